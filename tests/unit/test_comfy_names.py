"""Names of ComfyUI in the nodes: each is imported by the module that uses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.comfy.comfy_names import host_names, not_imported

NODES = sorted((Path(__file__).parents[2] / "nodes").rglob("*.py"))


def test_names_are_found_however_they_are_imported():
    source = """
import comfy.sd
import comfy.ldm.wan.model as wan
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io as nodes_io
from .wan_patches import raw
import torch
native = wan
x = comfy.sd.VAE(torch.zeros(1)), WrappersMP.APPLY_MODEL, nodes_io.Image.Input("x"), raw.y
y = wan.WanModel.forward
"""
    assert host_names(source) == {
        "comfy.sd",
        "comfy.sd.VAE",
        "comfy.ldm.wan.model",
        "comfy.ldm.wan.model.WanModel",
        "comfy.ldm.wan.model.WanModel.forward",
        "comfy.patcher_extension.WrappersMP",
        "comfy.patcher_extension.WrappersMP.APPLY_MODEL",
        "comfy_api.latest.io",
        "comfy_api.latest.io.Image",
        "comfy_api.latest.io.Image.Input",
    }


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_a_module_imports_what_it_uses(path):
    assert not_imported(path.read_text(encoding="utf-8")) == set()


def test_what_only_others_import_is_found():
    source = "import comfy.ldm.wan.model\nx = comfy.ldm.wan.model.y, comfy.utils.z"
    assert not_imported(source) == {"comfy.utils", "comfy.utils.z"}
