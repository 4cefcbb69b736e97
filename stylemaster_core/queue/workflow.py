"""A ComfyUI workflow in API format, and the node inputs that a batch sets."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError

Workflow = dict[str, dict[str, Any]]

ROLES = ("video", "style", "prompt")
_TITLES = {"video": "content video", "style": "style image", "prompt": "prompt"}
# The inputs of a node that may hold a role's value, the usual one first.
_INPUT_NAMES = {
    "video": ("file", "video"),
    "style": ("image",),
    "prompt": ("text", "prompt", "value", "string"),
}
_LOADERS = {"video": ("LoadVideo", "VHS_LoadVideo"), "style": ("LoadImage",)}
_SEED_NAMES = ("seed", "noise_seed")


class Target(NamedTuple):
    """One input of one node."""

    node: str
    input: str

    def __str__(self) -> str:
        return f"{self.node}.{self.input}"


def load_workflow(path: Path) -> Workflow:
    """Read a workflow that was exported in API format.

    Args:
        path: JSON file of `{"node id": {"class_type": ..., "inputs": {...}}}`.

    Returns:
        The workflow, by node id.

    Raises:
        ConfigError: if the file is missing, is no JSON or is not in API format.

    Source: ComfyUI, the `prompt` of POST /prompt.
    """
    try:
        workflow = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"Cannot read the workflow {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"The workflow {path} is not valid JSON: {error}.") from error
    if isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list):
        raise ConfigError(
            f"{path} is a workflow as the editor saves it; a server takes the API format. Open it "
            "in ComfyUI and choose Workflow > Export (API), then give the exported file."
        )
    if not isinstance(workflow, dict) or not workflow or not all(map(_is_node, workflow.values())):
        raise ConfigError(
            f"{path} is not a workflow in API format: expected an object of nodes, each with "
            '"class_type" and "inputs". In ComfyUI choose Workflow > Export (API).'
        )
    return workflow


def server_address(url: str) -> str:
    """Check the address of a server and bring it into its usual form.

    Args:
        url: `http://host:port`, maybe with a path before ComfyUI's own.

    Raises:
        ConfigError: if it is no such address.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, brackets that do not close
        is_good = False
    if not is_good or "@" in parts.netloc:
        raise ConfigError(f"--server {url!r}: expected http://HOST:PORT, without a user name.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def parse_value(text: str) -> Any:
    """Read a value of the command line: JSON where it is JSON, otherwise the text itself.

    Args:
        text: `5`, `0.5`, `true`, `"5"`, `any words`.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return text


def find_target(workflow: Workflow, key: str) -> Target:
    """Find an input that a user named.

    Args:
        workflow: from `load_workflow`.
        key: `NODE.input`; NODE is an id or a title. Both parts may hold dots themselves.

    Raises:
        ConfigError: if there is no such node or input, if several nodes have that title, or if
            the input is connected to another node.
    """
    named: dict[str, str] = {}  # node id -> the rest of the key
    for dot in re.finditer(r"\.", key):
        for node in _nodes_called(workflow, key[: dot.start()]):
            named[node] = key[dot.end() :]
    if not named:
        raise ConfigError(
            f"No node is meant by {key!r}; expected NODE.input with a node's id or title. "
            f"The workflow has: {_list_nodes(workflow, workflow)}."
        )
    found = [Target(node, name) for node, name in named.items() if name in _inputs(workflow, node)]
    if not found:
        raise ConfigError(f"{key!r}: no such input. There is: {_list_inputs(workflow, named)}.")
    if len(found) > 1:
        raise ConfigError(
            f"{key!r} fits several nodes: {', '.join(map(str, found))}. Name one by its id."
        )
    return _unconnected(workflow, found[0], key)


def find_role(workflow: Workflow, role: str, key: str | None = None) -> Target:
    """Find the input that receives the video, the style image or the prompt.

    What the user named comes first, then a node with the role's title ("Content video", "Style
    image", "Prompt"), then the stock node: LoadVideo, LoadImage, or the CLIPTextEncode that leads
    to an input called "positive".

    Args:
        workflow: from `load_workflow`.
        role: one of `ROLES`.
        key: `NODE.input` that the user named for it.

    Raises:
        ConfigError: if no node or more than one fits; the message lists the candidates.
    """
    if key is not None:
        return find_target(workflow, key)
    nodes = _titled(workflow, _TITLES[role])
    if not nodes and role == "prompt":
        nodes = _positive_encoders(workflow)
    elif not nodes:
        nodes = [node for node, body in workflow.items() if body["class_type"] in _LOADERS[role]]
    if len(nodes) != 1:
        what = "Several nodes" if nodes else "No node"
        raise ConfigError(
            f"{what} could take the {role}. Say which with --map {role}=NODE.input, or give one "
            f'node the title "{_TITLES[role].capitalize()}". '
            f"Candidates: {_list_inputs(workflow, nodes or workflow)}."
        )
    inputs = _inputs(workflow, nodes[0])
    for name in _INPUT_NAMES[role]:
        if name in inputs:
            return _unconnected(workflow, Target(nodes[0], name), f"{role} ({nodes[0]}.{name})")
    raise ConfigError(
        f"Node {_describe(workflow, nodes[0])} should take the {role}, but has none of the inputs "
        f"{', '.join(_INPUT_NAMES[role])}. Say which with --map {role}=NODE.input; "
        f"there is: {_list_inputs(workflow, nodes)}."
    )


def seed_targets(workflow: Workflow) -> list[Target]:
    """Return every input called `seed` or `noise_seed` that holds a number.

    Raises:
        ConfigError: if the workflow has none.
    """
    found = [
        Target(node, name)
        for node in workflow
        for name, value in _inputs(workflow, node).items()
        if name in _SEED_NAMES and not _is_link(value)
    ]
    if not found:
        raise ConfigError(
            "--seed was given, but no node of the workflow has an input seed or noise_seed that "
            f"holds a number. The workflow has: {_list_nodes(workflow, workflow)}."
        )
    return found


def _is_node(body: Any) -> bool:
    return (
        isinstance(body, dict)
        and isinstance(body.get("class_type"), str)
        and isinstance(body.get("inputs"), dict)
    )


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _no_constant(name: str) -> None:
    # NaN and Infinity are not JSON; a server would refuse them.
    raise ValueError(name)


def _inputs(workflow: Workflow, node: str) -> Mapping[str, Any]:
    return workflow[node]["inputs"]


def _title(workflow: Workflow, node: str) -> str:
    return str((workflow[node].get("_meta") or {}).get("title", ""))


def _titled(workflow: Workflow, title: str) -> list[str]:
    return [node for node in workflow if _title(workflow, node).casefold() == title.casefold()]


def _nodes_called(workflow: Workflow, name: str) -> list[str]:
    return [name] if name in workflow else _titled(workflow, name)


def _unconnected(workflow: Workflow, target: Target, key: str) -> Target:
    value = _inputs(workflow, target.node)[target.input]
    if _is_link(value):
        raise ConfigError(
            f"{key}: the input is connected to node {_describe(workflow, value[0])}. "
            "Set the value there, or name another input with --map or --set."
        )
    return target


def _positive_encoders(workflow: Workflow) -> list[str]:
    """Ids of the CLIPTextEncode nodes upstream of an input called "positive"."""
    waiting = [
        body["inputs"]["positive"] for body in workflow.values() if "positive" in body["inputs"]
    ]
    seen: set[str] = set()
    found: list[str] = []
    while waiting:
        link = waiting.pop()
        if not _is_link(link) or link[0] in seen or link[0] not in workflow:
            continue
        seen.add(link[0])
        inputs = _inputs(workflow, link[0])
        if workflow[link[0]]["class_type"] == "CLIPTextEncode":
            found.append(link[0])
        else:
            # A node such as ControlNetApplyAdvanced takes both; only its positive side is ours.
            waiting += [inputs["positive"]] if "positive" in inputs else list(inputs.values())
    return found or [
        node for node, body in workflow.items() if body["class_type"] == "CLIPTextEncode"
    ]


def _describe(workflow: Workflow, node: str) -> str:
    if node not in workflow:
        return node
    title = _title(workflow, node)
    class_type = workflow[node]["class_type"]
    return (
        f"{node} ({class_type})"
        if title in ("", class_type)
        else f'{node} ({class_type} "{title}")'
    )


def _list_nodes(workflow: Workflow, nodes: Iterable[str]) -> str:
    return ", ".join(_describe(workflow, node) for node in nodes)


def _list_inputs(workflow: Workflow, nodes: Iterable[str]) -> str:
    rows: list[str] = []
    for node in nodes:
        inputs = _inputs(workflow, node)
        free = [name for name, value in inputs.items() if not _is_link(value)]
        rows += [f"{node}.{name}" for name in free] and [
            f"{_describe(workflow, node)}: {', '.join(free)}"
        ]
    return "; ".join(rows) or "no free input"
