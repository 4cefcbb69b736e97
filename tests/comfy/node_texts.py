"""`locales/en/nodeDefs.json`, taken from the nodes: `python -m tests.comfy.node_texts` writes it.

Translations are made by hand; `tests/unit/test_pack_files.py` says what they lack. Help pages of
other languages are written from them: `python -m tests.comfy.node_texts pages`, without a ComfyUI.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.comfy import server

LOCALES = server.PACK / "locales"
DOCS = server.PACK / "web" / "docs"
PREFIX = "StyleMaster"
# By language: headings of inputs and outputs, and where more is said.
HEADINGS = {
    "zh": ("输入", "输出", "更详细的说明与示例见英文帮助页（将界面语言切换为英文后可查看）。")
}


def english_texts(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Names and explanations of our nodes, as they are in their schemas."""
    return {
        name: _texts(node) for name, node in sorted(object_info.items()) if name.startswith(PREFIX)
    }


def _texts(node: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {
            name: {"name": name, "tooltip": options["tooltip"]}
            for name, (_, options) in inputs.items()
        },
        "outputs": {
            str(number): {"name": name, "tooltip": tooltip}
            for number, (name, tooltip) in enumerate(outputs)
        },
    }


def pages(language: str) -> dict[Path, str]:
    """The help pages of a language: what the nodes' texts say, and the English page's picture."""
    texts = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
    return {
        DOCS / node / f"{language}.md": _page(node, text, language) for node, text in texts.items()
    }


def _page(node: str, text: Mapping[str, Any], language: str) -> str:
    inputs, outputs, more = HEADINGS[language]
    english = json.loads((LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8"))[node]
    picture = re.search(r"!\[[^]]*\]\(([^)]+)\)", (DOCS / f"{node}.md").read_text(encoding="utf-8"))
    # ComfyUI takes links of every language from the folder of the English pages.
    parts = [f"# {text['display_name']}", text["description"]]
    parts += [f"![{text['display_name']}]({picture.group(1)})"] if picture else []
    lists = (
        (inputs, [(key, entry) for key, entry in text["inputs"].items()]),
        (outputs, [(english["outputs"][key]["name"], e) for key, e in text["outputs"].items()]),
    )
    for heading, entries in lists:
        if entries:
            lines = [f"- `{key}`（{entry['name']}）：{entry['tooltip']}" for key, entry in entries]
            parts += [f"## {heading}", "\n".join(lines)]
    return "\n\n".join([*parts, more]) + "\n"


def write_pages() -> None:
    for language in HEADINGS:
        for path, page in pages(language).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(page, encoding="utf-8")


def main() -> None:
    if sys.argv[1:] == ["pages"]:
        return write_pages()
    checkouts = server.find_comfyui()
    if not checkouts:
        raise SystemExit("no ComfyUI found: set COMFYUI_PATH")
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        models.mkdir()
        with server.ComfyServer(checkouts[0], Path(folder) / "base", models) as comfy:
            texts = english_texts(comfy.object_info())
    text = json.dumps(texts, indent=2, ensure_ascii=False) + "\n"
    (LOCALES / "en").mkdir(parents=True, exist_ok=True)
    (LOCALES / "en" / "nodeDefs.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
