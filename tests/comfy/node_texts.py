"""`locales/en/nodeDefs.json`, taken from the nodes: `python -m tests.comfy.node_texts` writes it.

Translations are made by hand; `tests/unit/test_pack_files.py` says what they lack.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.comfy import server

LOCALES = server.PACK / "locales"
PREFIX = "StyleMaster"


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


def main() -> None:
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
