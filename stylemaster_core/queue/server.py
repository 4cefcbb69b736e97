"""One server of a batch: it is filled up, watched, rested when it fails, and asked again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import answers
from .answers import AnswerError, plain
from .board import Board, Fetched
from .client import (
    ComfyClient,
    RequestRejected,
    ResultGone,
    ServerBusy,
    ServerSick,
    ServerSilent,
    ServerTrouble,
)
from .jobs import Job
from .listener import Listener, OnStep

logger = logging.getLogger("stylemaster")

_FIRST_PAUSE_S = 0.02  # between two looks at a server without a websocket
_MAX_REST_S = 60.0
# So many jobs that failed here, and not yet elsewhere, and the server rests.
_MAX_DOUBTS = 3
# So many ends that its websocket did not tell, and it is not relied on.
_MAX_UNTOLD = 2
_MAX_ENDED = 4  # jobs whose results are not fetched yet
_CANCEL_S = 10.0


@dataclass(eq=False)
class _Held:
    """A job at the server: it runs or waits there until it has ended, and is then fetched."""

    job: Job
    prompt_id: str
    sent: Mapping[str, Any]
    since: float = field(default_factory=time.monotonic)
    has_ended: bool = False
    was_told: bool = False
    entry: answers.Entry | None = None
    trouble_since: float | None = None

    def is_in(self, entry: answers.Entry) -> bool:
        """Whether an entry of the history is about what was sent."""
        values = {t: self.sent[t.node]["inputs"][t.input] for t in self.job.targets}
        return entry.answers(self.sent, values)


class Server:
    """One server, within the board's event loop.

    It is "away" (not reached yet, lost, sick: rested, and asked again with growing pauses), "here"
    or, when it was away for too long, "gone".
    """

    def __init__(self, client: ComfyClient, board: Board, on_step: OnStep | None = None) -> None:
        self.url = client.url
        self.state: Literal["away", "here", "gone"] = "away"
        self.delivered = 0
        self.doubts: set[str] = set()
        self._doubts_allowed = _MAX_DOUBTS
        self.trouble_since: float | None = None
        self._client = client
        self._board = board
        self._listener = Listener(client, self._on_end, self._on_change, on_step)
        self._held: dict[str, _Held] = {}  # by prompt id
        self._uploaded: dict[str, str] = {}  # upload name -> its name on the server
        self._is_sending = False
        self._is_idle = False
        self._had_trouble = False
        self._wakeup = asyncio.Event()
        self._fetching: asyncio.Task[None] | None = None
        self._trouble: tuple[_Held, ServerTrouble] | None = None  # of a fetch
        self._look_at = 0.0
        self._look_pause_s = _FIRST_PAUSE_S
        self._untold = 0
        self._quiet_until = 0.0
        self._failures = 0  # times away since the last result
        self._away_s = 0.0  # how long, together
        self._rest_s = 0.0  # the least that it must rest now
        self._here_since = 0.0

    @property
    def load(self) -> int:
        return self._is_sending + sum(not held.has_ended for held in self._held.values())

    @property
    def is_ready(self) -> bool:
        return self.trouble_since is None and not self._is_quiet

    @property
    def _is_quiet(self) -> bool:
        return time.monotonic() < self._quiet_until

    def wake(self) -> None:
        self._wakeup.set()

    async def connect(self) -> str | None:
        """Return what is wrong with the server, or None."""
        try:
            await self._client.probe()
        except (ServerTrouble, RequestRejected) as error:
            return str(error)
        self._arrive()
        return None

    async def adopt(self) -> None:
        """Go on with prompts that an earlier run queued here before it was killed."""
        if self.state != "here":
            return
        for job in list(self._board.pending):
            record = self._board.journal.last(job.id)
            prompt_id = record.get("prompt_id")
            is_there = record.get("event") in ("submitted", "delivering")
            if not is_there or prompt_id is None or record.get("server") != self.url:
                continue
            held = _Held(job, prompt_id, job.workflow)
            try:
                is_queued = prompt_id in await self._client.queued()
                entry = await self._client.history(prompt_id)
                is_good = entry is not None and entry.problem() is None and held.is_in(entry)
            except (ServerTrouble, RequestRejected, AnswerError) as error:
                logger.warning("Cannot look for earlier jobs: %s", error)
                return
            if (is_queued or is_good) and prompt_id not in self._held:
                self._board.pending.remove(job)
                self._held[prompt_id] = held

    async def run(self) -> None:
        """Do jobs until the batch is over or the server is gone."""
        listening = asyncio.ensure_future(self._listener.run())
        try:
            while not self._board.over.is_set() and (self.state == "here" or await self._return()):
                try:
                    await self._work()
                except ServerTrouble as error:
                    await self._meet(error)
        finally:
            listening.cancel()
            await self._stop_fetch()
            if self._held or self._had_trouble:
                await self._cancel()

    async def _work(self) -> None:
        """Do what is to be done now, then sleep until there is more."""
        self._wakeup.clear()
        if self._trouble is not None:
            (held, error), self._trouble = self._trouble, None
            await self._meet(error, held)
            return
        if len(self.doubts) < _MAX_DOUBTS:
            self._doubts_allowed = _MAX_DOUBTS
        elif len(self.doubts) >= self._doubts_allowed:
            self._doubts_allowed = len(self.doubts) + 1  # when it is back, one more is the test
            await self._leave(f"{self.url} fails every job")
            return
        await self._fill()
        await self._share()
        if self._held and time.monotonic() >= self._look_at and not self._is_quiet:
            await self._look()
        self.trouble_since = None
        self._start_fetch()
        await self._sleep()

    async def _sleep(self) -> None:
        moments = [self._look_at] if any(not h.has_ended for h in self._held.values()) else []
        if self._is_quiet:
            moments = [self._quiet_until]
        left_s = min(moments) - time.monotonic() if moments else None
        if left_s is None or left_s > 0:
            await self._pause(left_s)

    async def _pause(self, seconds: float | None) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wakeup.wait(), seconds)

    # Jobs on their way there.

    async def _fill(self) -> None:
        # After a failure one job is the test whether the server is well again.
        limit = 1 if self._failures else self._board.config.per_server
        while (
            self.load < limit
            and len(self._held) < limit + _MAX_ENDED
            and not self._is_quiet
            and not self._board.over.is_set()
            and (job := self._board.take(self)) is not None
        ):
            self._is_sending = True
            self._tell_idle(False)
            try:
                await self._send(job)
            finally:
                self._is_sending = False
        self._tell_idle(not self.load)

    def _tell_idle(self, is_idle: bool) -> None:
        if is_idle != self._is_idle:
            self._is_idle = is_idle
            self._board.changed()

    async def _send(self, job: Job) -> None:
        try:
            for file in job.uploads.values():
                if file.upload_name not in self._uploaded:
                    self._uploaded[file.upload_name] = await self._client.upload(file)
        except RequestRejected as error:
            self._board.fail(job, self, str(error))
        except ServerBusy as error:
            await self._rest_from(job, error)
        except ServerTrouble as error:
            self._refuse(job, error)
            raise
        else:
            await self._submit(job, job.prompt(self._uploaded))

    async def _submit(self, job: Job, prompt: dict[str, Any]) -> None:
        # Noted before it is sent: where the answer gets lost, `_look` finds out what happened.
        prompt_id = str(uuid.uuid4())
        held = self._hold(job, prompt_id, prompt)
        try:
            got = await self._client.submit(prompt, prompt_id)
            if got != prompt_id and got in self._held:
                raise ServerSick(f"{self.url} gives two jobs the id {plain(got, 80)}")
        except RequestRejected as error:
            await self._drop(held)
            self._board.fail(job, self, str(error))
        except ServerBusy as error:
            await self._drop(held)
            await self._rest_from(job, error)
        except ServerSick as error:
            await self._drop(held)
            self._refuse(job, error)
            raise
        except ServerSilent:
            self._look_at = 0.0
            raise
        else:
            if got != prompt_id and self._held.pop(prompt_id, None) is not None:
                self._hold(job, got, prompt)

    def _refuse(self, job: Job, error: ServerTrouble) -> None:
        """Give a job back that the server did not even take."""
        # Sick answers of a server that has done nothing well yet need not be about this job.
        is_blamed = self.delivered > 0 or not isinstance(error, ServerSick)
        self._board.give_back(job, self, str(error), is_blamed=is_blamed, is_last=True)
        error.has_blamed = True

    def _hold(self, job: Job, prompt_id: str, prompt: Mapping[str, Any]) -> _Held:
        self._board.journal.write("submitted", job.id, server=self.url, prompt_id=prompt_id)
        self._held[prompt_id] = held = _Held(job, prompt_id, prompt)
        # A look that is due stays due: the websocket may have told nothing yet.
        self._look_at = min(self._look_at, self._next_look())
        return held

    async def _drop(self, held: _Held) -> None:
        self._held.pop(held.prompt_id, None)
        if held.has_ended:  # so it said; it may be the one that is being fetched
            await self._stop_fetch()

    async def _rest_from(self, job: Job, error: ServerBusy) -> None:
        """Give a job back to a server that asks for a pause, and let it have one."""
        self._board.give_back(job, self, str(error), is_blamed=False)
        if not self._held:
            raise error
        self._failures += 1
        pause_s = max(self._back_off_s(), error.wait_s or 0.0)
        self._quiet_until = time.monotonic() + pause_s
        logger.info("%s; its next job waits for %.0f s", error, pause_s)

    async def _share(self) -> None:
        """Take the last waiting job back for a server that has nothing to do."""
        waiting = [held for held in self._held.values() if not held.has_ended]
        if len(waiting) < 2 or not self._board.wants(waiting[-1].job, self):
            return
        held = waiting[-1]
        if await self._client.withdraw(held.prompt_id) and not held.has_ended:
            await self._drop(held)
            self._board.give_up(held.job, self)

    # Jobs there.

    def _on_end(self, prompt_id: str) -> None:
        held = self._held.get(prompt_id)
        if held is not None and not held.was_told:
            held.was_told = held.has_ended = True
            self._start_fetch()
            self.wake()

    def _on_change(self) -> None:
        self._look_at = 0.0
        self.wake()

    def _next_look(self) -> float:
        is_told = self._listener.is_connected and self._untold < _MAX_UNTOLD
        pause_s = self._board.config.timeout_s / 4 if is_told else self._look_pause_s
        return time.monotonic() + pause_s

    async def _look(self) -> None:
        """Find out which jobs have ended, and which the server has forgotten."""
        queued: set[str] | None = None
        found = False
        running = [held for held in self._held.values() if not held.has_ended]
        for held in running:
            # A prompt goes from the queue to the history in one step: not there and then not
            # here means that the server has forgotten it.
            if (entry := await self._client.history(held.prompt_id)) is None:
                if queued is None:
                    queued = await self._client.queued()
                if held.prompt_id in queued:
                    continue
                entry = await self._client.history(held.prompt_id)
            if held.has_ended or held.prompt_id not in self._held:
                continue  # the websocket was faster
            if entry is None:
                await self._forget(held, is_blamed=held is running[0])
                continue
            found = True
            self._untold += self._listener.is_connected
            held.entry, held.has_ended = entry, True
            self._start_fetch()
        grown_s = min(1.5 * self._look_pause_s, max(self._board.config.poll_s, _FIRST_PAUSE_S))
        self._look_pause_s = max(self._look_pause_s / 4, _FIRST_PAUSE_S) if found else grown_s
        self._look_at = self._next_look()
        if found:
            self.wake()

    async def _forget(self, held: _Held, *, is_blamed: bool) -> None:
        await self._client.cancel({held.prompt_id}, strays_except=self._held)
        self._uploaded.clear()
        await self._drop(held)
        reason = f"{self.url} has forgotten the job; was it restarted?"
        self._board.give_back(held.job, self, reason, is_blamed=is_blamed)

    def _start_fetch(self) -> None:
        """Fetch the results of the next job that has ended, one job after the other."""
        if self._fetching is not None or self._is_quiet:
            return
        held = next((held for held in self._held.values() if held.has_ended), None)
        if held is not None:
            self._fetching = asyncio.ensure_future(self._fetch(held))

    async def _fetch(self, held: _Held) -> None:
        parts: list[Path] = []
        is_delivered = False
        try:
            is_delivered = await self._fetch_into(held, parts)
        except RequestRejected as error:
            self._fail(held, f"its result could not be fetched: {error}")
        except AnswerError as error:
            sick = ServerSick(f"{self.url} did not answer as a ComfyUI server does: {error}")
            self._trouble = held, sick
        except ServerTrouble as error:
            self._trouble = held, error
        except Exception as error:  # noqa: BLE001 - raised again by `run_jobs`
            self._board.stop(error)
        finally:
            if not is_delivered:
                for part in parts:
                    part.unlink(missing_ok=True)
            self._fetching = None
            self.wake()

    async def _fetch_into(self, held: _Held, parts: list[Path]) -> bool:
        """Fetch a job's results and deliver them; False if there are none."""
        entry = held.entry = held.entry or await self._client.history(held.prompt_id)
        if entry is None:
            held.has_ended = False
            self._look_at = time.monotonic() + _FIRST_PAUSE_S
            return False
        if not held.is_in(entry):
            raise ServerSick(f"{self.url} has another prompt under the id of a job")
        files = entry.files()
        problem = entry.problem()
        if problem is None and not files:
            problem = "it ended without a file; does the workflow save its result?"
        if problem is not None:
            self._fail(held, problem)
            return False
        hashes: list[str] = []
        for number, file in enumerate(files, start=1):
            parts.append(self._board.part_path(held.job, number, file))
            try:
                hashes.append(await self._client.download(file, parts[-1]))
            except ResultGone as error:
                # Where the server had it in its cache, it makes it again under another prefix.
                if not entry.is_cached(file) or not self._board.renew(held.job, self, str(error)):
                    raise
                del self._held[held.prompt_id]
                return False
        del self._held[held.prompt_id]
        self._prove()
        seconds = time.monotonic() - held.since
        self._board.deliver(Fetched(held.job, self.url, held.prompt_id, parts, hashes, seconds))
        await self._board.keep_up()
        return True

    def _fail(self, held: _Held, problem: str) -> None:
        del self._held[held.prompt_id]
        self._board.fail(held.job, self, problem)

    def _prove(self) -> None:
        """The server has done a job: nothing of what it did before counts."""
        self.delivered += 1
        self.doubts.clear()
        self._failures = 0
        self._away_s = 0.0

    # Trouble.

    async def _meet(self, error: ServerTrouble, held: _Held | None = None) -> None:
        """Forgive a short trouble, as the jobs are most likely still running there."""
        self._had_trouble = True
        now = time.monotonic()
        timeout_s = self._board.config.timeout_s
        place = held or self
        place.trouble_since = place.trouble_since or now
        self.trouble_since = self.trouble_since or now
        trouble_s = now - place.trouble_since
        poll_s = self._board.config.poll_s
        pause_s = min(max(trouble_s, _FIRST_PAUSE_S), poll_s)
        if error.has_blamed:  # a job has lost a try by it; the next one comes later each time
            pause_s = max(trouble_s, poll_s)
        asked_s = (error.wait_s or 0.0) if isinstance(error, ServerBusy) else 0.0
        if isinstance(error, ServerBusy):
            pause_s = max(pause_s, asked_s)
            is_short = bool(self._held) and trouble_s + pause_s < timeout_s
        else:
            is_silent = isinstance(error, ServerSilent) and not error.is_final
            is_short = is_silent and trouble_s < timeout_s
        if is_short:
            self._look_at = 0.0
            await self._wait(pause_s)
            return
        if held is None and not error.has_blamed and not isinstance(error, ServerBusy):
            waiting = [held for held in self._held.values() if not held.has_ended]
            held = next(iter(waiting or self._held.values()), None)
        await self._leave(str(error), held, asked_s)

    async def _leave(self, reason: str, blamed: _Held | None = None, asked_s: float = 0.0) -> None:
        logger.warning("Lost a server: %s", reason)
        if time.monotonic() - self._here_since > max(self._away_s, 1.0):
            self._failures, self._away_s = 0, 0.0  # it has worked for longer than it was away
        self._failures += 1
        self._rest_s = max(self._back_off_s(), asked_s)
        self.state = "away"
        self.trouble_since = None
        self._quiet_until = 0.0
        self._uploaded.clear()
        await self._stop_fetch()
        self._trouble = None
        lost, self._held = list(self._held.values()), {}
        for held in reversed(lost):
            self._board.give_back(held.job, self, reason, is_blamed=held is blamed)
        self._board.review()

    async def _return(self) -> bool:
        """Rest, then ask the server until it answers; False if it does not or all is done."""
        give_up_s = self._board.config.give_up_s
        was_doubted = len(self.doubts) >= _MAX_DOUBTS
        while True:
            since = time.monotonic()
            left_s = give_up_s - self._away_s
            await self._wait(min(self._rest_s, max(left_s, 0.0)), was_doubted)
            if self._board.over.is_set():
                return False
            problem = f"{self.url} asks for {self._rest_s:.0f} s" if self._rest_s > left_s else None
            try:
                await self._client.probe()
                # Others have its jobs now, so whatever it still has of ours is of no use.
                await self._client.cancel(())
            except (ServerTrouble, RequestRejected) as error:
                problem = str(error)
                self._failures += 1
                self._rest_s = self._back_off_s()
            else:
                if problem is None:
                    self._away_s += time.monotonic() - since
                    logger.warning("A server is asked again: %s", self.url)
                    self._arrive()
                    return True
            self._away_s += time.monotonic() - since
            if self._away_s >= give_up_s:
                logger.warning("Gave up a server: %s", problem)
                self.state = "gone"
                self._board.review()
                return False

    def _arrive(self) -> None:
        self.state = "here"
        self._here_since = time.monotonic()
        self._look_at = 0.0
        self._board.changed()

    def _back_off_s(self) -> float:
        first_s = min(1.0, self._board.config.poll_s)
        return min(first_s * 2.0 ** min(max(self._failures - 1, 0), 10), _MAX_REST_S)

    async def _wait(self, seconds: float, was_doubted: bool = False) -> None:
        """Wait, until the batch is over at most, or until it is known not to be at fault."""
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0 and not self._board.over.is_set():
            if was_doubted and len(self.doubts) < _MAX_DOUBTS:
                return
            self._wakeup.clear()
            await self._pause(left_s)

    async def _stop_fetch(self) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})
            self._fetching = None  # one that had not begun does not do it itself

    async def _cancel(self) -> None:
        try:
            cancelled = await asyncio.wait_for(self._client.cancel(self._held), _CANCEL_S)
        except (ServerTrouble, RequestRejected, asyncio.TimeoutError) as error:
            logger.warning("Could not cancel jobs at %s: %s", self.url, error)
            return
        # What has ended by itself in the meantime stays noted as submitted; a rerun fetches it.
        for prompt_id in cancelled.intersection(self._held):
            job = self._held[prompt_id].job
            self._board.journal.write("cancelled", job.id, server=self.url)
