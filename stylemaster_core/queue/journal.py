"""The journal of a batch: JSON lines beside the results, so that a rerun continues."""

from __future__ import annotations

import json
import os
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..data.jsonl import read_jsonl
from ..errors import ConfigError
from ..file_names import check_name


class Journal:
    """Append-only record of what became of every job; safe to use from several threads.

    Events: `submitted` (server, prompt_id), `lost`, `cancelled`, `delivering` (files), `done`
    (files), `failed` (error). Only one process at a time holds a folder's journal.

    Args:
        folder: where results go; made if missing.

    Raises:
        ConfigError: if another run uses the folder, or the journal is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "queue.jsonl"
        self._mutex = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file_lock = FileLock(folder / ".queue.lock", timeout=0)
            self._file_lock.acquire()
        except Timeout as error:
            raise ConfigError(f"Another run is writing to {folder}; give another --out.") from error
        except OSError as error:
            raise ConfigError(f"Cannot write to {folder}: {error.strerror}.") from error
        try:
            self._last, self._files = _read(self.path)
            self._stream = self.path.open("ab")
            if self._stream.tell() and not self.path.read_bytes().endswith(b"\n"):
                self._stream.write(b"\n")
        except BaseException:
            self._file_lock.release()
            raise

    def last(self, job_id: str) -> dict[str, Any]:
        """Return the last record of a job, or an empty dictionary."""
        with self._mutex:
            return self._last.get(job_id, {})

    def own_files(self, job_id: str) -> set[str]:
        """Return the names of result files that belong to a job."""
        with self._mutex:
            return set(self._files.get(job_id, ()))

    def write(self, event: str, job_id: str, **fields: Any) -> None:
        """Append a record; it is on the disk when this returns."""
        record = {"event": event, "job": job_id, **fields}
        record["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with self._mutex:
            self._stream.write(json.dumps(record).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
            _remember(record, self._last, self._files)

    def close(self) -> None:
        """Close the file and let another run use the folder."""
        self._stream.close()
        self._file_lock.release()


def read_journal(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of every job without taking the folder, job id -> record.

    Raises:
        ConfigError: if the journal is damaged.
    """
    return _read(folder / "queue.jsonl")[0]


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, set[str]]]:
    last: dict[str, dict[str, Any]] = {}
    files: dict[str, set[str]] = {}
    for record in read_jsonl(path, _problem, missing_ok=True):
        _remember(record, last, files)
    return last, files


def _problem(record: dict[str, Any]) -> str | None:
    names = record.get("files", [])
    if not all(isinstance(record.get(key), str) for key in ("job", "event")):
        return "not a record of this journal"
    if not isinstance(names, list) or not all(len(check_name(name)) == 1 for name in names):
        return "its files are not names of this folder"
    return None


def _remember(
    record: dict[str, Any], last: dict[str, dict[str, Any]], files: dict[str, set[str]]
) -> None:
    last[record["job"]] = record
    files.setdefault(record["job"], set()).update(record.get("files", ()))
