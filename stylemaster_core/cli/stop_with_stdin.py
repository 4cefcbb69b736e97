"""Ending with the process that started this one, however it ends."""

from __future__ import annotations

import _thread
import os
import sys
import threading
import time

GRACE_S = 120.0  # for the step under way and its checkpoint


def stop_with_stdin() -> None:
    """Ask for a stop, as Ctrl-C does, once the standard input closes; after a while, insist.

    A pipe closes when the process that holds its other end is gone, even if it was killed.
    """
    threading.Thread(target=_wait, name="stop-with-stdin", daemon=True).start()


def _wait() -> None:
    # The plain descriptor: a thread that holds the lock of sys.stdin would stop the interpreter.
    while os.read(sys.__stdin__.fileno() if sys.__stdin__ else 0, 1024):
        pass
    _thread.interrupt_main()
    time.sleep(GRACE_S)
    os._exit(130)
