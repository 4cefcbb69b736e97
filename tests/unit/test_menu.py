"""The menu's groups hold every node once, and name only inputs that there are."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

PACK = Path(__file__).parents[2]
TEXTS = json.loads((PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def menu() -> dict[str, Any]:
    """The module's names; it imports nothing of ComfyUI, but its package does."""
    return runpy.run_path(str(PACK / "nodes" / "menu.py"))


def test_every_node_stands_in_one_group(menu):
    listed = [f"StyleMaster{name}" for names in menu["GROUPS"].values() for name in names]
    assert sorted(listed) == sorted(TEXTS)
    assert menu["category"]("StyleMasterApplyStyle") == "stylemaster/style"
    trainers = [node for node in TEXTS if menu["is_trainer"](node)]
    assert trainers and all("steps" in TEXTS[node]["inputs"] for node in trainers)


def test_advanced_inputs_are_inputs(menu):
    for node, names in menu["ADVANCED"].items():
        assert set(names) < set(TEXTS[f"StyleMaster{node}"]["inputs"]), node
