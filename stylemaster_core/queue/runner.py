"""Runs jobs on several ComfyUI servers, so that each result is delivered exactly once."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Generator, Sequence
from pathlib import Path

from ..errors import StyleMasterError
from .board import Board, JobResult, RunConfig
from .client import ComfyClient
from .jobs import Job
from .journal import Journal
from .listener import OnStep
from .server import Server

_TICK_S = 0.2  # Windows does not let Ctrl-C interrupt an endless wait


def run_jobs(
    jobs: Sequence[Job],
    clients: Sequence[ComfyClient],
    journal: Journal,
    folder: Path,
    config: RunConfig,
    on_step: OnStep | None = None,
    *,
    redo: bool = False,
) -> Generator[JobResult, None, None]:
    """Run the jobs that are not done, or whose files are gone; yield each result as it ends.

    Closing the iterator early (or Ctrl-C) cancels what was queued; the journal stays good for
    another run.

    Args:
        jobs: from `make_jobs`.
        clients: one for each server.
        journal: of `folder`.
        folder: for the results.
        config: see `RunConfig`.
        on_step: called in another thread with each step that a server tells.
        redo: run all of them; what they made before is replaced.

    Raises:
        StyleMasterError: if no server answers at the start.
        OSError: if a result cannot be written here.
    """
    results: queue.Queue[JobResult | None] = queue.Queue()
    board = Board(
        [job for job in jobs if redo or not journal.is_done(job.id)],
        journal,
        folder,
        config,
        results.put,
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=_run_loop, args=(loop, board, clients, on_step, results), name="queue"
    )
    thread.start()
    try:
        while True:
            try:
                result = results.get(timeout=_TICK_S)
            except queue.Empty:
                continue
            if result is None:
                break
            yield result
    finally:
        # The loop is closed once the thread is at its end.
        if thread.is_alive():
            loop.call_soon_threadsafe(board.stop)
        thread.join()
        loop.close()
    if board.failure is not None:
        raise board.failure


def _run_loop(
    loop: asyncio.AbstractEventLoop,
    board: Board,
    clients: Sequence[ComfyClient],
    on_step: OnStep | None,
    results: queue.Queue[JobResult | None],
) -> None:
    try:
        loop.run_until_complete(_run(board, clients, on_step))
    except BaseException as error:  # noqa: BLE001 - raised again by `run_jobs`
        board.failure = board.failure or error
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        results.put(None)


async def _run(board: Board, clients: Sequence[ComfyClient], on_step: OnStep | None) -> None:
    board.recover()
    if not board.has_open:
        return
    servers = [Server(client, board, on_step) for client in clients]
    board.servers = servers
    tasks: list[asyncio.Task[None]] = []
    try:
        over = asyncio.ensure_future(board.over.wait())
        connecting = asyncio.gather(*(server.connect() for server in servers))
        await asyncio.wait({over, connecting}, return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():
            connecting.cancel()
            return
        problems = [str(problem) for problem in connecting.result() if problem]
        if len(problems) == len(servers):
            raise StyleMasterError(
                "No server answers; start ComfyUI or check --server: " + "; ".join(problems)
            )
        for server in servers:
            await server.adopt()
        tasks = [asyncio.ensure_future(server.run()) for server in servers]
        waiting = {over, *tasks}
        while not over.done():
            ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()  # a fault of ours
    finally:
        board.over.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await board.drain()
        for client in clients:
            await client.close()
