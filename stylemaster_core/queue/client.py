"""One ComfyUI server, over its HTTP API."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import itertools
import json
import time
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import aiohttp
import yarl

from . import answers
from .answers import AnswerError, OutputFile, plain
from .jobs import UPLOAD_FOLDER, InputFile
from .workflow import Workflow, server_address

T = TypeVar("T")

MAX_RESULT_BYTES = 8 << 30
MAX_ANSWER_BYTES = 16 << 20  # of an answer that is no result, and of a message
# Whoever sends or takes less than this is taken for hung.
SLOW_BYTES_PER_S = 10_000
SLOW_S = 30.0

_CHUNK_BYTES = 1 << 18
_SMALL_BYTES = 1 << 16
_MAX_INTERIM = 16
_PROBE_TIMEOUT_S = 10.0
_MAX_WAIT_S = 86_400.0
_GATEWAY_STATUS = (502, 503, 504)  # a gateway in front of a server that is gone or not up yet
# With these a ComfyUI server refuses a job, not its sender.
_REJECTED_STATUS = (400, 413)
_BRINGS_A_JOB = ("/prompt", "/upload/image")


class ServerTrouble(Exception):
    """A server does not do what is asked, for a reason that lies with it and not with the job.

    Attributes:
        has_blamed: a job was given back for it already.
    """

    has_blamed = False


class ServerSilent(ServerTrouble):
    """The server gave no answer.

    Attributes:
        is_final: nobody listens there, or it was waited for long enough.
    """

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final


class ServerSick(ServerTrouble):
    """The server answered what no ComfyUI server in good health answers."""


class ResultGone(ServerSick):
    """The server has not the file that it named as a result."""


class ServerBusy(ServerTrouble):
    """The server asks for a pause.

    Attributes:
        wait_s: how long; None where it does not say.
    """

    def __init__(self, message: str, wait_s: float | None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class RequestRejected(Exception):
    """The server answered that it will not do this job; asking it again is of no use."""


class _Reply(NamedTuple):
    status: int
    body: bytes


class _Response(aiohttp.ClientResponse):
    """An answer that only a few of the kind "100 Continue" may come before."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        protocol = connection.protocol
        read, count = protocol.read, itertools.count()

        async def read_some() -> Any:
            if next(count) > _MAX_INTERIM:
                raise aiohttp.ClientResponseError(
                    self.request_info, self.history, message="it goes on announcing an answer"
                )
            return await read()

        protocol.read = read_some
        try:
            return await super().start(connection)
        finally:
            del protocol.read


class ComfyClient:
    """Talk to one ComfyUI server, within one event loop.

    Every method may raise `ServerTrouble`; those that bring a job there, `RequestRejected`.
    Proxies of the environment, redirects, cookies and compressed answers are not taken.

    Args:
        url: `http://host:port`, maybe with a path before ComfyUI's own.
        timeout_s: longest wait for a whole answer; a result may take longer, as long as it flows.
        max_result_bytes: largest result that is fetched.

    Raises:
        ConfigError: if `url` is no such address.

    Source: ComfyUI, server.py and execution.py (0.3.64, 0.8.0 and 0.33.0).
    """

    def __init__(
        self, url: str, timeout_s: float, max_result_bytes: int = MAX_RESULT_BYTES
    ) -> None:
        self.url = server_address(url)
        self.client_id = f"stylemaster-{uuid.uuid4().hex}"
        self._timeout_s = timeout_s
        self._max_result_bytes = max_result_bytes
        self._max_upload_bytes: int | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections; made on first use, which must be within the event loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=8, keepalive_timeout=10),
                response_class=_Response,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            )
        return self._session

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def probe(self) -> None:
        """Ask for a sign of life."""
        timeout_s = min(self._timeout_s, _PROBE_TIMEOUT_S)
        await self._ask("GET", "/queue", answers.Queue, timeout_s=timeout_s)
        try:
            features = await self._ask("GET", "/features", answers.Features, timeout_s=timeout_s)
        except RequestRejected:
            return  # a server from before /features; it will say by itself what it cannot take
        self._max_upload_bytes = features.max_upload_size

    async def upload(self, file: InputFile) -> str:
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
        pace = _Pace(self._timeout_s)
        answer = await self._ask(
            "POST",
            "/upload/image",
            answers.Upload,
            data=_body(head.encode(), file.path, tail.encode(), pace),
            headers={
                "Content-Type": f"multipart/form-data; boundary={boundary}",
                "Content-Length": str(len(head) + size + len(tail)),
            },
            pace=pace,
        )
        try:
            return answer.path(file.upload_name, UPLOAD_FOLDER)
        except AnswerError as error:
            raise ServerSick(f"{self.url} has uploaded another file: {error}") from error

    async def submit(self, prompt: Workflow, prompt_id: str) -> str:
        """Queue a prompt.

        Args:
            prompt: the workflow.
            prompt_id: the id that it should get.

        Returns:
            The id that it got; servers before 0.3.4x choose one themselves.
        """
        body = {"prompt": prompt, "client_id": self.client_id, "prompt_id": prompt_id}
        answer = await self._post("/prompt", body, answers.Submitted)
        if answer.node_errors:
            await self.cancel({answer.prompt_id})
            raise RequestRejected(answers.refusal_words(answer))
        return answer.prompt_id

    async def history(self, prompt_id: str) -> answers.Entry | None:
        """Return what became of a prompt, or None while it has not ended."""
        path = f"/history/{urllib.parse.quote(prompt_id, safe='')}"
        return (await self._ask("GET", path, dict[str, answers.Entry])).get(prompt_id)

    async def queued(self) -> set[str]:
        """Return the ids of the prompts that run or wait."""
        queue = await self._queue()
        return {item.prompt_id for item in (*queue.queue_running, *queue.queue_pending)}

    async def cancel(
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

        def is_own(item: answers.QueueItem) -> bool:
            return item.prompt_id in prompt_ids or (
                item.extra.client_id == self.client_id and item.prompt_id not in strays_except
            )

        queue = await self._queue()
        own = {item.prompt_id for item in queue.queue_running if is_own(item)}
        if waiting := [item.prompt_id for item in queue.queue_pending if is_own(item)]:
            await self._post("/queue", {"delete": waiting})
            own.update(waiting)
        if own:
            for item in (await self._queue()).queue_running:
                # Old servers interrupt whatever runs, so look again whether it is ours.
                if item.prompt_id in own:
                    await self._post("/interrupt", {"prompt_id": item.prompt_id})
        return own

    async def withdraw(self, prompt_id: str) -> bool:
        """Take a prompt back that still waits; False if it runs or has ended."""
        await self._post("/queue", {"delete": [prompt_id]})
        return prompt_id not in await self.queued() and await self.history(prompt_id) is None

    async def download(self, file: OutputFile, path: Path) -> str:
        """Fetch a result into `path`, complete when this returns.

        Returns:
            The SHA-256 of what was written.
        """
        query = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        pace = _Pace(self._timeout_s)
        target = f"/view?{urllib.parse.urlencode(query)}"
        return await self._timed(self._download(target, path, pace), pace, "the result")

    async def _download(self, target: str, path: Path, pace: _Pace) -> str:
        digest = hashlib.sha256()
        async with self._open("GET", target) as response:
            if response.status == 404:
                raise ResultGone(f"{self.url} has a result no longer, or never had it")
            if response.status != 200:
                raise self._refusal("/view", response, (await self._read(response)).body)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise ServerSick(f"{self.url} compresses a result without being asked to")
            if (response.content_length or 0) > self._max_result_bytes:
                raise RequestRejected(self._too_large(f"has {response.content_length} bytes"))
            pace.flows()
            got = 0
            with path.open("wb") as stream:
                async for chunk in response.content.iter_any():
                    got += len(chunk)
                    if got > self._max_result_bytes:
                        raise RequestRejected(self._too_large("does not end"))
                    pace.advance(len(chunk))
                    if len(chunk) < _SMALL_BYTES:
                        _write(stream, digest, chunk)
                    else:
                        await asyncio.to_thread(_write, stream, digest, chunk)
        return digest.hexdigest()

    def _too_large(self, what: str) -> str:
        limit = self._max_result_bytes
        return f"{self.url}: a result {what}; --max-result allows {limit / (1 << 30):.3g} GiB"

    async def _queue(self) -> answers.Queue:
        return await self._ask("GET", "/queue", answers.Queue)

    async def _post(self, path: str, body: dict[str, Any], form: type[T] | None = None) -> T:
        headers = {"Content-Type": "application/json"}
        return await self._ask("POST", path, form, data=json.dumps(body).encode(), headers=headers)

    async def _ask(
        self,
        method: str,
        path: str,
        form: type[T] | None,
        *,
        data: bytes | AsyncIterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float | None = None,
        pace: _Pace | None = None,
    ) -> T:
        """Send a request; `form` is what its answer must be, None if it does not matter."""

        async def exchange() -> _Reply:
            async with self._open(method, path, data=data, headers=headers) as response:
                reply = await self._read(response)
                if response.status != 200:
                    raise self._refusal(path, response, reply.body)
                return reply

        pace = pace or _Pace(timeout_s or self._timeout_s)
        reply = await self._timed(exchange(), pace, path)
        if form is None:
            return None  # pyright: ignore[reportReturnType]
        try:
            return answers.decode(reply.body, form)
        except AnswerError as error:
            raise ServerSick(
                f"{self.url}{path} did not answer as a ComfyUI server does: {error}"
            ) from error

    def _open(self, method: str, path: str, **request: Any) -> Any:
        url = yarl.URL(self.url + path, encoded=True)
        return self.session.request(method, url, allow_redirects=False, **request)

    async def _read(self, response: aiohttp.ClientResponse) -> _Reply:
        if (response.content_length or 0) > MAX_ANSWER_BYTES:
            raise ServerSick(f"{self.url} answers with {response.content_length} bytes")
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise ServerSick(f"{self.url} answers without an end")
        return _Reply(response.status, bytes(body))

    async def _timed(self, work: Coroutine[Any, Any, T], pace: _Pace, what: str) -> T:
        """Await a request; whatever goes wrong on the way becomes a `ServerTrouble`."""
        try:
            return await _until(work, pace.deadline)
        except asyncio.TimeoutError as error:
            message = f"{self.url} is silent or too slow ({what})"
            raise ServerSilent(message, is_final=True) from error
        except (ServerTrouble, RequestRejected):
            raise
        except aiohttp.ClientConnectorError as error:
            refused = error.os_error.errno == errno.ECONNREFUSED or isinstance(
                error, aiohttp.ClientConnectorDNSError
            )
            raise ServerSilent(f"{self.url}: {plain(error)}", is_final=refused) from error
        except aiohttp.ClientResponseError as error:
            raise ServerSick(f"{self.url}: {plain(error.message)}") from error
        except aiohttp.ClientError as error:
            raise ServerSilent(f"{self.url}: {plain(error) or type(error).__name__}") from error

    def _refusal(
        self, path: str, response: aiohttp.ClientResponse, body: bytes
    ) -> ServerTrouble | RequestRejected:
        """Say what a status other than 200 means."""
        status, headers = response.status, response.headers
        where = f"; it points to {plain(headers['Location'])}" if "Location" in headers else ""
        shown = path.partition("?")[0]
        words = plain(body[:4096].decode("utf-8", "replace"))
        message = f"{self.url}{shown} answered {status} {plain(response.reason)}{where} {words}"
        message = message.strip()
        if status == 429 or (status == 503 and "Retry-After" in headers):
            return ServerBusy(message, _wait_s(headers.get("Retry-After")))
        if status in _GATEWAY_STATUS:
            return ServerSilent(message)
        if status in _REJECTED_STATUS and path in _BRINGS_A_JOB:
            try:
                refusal = answers.decode(body, answers.Refusal)
            except AnswerError:
                return RequestRejected(message)
            return RequestRejected(answers.refusal_words(refusal))
        if status == 404 and path == "/features":
            return RequestRejected(message)
        return ServerSick(message)


class _Pace:
    """How long a request may still take."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s
        self._bytes = 0

    def deadline(self) -> float:
        return self._until

    def flows(self) -> None:
        """A long body begins: from here on its speed counts."""
        self._until = time.monotonic() + SLOW_S
        self._bytes = 0

    def advance(self, count: int) -> None:
        self._bytes += count
        if self._bytes >= SLOW_S * SLOW_BYTES_PER_S:
            self.flows()

    def ends(self) -> None:
        """The body is sent: now the answer must come."""
        self._until = time.monotonic() + self._timeout_s


async def _until(work: Coroutine[Any, Any, T], deadline: Callable[[], float]) -> T:
    """Await `work`, cancel it when a deadline that moves is over."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            left_s = deadline() - time.monotonic()
            if left_s <= 0:
                raise asyncio.TimeoutError
            await asyncio.wait({task}, timeout=left_s)
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # seen


async def _body(head: bytes, path: Path, tail: bytes, pace: _Pace) -> AsyncIterator[bytes]:
    yield head
    pace.flows()
    with path.open("rb") as stream:
        while chunk := await asyncio.to_thread(stream.read, _CHUNK_BYTES):
            yield chunk
            pace.advance(len(chunk))
    pace.ends()
    yield tail


def _write(stream: Any, digest: Any, chunk: bytes) -> None:
    digest.update(chunk)
    stream.write(chunk)


def _wait_s(retry_after: str | None) -> float | None:
    """Read the header Retry-After: seconds or a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    try:
        if retry_after.strip().isdigit():
            wait_s = float(retry_after)
        else:
            date = parsedate_to_datetime(retry_after)
            date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
            wait_s = (date - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(max(wait_s, 0.0), _MAX_WAIT_S)
