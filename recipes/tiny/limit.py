"""How long a call of the recipe may take."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path


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
