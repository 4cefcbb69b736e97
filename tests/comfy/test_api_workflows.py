"""Every shipped workflow against the nodes of each ComfyUI at hand."""

from __future__ import annotations

import re

import pytest

from tests.comfy import shipped_workflows, validate

LATENT_STRIDE = 4  # frames for each latent frame of Wan


@pytest.fixture(scope="module")
def info(comfy_server):
    return comfy_server.object_info()


@pytest.mark.parametrize("name", shipped_workflows.names())
def test_it_is_what_the_nodes_ask_for(info, name):
    problems = validate.problems(shipped_workflows.load(name), info)
    if lacking := shipped_workflows.lacking(name, info):
        refused = [line for line in problems if "this ComfyUI has no such node" in line]
        assert sorted(re.findall(r"\((\w+)\): ", "".join(refused))) == lacking
    else:
        assert problems == []


def workflow(**inputs):
    return {"1": {"class_type": "Known", "inputs": inputs, "_meta": {"title": "One"}}}


INFO = {
    "Known": {
        "input": {
            "required": {
                "length": ["INT", {"min": 1, "max": 9}],
                "way": [["a", "b"]],
                "source": ["IMAGE"],
            },
            "optional": {"kind": ["COMBO", {"options": ["c"]}], "file_name": [["x"]]},
        },
        "output": ["MASK"],
    }
}
GOOD = {"length": 2, "way": "a", "source": ["2", 0]}
SOURCE = {"2": {"class_type": "Picture", "inputs": {}, "_meta": {"title": "Two"}}}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (GOOD | {"kind": "c", "file_name": "y"}, ""),
        ({"way": "a", "source": ["2", 0]}, "length is required"),
        (GOOD | {"length": 10}, "10 is not in 1 to 9"),
        (GOOD | {"length": "2"}, "'2' is no number"),
        (GOOD | {"way": "c"}, "'c' is none of"),
        (GOOD | {"kind": "d"}, "'d' is none of"),
        (GOOD | {"source": ["1", 0]}, "MASK is linked, IMAGE is wanted"),
        (GOOD | {"source": ["1", 3]}, "has no output 3"),
    ],
)
def test_what_would_be_refused_is_found(inputs, said):
    info = {**INFO, "Picture": {"input": {}, "output": ["IMAGE"]}}
    found = validate.problems(workflow(**inputs) | SOURCE, info)
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_a_node_that_is_not_there_is_found():
    assert "has no such node" in validate.problems(workflow(), {})[0]


@pytest.mark.parametrize("name", shipped_workflows.names())
def test_windows_have_the_same_latent_frames_in_every_version(name):
    """An overlap of n frames is (n - 1) // 4 + 1 latent frames up to 0.25, and n // 4 since."""
    for node in shipped_workflows.load(name).values():
        if node["class_type"] == "WanContextWindowsManual":
            length, overlap = (node["inputs"][key] for key in ("context_length", "context_overlap"))
            assert (length - 1) % LATENT_STRIDE == 0
            assert (overlap - 1) // LATENT_STRIDE + 1 == overlap // LATENT_STRIDE
