"""One process at a time trains in a folder, and others can see whether one does."""

from __future__ import annotations

from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from ..errors import ConfigError, DiskError
from ..writing import reason_of

NAME = ".lock"
LOOK_S = 2.0  # longer than `is_running` takes


def lock_run(out: Path) -> BaseFileLock:
    """Hold the folder of a run until `release()`, or until this process ends, however it does.

    Raises:
        ConfigError: if another process trains there.
    """
    lock = FileLock(out / NAME)
    try:
        lock.acquire(timeout=LOOK_S)
    except Timeout as error:
        raise ConfigError(
            f"another process is training in {out}; wait for its end, or choose another folder"
        ) from error
    except OSError as error:
        raise DiskError(f"{out / NAME} cannot be locked: {reason_of(error)}") from error
    return lock


def is_running(out: Path) -> bool:
    """Whether a process trains in this folder now."""
    if not (out / NAME).is_file():
        return False
    try:
        with FileLock(out / NAME, timeout=0):
            return False
    except Timeout:
        return True
