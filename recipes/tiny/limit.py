"""How long a call of the recipe may take, and what it has cost."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from stylemaster_core.data.jsonl import append_jsonl


class TimeOver(Exception):  # noqa: N818
    """The time of this call is over; what was done is kept."""


class TimeLimit:
    """Minutes from now on, or None for no limit."""

    def __init__(self, minutes: float | None = None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def check(self) -> None:
        """Raise `TimeOver` if nothing is left."""
        if self.left_s <= 0:
            raise TimeOver

    @contextlib.contextmanager
    def touching(self, stop: Path) -> Iterator[None]:
        """Meanwhile, make the file `stop` when the time is over: the training loop looks at it."""
        if self._end is None:
            yield
            return
        timer = threading.Timer(max(self.left_s, 0), stop.touch)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@contextlib.contextmanager
def logged(path: Path, stage: str) -> Iterator[None]:
    """Append to a log what the block cost, however it ends.

    A line says the stage, when it began, its seconds, those of all cores (its own processes that
    have ended included), and whether it came to its end.
    """
    began, used, when = time.monotonic(), _core_seconds(), time.strftime("%Y-%m-%d %H:%M:%S")
    ended = False
    try:
        yield
        ended = True
    finally:
        cost = {
            "seconds": round(time.monotonic() - began),
            "core_seconds": round(_core_seconds() - used),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(path, {"stage": stage, "began": when, **cost, "ended": ended})


def _core_seconds() -> float:
    return sum(os.times()[:4])
