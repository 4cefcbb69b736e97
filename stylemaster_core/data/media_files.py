"""Which files of a folder are videos and pictures: by their endings, hidden ones left out."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

logger = logging.getLogger("stylemaster")

# What Pillow reads of the formats that are meant.
IMAGE_ENDINGS = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib"}
    | {".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".pnm", ".tga", ".ico", ".qoi"}
)
# What PyAV reads of the containers that are meant.
VIDEO_ENDINGS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".mts"}
    | {".m2ts", ".flv", ".wmv", ".asf", ".ogv", ".mxf", ".3gp", ".3g2", ".mj2", ".dv", ".nut"}
    | {".ivf", ".y4m"}
)
# Where a folder is to give videos, these pictures count: they move.
MOVING_ENDINGS = VIDEO_ENDINGS | {".gif", ".apng"}
_MOST_NAMED = 8


def is_hidden(path: Path, root: Path) -> bool:
    """Whether a file, or a folder between it and `root`, has a name that begins with a dot.

    Drives of Macs hold a file `._name` beside each file; it ends alike and is no video.
    """
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def media_files(folder: Path, endings: Collection[str], *, what: str | None = None) -> list[Path]:
    """The files of a folder with these endings, sorted by name.

    Args:
        folder: an existing folder.
        endings: in lower case.
        what: what they are; given, the log says which others were skipped, and why.
    """
    found: list[Path] = []
    skipped: list[str] = []
    for path in sorted(folder.iterdir()):
        ends = path.suffix.lower() in endings
        if ends and is_hidden(path, folder):
            skipped.append(f"{path.name} (hidden)")
        elif ends and not path.is_file():
            skipped.append(f"{path.name} (a folder)")
        elif ends:
            found.append(path)
        elif path.is_file() and not is_hidden(path, folder):
            skipped.append(f"{path.name} (no {what})")
    if what is not None and skipped:
        named = ", ".join(skipped[:_MOST_NAMED])
        more = f" and {len(skipped) - _MOST_NAMED} more" if len(skipped) > _MOST_NAMED else ""
        logger.info("%s: skipped %s%s", folder, named, more)
    return found
