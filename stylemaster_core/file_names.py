"""Names of files that are not to be trusted: those of workflows, and those written in files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .errors import ConfigError

MAX_PART_BYTES = 255  # of one file's or folder's name, on every common file system
MAX_NEW_PART_BYTES = 200  # of one that is to be written: numbers and endings are added to it
MAX_NAME_BYTES = 1024

_SEPARATORS = re.compile(r"[/\\]")
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")  # what we write ourselves
_CONTROL = re.compile(r"[\x01-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def check_name(name: object, *, new: bool = False) -> Sequence[str]:
    """Parts of a relative name that may lead into a folder and never out of it.

    Args:
        name: relative path with either separator; other types are refused.
        new: whether something of this name is to be written.

    Raises:
        ConfigError: if it is empty, absolute, climbs up, names a drive or a stream, holds what no
            file's name holds, or is too long for the disk.
    """
    if not isinstance(name, str):
        raise ConfigError(f"the path {name!r:.80} is refused: a text was expected")
    if _PLAIN.fullmatch(name):
        return [name]
    parts = [part for part in _SEPARATORS.split(name) if part != "."]
    longest = MAX_NEW_PART_BYTES if new else MAX_PART_BYTES
    faults = {
        "it is empty": not name.strip(),
        "it holds a null byte": "\0" in name,
        "it holds a control character": bool(_CONTROL.search(name)),
        "it holds half a character (a lone surrogate)": bool(_SURROGATE.search(name)),
        "it is absolute": name.startswith(("/", "\\")),
        "it names a drive or a stream": ":" in name,
        "it climbs up with '..'": any(part.strip(". ") == "" and part for part in parts),
        f"a part of it is longer than {longest} bytes": any(_size(p) > longest for p in parts),
        f"it is longer than {MAX_NAME_BYTES} bytes": _size(name) > MAX_NAME_BYTES,
    }
    found = [fault for fault, present in faults.items() if present]
    if found:
        said = name if len(name) <= 80 else f"{name[:60]}... ({len(name)} characters)"
        raise ConfigError(
            f"the path {said!r} is refused: {found[0]}. Give a relative name, such as "
            "'clips/cat.mp4'"
        )
    return [part for part in parts if part]


def file_below(folder: Path, name: object, source: Path) -> Path:
    """The file that an entry of a file of ours names; it need not exist.

    Args:
        folder: which holds it; the folder itself may be a link.
        name: from the entry; anybody may have written it.
        source: where the entry stands, for the message.

    Returns:
        `folder / name`.

    Raises:
        ConfigError: if the name leads out of the folder, be it by a link.
    """
    try:
        parts = check_name(name)
        path = folder.joinpath(*parts)
        # Links alone can lead out now, and most often there is none: one look instead of many.
        below = [path, *path.parents[: len(parts) - 1]]
        if any(os.path.islink(part) for part in below):
            refuse_outside([path], [folder])
    except ConfigError as error:
        raise ConfigError(f"{source} names a file that is not below {folder}: {error}") from error
    return path


def finder_below(folder: Path, source: Path) -> Callable[[object], Path]:
    """`file_below` for many names of one folder, whose links are looked up once."""
    try:
        with os.scandir(folder) as entries:
            links = {entry.name.casefold() for entry in entries if entry.is_symlink()}
    except OSError:
        return lambda name: file_below(folder, name, source)

    def find(name: object) -> Path:
        is_text = isinstance(name, str)
        # Some file systems do not tell capitals from small letters.
        if is_text and _PLAIN.fullmatch(name) and (not links or name.casefold() not in links):
            return folder / name
        return file_below(folder, name, source)

    return find


def refuse_outside(paths: Iterable[Path], folders: Sequence[Path]) -> None:
    """Check that files lie in one of some folders, links followed.

    Raises:
        ConfigError: for the first one that does not.
    """
    roots = [Path(os.path.realpath(folder)) for folder in folders]
    for path in paths:
        try:
            real = Path(os.path.realpath(path))
        except (OSError, ValueError) as error:  # a null byte, half a character, a loop of links
            raise ConfigError(f"{str(path)!r} cannot be the name of a file ({error})") from error
        if not any(root == real or root in real.parents for root in roots):
            raise ConfigError(
                f"{path} is not in {' or '.join(map(str, roots))}, where it has to be"
                + (" (it is a link to elsewhere)" if path.is_symlink() else "")
                + "; copy the file itself there, and write its path relative to what names it"
            )


def _size(text: str) -> int:
    return len(text.encode("utf-8", errors="surrogatepass"))
