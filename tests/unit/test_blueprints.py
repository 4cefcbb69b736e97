"""Subgraph blueprints: made from the templates, and meaning the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.comfy import blueprints, shipped_workflows
from tests.comfy.ui_workflows import is_linked

BY_NAME = {blueprint.name: blueprint for blueprint in blueprints.BLUEPRINTS}


def shipped(name: str) -> dict[str, Any]:
    return json.loads((blueprints.FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_there_is_one_of_each():
    assert {path.stem for path in blueprints.FOLDER.glob("*.json")} == set(BY_NAME)


@pytest.mark.parametrize("name", BY_NAME)
def test_it_is_up_to_date(name):
    made = blueprints.make(BY_NAME[name])
    assert shipped(name) == made, "run `python -m tests.comfy.blueprints`"


@pytest.mark.parametrize("name", BY_NAME)
def test_inside_it_is_the_template(name):
    inside = blueprints.to_api(shipped(name))
    template = shipped_workflows.load(BY_NAME[name].template)
    left_out = {template[key]["class_type"] for key in template.keys() - inside.keys()}
    assert left_out <= blueprints.OUTSIDE
    for key, node in inside.items():
        wanted = {
            name: value
            for name, value in template[key]["inputs"].items()
            if not (is_linked(value) and value[0] not in inside)
        }
        assert node["inputs"] == wanted


@pytest.mark.parametrize("name", BY_NAME)
def test_it_shows_what_an_artist_sets(name):
    (node,) = shipped(name)["nodes"]
    labels = {entry["name"] for entry in node["inputs"]}
    assert {"style_image", "prompt", "style_strength", "seed"} <= labels
    assert node["outputs"][0]["name"] == "result"
    assert node["outputs"][0]["type"] == ("IMAGE" if "Picture" in name else "VIDEO")
    (definition,) = shipped(name)["definitions"]["subgraphs"]
    assert [port["name"] for port in definition["inputs"]] == [i["name"] for i in node["inputs"]]
    ids = [link["id"] for link in definition["links"]]
    assert len(set(ids)) == len(ids)
    ends = {(link["target_id"], link["target_slot"]) for link in definition["links"]}
    assert len(ends) == len(ids)
