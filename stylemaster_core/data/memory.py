"""Main memory: how much is free, and what frames will take of it."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from ..errors import LayoutError

logger = logging.getLogger("stylemaster")

# What is worth a word before it is read.
_MUCH_BYTES = 1 << 30
# A picture below takes no look at the memory, which costs more than a small picture.
_LARGE_PICTURE_BYTES = 1 << 28


def free_main_memory() -> int:
    """Bytes of main memory that a new program can have, within a container's limit."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def check_picture_fits(path: Path, width: int, height: int) -> None:
    """Refuse a large picture that memory cannot hold, before it is decoded.

    Args:
        path: the file, for the message.
        width: pixels.
        height: pixels.

    Raises:
        LayoutError: if there is less memory than three copies of it take: decoded, turned upright
            in sRGB, and as an array.
    """
    needed = width * height * 4 * 3
    if needed < _LARGE_PICTURE_BYTES:
        return
    free = free_main_memory()
    if needed > free:
        raise LayoutError(
            f"the image {path} of {width} x {height} takes {needed / 1e9:.1f} GB of main memory to "
            f"read, {free / 1e9:.1f} GB are free; scale it down"
        )


def check_frames_fit(path: Path, num_frames: int, shape: tuple[int, ...]) -> None:
    """Say what the frames of a file will take, and refuse what cannot fit, before it is decoded.

    Args:
        path: the file, for the message.
        num_frames: how many will be kept.
        shape: (height, width, channels) of a frame, uint8.

    Raises:
        LayoutError: if there is less memory.
    """
    frame_bytes = math.prod(shape)
    needed = num_frames * frame_bytes
    if needed < _MUCH_BYTES // 4:
        return
    free = free_main_memory()
    text = f"{num_frames} frames of {shape[1]} x {shape[0]} of {path} take {needed / 1e9:.1f} GB"
    if needed > free:
        raise LayoutError(
            f"{text} of main memory, {free / 1e9:.1f} GB are free; read at most "
            f"{max(free // frame_bytes, 1)} frames (max_frames)"
        )
    if needed >= _MUCH_BYTES:
        logger.info(text)
