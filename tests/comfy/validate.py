"""Whether an API workflow is what a ComfyUI's nodes ask for, without running it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Choices that depend on the files of a machine.
FOLDER_INPUTS = ("folder", "name")
FILE = re.compile(r"\.[a-z][a-z0-9]+$")
NUMBERS = ("INT", "FLOAT")


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
    for name, spec in {**required, **described["input"].get("optional", {})}.items():
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
    choices = kind if isinstance(kind, list) else options.get("options")
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
