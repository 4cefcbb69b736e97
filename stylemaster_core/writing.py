"""Writing files: they appear whole or not at all, and over nothing unless that is asked for.

Everything is written beside its place under a hidden name and moved there in the end. A move that
must not replace anything is a hard link, which the disk makes for one process only.
"""

from __future__ import annotations

import errno
import glob
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ConfigError, DiskError, StyleMasterError

_ADVICE = {
    errno.ENOSPC: "make room on that disk, or choose another place",
    errno.EDQUOT: "make room, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}
# What `os.link` says on FAT and on some network drives, which know no hard links.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_MAX_STEM = 40  # characters of a hidden name; 255 bytes is the usual limit of a whole name
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_OWNER = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]+\.part")


@contextmanager
def written_beside(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a path beside `path` to write a file to, which becomes `path` once the block succeeds.

    A missing folder is made. Two processes that write one name at once never both succeed, unless
    both are asked to overwrite. What killed processes left of the same name is removed.

    Raises:
        ConfigError: if `path` is a folder, or exists and `overwrite` is false.
        DiskError: if the disk does not take the file.
    """
    path = Path(path)
    with disk_errors(path):
        _check_name(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path)
    part = part_path(path)
    try:
        with disk_errors(path, part):
            yield part
            publish(part, path, overwrite=overwrite)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def part_path(path: Path) -> Path:
    """A new hidden name beside `path` that tells whose it is; the ending, the format's, stays."""
    owner = f"{_HOST}-{os.getpid()}-{secrets.token_hex(3)}"
    return path.with_name(f".{path.stem[:_MAX_STEM]}.{owner}.part{path.suffix}")


def publish(part: Path, path: Path, *, overwrite: bool) -> None:
    """Give a finished file its name, once it is on the disk.

    Raises:
        ConfigError: if `path` exists and `overwrite` is false; `part` is left as it is.
        OSError: if the disk does not take it.
    """
    with part.open("rb+") as stream:
        os.fsync(stream.fileno())
    if overwrite:
        os.replace(part, path)
        return
    try:
        move_new(part, path)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} appeared while it was being written, and is left as it is; choose another name"
        ) from error


def publish_all(part: Path, folder: Path, *, overwrite: bool) -> None:
    """Move the finished files of a folder into another one, which is made if it is missing.

    Raises:
        ConfigError: if one exists and `overwrite` is false; those before it are in their place.
        DiskError: if the disk does not take one.
    """
    with disk_errors(folder, part):
        folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(part.iterdir()):
        with disk_errors(folder / path.name, path):
            publish(path, folder / path.name, overwrite=overwrite)


def move_new(part: Path, path: Path) -> None:
    """Move a file to a name that must be free; of several processes, one succeeds.

    Raises:
        FileExistsError: if the name is taken; `part` is left as it is.
        OSError: if the disk does not take it.
    """
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _move_over_claim(part, path)
    else:
        part.unlink()


def _move_over_claim(part: Path, path: Path) -> None:
    """Reserve the name with an empty file, which only one process can make, and replace that."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.replace(part, path)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str, *, overwrite: bool = False) -> None:
    """Write a text file, UTF-8; errors as `written_beside`."""
    with written_beside(path, overwrite=overwrite) as part:
        part.write_text(text, encoding="utf-8")


def append_line(path: Path, line: bytes, *, sync: bool = True) -> None:
    """Append a line to a file, whole or not at all; half a line that a crash left is ended first.

    Only one process at a time may append. The line is on the disk when this returns, if `sync`.

    Raises:
        DiskError: if the disk does not take it.
    """
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size:
                os.lseek(descriptor, -1, os.SEEK_END)
            text = line + b"\n"
            if size and os.read(descriptor, 1) != b"\n":
                text = b"\n" + text
            _write_whole(descriptor, text, size)
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


_BINARY = getattr(os, "O_BINARY", 0)


def _write_whole(descriptor: int, text: bytes, size: int) -> None:
    """Write all of `text` at the end of a file of `size` bytes, or leave the file as it was."""
    try:
        written = os.write(descriptor, text)
        if written < len(text):  # a disk takes what still fits, and says so only the next time
            written += os.write(descriptor, text[written:])
        if written < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def check_place(path: str | Path, *, overwrite: bool = False) -> None:
    """Check that a file can be written before the work that it takes; a missing folder is made.

    Raises:
        ConfigError: if `path` is a folder or no name, or exists and `overwrite` is false.
        DiskError: if its folder cannot be made or written to.
    """
    path = Path(path)
    probe = part_path(path)
    with disk_errors(path, probe):
        _check_name(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        probe.unlink()


def check_folder(path: str | Path) -> None:
    """Check that files can be written into a folder, which is made if it is missing.

    Raises:
        DiskError: if not.
    """
    check_place(Path(path) / "probe", overwrite=True)


def check_space(path: Path, needed: int, what: str, advice: str) -> None:
    """Check that the disk of `path` has `needed` bytes free; the folder need not exist yet.

    Args:
        path: file or folder to be written.
        needed: bytes.
        what: what needs them, for the message.
        advice: what to do, beginning with a verb.

    Raises:
        DiskError: if it has fewer.
    """
    folder = path.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    with disk_errors(path):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"{what} takes about {_in_words(needed)}, and the disk of {folder} has "
            f"{_in_words(free)} free; {advice}"
        )


def _in_words(size: int) -> str:
    unit, name = next(
        u for u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u[0] or u[0] < 1e4
    )
    return f"{size / unit:.1f} {name}"


def _check_name(path: Path, overwrite: bool) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except ValueError as error:  # a null byte, or a character that no file's name can hold
        raise ConfigError(f"{str(path)!r} cannot be the name of a file ({error})") from error
    if stat.S_ISDIR(mode) or path.is_dir():
        raise ConfigError(f"{path} is a folder and exists already; name a file in it")
    if not overwrite:
        raise ConfigError(
            f"{path} exists already; choose another name, or ask to overwrite it (--overwrite)"
        )


@contextmanager
def disk_errors(path: Path, *others: Path) -> Iterator[None]:
    """Turn an `OSError` about these files, or about none in particular, into a `DiskError`."""
    own = {str(name) for name in (path, path.parent, *others)}
    try:
        yield
    except OSError as error:
        about = getattr(error, "filename", None)
        is_folder_of_it = about is not None and Path(str(about)) in path.parents
        if about is not None and str(about) not in own and not is_folder_of_it:
            raise
        raise DiskError(f"{path} cannot be written: {reason_of(error)}") from error


def reason_of(error: OSError) -> str:
    """Why the system refused, and what to do."""
    reason = error.strerror or str(error)
    return f"{reason}; {_ADVICE.get(error.errno or 0, 'choose another place')}"


def write_or_rescue(path: Path, write: Callable[[Path], object]) -> None:
    """Write a result that took long to make: where its place fails, into the temporary folder.

    Args:
        path: where the result belongs.
        write: writes it to the path that it is given.

    Raises:
        StyleMasterError: if the place fails; it says where the result is now.
    """
    try:
        write(path)
    except StyleMasterError as error:
        rescued = Path(tempfile.mkdtemp(prefix="stylemaster-")) / path.name
        try:
            write(rescued)
        except StyleMasterError as second:
            shutil.rmtree(rescued.parent, ignore_errors=True)
            raise DiskError(f"{error}. Nor could it be kept elsewhere: {second}") from error
        raise DiskError(f"{error}. The result is kept: {rescued}") from error


def remove_leftovers(folder: Path, path: Path | None = None) -> list[Path]:
    """Remove the hidden files that killed processes of this machine left in a folder.

    Args:
        folder: where to look.
        path: only what was to become this file; None for all.

    Returns:
        What was removed.
    """
    stem = "*" if path is None else glob.escape(path.stem[:_MAX_STEM])
    suffix = "*" if path is None else glob.escape(path.suffix)
    removed = []
    for part in folder.glob(f".{stem}.*.part{suffix}"):
        owner = _OWNER.search(part.name)
        if owner and owner[1] == _HOST and not _is_alive(int(owner[2])):
            part.unlink(missing_ok=True)
            removed.append(part)
    return removed


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # there, signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return True
