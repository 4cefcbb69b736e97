"""Reading files of others: whatever a reader raises becomes our error, with the file's name."""

from __future__ import annotations

from pathlib import Path

from .errors import StyleMasterError, WeightsError

_MAX_WORDS = 300  # characters of a reader's message; some quote the whole file
_MAX_OWN = 3000


class reading:
    """While open, everything that goes wrong is taken to be the fault of a file or folder.

    Readers raise what they like about a damaged file, and change it from version to version. Our
    own errors pass, with the file's name in front where they lack it; so does a missing library.
    A class, as a generator costs more than a small file takes to read.

    Raises:
        StyleMasterError: as said.
    """

    __slots__ = ("_advice", "_error", "_path", "_what")

    def __init__(
        self,
        path: str | Path,
        what: str,
        *,
        error: type[StyleMasterError] = WeightsError,
        advice: str = "compare its size with the published one, and get it again",
    ) -> None:
        """Only remember what the message is made of.

        Args:
            path: of the file or folder.
            what: it is expected to be, for the message.
            error: of which type ours is.
            advice: what to do, for the message.
        """
        self._path, self._what, self._error, self._advice = path, what, error, advice

    def __enter__(self) -> None:
        """Nothing is done before something goes wrong."""

    def __exit__(self, kind: object, raw: BaseException | None, trace: object) -> None:
        """Turn an exception into ours."""
        if raw is None or isinstance(raw, ImportError) or not isinstance(raw, Exception):
            return
        path = Path(self._path)
        if isinstance(raw, StyleMasterError):
            words = str(raw)
            if path.name in words and len(words) <= _MAX_OWN:
                return
            raise type(raw)(f"{path}: {_short(words, _MAX_OWN)}") from raw
        if type(raw).__name__ == "OutOfMemoryError":  # the device's, not the file's
            return
        words = _short(str(raw).strip() or "no more is said", _MAX_WORDS)
        raise self._error(
            f"{path}{_size(path)} cannot be read as {self._what}: it is damaged or incomplete, or "
            f"of another kind; {self._advice}. Reader's words: {type(raw).__name__}: {words}"
        ) from raw


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else f"{words[:most]}..."


def _size(path: Path) -> str:
    try:
        return f" ({path.stat().st_size:,} bytes)" if path.is_file() else ""
    except (OSError, ValueError):
        return ""
