"""Being asked to stop: by a signal, or by a file (which works on every system)."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType

STOP_FILE = "stop"
SAME_REQUEST_S = 3.0


class StopRequest:
    """While open, SIGINT and SIGTERM, or a file `stop` in the run's folder, ask for a stop.

    The pass under way is finished, the step it belongs to forgotten, and a checkpoint of the steps
    before it written. A later signal ends the process at once, which loses the steps since the last
    checkpoint; within a few seconds it counts as the same request, because launchers pass on what
    the terminal has already sent to every process.
    """

    def __init__(self, out: Path) -> None:
        self._file = out / STOP_FILE
        self._asked_at: float | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._file.unlink(missing_ok=True)
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._file.unlink(missing_ok=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at > SAME_REQUEST_S:
            signal.signal(number, self._before[number])  # type: ignore[arg-type]
            signal.raise_signal(number)

    @property
    def asked(self) -> bool:
        """Whether someone asked."""
        return self._asked_at is not None or self._file.exists()
