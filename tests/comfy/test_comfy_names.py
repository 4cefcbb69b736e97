"""Every name of ComfyUI that the nodes use is there, in each ComfyUI at hand."""

from __future__ import annotations

import json

from tests.comfy import server
from tests.comfy.comfy_names import host_names

RESOLVE = """
import importlib, json, sys

def is_there(name):
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False

print(json.dumps([name for name in json.loads(sys.argv[1]) if not is_there(name)]))
"""


def used_names() -> dict[str, str]:
    """Each name of ComfyUI, and a file that uses it."""
    files = sorted((server.PACK / "nodes").rglob("*.py"))
    return {name: path.name for path in files for name in host_names(path.read_text("utf-8"))}


def test_every_name_is_there(run_in_comfy):
    used = used_names()
    assert len(used) > 50
    missing = run_in_comfy(RESOLVE, json.dumps(sorted(used)))
    assert {name: used[name] for name in missing} == {}


def test_a_name_that_is_not_there_is_told(run_in_comfy):
    absent = ["comfy.sd.NoSuchThing", "comfy.no_such_module", "comfy.sd.VAE"]
    assert run_in_comfy(RESOLVE, json.dumps(absent)) == absent[:2]
