"""Subgraph blueprints: a whole template as one node, made from it.

`python -m tests.comfy.blueprints` writes `subgraphs/NAME.json` from `workflows/TEMPLATE.json`. What
a template loads and saves stays outside of the node; opened, it is all of the template.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.comfy import server, ui_workflows

FOLDER = server.PACK / "subgraphs"
SPACE = uuid.UUID("5d3f1b0e-8f7c-4c61-9a2e-0c3b7f1e2a55")  # of the ids, so that they stay
OUTSIDE = {"LoadVideo", "LoadImage", "SaveVideo", "SaveImage", "PreviewImage", ui_workflows.NOTE}
OUTSIDE |= {"StyleMasterCompareStyles"}
INPUT_ID, OUTPUT_ID = -10, -20
MARGIN = 260


@dataclass(frozen=True)
class Blueprint:
    """One node: its name, the template inside it, and the values that it shows."""

    name: str
    template: str
    description: str
    widgets: Sequence[tuple[str, str, str]]  # title of the node inside, its input, label


_COMMON = (
    ("Prompt", "text", "prompt"),
    ("Apply the style", "strength", "style strength"),
    ("Sample", "style_cfg", "style guidance"),
)
_RELEASED = (
    ("Wan 2.1 T2V 1.3B", "unet_name", "Wan model"),
    ("Text encoder", "clip_name", "text encoder"),
    ("VAE", "vae_name", "VAE"),
    ("Image encoder", "clip_name", "image encoder"),
    ("Style adapter", "adapter_name", "style adapter"),
)
_CONTROL = (("Keep the content", "control_net_name", "control"),)
_SEED = (("Sample", "seed", "seed"), ("Sample", "steps", "steps"))
BLUEPRINTS = (
    Blueprint(
        "Restyle a Video (StyleMaster)",
        "video_to_video",
        "A video in the style of a picture: give it both and say what the video shows.",
        (
            *_COMMON,
            ("Keep the content", "strength", "keep the content"),
            *_SEED,
            *_RELEASED,
            *_CONTROL,
        ),
    ),
    Blueprint(
        "Video in a Style (StyleMaster)",
        "text_to_video",
        "A new video from a prompt, in the style of a picture.",
        (*_COMMON, ("Size and length", "num_frames", "frames"), *_SEED, *_RELEASED),
    ),
    Blueprint(
        "Restyle a Picture (StyleMaster)",
        "image_restyle",
        "A picture in the style of another: give it both and say what the picture shows.",
        (
            *_COMMON,
            ("Keep the content", "strength", "keep the content"),
            *_SEED,
            *_RELEASED,
            *_CONTROL,
        ),
    ),
    Blueprint(
        "Restyle a Video (stylemaster-tiny)",
        "tiny_video_to_video",
        "A small video in the style of a picture, on the small model that comes with the pack: "
        "runs on any computer, to see how it works.",
        (*_COMMON, ("Keep the content", "strength", "keep the content"), *_SEED),
    ),
)


def make(blueprint: Blueprint) -> dict[str, Any]:
    """The blueprint as a workflow with one node."""
    path = ui_workflows.FOLDER / f"{blueprint.template}.json"
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes = [copy.deepcopy(node) for node in graph["nodes"] if node["type"] not in OUTSIDE]
    inside = {node["id"]: node for node in nodes}
    number = iter(range(graph["last_link_id"] + 1, 10**6))
    inputs = _given_from_outside(blueprint, graph, inside)
    outputs = _given_to_outside(blueprint, graph, inside)
    proxies = []
    for title, name, label in blueprint.widgets:
        (node,) = (node for node in nodes if node["title"] == title)
        slot = next(i for i, entry in enumerate(node["inputs"]) if entry["name"] == name)
        key = f"{label}".replace(" ", "_")
        kind, link = node["inputs"][slot]["type"], next(number)
        inputs.append(_port(blueprint, key, kind, [(link, node["id"], slot)]) | {"label": label})
        node["inputs"][slot]["link"] = link
        proxies.append([str(node["id"]), name])
    links = [
        {
            "id": link[0],
            "origin_id": link[1],
            "origin_slot": link[2],
            "target_id": link[3],
            "target_slot": link[4],
            "type": link[5],
        }
        for link in graph["links"]
        if link[1] in inside and link[3] in inside
    ]
    for place, port in enumerate(inputs):
        for link, target, slot in port.pop("ends"):
            ends = {"target_id": target, "target_slot": slot, "type": port["type"]}
            links.append({"id": link, "origin_id": INPUT_ID, "origin_slot": place, **ends})
    for place, port in enumerate(outputs):
        for link, origin, slot in port.pop("ends"):
            ends = {"target_id": OUTPUT_ID, "target_slot": place, "type": port["type"]}
            links.append({"id": link, "origin_id": origin, "origin_slot": slot, **ends})
    _keep_only(nodes, {link["id"] for link in links}, outputs)
    return _workflow(blueprint, graph, nodes, links, inputs, outputs, proxies)


def _id(blueprint: Blueprint, what: str) -> str:
    return str(uuid.uuid5(SPACE, f"{blueprint.name}/{what}"))


def _port(blueprint: Blueprint, name: str, kind: str, ends: list[Any]) -> dict[str, Any]:
    return {
        "id": _id(blueprint, name),
        "name": name,
        "type": kind,
        "linkIds": [end[0] for end in ends],
        "ends": ends,
    }


def _given_from_outside(
    blueprint: Blueprint, graph: Mapping[str, Any], inside: Mapping[int, Any]
) -> list[dict[str, Any]]:
    """Inputs of the node: one for each output outside that is linked into it."""
    titles = {node["id"]: node["title"] for node in graph["nodes"]}
    ports: dict[tuple[int, int], list[Any]] = {}
    for link, origin, out, target, slot, _ in graph["links"]:
        if origin not in inside and target in inside:
            ports.setdefault((origin, out), []).append((link, target, slot))
    kinds = {(link[1], link[2]): link[5] for link in graph["links"]}
    return [
        _port(blueprint, titles[key[0]].lower().replace(" ", "_"), kinds[key], ends)
        for key, ends in ports.items()
    ]


def _given_to_outside(
    blueprint: Blueprint, graph: Mapping[str, Any], inside: Mapping[int, Any]
) -> list[dict[str, Any]]:
    """Outputs of the node: one for each output that is linked out of it, the result first."""
    saved = {node["id"] for node in graph["nodes"] if node["title"] == "Result"}
    ports: dict[tuple[int, int], list[Any]] = {}
    for link in sorted(graph["links"], key=lambda link: link[3] not in saved):
        if link[1] in inside and link[3] not in inside:
            ports.setdefault((link[1], link[2]), [(link[0], link[1], link[2])])
    kinds = {(link[1], link[2]): link[5] for link in graph["links"]}
    names = {
        key: "result" if place == 0 else inside[key[0]]["outputs"][key[1]]["name"]
        for place, key in enumerate(ports)
    }
    return [_port(blueprint, names[key], kinds[key], ends) for key, ends in ports.items()]


def _keep_only(nodes: Sequence[dict[str, Any]], links: set[int], outputs: Sequence[Any]) -> None:
    """Take off what the nodes say of links that are not inside."""
    for node in nodes:
        for slot in node["inputs"]:
            if slot.get("link") not in links:
                slot["link"] = None
        for slot in node["outputs"]:
            slot["links"] = [link for link in slot.get("links") or [] if link in links]


def _workflow(
    blueprint: Blueprint,
    graph: Mapping[str, Any],
    nodes: Sequence[dict[str, Any]],
    links: Sequence[dict[str, Any]],
    inputs: Sequence[dict[str, Any]],
    outputs: Sequence[dict[str, Any]],
    proxies: Sequence[Any],
) -> dict[str, Any]:
    kind, number = _id(blueprint, "subgraph"), graph["last_node_id"] + 1
    left = min(node["pos"][0] for node in nodes) - MARGIN
    right = max(node["pos"][0] + node["size"][0] for node in nodes) + MARGIN
    shown = {label.replace(" ", "_") for _, _, label in blueprint.widgets}
    node_inputs = [
        {key: port[key] for key in ("label", "name", "type") if key in port}
        | ({"widget": {"name": port["name"]}} if port["name"] in shown else {})
        | {"link": None}
        for port in inputs
    ]
    outside = {
        "id": number,
        "type": kind,
        "pos": [0, 0],
        "size": [400, 60 + 30 * len(inputs) + 80],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": node_inputs,
        "outputs": [{"name": port["name"], "type": port["type"], "links": []} for port in outputs],
        "title": blueprint.name,
        "properties": {"proxyWidgets": proxies, "cnr_id": ui_workflows.PACK},
        "widgets_values": [],
    }
    state = {"lastGroupId": 0, "lastRerouteId": 0}
    state |= {"lastNodeId": graph["last_node_id"], "lastLinkId": max(link["id"] for link in links)}
    definition = {
        "id": kind,
        "version": 1,
        "state": state,
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "inputNode": {"id": INPUT_ID, "bounding": [left, 0, 160, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUT_ID, "bounding": [right, 0, 160, 40 + 20 * len(outputs)]},
        "inputs": list(inputs),
        "outputs": list(outputs),
        "widgets": [],
        "nodes": list(nodes),
        "groups": [],
        "links": list(links),
        "extra": {},
        "category": "StyleMaster",
        "description": blueprint.description,
    }
    return {
        "revision": 0,
        "last_node_id": number,
        "last_link_id": 0,
        "nodes": [outside],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
    }


def to_api(blueprint: Mapping[str, Any]) -> dict[str, Any]:
    """What is inside a blueprint, in API format; inputs that come from outside are left out."""
    (inside,) = blueprint["definitions"]["subgraphs"]
    from_outside = {link["id"] for link in inside["links"] if link["origin_id"] == INPUT_ID}
    nodes = copy.deepcopy(inside["nodes"])
    for node in nodes:
        for slot in node["inputs"]:
            if slot["link"] in from_outside:
                slot["link"] = None  # the value of the widget counts, if it is one
    links = [[link["id"], link["origin_id"], link["origin_slot"]] for link in inside["links"]]
    return ui_workflows.to_api({"nodes": nodes, "links": links})


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for blueprint in BLUEPRINTS:
        text = json.dumps(make(blueprint), indent=1, ensure_ascii=False)
        (FOLDER / f"{blueprint.name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
