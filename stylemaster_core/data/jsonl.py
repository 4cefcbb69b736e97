"""Files of JSON lines that several processes append to, and that survive being killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import ConfigError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder; other processes wait meanwhile."""
    with FileLock(folder / ".lock"):
        yield


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record; it is on the disk, whole, when this returns.

    Source: own; several processes may append to one file, the lock of its folder orders them.
    """
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with locked(path.parent), path.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            # A killed process may have left half a line; it must not swallow this one.
            if stream.read(1) != b"\n":
                line = b"\n" + line
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read all whole records; lines that a killed process cut short are left out.

    Raises:
        ConfigError: if a line is something else.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if line.startswith(b"{") and not line.rstrip().endswith(b"}"):
                continue
            raise ConfigError(f"{path}, line {number} is no JSON ({error}); mend it") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{path}, line {number} is {line[:40]!r}; expected a JSON object")
        records.append(record)
    return records


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file beside its place and rename it into place; one that is there is replaced.

    Callers decide whether replacing is allowed, and hold the lock of the folder.
    """
    _replace(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines anew, as `write_json` does."""
    _replace(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def _replace(path: Path, text: str) -> None:
    for left_by_kill in path.parent.glob(f".{path.name}.*.part"):
        left_by_kill.unlink()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ConfigError: if it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
