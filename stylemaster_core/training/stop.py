"""Being asked to stop: by a signal, or by a file (which works on every system)."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType

STOP_FILE = "stop"


class StopRequest:
    """While open, SIGINT and SIGTERM, or a file `stop` in the run's folder, ask for a stop.

    The pass under way is finished, the step it belongs to forgotten, and a checkpoint of the steps
    before it written. A second signal ends the process at once, which loses the steps since the
    last checkpoint.
    """

    def __init__(self, out: Path) -> None:
        self._file = out / STOP_FILE
        self._asked = False
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
        self._asked = True
        signal.signal(number, self._before[number])  # type: ignore[arg-type]

    @property
    def asked(self) -> bool:
        """Whether someone asked."""
        return self._asked or self._file.exists()
