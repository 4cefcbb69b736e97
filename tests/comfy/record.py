"""Which ComfyUI the tests passed on: `docs/tested_comfyui.json`, which a run writes itself.

`make comfy-tests` runs with `--record-comfyui`. A run of some files replaces what is recorded of
those files; the versions of which every file is recorded without a failure are the tested ones.
The README's sentence about versions is written from it, too; `python -m tests.comfy.record` writes
that alone.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.comfy.server import Checkout

HERE = Path(__file__).parent
RECORD = HERE.parents[1] / "docs" / "tested_comfyui.json"
README = HERE.parents[1] / "README.md"
SENTENCE = re.compile(r"^Tested on ComfyUI .*\n", re.MULTILINE)
_SETTING = """
import importlib.metadata as m, json, platform
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return "none"
print(json.dumps({"frontend": version("comfyui-frontend-package"), "torch": version("torch"),
                  "python": platform.python_version(), "platform": platform.system()}))
"""


def setting(checkout: Checkout) -> dict[str, str]:
    """What runs in the Python of a ComfyUI."""
    command = [str(checkout.python), "-c", _SETTING]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def test_files() -> list[str]:
    return sorted(path.name for path in HERE.glob("test_*.py"))


def add_results(
    record: Mapping[str, Any],
    version: str,
    where: Mapping[str, str],
    outcomes: Mapping[str, Counter[str]],
) -> dict[str, Any]:
    """The record after a run.

    Args:
        record: as it was.
        version: of the ComfyUI.
        where: from `setting`.
        outcomes: by test file how many passed, failed, were skipped.
    """
    before = record.get(version, {})
    files = {**before.get("files", {}), **{name: dict(c) for name, c in outcomes.items()}}
    day = datetime.date.today().isoformat()
    entry = {**where, "date": day, "files": dict(sorted(files.items()))}
    return {**record, version: entry}


def tested_versions(record: Mapping[str, Any], files: Iterable[str]) -> list[str]:
    """Versions on which every test file ran without a failure, the newest first."""
    wanted = set(files)
    whole = [
        version
        for version, entry in record.items()
        if wanted <= entry["files"].keys()
        and not any(entry["files"][name].get("failed") for name in wanted)
    ]
    return sorted(whole, key=lambda version: [int(n) for n in version.split(".")], reverse=True)


def sentence(record: Mapping[str, Any], files: Iterable[str]) -> str:
    """What the README says of the versions: how many test files ran, and how many failed."""
    wanted = set(files)
    newest_first = sorted(record, key=lambda name: [int(n) for n in name.split(".")], reverse=True)
    told = []
    for version in newest_first:
        run = {name: n for name, n in record[version]["files"].items() if name in wanted}
        failed = sum(bool(counts.get("failed")) for counts in run.values())
        words = f"{len(run)} of {len(wanted)} test files, {failed or 'none'} with failures"
        told.append(f"{version} ({words})")
    return f"Tested on ComfyUI {', '.join(told) or '(nothing is recorded)'}.\n"


def read() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def write(record: Mapping[str, Any]) -> None:
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    README.write_text(
        SENTENCE.sub(lambda _: sentence(record, test_files()), readme), encoding="utf-8"
    )


if __name__ == "__main__":
    write(read())  # the README's sentence anew, e.g. after a test file was added
