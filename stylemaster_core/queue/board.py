"""Who does which job of a batch, and what became of it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, Protocol

from ..writing import move_new
from .answers import OutputFile
from .jobs import Job
from .journal import Journal

_PART_PREFIX = ".stylemaster-"
# A job that so many servers could not do is to blame itself.
_BLAMED_BY = 2
_MAX_DELIVERIES = 16


@dataclass(frozen=True)
class RunConfig:
    """How a batch is run."""

    per_server: int = 2  # jobs at a server at a time: one runs, the others wait
    timeout_s: float = 60.0  # a server that is silent for so long is lost
    give_up_s: float = 600.0  # a lost or sick server is asked again for so long
    max_attempts: int = 3  # how often a job may lose its server
    poll_s: float = 1.0  # longest pause between two looks at a server without a websocket


@dataclass(frozen=True)
class JobResult:
    """What became of a job."""

    job: Job
    status: Literal["done", "failed"]
    server: str | None
    files: tuple[str, ...] = ()  # names in the output folder
    error: str | None = None
    seconds: float = 0.0  # from queueing to delivery, on the server that did it


class Fetched(NamedTuple):
    """A job's results, downloaded and without names of their own."""

    job: Job
    url: str
    prompt_id: str
    parts: Sequence[Path]
    hashes: Sequence[str]
    seconds: float


class Taker(Protocol):
    """What the board knows of a server."""

    url: str
    state: Literal["away", "here", "gone"]
    delivered: int  # results
    doubts: set[str]  # jobs that failed there since its last result, by a fault not yet found

    @property
    def load(self) -> int:
        """Jobs that run, wait or are on the way there."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether it would take a job at once."""
        ...

    def wake(self) -> None:
        """Look at the board again."""
        ...


@dataclass
class _Past:
    lost_on: list[str] = field(default_factory=list)
    failed_on: dict[str, str] = field(default_factory=dict)  # server -> error


class Board:
    """The jobs of a batch, within one event loop.

    A job is pending, at one server, in delivery or settled. From a server it comes back (`fail`,
    `give_back`) or is delivered; nothing that is in delivery can come back.

    Args:
        jobs: those to do.
        journal: of `folder`.
        folder: for the results.
        config: see `RunConfig`.
        emit: called with each result.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        journal: Journal,
        folder: Path,
        config: RunConfig,
        emit: Callable[[JobResult], None],
    ) -> None:
        self.journal = journal
        self.config = config
        self.pending = deque(jobs)
        self.servers: Sequence[Taker] = ()
        self.over = asyncio.Event()
        self.failure: BaseException | None = None
        self._emit = emit
        self._files = _ResultFiles(journal, folder)
        self._open = {job.id for job in jobs}
        self._past: dict[str, _Past] = {}
        self._renewed: set[str] = set()
        self._deliveries: set[asyncio.Task[None]] = set()
        self._one_delivery = asyncio.Lock()

    @property
    def has_open(self) -> bool:
        """Whether a job has no result yet."""
        return bool(self._open)

    def recover(self) -> None:
        """Finish deliveries that an earlier run was killed in; sweep its half results."""
        for job in list(self.pending):
            record = self.journal.last(job.id)
            names, hashes = record.get("files", ()), record.get("hashes", ())
            if record.get("event") != "delivering" or not names:
                continue
            if self._files.complete(job, names, hashes):
                self.pending.remove(job)
                self._settle(JobResult(job, "done", record.get("server"), tuple(names)))
        self._files.sweep()

    def take(self, server: Taker) -> Job | None:
        """Hand out a job, one that this server lost only if no other server could take it."""
        for index, job in enumerate(self.pending):
            if self._may_take(server, job):
                if server.load and self._has_idle(job, server):
                    return None
                del self.pending[index]
                return job
        return None

    def wants(self, job: Job, server: Taker) -> bool:
        """Return whether another server has nothing to do and could take a job off this one."""
        return not self.pending and self._has_idle(job, server)

    def give_back(
        self, job: Job, server: Taker, reason: str, *, is_blamed: bool, is_last: bool = False
    ) -> None:
        """Make a job pending again that its server does not do.

        Args:
            job: the job.
            server: where it was.
            reason: why it is no longer there.
            is_blamed: whether it may be the cause; after too many times it has failed.
            is_last: whether other jobs are to be tried before it.
        """
        event = "lost" if is_blamed else "returned"
        self.journal.write(event, job.id, server=server.url, error=reason)
        if not is_blamed:
            (self.pending.append if is_last else self.pending.appendleft)(job)
        else:
            lost_on = self._past.setdefault(job.id, _Past()).lost_on
            lost_on.append(server.url)
            if len(lost_on) >= self.config.max_attempts:
                times = f"its server was lost {len(lost_on)} times"
                self._fail(job, server.url, f"{times}, last: {reason}")
                return
            self.pending.append(job)
        self.changed()

    def renew(self, job: Job, server: Taker, reason: str) -> bool:
        """Make a job pending under another filename prefix, once; False if that is not possible."""
        renewed = None if job.id in self._renewed else job.with_other_prefix()
        if renewed is None:
            return False
        self._renewed.add(job.id)
        self.give_back(renewed, server, reason, is_blamed=False)
        return True

    def give_up(self, job: Job, server: Taker) -> None:
        """Make a job pending again that was taken off a server's queue for an idle server."""
        self.journal.write("cancelled", job.id, server=server.url)
        self.pending.appendleft(job)
        self.changed()

    def fail(self, job: Job, server: Taker, error: str) -> None:
        """Take note that a server could not do a job; another one may try it."""
        self._past.setdefault(job.id, _Past()).failed_on[server.url] = error
        server.doubts.add(job.id)
        if self._has_failed(job):
            self._fail(job, server.url, error)
            return
        self.journal.write("returned", job.id, server=server.url, error=error)
        self.pending.append(job)
        self.changed()

    def review(self) -> None:
        """Settle the failed jobs that no server is left to try again, or all if none is left."""
        failed = [job for job in self.pending if job.id in self._past and self._has_failed(job)]
        known = {job.id for job in failed}
        self.pending = deque(job for job in self.pending if job.id not in known)
        for job in failed:
            url, error = list(self._past[job.id].failed_on.items())[-1]
            self._fail(job, url, error)
        if all(server.state == "gone" for server in self.servers):
            while self.pending:
                self._fail(self.pending.popleft(), None, "no server is left; run again to continue")
        self.changed()

    def deliver(self, fetched: Fetched) -> None:
        """Give downloaded files their names; from here on the job is out of the server's hands."""
        task = asyncio.ensure_future(self._deliver(fetched))
        self._deliveries.add(task)
        task.add_done_callback(self._deliveries.discard)

    async def keep_up(self) -> None:
        """Wait while the disk is slower than the servers."""
        while len(self._deliveries) > _MAX_DELIVERIES:
            await asyncio.wait(set(self._deliveries), return_when=asyncio.FIRST_COMPLETED)

    async def drain(self) -> None:
        """Wait for the deliveries, then sweep half results."""
        while self._deliveries:
            await asyncio.wait(set(self._deliveries))
        self._files.sweep()

    def part_path(self, job: Job, number: int, file: OutputFile) -> Path:
        """Where to download a result to."""
        return self._files.part_path(job, number, PurePosixPath(file.filename).suffix)

    def changed(self) -> None:
        """Let every server look at the board again."""
        for server in self.servers:
            server.wake()

    def stop(self, failure: BaseException | None = None) -> None:
        """End the batch, early if there is something open."""
        self.failure = self.failure or failure
        self.over.set()
        self.changed()

    def _may_take(self, server: Taker, job: Job) -> bool:
        past = self._past.get(job.id)
        if past is None:
            return True
        if server.url in past.failed_on:
            return False
        return server.url not in past.lost_on or not any(
            other.state == "here"
            for other in self.servers
            if other.url not in past.lost_on and other.url not in past.failed_on
        )

    def _has_idle(self, job: Job, server: Taker) -> bool:
        return any(
            other is not server
            and other.state == "here"
            and other.is_ready
            and not other.load
            and self._may_take(other, job)
            for other in self.servers
        )

    def _has_failed(self, job: Job) -> bool:
        failed_on = self._past[job.id].failed_on
        if not failed_on or len(failed_on) >= _BLAMED_BY:
            return bool(failed_on)
        # Where a server has proved good, its word is enough once nobody else is there to ask.
        is_proved = any(s.delivered for s in self.servers if s.url in failed_on)
        return not any(
            other.state == "here" or (other.state == "away" and not is_proved)
            for other in self.servers
            if other.url not in failed_on
        )

    def _fail(self, job: Job, url: str | None, error: str) -> None:
        for server in self.servers:  # it was the job
            server.doubts.discard(job.id)
        self._settle(JobResult(job, "failed", url, error=error))
        self.changed()

    async def _deliver(self, fetched: Fetched) -> None:
        try:
            async with self._one_delivery:
                names = await asyncio.to_thread(self._files.place, fetched)
            seconds = fetched.seconds
            self._settle(JobResult(fetched.job, "done", fetched.url, names, seconds=seconds))
        except Exception as error:  # noqa: BLE001 - raised again by `run_jobs`
            self.stop(error)

    def _settle(self, result: JobResult) -> None:
        job = result.job
        assert job.id in self._open, f"{job.id} has a second result"
        fields: dict[str, Any] = {"name": job.name, "server": result.server}
        if result.status == "done":
            fields |= {"files": list(result.files), "seconds": round(result.seconds, 1)}
        else:
            fields["error"] = result.error
        self.journal.write(result.status, job.id, **fields, values=dict(job.values))
        self._open.remove(job.id)
        self._past.pop(job.id, None)
        self._emit(result)
        if not self._open:
            self.stop()


class _ResultFiles:
    """The result files of a folder: none is overwritten that is not the job's own."""

    def __init__(self, journal: Journal, folder: Path) -> None:
        self._journal = journal
        self._folder = folder

    def part_path(self, job: Job, number: int, suffix: str) -> Path:
        if not re.fullmatch(r"\.[A-Za-z0-9]{1,10}", suffix):
            suffix = ""
        return self._folder / f"{_PART_PREFIX}{job.id}-{number}{suffix}.part"

    def sweep(self) -> None:
        for part in self._folder.glob(f"{_PART_PREFIX}*.part"):
            part.unlink()

    def place(self, fetched: Fetched) -> tuple[str, ...]:
        """Give the parts readable names, noted before, so that a rerun knows its own."""
        job, url, prompt_id, parts, hashes, _ = fetched
        for part in parts:
            with part.open("rb+") as stream:
                os.fsync(stream.fileno())
        own = self._journal.own_files(job.id)
        fields = {"server": url, "prompt_id": prompt_id, "hashes": list(hashes)}
        refused: set[str] = set()
        while True:
            names: list[str] = []
            for number, part in enumerate(parts, start=1):
                names.append(self._free_name(f"{job.name}_{number}", part, own, {*refused, *names}))
            self._journal.write("delivering", job.id, files=names, **fields)
            if (taken := self._link(parts, names, own)) is None:
                return tuple(names)
            refused.add(taken)

    def complete(self, job: Job, names: Sequence[str], hashes: Sequence[str]) -> bool:
        """Finish what `place` had begun; False if a file is neither here nor there."""
        if len(names) != len(hashes):
            return False
        missing: list[tuple[Path, Path]] = []
        for number, (name, digest) in enumerate(zip(names, hashes, strict=True), start=1):
            target = self._folder / name
            if _hash_of(target) == digest:
                continue
            part = self.part_path(job, number, target.suffix)
            if os.path.lexists(target) or _hash_of(part) != digest:
                return False
            missing.append((part, target))
        for part, target in missing:
            move_new(part, target)
        return True

    def _free_name(
        self, stem: str, part: Path, own: Mapping[str, str | None], taken: Iterable[str]
    ) -> str:
        suffix = part.with_suffix("").suffix
        name = f"{stem}{suffix}"
        count = 1
        while name in taken or (os.path.lexists(self._folder / name) and not self._is(name, own)):
            count += 1
            name = f"{stem}-{count}{suffix}"
        return name

    def _is(self, name: str, own: Mapping[str, str | None]) -> bool:
        """Return whether an existing file is what the job delivered under this name."""
        return name in own and own[name] in (None, _hash_of(self._folder / name))

    def _link(
        self, parts: Sequence[Path], names: Sequence[str], own: Mapping[str, str | None]
    ) -> str | None:
        """Move parts to their names; return a name that somebody else has just taken."""
        pairs = [(part, self._folder / name) for part, name in zip(parts, names, strict=True)]
        is_own = [name in own and os.path.lexists(self._folder / name) for name in names]
        made: list[tuple[Path, Path]] = []
        for (part, target), known in zip(pairs, is_own, strict=True):
            if known:
                continue
            try:
                move_new(part, target)
            except FileExistsError:
                for before, path in made:
                    os.replace(path, before)
                return target.name
            made.append((part, target))
        for (part, target), known in zip(pairs, is_own, strict=True):
            if known:
                os.replace(part, target)
        return None


def _hash_of(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()
