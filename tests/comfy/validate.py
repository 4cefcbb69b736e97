"""Whether an API workflow is what a ComfyUI's nodes ask for, and whether two are the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Choices that depend on the files of a machine.
FOLDER_INPUTS = ("folder", "name")
FILE = re.compile(r"\.[a-z][a-z0-9]+$")
NUMBERS = ("INT", "FLOAT")
SHOWN_ONLY = {"video-preview"}  # the editor posts them, and no node asks for them


def problems(workflow: Mapping[str, Any], info: Mapping[str, Any]) -> list[str]:
    """What ComfyUI would refuse, one line each, with the node's title.

    Args:
        workflow: in API format.
        info: the server's `object_info`.
    """
    return [
        f"{node['_meta']['title']} ({node['class_type']}): {problem}"
        for node in workflow.values()
        for problem in _of_node(node, workflow, info)
    ]


def _of_node(
    node: Mapping[str, Any], workflow: Mapping[str, Any], info: Mapping[str, Any]
) -> Iterator[str]:
    described = info.get(node["class_type"])
    if described is None:
        yield "this ComfyUI has no such node"
        return
    required = described["input"].get("required", {})
    for name, spec in _specs(described["input"]).items():
        if name not in node["inputs"]:
            if name in required:
                yield f"{name} is required"
            continue
        value = node["inputs"][name]
        found = _of_link if isinstance(value, list) else _of_value
        for problem in found(name, value, spec, workflow, info):
            yield f"{name}: {problem}"


def _of_link(
    _name: str, value: Any, spec: Any, workflow: Mapping[str, Any], info: Mapping[str, Any]
) -> Iterator[str]:
    source, output = workflow[value[0]], value[1]
    given = info.get(source["class_type"], {}).get("output", [])
    wanted = spec[0]
    if output >= len(given):
        yield f"{source['class_type']} has no output {output}"
    elif isinstance(wanted, str) and not _joins(given[output], wanted):
        yield f"{given[output]} is linked, {wanted} is wanted"


def _joins(given: Any, wanted: str) -> bool:
    if not isinstance(given, str) or "*" in (given, wanted):
        return True
    return bool(set(given.split(",")) & set(wanted.split(","))) or wanted.startswith("COMFY_")


def _of_value(name: str, value: Any, spec: Any, *_: Any) -> Iterator[str]:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    choices = _choices(spec)
    if choices and not all(isinstance(choice, str) for choice in choices):
        return  # choices with inputs of their own
    if kind in NUMBERS:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            yield f"{value!r} is no number"
        elif not options.get("min", value) <= value <= options.get("max", value):
            yield f"{value} is not in {options.get('min')} to {options.get('max')}"
    elif choices and value not in choices and not _of_machine(name, value):
        yield f"{value!r} is none of {choices}"


def _of_machine(name: str, value: Any) -> bool:
    return name.endswith(FOLDER_INPUTS) or bool(FILE.search(str(value)))


def differences(
    made: Mapping[str, Any], shipped: Mapping[str, Any], info: Mapping[str, Any]
) -> list[str]:
    """In what a workflow means something else than the shipped one, one line each.

    Versions know different inputs of stock nodes: one that only one side has and that is at this
    version's default does not count, nor does one of the shipped that this version does not know.

    Args:
        made: in API format, by the editor of some ComfyUI.
        shipped: in API format.
        info: that server's `object_info`.
    """
    found = [f"node {key} is on one side only" for key in sorted(made.keys() ^ shipped.keys())]
    for key in sorted(made.keys() & shipped.keys()):
        ours, theirs = made[key], shipped[key]
        title = f"{theirs['_meta']['title']} ({theirs['class_type']})"
        for part in ("class_type", "_meta"):
            if ours[part] != theirs[part]:
                found.append(f"{title}: {part}: {ours[part]} instead of {theirs[part]}")
        for name in sorted(ours["inputs"].keys() | theirs["inputs"].keys()):
            if not _same(name, ours, theirs, info):
                values = [node["inputs"].get(name, "(none)") for node in (ours, theirs)]
                found.append(f"{title}: {name}: {values[0]} instead of {values[1]}")
    return found


def _same(
    name: str, made: Mapping[str, Any], shipped: Mapping[str, Any], info: Mapping[str, Any]
) -> bool:
    sides = [node["inputs"] for node in (made, shipped) if name in node["inputs"]]
    if len(sides) == 2:
        return sides[0][name] == sides[1][name]
    if shipped["class_type"].startswith("StyleMaster"):
        return False
    described = info.get(shipped["class_type"], {"input": {}})
    spec = _spec(name, _specs(described["input"]), sides[0])
    if spec is None:
        return name in SHOWN_ONLY or name in shipped["inputs"]
    return sides[0][name] == _default(spec)


def _specs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {**inputs.get("required", {}), **inputs.get("optional", {})}


def _spec(name: str, specs: Mapping[str, Any], chosen: Mapping[str, Any]) -> Any:
    """Description of an input, None if there is none; "format.codec" is one of a choice's own."""
    spec, parts = None, name.split(".")
    for count, part in enumerate(parts):
        if spec is not None:
            value = chosen.get(".".join(parts[:count]))
            options = (o for o in _choices(spec) if isinstance(o, Mapping) and o["key"] == value)
            specs = _specs(next(options, {"inputs": {}})["inputs"])
        if (spec := specs.get(part)) is None:
            return None
    return spec


def _choices(spec: Any) -> list[Any]:
    options = spec[1] if len(spec) > 1 else {}
    return spec[0] if isinstance(spec[0], list) else options.get("options") or []


def _default(spec: Any) -> Any:
    options = spec[1] if len(spec) > 1 else {}
    first = next(iter(_choices(spec)), None)
    return options.get("default", first["key"] if isinstance(first, Mapping) else first)
