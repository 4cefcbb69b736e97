"""One ComfyUI server, over its HTTP API."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from .jobs import UPLOAD_FOLDER, InputFile
from .workflow import Workflow

_CHUNK_BYTES = 1 << 20
_PROBE_TIMEOUT_S = 10.0
_MAX_MESSAGE = 400
# A gateway in front of a server that is gone or not up yet.
_GATEWAY_STATUS = (502, 503, 504)


class ServerSilent(Exception):
    """The server gave no answer.

    Attributes:
        refused: nobody listens there, so that waiting is of no use.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class RequestRejected(Exception):
    """The server answered that it will not do it; asking again is of no use."""


class OutputFile(NamedTuple):
    """A result as the server names it."""

    filename: str
    subfolder: str
    type: str  # "output" or "temp"


class _QueueItem(NamedTuple):
    prompt_id: str
    client_id: str | None
    running: bool


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Only the address that the user gave is ever asked."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


class ComfyClient:
    """Talk to one ComfyUI server.

    Every method may raise `ServerSilent` and `RequestRejected`. Proxies of the environment and
    redirects are not followed. Not for use from several threads.

    Args:
        url: `http://host:port`, maybe with a path before ComfyUI's own.
        timeout_s: longest wait for an answer.

    Raises:
        ConfigError: if `url` is no such address.

    Source: ComfyUI, server.py and execution.py (0.3.64 and 0.8.0).
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ConfigError(f"--server {url!r}: expected http://HOST:PORT, without a user name.")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.client_id = f"stylemaster-{uuid.uuid4().hex}"
        self._timeout_s = timeout_s
        self._max_upload_bytes: int | None = None
        self._last_answer = time.monotonic()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    @property
    def silent_s(self) -> float:
        """Seconds since the last answer."""
        return time.monotonic() - self._last_answer

    def probe(self) -> None:
        """Ask for a sign of life."""
        timeout_s = min(self._timeout_s, _PROBE_TIMEOUT_S)
        answer = self._json("GET", "/queue", timeout_s=timeout_s)
        if not isinstance(answer, dict) or "queue_running" not in answer:
            raise RequestRejected(f"{self.url} is not a ComfyUI server: /queue has no queue")
        try:
            features = self._json("GET", "/features", timeout_s=timeout_s)
        except RequestRejected:
            return  # a server from before /features; it will say by itself what it cannot take
        self._max_upload_bytes = features.get("max_upload_size")

    def upload(self, file: InputFile) -> str:
        """Upload an input file, unless the server has the same one already.

        Returns:
            The file's name for a node's input, with its subfolder.
        """
        try:
            size = file.path.stat().st_size
        except OSError as error:
            raise RequestRejected(f"Cannot read the input {file.path}: {error.strerror}") from error
        if self._max_upload_bytes is not None and size > self._max_upload_bytes:
            raise RequestRejected(
                f"{file.path} has {size / 1e6:.0f} MB and {self.url} takes "
                f"{self._max_upload_bytes / 1e6:.0f} MB. Start it with a larger --max-upload-size."
            )
        boundary = uuid.uuid4().hex
        fields = {"subfolder": UPLOAD_FOLDER, "type": "input", "overwrite": "false"}
        head = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        )
        head += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; '
            f'filename="{file.upload_name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        )
        tail = f"\r\n--{boundary}--\r\n"
        answer = self._json(
            "POST",
            "/upload/image",
            _body(head.encode(), file.path, tail.encode()),
            {
                "Content-Type": f"multipart/form-data; boundary={boundary}",
                "Content-Length": str(len(head) + size + len(tail)),
            },
        )
        # The server picks another name where a different file has ours.
        return "/".join(filter(None, (answer.get("subfolder"), answer["name"])))

    def submit(self, prompt: Workflow, prompt_id: str) -> str:
        """Queue a prompt.

        Args:
            prompt: the workflow.
            prompt_id: the id that it should get.

        Returns:
            The id that it got; servers before 0.3.4x choose one themselves.
        """
        answer = self._post(
            "/prompt", {"prompt": prompt, "client_id": self.client_id, "prompt_id": prompt_id}
        )
        got = str(answer["prompt_id"])
        if answer.get("node_errors"):
            self.cancel({got})
            raise RequestRejected(_validation_message(answer))
        return got

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """Return what became of a prompt, or None while it has not ended."""
        return self._json("GET", f"/history/{prompt_id}").get(prompt_id)

    def is_queued(self, prompt_id: str) -> bool:
        """Return whether a prompt runs or waits."""
        return any(item.prompt_id == prompt_id for item in self._queue())

    def cancel(
        self, prompt_ids: Collection[str], *, strays_except: Collection[str] = ()
    ) -> set[str]:
        """Delete own prompts from the queue and interrupt an own running one.

        Args:
            prompt_ids: what to cancel.
            strays_except: of this client's other prompts, the ones to keep. Such others are there
                when the answer to `submit` was lost.

        Returns:
            The ids that were found and cancelled.
        """
        own = [
            item
            for item in self._queue()
            if item.prompt_id in prompt_ids
            or (item.client_id == self.client_id and item.prompt_id not in strays_except)
        ]
        if waiting := [item.prompt_id for item in own if not item.running]:
            self._post("/queue", {"delete": waiting})
        for item in self._queue():
            # Old servers interrupt whatever runs, so look again whether it is ours.
            if item.running and item.prompt_id in {other.prompt_id for other in own}:
                self._post("/interrupt", {"prompt_id": item.prompt_id})
        return {item.prompt_id for item in own}

    def download(self, file: OutputFile, path: Path) -> None:
        """Fetch a result into `path`, complete and on the disk when this returns."""
        query = urllib.parse.urlencode(file._asdict())
        with self._open("GET", f"/view?{query}") as answer, path.open("wb") as stream:
            for chunk in self._chunks(answer):
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())

    def _queue(self) -> list[_QueueItem]:
        # An item is [number, prompt_id, prompt, extra_data, outputs].
        answer = self._json("GET", "/queue")
        return [
            _QueueItem(item[1], item[3].get("client_id"), running)
            for key, running in (("queue_running", True), ("queue_pending", False))
            for item in answer[key]
        ]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        return self._json("POST", path, json.dumps(body).encode(), headers)

    def _json(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        with self._open(method, path, body, headers, timeout_s) as answer:
            data = b"".join(self._chunks(answer))
        try:
            return json.loads(data) if data else {}
        except ValueError as error:
            raise RequestRejected(
                f"{self.url}{path} did not answer with JSON; is it a ComfyUI server?"
            ) from error

    def _open(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            self.url + path, data=body, headers=dict(headers or {}), method=method
        )
        try:
            answer = self._opener.open(request, timeout=timeout_s or self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                message = self._explain(error, path)
            if error.code in _GATEWAY_STATUS:
                raise ServerSilent(message) from error
            self._last_answer = time.monotonic()
            raise RequestRejected(message) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise self._silent(error) from error
        self._last_answer = time.monotonic()
        return answer

    def _chunks(self, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        expected = answer.length
        got = 0
        while True:
            try:
                chunk = answer.read(_CHUNK_BYTES)
            except (http.client.HTTPException, OSError) as error:
                raise self._silent(error) from error
            if not chunk:
                break
            got += len(chunk)
            self._last_answer = time.monotonic()
            yield chunk
        # http.client ends quietly where a server dies within its answer.
        if expected is not None and got < expected:
            raise ServerSilent(f"{self.url} broke off after {got} of {expected} bytes")

    def _silent(self, error: BaseException) -> ServerSilent:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        refused = isinstance(reason, (ConnectionRefusedError, socket.gaierror))
        return ServerSilent(f"{self.url}: {reason or type(reason).__name__}", refused=refused)

    def _explain(self, error: urllib.error.HTTPError, path: str) -> str:
        try:
            text = error.read().decode("utf-8", "replace")
        except (http.client.HTTPException, OSError):
            text = ""
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and "error" in answer:
            return _validation_message(answer)
        where = f"; it points to {error.headers['Location']}" if error.headers["Location"] else ""
        return (
            f"{self.url}{path} answered {error.code} {error.reason}{where} {_short(text)}".strip()
        )


def _body(head: bytes, path: Path, tail: bytes) -> Iterator[bytes]:
    yield head
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk
    yield tail


def _validation_message(answer: Mapping[str, Any]) -> str:
    """Put the answer to a refused prompt into words, a line for each node."""
    error = answer.get("error")
    lines: list[str] = []
    if isinstance(error, Mapping):
        lines.append(_join(error.get("message"), error.get("details")))
    elif error:
        lines.append(_short(str(error)))
    node_errors = answer.get("node_errors") or {}
    for node, body in node_errors.items():
        for problem in body.get("errors", ()):
            text = _join(problem.get("message"), problem.get("details"))
            lines.append(f"node {node} ({body.get('class_type')}): {text}")
    return "\n  ".join(lines) or "The server refused the workflow without saying why."


def _join(*parts: Any) -> str:
    return ": ".join(_short(str(part)) for part in parts if part)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."
