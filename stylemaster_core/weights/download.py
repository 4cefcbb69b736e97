"""Downloading a weight file: resumed after a break, verified before it is put in place."""

from __future__ import annotations

import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import WeightsError
from ..writing import disk_errors, publish, write_text
from .files import Progress, sha256_of
from .manifest import WeightEntry

logger = logging.getLogger("stylemaster")

DEFAULT_ENDPOINT = "https://huggingface.co"

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 60.0
# What must stay free on the disk after the download.
_SPARE_BYTES = 64 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, OSError)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but stop a HEAD at the answer that carries the hub's size and hash."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if req.get_method() == "HEAD" and headers.get("x-linked-etag"):
            return None
        followed = super().redirect_request(req, fp, code, msg, headers, newurl)
        if followed is not None:
            # Older Python versions turn a HEAD into a GET of the whole file here.
            followed.method = req.get_method()
        return followed


def default_opener() -> urllib.request.OpenerDirector:
    """The opener of `download`: urllib with the system's proxies."""
    return urllib.request.build_opener(_Redirects)


class Published(NamedTuple):
    """What the hub says about a file."""

    size: int | None  # bytes
    sha256: str | None  # lower-case hexadecimal digits


@dataclass(frozen=True)
class Download:
    """A file in place, and how it was checked."""

    path: Path
    sha256: str
    size: int
    checked_against: str  # "manifest", "hub" or "nothing"
    was_present: bool  # True if nothing had to be done


def file_url(entry: WeightEntry, endpoint: str = DEFAULT_ENDPOINT) -> str:
    """Address of a file on the hub.

    Args:
        entry: entry of the manifest.
        endpoint: the hub or a mirror of it, with scheme and without a closing slash.

    Returns:
        The address.

    Raises:
        WeightsError: if the entry stands for a whole repository.
    """
    if entry.file is None:
        raise WeightsError(
            f"{entry.id} is a whole repository, not one file. Accept its licence and fetch it at "
            f"{endpoint}/{entry.repository} (for example with `hf download {entry.repository}`), "
            f"then put it into models/{entry.folder}."
        )
    return (
        f"{endpoint.rstrip('/')}/{entry.repository}/resolve/main/{urllib.parse.quote(entry.file)}"
    )


def published_facts(
    entry: WeightEntry,
    endpoint: str = DEFAULT_ENDPOINT,
    opener: urllib.request.OpenerDirector | None = None,
) -> Published:
    """Ask the hub for size and SHA-256 of a file, without fetching it.

    Args:
        entry: entry of the manifest.
        endpoint: as in `file_url`.
        opener: by default `default_opener()`.

    Returns:
        What the hub says; None for what it does not say.

    Raises:
        WeightsError: if the hub refuses or cannot be reached.
    """
    url = file_url(entry, endpoint)
    request = urllib.request.Request(
        url, method="HEAD", headers={"Accept-Encoding": "identity", "User-Agent": "stylemaster"}
    )
    try:
        with (opener or default_opener()).open(request, timeout=_TIMEOUT_S) as response:
            headers = response.headers
    except urllib.error.HTTPError as error:
        # `_Redirects` stops at a redirect that tells what was asked; any other is a dead end.
        if not (300 <= error.code < 400 and error.headers.get("x-linked-etag")):
            raise _refused(entry, url, error) from error
        headers = error.headers
        error.close()
    except _NETWORK_ERRORS as error:
        raise _unreachable(entry, url, error) from error
    etag = (headers.get("x-linked-etag") or headers.get("etag") or "").removeprefix("W/").strip('"')
    size = headers.get("x-linked-size") or headers.get("content-length") or ""
    return Published(
        size=int(size) if size.isdigit() else None,
        sha256=etag.lower() if _SHA256.fullmatch(etag.lower()) else None,
    )


def download(
    entry: WeightEntry,
    models_dir: str | os.PathLike[str],
    *,
    endpoint: str = DEFAULT_ENDPOINT,
    overwrite: bool = False,
    opener: urllib.request.OpenerDirector | None = None,
    progress: Progress | None = None,
    attempts: int = 5,
    pause_s: float = 2.0,
) -> Download:
    """Put a weight file into its folder.

    The file grows in `<name>.part`, which a later call resumes. Size and SHA-256 are compared with
    the manifest, or with the hub where the manifest has no hash or one read from a mirror. Only a
    file that agrees is renamed into place; its hash is noted beside it in `<name>.sha256`.

    Args:
        entry: entry of the manifest.
        models_dir: ComfyUI's models folder; the entry's sub-folder is made if missing.
        endpoint: the hub or a mirror of it.
        overwrite: replace a different file of that name.
        opener: by default `default_opener()`; tests and proxies give their own.
        progress: called with (bytes done, bytes in all).
        attempts: how often a broken connection is taken up again.
        pause_s: seconds to wait before the second attempt, doubled after each.

    Returns:
        The file in place, and how it was checked.

    Raises:
        WeightsError: if the hub refuses or cannot be reached, the disk is too small, another file
            of that name exists, or size or hash are wrong (the part file is deleted then).
    """
    opener = opener or default_opener()
    url = file_url(entry, endpoint)
    folder = Path(models_dir) / entry.folder
    target = folder / entry.file_name
    size, sha256, source = _expectation(entry, endpoint, opener)
    if target.exists():
        present = _check_present(target, size, sha256, source)
        if present is not None:
            return present
        if not overwrite:
            raise WeightsError(
                f"{target} exists ({target.stat().st_size:,} bytes) and is another file than "
                f"{entry.id} (expected: {_expected(size, sha256)}). It is not overwritten unless "
                "asked (--overwrite); rename it, or choose another models folder."
            )
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if size is not None and part.exists() and part.stat().st_size > size:
        part.unlink()
    _check_free_space(folder, size, part)
    _fetch(entry, url, part, size, opener, progress, attempts, pause_s)
    actual = _verify_part(entry, part, size, sha256)
    publish(part, target, overwrite=overwrite)
    note_sha256(target, actual)
    return Download(target, actual, target.stat().st_size, source, was_present=False)


def note_sha256(path: Path, sha256: str) -> None:
    """Note a hash in `<name>.sha256`, in the form that sha256sum reads.

    Args:
        path: the file that was hashed.
        sha256: its hash.
    """
    note = path.with_name(f"{path.name}.sha256")
    write_text(note, f"{sha256}  {path.name}\n", overwrite=True)


def noted_sha256(path: Path) -> str | None:
    """The hash that `download` noted beside a file, or None.

    Args:
        path: the weight file.
    """
    note = path.with_name(f"{path.name}.sha256")
    if not note.is_file():
        return None
    word = note.read_text(encoding="utf-8").split(" ", 1)[0].strip().lower()
    return word if _SHA256.fullmatch(word) else None


def _expectation(
    entry: WeightEntry, endpoint: str, opener: urllib.request.OpenerDirector
) -> tuple[int | None, str | None, str]:
    """Size and hash to demand, and who says so."""
    is_official = entry.sha256 is not None and entry.sha256_source == "official"
    if is_official and entry.size is not None:
        return entry.size, entry.sha256, "manifest"
    published = published_facts(entry, endpoint, opener)
    if is_official:
        return published.size, entry.sha256, "manifest"
    if published.sha256 is None:
        size = entry.size if entry.size is not None else published.size
        return size, entry.sha256, "nothing" if entry.sha256 is None else "manifest"
    if entry.sha256 is not None and published.sha256 != entry.sha256:
        logger.warning(
            "%s: the hub publishes the hash %s, the manifest has %s, read from a mirror; the hub's "
            "is demanded",
            entry.id,
            published.sha256,
            entry.sha256,
        )
    return published.size, published.sha256, "hub"


def _check_present(
    target: Path, size: int | None, sha256: str | None, source: str
) -> Download | None:
    actual_size = target.stat().st_size
    if size is not None and actual_size != size:
        return None
    if size is None and sha256 is None:
        return None
    actual = sha256_of(target)
    if sha256 is not None and actual != sha256:
        return None
    return Download(target, actual, actual_size, source, was_present=True)


def _check_free_space(folder: Path, size: int | None, part: Path) -> None:
    if size is None:
        return
    needed = size - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise WeightsError(
            f"{folder} has {free / 1e9:.2f} GB free, {(needed + _SPARE_BYTES) / 1e9:.2f} GB are "
            "needed. Free some space or choose another folder (--models-dir). Nothing was fetched."
        )


def _fetch(
    entry: WeightEntry,
    url: str,
    part: Path,
    size: int | None,
    opener: urllib.request.OpenerDirector,
    progress: Progress | None,
    attempts: int,
    pause_s: float,
) -> None:
    """Make `part` complete, taking a broken connection up again."""
    last_error: Exception | None = None
    for attempt in range(attempts):
        if attempt:
            logger.warning("%s: connection lost (%s), trying again", entry.id, last_error)
            time.sleep(pause_s * 2 ** (attempt - 1))
        try:
            total = _fetch_once(url, part, size, opener, progress)
        except urllib.error.HTTPError as error:
            if error.code == 416:
                # The part does not belong to this file (any more).
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code != 429:
                raise _refused(entry, url, error) from error
            last_error = error
            continue
        except _NETWORK_ERRORS as error:
            last_error = error
            continue
        have = part.stat().st_size
        if total is None or have >= total:
            return
        last_error = ConnectionError(f"{have:,} of {total:,} bytes came")
    raise _unreachable(entry, url, last_error)


def _fetch_once(
    url: str,
    part: Path,
    size: int | None,
    opener: urllib.request.OpenerDirector,
    progress: Progress | None,
) -> int | None:
    """Append to `part` until the connection ends; return the bytes that the whole file has."""
    offset = part.stat().st_size if part.exists() else 0
    if size and offset == size:
        return size
    headers = {"Accept-Encoding": "identity", "User-Agent": "stylemaster"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as response:
        resumed = response.status == 206 and _range_start(response.headers) == offset
        length = response.headers.get("content-length")
        if not resumed:
            offset = 0
        total = size if size is not None else offset + int(length) if length else None
        with _open_part(part, resumed) as write:
            while chunk := response.read(_CHUNK_BYTES):
                write(chunk)
                offset += len(chunk)
                if progress is not None:
                    progress(offset, total)
                if total is not None and offset > total:
                    break
    return total


@contextmanager
def _open_part(part: Path, resumed: bool) -> Iterator[Callable[[bytes], None]]:
    """Give what writes to a part file; a disk's errors are not taken for the network's."""
    with disk_errors(part):
        file = part.open("ab" if resumed else "wb", buffering=0)

    def write(chunk: bytes) -> None:
        with disk_errors(part):
            left = memoryview(chunk)
            while left:
                left = left[file.write(left) :]

    with file:
        yield write


def _range_start(headers: Any) -> int | None:
    match = re.match(r"bytes (\d+)-", headers.get("content-range") or "")
    return int(match.group(1)) if match else None


def _verify_part(entry: WeightEntry, part: Path, size: int | None, sha256: str | None) -> str:
    actual_size = part.stat().st_size
    actual = sha256_of(part)
    if (size is not None and actual_size != size) or (sha256 is not None and actual != sha256):
        part.unlink()
        raise WeightsError(
            f"What came for {entry.id} is not the published file: {actual_size:,} bytes with "
            f"SHA-256 {actual}, expected {_expected(size, sha256)}. It was deleted. Try again; if "
            "it happens again, check --endpoint and whether the repository has changed."
        )
    return actual


def _expected(size: int | None, sha256: str | None) -> str:
    return f"{'unknown' if size is None else f'{size:,}'} bytes, SHA-256 {sha256 or 'unknown'}"


def _refused(entry: WeightEntry, url: str, error: urllib.error.HTTPError) -> WeightsError:
    page = f"https://huggingface.co/{entry.repository}"
    if error.code in (401, 403):
        advice = (
            f"The licence must be accepted at {page}, or the repository is private; then fetch "
            f"{entry.file} there and put it into models/{entry.folder} as {entry.file_name}."
        )
    else:
        advice = f"Look whether {page} still has {entry.file}; it may have moved."
    return WeightsError(f"{url} answered {error.code} {error.reason}. {advice}")


def _unreachable(entry: WeightEntry, url: str, error: Exception | None) -> WeightsError:
    return WeightsError(
        f"{entry.id} could not be fetched from {url}: {error}. Check the connection and run the "
        "command again (what came so far is kept and resumed), or name a mirror with --endpoint."
    )
