"""Runs jobs on several ComfyUI servers, so that each result is delivered exactly once."""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..errors import StyleMasterError
from .client import ComfyClient, OutputFile, RequestRejected, ServerSilent
from .jobs import Job
from .journal import Journal

logger = logging.getLogger("stylemaster")

_PART_PREFIX = ".stylemaster-"
_MAX_BACK_OFF_S = 60.0
_TICK_S = 0.2


@dataclass(frozen=True)
class RunConfig:
    """How a batch is run."""

    per_server: int = 1  # jobs queued at a server at a time
    timeout_s: float = 60.0  # a server that is silent for so long is lost
    give_up_s: float = 600.0  # a lost server is asked again for so long
    max_attempts: int = 3  # how often a job may lose its server
    poll_s: float = 1.0  # between two looks at a server


@dataclass(frozen=True)
class JobResult:
    """What became of a job."""

    job: Job
    status: Literal["done", "failed"]
    server: str | None
    files: tuple[str, ...] = ()  # names in the output folder
    error: str | None = None
    seconds: float = 0.0  # from queueing to delivery, on the server that did it


def run_jobs(
    jobs: Sequence[Job],
    clients: Sequence[ComfyClient],
    journal: Journal,
    folder: Path,
    config: RunConfig,
) -> Generator[JobResult, None, None]:
    """Run the jobs that the journal does not know as done; yield each one's result as it ends.

    Closing the iterator early (or Ctrl-C) cancels what was queued; the journal stays good for
    another run.

    Args:
        jobs: from `make_jobs`.
        clients: one for each server.
        journal: of `folder`.
        folder: for the results.
        config: see `RunConfig`.

    Raises:
        StyleMasterError: if no server answers at the start.
        OSError: if a result cannot be written here.
    """
    board = _Board(
        [job for job in jobs if journal.last(job.id).get("event") != "done"],
        journal,
        folder,
        config,
    )
    if not board.pending:
        return
    servers = [_Server(client, board) for client in clients]
    with ExitStack() as stack:
        stack.callback(board.remove_parts)
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=len(servers)))
        problems = list(pool.map(_Server.connect, servers))
        if all(problems):
            raise StyleMasterError(
                "No server answers; start ComfyUI or check --server: "
                + "; ".join(str(problem) for problem in problems)
            )
        for server in servers:
            server.adopt()
        stack.callback(board.over.set)
        running = [pool.submit(server.run) for server in servers]
        while board.has_open or not board.results.empty():
            try:
                yield board.results.get(timeout=_TICK_S)
            except queue.Empty:
                for future in running:
                    if future.done():
                        future.result()
                if all(future.done() for future in running):
                    board.fail_pending("no server is left; run again to continue")


class _Board:
    """What the servers' threads share: who does which job.

    A job is either pending, held by one server, or settled. Only its holder may deliver it.
    """

    def __init__(
        self, jobs: Sequence[Job], journal: Journal, folder: Path, config: RunConfig
    ) -> None:
        self.journal = journal
        self.folder = folder
        self.config = config
        self.pending = list(jobs)
        self.results: queue.Queue[JobResult] = queue.Queue()
        self.over = threading.Event()
        self._alive: set[str] = set()
        self._open = {job.id for job in jobs}
        self._lost_on: dict[str, list[str]] = {}
        self._mutex = threading.RLock()

    @property
    def has_open(self) -> bool:
        return bool(self._open)

    def is_alive(self, server: str) -> bool:
        with self._mutex:
            return server in self._alive

    def set_alive(self, server: str, alive: bool) -> None:
        with self._mutex:
            (self._alive.add if alive else self._alive.discard)(server)

    def take(self, server: str) -> Job | None:
        """Hand a job out, one that this server lost only if no other server could take it."""
        with self._mutex:
            others = self._alive - {server}
            for job in self.pending:
                lost_on = self._lost_on.get(job.id, [])
                if server not in lost_on or others.issubset(lost_on):
                    self.pending.remove(job)
                    return job
        return None

    def take_job(self, job: Job) -> None:
        with self._mutex:
            self.pending.remove(job)

    def give_back(self, job: Job, server: str, reason: str) -> None:
        """Make a job pending again whose server was lost, or fail it after too many times."""
        with self._mutex:
            lost_on = self._lost_on.setdefault(job.id, [])
            lost_on.append(server)
            self.journal.write("lost", job.id, server=server, error=reason)
            if len(lost_on) < self.config.max_attempts:
                self.pending.append(job)
                return
        times = f"its server was lost {len(lost_on)} times"
        self.settle(JobResult(job, "failed", server, error=f"{times}, last: {reason}"))

    def settle(self, result: JobResult) -> None:
        with self._mutex:
            job = result.job
            assert job.id in self._open, f"{job.id} has a second result"
            fields: dict[str, Any] = {"name": job.name, "server": result.server}
            if result.status == "done":
                fields |= {"files": list(result.files), "seconds": round(result.seconds, 1)}
            else:
                fields["error"] = result.error
            self.journal.write(result.status, job.id, **fields, values=dict(job.values))
            # In this order: who sees nothing open must find every result.
            self.results.put(result)
            self._open.remove(job.id)
            if not self._open:
                self.over.set()

    def fail_pending(self, reason: str) -> None:
        for job in self.pending:
            self.settle(JobResult(job, "failed", None, error=reason))
        self.pending = []

    def deliver(self, job: Job, parts: Sequence[Path]) -> tuple[str, ...]:
        """Rename downloaded files to their readable names, over nothing that is not the job's."""
        with self._mutex:
            own = self.journal.own_files(job.id)
            names: list[str] = []
            for number, part in enumerate(parts, start=1):
                names.append(self._free_name(f"{job.name}_{number}", part, own, names))
            self.journal.write("delivering", job.id, files=names)
            for part, name in zip(parts, names, strict=True):
                os.replace(part, self.folder / name)
        return tuple(names)

    def part_path(self, job: Job, number: int, file: OutputFile) -> Path:
        suffix = PurePosixPath(file.filename).suffix
        if not re.fullmatch(r"\.\w{1,10}", suffix):
            suffix = ""
        return self.folder / f"{_PART_PREFIX}{job.id}-{number}{suffix}.part"

    def remove_parts(self) -> None:
        for part in self.folder.glob(f"{_PART_PREFIX}*.part"):
            part.unlink()

    def _free_name(self, stem: str, part: Path, own: set[str], taken: Sequence[str]) -> str:
        suffix = part.with_suffix("").suffix
        name = f"{stem}{suffix}"
        count = 1
        while name in taken or (name not in own and os.path.lexists(self.folder / name)):
            count += 1
            name = f"{stem}-{count}{suffix}"
        return name


class _Held:
    """A job at a server."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.since = time.monotonic()


class _Server:
    """One server's thread: fills the server up, watches its jobs and fetches their results."""

    def __init__(self, client: ComfyClient, board: _Board) -> None:
        self._client = client
        self._board = board
        self._held: dict[str, _Held] = {}  # by prompt id
        self._uploaded: dict[str, str] = {}  # upload name -> its name on the server
        self._had_trouble = False

    def connect(self) -> str | None:
        """Return what is wrong with the server, or None."""
        try:
            self._client.probe()
        except (ServerSilent, RequestRejected) as error:
            return str(error)
        self._board.set_alive(self._client.url, True)
        return None

    def adopt(self) -> None:
        """Go on with prompts that an earlier run queued here before it was killed."""
        if not self._board.is_alive(self._client.url):
            return
        for job in list(self._board.pending):
            record = self._board.journal.last(job.id)
            if record.get("event") != "submitted" or record["server"] != self._client.url:
                continue
            prompt_id = record["prompt_id"]
            try:
                is_queued = self._client.is_queued(prompt_id)
                entry = self._client.history(prompt_id)
            except (ServerSilent, RequestRejected) as error:
                logger.warning("Cannot look for earlier jobs: %s", error)
                return
            if is_queued or (entry is not None and _problem_in(entry) is None):
                self._board.take_job(job)
                self._held[prompt_id] = _Held(job)

    def run(self) -> None:
        board = self._board
        trouble_since: float | None = None
        is_here = board.is_alive(self._client.url) or self._revive()
        try:
            while is_here and not board.over.is_set():
                try:
                    self._fill()
                    self._watch()
                    trouble_since = None
                except (ServerSilent, RequestRejected) as error:
                    self._had_trouble = True
                    trouble_since = trouble_since or time.monotonic()
                    # A short trouble is forgiven: the jobs are most likely still running there.
                    trouble_s = max(self._client.silent_s, time.monotonic() - trouble_since)
                    is_silent = isinstance(error, ServerSilent) and not error.refused
                    if not is_silent or trouble_s >= board.config.timeout_s:
                        self._lose(str(error))
                        is_here = self._revive()
                        trouble_since = None
                board.over.wait(board.config.poll_s)
        finally:
            if self._held or self._had_trouble:
                self._cancel()

    def _fill(self) -> None:
        while len(self._held) < self._board.config.per_server and not self._board.over.is_set():
            job = self._board.take(self._client.url)
            if job is None:
                return
            try:
                prompt = job.prompt(self._upload(job))
            except RequestRejected as error:
                self._fail(job, str(error))
            except ServerSilent as error:
                self._board.give_back(job, self._client.url, str(error))
                raise
            else:
                self._submit(job, prompt)

    def _upload(self, job: Job) -> Mapping[str, str]:
        for file in job.uploads.values():
            if file.upload_name not in self._uploaded:
                self._uploaded[file.upload_name] = self._client.upload(file)
        return self._uploaded

    def _submit(self, job: Job, prompt: dict[str, Any]) -> None:
        # Noted before it is sent: where the answer gets lost, `_watch` finds out what happened.
        prompt_id = str(uuid.uuid4())
        self._hold(prompt_id, job)
        try:
            got = self._client.submit(prompt, prompt_id)
        except RequestRejected as error:
            del self._held[prompt_id]
            self._fail(job, str(error))
            return
        if got != prompt_id:
            del self._held[prompt_id]
            self._hold(got, job)

    def _hold(self, prompt_id: str, job: Job) -> None:
        url = self._client.url
        self._board.journal.write("submitted", job.id, server=url, prompt_id=prompt_id)
        self._held[prompt_id] = _Held(job)

    def _watch(self) -> None:
        for prompt_id, held in list(self._held.items()):
            # A prompt goes from the queue to the history in one step: not there and then not
            # here means that the server has forgotten it.
            if (entry := self._client.history(prompt_id)) is None:
                if self._client.is_queued(prompt_id):
                    continue
                entry = self._client.history(prompt_id)
            if entry is None:
                self._client.cancel({prompt_id}, strays_except=self._held)
                self._uploaded.clear()
                del self._held[prompt_id]
                reason = f"{self._client.url} has forgotten the job; was it restarted?"
                self._board.give_back(held.job, self._client.url, reason)
            else:
                self._finish(prompt_id, held, entry)

    def _finish(self, prompt_id: str, held: _Held, entry: Mapping[str, Any]) -> None:
        job = held.job
        problem = _problem_in(entry)
        outputs = _outputs_in(entry)
        if problem is None and not outputs:
            problem = "it ended without a file; does the workflow save its result?"
        parts: list[Path] = []
        if problem is None:
            try:
                for number, file in enumerate(outputs, start=1):
                    parts.append(self._board.part_path(job, number, file))
                    self._client.download(file, parts[-1])
            except RequestRejected as error:
                problem = f"its result could not be fetched: {error}"
        del self._held[prompt_id]
        if problem is not None:
            for part in parts:
                part.unlink(missing_ok=True)
            self._fail(job, problem)
            return
        names = self._board.deliver(job, parts)
        seconds = time.monotonic() - held.since
        self._board.settle(JobResult(job, "done", self._client.url, names, seconds=seconds))

    def _fail(self, job: Job, error: str) -> None:
        self._board.settle(JobResult(job, "failed", self._client.url, error=error))

    def _lose(self, reason: str) -> None:
        logger.warning("Lost a server: %s", reason)
        self._board.set_alive(self._client.url, False)
        self._uploaded.clear()
        while self._held:
            _, held = self._held.popitem()
            self._board.give_back(held.job, self._client.url, reason)

    def _revive(self) -> bool:
        """Wait until the server answers again; False if it does not or nothing is left to do."""
        delay_s = min(1.0, self._board.config.poll_s)
        deadline = time.monotonic() + self._board.config.give_up_s
        while not self._board.over.wait(delay_s):
            try:
                self._client.probe()
                # Others have its jobs now, so whatever it still has of ours is of no use.
                self._client.cancel(())
            except (ServerSilent, RequestRejected) as error:
                if time.monotonic() > deadline:
                    logger.warning("Gave up a server: %s", error)
                    return False
                delay_s = min(2 * delay_s, _MAX_BACK_OFF_S)
            else:
                logger.warning("A server is back: %s", self._client.url)
                self._board.set_alive(self._client.url, True)
                return True
        return False

    def _cancel(self) -> None:
        try:
            cancelled = self._client.cancel(self._held)
        except (ServerSilent, RequestRejected) as error:
            logger.warning("Could not cancel jobs: %s", error)
            return
        # What has ended by itself in the meantime stays noted as submitted; a rerun fetches it.
        for prompt_id in cancelled.intersection(self._held):
            job = self._held[prompt_id].job
            self._board.journal.write("cancelled", job.id, server=self._client.url)


def _problem_in(entry: Mapping[str, Any]) -> str | None:
    """Say why a prompt of the history failed, or None if it did not."""
    status = entry.get("status") or {}
    if status.get("status_str") != "error":
        return None
    for event, data in status.get("messages", ()):
        where = f"node {data.get('node_id')} ({data.get('node_type')})"
        if event == "execution_error":
            message = str(data.get("exception_message", "")).strip()
            return f"{where}: {data.get('exception_type')}: {message}"
        if event == "execution_interrupted":
            return f"{where}: somebody interrupted it on the server"
    return "the server reports an error without a message"


def _outputs_in(entry: Mapping[str, Any]) -> list[OutputFile]:
    """Saved files of a prompt of the history, or its previews if nothing was saved."""
    files = [
        OutputFile(item["filename"], item.get("subfolder", ""), item.get("type", "output"))
        for output in (entry.get("outputs") or {}).values()
        for items in output.values()
        if isinstance(items, list)
        for item in items
        if isinstance(item, dict) and "filename" in item
    ]
    return [file for file in files if file.type == "output"] or files
