"""The journal of a batch: JSON lines beside the results, so that a rerun continues."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..data.jsonl import read_jsonl
from ..errors import ConfigError
from ..file_names import check_name

# What a rerun needs; the rest is for people to read.
_KEPT = ("event", "job", "server", "prompt_id", "files", "hashes")
_Files = dict[str, str | None]


class Journal:
    """Append-only record of what became of every job; safe to use from several threads.

    Events: `submitted` (server, prompt_id), `lost` (server, error), `returned` (server, error),
    `cancelled`, `delivering` (server, prompt_id, files, hashes), `done` (files), `failed` (error).
    Only one process at a time holds a folder's journal.

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

    def is_done(self, job_id: str) -> bool:
        """Return whether a job is done and its files are still there."""
        return is_done(self.last(job_id), self.path.parent)

    def own_files(self, job_id: str) -> dict[str, str | None]:
        """Return the result files that belong to a job, name -> SHA-256 where it was noted."""
        with self._mutex:
            return dict(self._files.get(job_id, {}))

    def write(self, event: str, job_id: str, **fields: Any) -> None:
        """Append a record, which a kill cannot take back.

        "delivering" is on the disk when this returns: a result whose name the journal does not
        know would be delivered once more. What else a power cut takes only costs a look or a run.
        """
        record = {"event": event, "job": job_id, **fields}
        record["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with self._mutex:
            self._stream.write(json.dumps(record).encode() + b"\n")
            self._stream.flush()
            self._last[job_id] = _kept(record)
            _remember_files(record, self._files)
        if event == "delivering":
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file, all of it on the disk, and let another run use the folder."""
        try:
            os.fsync(self._stream.fileno())
        finally:
            self._stream.close()
            self._file_lock.release()


def is_done(record: Mapping[str, Any], folder: Path) -> bool:
    """Return whether a job's last record says that it is done, and its files are still there."""
    is_there = all((folder / name).is_file() for name in record.get("files", ()))
    return record.get("event") == "done" and is_there


def read_journal(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of every job without taking the folder, job id -> record.

    Raises:
        ConfigError: if the journal is damaged.
    """
    return _read(folder / "queue.jsonl")[0]


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, _Files]]:
    last: dict[str, dict[str, Any]] = {}
    files: dict[str, _Files] = {}
    for record in read_jsonl(path, _problem, missing_ok=True):
        last[record["job"]] = record
        _remember_files(record, files)
    return {job_id: _kept(record) for job_id, record in last.items()}, files


def _problem(record: dict[str, Any]) -> str | None:
    names = record.get("files", [])
    hashes = record.get("hashes", [])
    if not isinstance(record.get("job"), str) or not isinstance(record.get("event"), str):
        return "not a record of this journal"
    if not isinstance(record.get("prompt_id", ""), str):
        return "its prompt_id is no text"
    if not isinstance(names, list):
        return "its files are no list"
    for name in names:
        if len(check_name(name)) != 1:
            return "its files are not names of this folder"
    if not isinstance(hashes, list) or len(hashes) not in (0, len(names)):
        return "its hashes are not those of its files"
    return None


def _kept(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in _KEPT if key in record}


def _remember_files(record: dict[str, Any], files: dict[str, _Files]) -> None:
    if names := record.get("files"):
        own = files.setdefault(record["job"], {})
        hashes = record.get("hashes") or [own.get(name) for name in names]
        own.update(zip(names, hashes, strict=True))
