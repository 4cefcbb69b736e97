"""What a ComfyUI server may say: every answer and message is checked here, and nowhere else.

What an answer holds beside these fields is skipped without being read into memory.

Source: ComfyUI, server.py and execution.py (0.3.64, 0.8.0 and 0.33.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from .workflow import Target

T = TypeVar("T")

_MAX_WORDS = 400
_MAX_LINES = 20
_COUNTER = re.compile(r" \(\d+\)(?=(\.\w+)?$)")  # what a server adds to a name that it has already


class AnswerError(ValueError):
    """What a server said is not what a ComfyUI server says."""


class OutputFile(msgspec.Struct, frozen=True):
    """A result as the server names it."""

    filename: str
    subfolder: str = ""
    type: str = "output"  # or "temp"


class Features(msgspec.Struct):
    """The answer to GET /features."""

    max_upload_size: int | None = None  # bytes


class Upload(msgspec.Struct):
    """The answer to POST /upload/image."""

    name: str
    subfolder: str | None = None

    def path(self, name: str, subfolder: str) -> str:
        """Return what the server calls the file, which must be what it was asked for.

        The server picks another name, with a number, where a different file has ours.

        Raises:
            AnswerError: if it speaks of another file.
        """
        if _COUNTER.sub("", self.name) != name or (self.subfolder or "") != subfolder:
            raise AnswerError(f"{plain(self.name, 80)} in place of {name}")
        return f"{subfolder}/{self.name}"


class _Extra(msgspec.Struct):
    client_id: Any = None


class QueueItem(msgspec.Struct, array_like=True):
    """A prompt that runs or waits; the prompt itself is not read."""

    number: float
    prompt_id: str
    prompt: msgspec.Raw
    extra: _Extra


class Queue(msgspec.Struct):
    """The answer to GET /queue."""

    queue_running: list[QueueItem]
    queue_pending: list[QueueItem]


class Problem(msgspec.Struct):
    """What is wrong with a prompt or one of its nodes."""

    message: str | None = None
    details: str | None = None


class NodeProblems(msgspec.Struct):
    """What is wrong with a node."""

    errors: list[Problem] = []
    class_type: str | None = None


class Refusal(msgspec.Struct):
    """The answer with status 400 to POST /prompt."""

    error: Problem | str
    node_errors: dict[str, NodeProblems] | list[Any] = {}


class Submitted(msgspec.Struct):
    """The answer to POST /prompt."""

    prompt_id: str
    node_errors: dict[str, NodeProblems] | list[Any] = {}
    error: Problem | str | None = None


class _Node(msgspec.Struct):
    class_type: str
    inputs: dict[str, Any] = {}


class _Item(msgspec.Struct, array_like=True):
    number: float
    prompt_id: str
    prompt: dict[str, _Node]


class _Failure(msgspec.Struct):
    node_id: str | int | None = None
    node_type: str | None = None
    exception_type: str | None = None
    exception_message: str | None = None


class _Cached(msgspec.Struct):
    nodes: list[str | int] = []


class _Status(msgspec.Struct):
    status_str: str | None = None
    messages: list[tuple[str, msgspec.Raw]] | None = None


class Entry(msgspec.Struct):
    """What became of a prompt, of GET /history."""

    prompt: _Item
    outputs: dict[str, dict[str, Any] | None] | None = None
    status: _Status | None = None

    def problem(self) -> str | None:
        """Say why the prompt failed, or None if it did not.

        Raises:
            AnswerError: if the server does not say it as ComfyUI does.
        """
        if self.status is None or self.status.status_str != "error":
            return None
        for event, raw in self.status.messages or ():
            if event not in ("execution_error", "execution_interrupted"):
                continue
            failure = decode(raw, _Failure)
            where = f"node {failure.node_id} ({failure.node_type})"
            if event == "execution_interrupted":
                return plain(f"{where}: somebody interrupted it on the server")
            message = (failure.exception_message or "").strip()
            return plain(f"{where}: {failure.exception_type}: {message}")
        return "the server reports an error without a message"

    def files(self) -> list[OutputFile]:
        """Return the saved files, or the previews if nothing was saved.

        Raises:
            AnswerError: if a file has no proper name.
        """
        items = [
            item
            for output in (self.outputs or {}).values()
            for items in (output or {}).values()
            if isinstance(items, list)
            for item in items
            if isinstance(item, dict) and "filename" in item
        ]
        try:
            files = [msgspec.convert(item, OutputFile) for item in items]
        except msgspec.ValidationError as error:
            raise AnswerError(f"a result without a proper name: {plain(str(error))}") from error
        return [file for file in files if file.type == "output"] or files

    def is_cached(self, file: OutputFile) -> bool:
        """Return whether the server did not make a file for this prompt but named an earlier one.

        Raises:
            AnswerError: if the server does not say it as ComfyUI does.
        """
        messages = (self.status.messages or ()) if self.status else ()
        cached = {
            str(node)
            for event, raw in messages
            if event == "execution_cached"
            for node in decode(raw, _Cached).nodes
        }
        return any(
            node in cached and isinstance(items, list) and any(_names(item, file) for item in items)
            for node, output in (self.outputs or {}).items()
            for items in (output or {}).values()
        )

    def answers(self, sent: Mapping[str, Any], values: Mapping[Target, Any]) -> bool:
        """Return whether this is about the prompt that was sent.

        A server may change a prompt: it converts values, renames uploads, replaces an outdated
        node by its successor, and node packs fill inputs in. What must be there is every node,
        most of them of the same class, and each value that the batch has set.

        Args:
            sent: the workflow as it was sent.
            values: what the batch has set in it.
        """
        nodes = self.prompt.prompt
        if nodes.keys() != sent.keys():
            return False
        same = sum(nodes[name].class_type == body["class_type"] for name, body in sent.items())
        return 2 * same > len(sent) and all(
            any(_is_like(value, other) for other in nodes[node].inputs.values())
            for (node, _), value in values.items()
        )


class Message(msgspec.Struct):
    """A message of the websocket."""

    type: str
    data: msgspec.Raw = msgspec.Raw(b"{}")


class Progress(msgspec.Struct):
    """Data of the message "progress"."""

    value: float
    max: float


class Executing(msgspec.Struct):
    """Data of the message "executing"; without a node, the prompt has ended."""

    node: str | None = None
    prompt_id: str | None = None


def decode(data: bytes | msgspec.Raw, form: type[T]) -> T:
    """Read JSON that must have a form.

    Args:
        data: UTF-8.
        form: a struct of this module, or a dictionary of such.

    Raises:
        AnswerError: if it has not.
    """
    try:
        return msgspec.json.decode(data, type=form)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise AnswerError(plain(str(error))) from error


def refusal_words(answer: Refusal | Submitted) -> str:
    """Put the answer to a refused prompt into words, a line for each problem."""
    error = answer.error
    lines = [_join(error.message, error.details) if isinstance(error, Problem) else plain(error)]
    if isinstance(answer.node_errors, dict):
        lines += [
            f"node {plain(node, 40)} ({plain(problems.class_type, 80)}): "
            f"{_join(problem.message, problem.details)}"
            for node, problems in answer.node_errors.items()
            for problem in problems.errors
        ]
    lines = [line for line in lines if line]
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"and {len(lines) - _MAX_LINES} problems more"]
    return "\n  ".join(lines) or "The server refused the workflow without saying why."


def plain(text: object, limit: int = _MAX_WORDS) -> str:
    """Return words as one line that is safe to print: no control characters, not too long."""
    words = "" if text is None else str(text)[: 4 * limit]
    line = " ".join(words.split())
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
    return line if len(line) <= limit else f"{line[:limit]}..."


def _names(item: Any, file: OutputFile) -> bool:
    if not isinstance(item, dict):
        return False
    found = (item.get("filename"), item.get("subfolder", ""), item.get("type", "output"))
    return found == (file.filename, file.subfolder, file.type)


def _join(*parts: str | None) -> str:
    return ": ".join(plain(part) for part in parts if part)


def _is_like(sent: Any, found: Any) -> bool:
    if sent == found:
        return True
    if isinstance(sent, (list, dict)) or isinstance(found, (list, dict)):
        return False
    # A node's own type may have turned 5 into "5", or "5" into 5.0.
    return _bare(sent) == _bare(found)


def _bare(value: Any) -> str:
    try:
        return repr(float(value))
    except (TypeError, ValueError):
        return _COUNTER.sub("", str(value))
