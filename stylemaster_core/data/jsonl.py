"""Files of JSON lines that several processes append to, and that survive being killed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock

from ..errors import ConfigError
from ..writing import append_line, disk_errors, write_text

logger = logging.getLogger("stylemaster")

# Without the looks around that take longer than a short line; the stubs leave it out.
_scan = json.JSONDecoder().scan_once  # pyright: ignore[reportAttributeAccessIssue]
# Says what is wrong with a record of a file, None if nothing is.
Check = Callable[[dict[str, Any]], "str | None"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder; other processes wait meanwhile."""
    lock = FileLock(folder / ".lock")
    with disk_errors(folder / ".lock"):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record; it is on the disk, whole, when this returns.

    Source: own; several processes may append to one file, the lock of its folder orders them.
    """
    with locked(path.parent):
        append_line(path, json.dumps(record, ensure_ascii=False).encode())


def read_jsonl(
    path: Path, check: Check | None = None, *, missing_ok: bool = False
) -> list[dict[str, Any]]:
    """Read all whole records; a line that was cut short is left out, and the log says so.

    A killed process or a full disk leaves half a line, which counts as not written. Later processes
    begin a new line, so it may stand anywhere.

    Args:
        path: the file.
        check: says what is wrong with a record, or raises KeyError, TypeError or ValueError.
        missing_ok: whether no file is an empty one.

    Raises:
        ConfigError: if the file cannot be read, a line is something else, or a record is wrong.
    """
    if missing_ok and not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parsed(line)
        if record is None:
            record = _parsed_slowly(line, f"{path}, line {number}")
            if record is None:
                continue
        if check is not None:
            try:
                problem = check(record)
            except (KeyError, TypeError, ValueError) as error:
                problem = repr(error)
            if problem:
                _refuse(line, f"{path}, line {number}", problem)
        records.append(record)
    return records


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object that a line is, and nothing else; None for all that needs a closer look."""
    try:
        text = line.decode()
        record, end = _scan(text, 0)
    except (StopIteration, ValueError, RecursionError):
        return None
    return record if end == len(text) and type(record) is dict else None


def _parsed_slowly(line: bytes, where: str) -> dict[str, Any] | None:
    """The object of a line with other bytes around; None for an empty line or one cut short."""
    if not line.strip(b" \t\r\0"):  # a power cut may leave null bytes
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        if _is_cut(line, error):
            logger.warning("%s was cut short and counts as not written", where)
            return None
        raise ConfigError(f"{where} is no JSON ({error}); mend it") from error
    if not isinstance(record, dict):
        _refuse(line, where, "no JSON object")
    return record


def _refuse(line: bytes, where: str, problem: str) -> NoReturn:
    raise ConfigError(f"{where} is {line[:80]!r}: {problem}; mend or remove it")


def _is_cut(line: bytes, error: Exception) -> bool:
    """Whether a line is the beginning of a JSON object."""
    if not line.startswith(b"{"):
        return False
    if not line.rstrip().endswith(b"}"):
        return True
    # An inner object may have just ended, or a text goes on that holds a brace.
    return isinstance(error, json.JSONDecodeError) and (
        error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
    )


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file beside its place and rename it into place; one that is there is replaced.

    Callers decide whether replacing is allowed, and hold the lock of the folder.
    """
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", overwrite=True)


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines anew, as `write_json` does."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(path, "".join(lines), overwrite=True)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ConfigError: if it is missing or damaged.
    """
    try:
        return json.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
