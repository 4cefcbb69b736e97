"""What the maker of the editor's workflows takes for the same workflow."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.comfy import ui_workflows, validate

CODEC = ["CHOICE", {"options": [{"key": "auto", "inputs": {}}, {"key": "av1", "inputs": {}}]}]
INFO: dict[str, Any] = {
    "Create": {
        "input": {
            "required": {"fps": ["FLOAT", {"default": 30.0}]},
            "optional": {"bit_depth": ["INT", {"default": 8}], "way": [["a", "b"]]},
        }
    },
    "Save": {
        "input": {
            "required": {
                "format": [
                    "CHOICE",
                    {
                        "options": [
                            {"key": "auto", "inputs": {"required": {"codec": CODEC}}},
                            {"key": "gif", "inputs": {}},
                        ]
                    },
                ]
            },
            "optional": {"codec": CODEC},
        }
    },
    "StyleMasterCrop": {"input": {"optional": {"side": ["INT", {"default": 8}]}}},
}


def workflow(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"1": {"class_type": class_type, "inputs": inputs, "_meta": {"title": "One"}}}


def with_choice(**inputs: Any) -> dict[str, Any]:
    given = {"format": "auto", "codec": "auto", "format.codec": "auto"}
    return workflow("Save", **given | inputs)


@pytest.mark.parametrize(
    ("made", "shipped", "said"),
    [
        # A stock input that one side has, at its default.
        (workflow("Create", fps=16, bit_depth=8), workflow("Create", fps=16.0), ""),
        (workflow("Create", fps=16), workflow("Create", fps=16.0, bit_depth=8), ""),
        (workflow("Create", fps=16, way="a"), workflow("Create", fps=16), ""),
        (with_choice(), workflow("Save", format="auto", codec="auto"), ""),
        # Of a newer version; this one does not know it.
        (workflow("Create", fps=16), workflow("Create", fps=16, retain=False), ""),
        (workflow("Create", **{"fps": 16, "video-preview": ""}), workflow("Create", fps=16), ""),
        # Anything else counts.
        (workflow("Create", fps=16, bit_depth=10), workflow("Create", fps=16), "bit_depth: 10"),
        (workflow("Create", fps=16), workflow("Create", fps=16, bit_depth=10), "bit_depth"),
        (workflow("Create", fps=16, way="b"), workflow("Create", fps=16), "way"),
        (workflow("Create", fps=16, unknown=8), workflow("Create", fps=16), "unknown"),
        (workflow("Create", fps=16), workflow("Create", fps=8), "fps: 16"),
        (workflow("Create", fps=["2", 0]), workflow("Create", fps=30.0), "fps"),
        (
            with_choice(**{"format.codec": "av1"}),
            workflow("Save", format="auto", codec="auto"),
            "format.codec",
        ),
        (
            with_choice(format="gif"),
            workflow("Save", format="gif", codec="auto"),
            "format.codec",
        ),
        (workflow("StyleMasterCrop", side=8), workflow("StyleMasterCrop"), "side"),
        (workflow("StyleMasterCrop"), workflow("StyleMasterCrop", side=8), "side"),
        (workflow("Create", fps=16), workflow("Save", fps=16), "class_type"),
        (workflow("Create", fps=16), {}, "node 1"),
        ({}, workflow("Create", fps=16), "node 1"),
    ],
)
def test_a_stock_input_at_its_default_is_no_difference(made, shipped, said):
    found = validate.differences(made, shipped, INFO)
    assert len(found) == bool(said)
    assert said in "".join(found)


def slot(name: str, *, widget: bool = True) -> dict[str, Any]:
    return {"name": name, "link": None} | ({"widget": {"name": name}} if widget else {})


def graph() -> dict[str, Any]:
    node = {
        "id": 1,
        "type": "Create",
        "title": "One",
        "inputs": [slot("images", widget=False), slot("seed"), slot("fps"), slot("bit_depth")],
        "widgets_values": [3, "fixed", 16, 8],
    }
    return {"nodes": [node], "links": []}


def test_the_graph_gets_the_inputs_that_the_workflow_names():
    wanted = workflow("Create", seed=3, fps=16, retain=False)
    made = graph()
    ui_workflows.name_the_same(made, wanted)
    assert ui_workflows.to_api(made) == wanted
    (node,) = made["nodes"]
    assert node["widgets_values"] == [3, "fixed", 16, False]
    assert [entry["name"] for entry in node["inputs"]] == ["images", "seed", "fps", "retain"]


def test_what_the_workflow_names_stays_as_it_is():
    made = graph()
    before = copy.deepcopy(made)
    ui_workflows.name_the_same(made, workflow("Create", seed=3, fps=16, bit_depth=8))
    assert made == before
