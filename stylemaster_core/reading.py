"""Reading files of others: whatever a reader raises becomes our error, with the file's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StyleMasterError, WeightsError

_MAX_WORDS = 300  # characters of a reader's message; some quote the whole file
_MAX_OWN = 3000


@contextmanager
def reading(
    path: str | Path,
    what: str,
    *,
    error: type[StyleMasterError] = WeightsError,
    advice: str = "compare its size with the published one, and get it again",
) -> Iterator[None]:
    """While open, everything that goes wrong is taken to be the fault of a file or folder.

    Readers raise what they like about a damaged file, and change it from version to version. Our
    own errors pass, with the file's name in front where they lack it; so does a missing library.

    Args:
        path: of the file or folder.
        what: it is expected to be, for the message.
        error: of which type ours is.
        advice: what to do, for the message.

    Raises:
        StyleMasterError: as said.
    """
    path = Path(path)
    try:
        yield
    except StyleMasterError as ours:
        words = str(ours)
        if path.name in words and len(words) <= _MAX_OWN:
            raise
        raise type(ours)(f"{path}: {_short(words, _MAX_OWN)}") from ours
    except ImportError:
        raise
    except Exception as raw:
        if type(raw).__name__ == "OutOfMemoryError":  # the device's, not the file's
            raise
        words = _short(str(raw).strip() or "no more is said", _MAX_WORDS)
        raise error(
            f"{path}{_size(path)} cannot be read as {what}: it is damaged or incomplete, or of "
            f"another kind; {advice}. Reader's words: {type(raw).__name__}: {words}"
        ) from raw


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else f"{words[:most]}..."


def _size(path: Path) -> str:
    try:
        return f" ({path.stat().st_size:,} bytes)" if path.is_file() else ""
    except (OSError, ValueError):
        return ""
