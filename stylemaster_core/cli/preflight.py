"""What `stylize` looks at before any model is loaded: nothing fails at the end of the work."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import DiskError
from ..pipelines.estimate import check_memory, estimate_needs
from ..pipelines.models import choose_device
from ..writing import check_space

# (frames, height, width)
Size = tuple[int, int, int]


def stand_in(size: Size) -> np.ndarray:
    """Black frames of a size that take no memory, uint8 [T, H, W, 3]."""
    return np.broadcast_to(np.zeros((), np.uint8), (*size, 3))


def check_room(
    output: Path,
    result: Size,
    source: Size | None,
    *,
    device: str,
    video: bool,
    option: str | None,
    segment_frames: int | None = None,
) -> None:
    """Refuse what memory or disk cannot hold.

    Args:
        output: the result's file.
        result: its size.
        source: of the input; None without.
        device: as on the command line.
        video: whether the result is a video.
        option: the one that makes a video shorter.
        segment_frames: of a segment, where --stream can be.

    Raises:
        StyleMasterError: with the options that make it fit.
    """
    chosen = choose_device(device)
    gpu = chosen.type != "cpu"
    needs, streamed = estimate_needs(result, source, gpu=gpu, video=video), None
    if segment_frames is not None and source is not None:
        count = min(segment_frames, source[0])
        segment = (count, *result[1:])
        streamed = estimate_needs(segment, (count, *source[1:]), gpu=gpu, video=video)
    check_memory(needs, chosen, result, option=option if video else None, streamed=streamed)
    smaller = " or ".join([option, "--size"] if video and option else ["--size"])
    advice = f"make room, choose another place, or pass a smaller {smaller}"
    check_space(output, needs.disk, "the result", advice)


def try_writing(output: Path, size: Size, write: Callable[[Path, np.ndarray], object]) -> None:
    """Write one black frame into the temporary folder as the result will be written.

    Ending, frame rate, size and sound are refused by the writer itself, which knows best.

    Args:
        output: the result's file; only its name counts.
        size: of the result.
        write: writes frames to a path.

    Raises:
        StyleMasterError: whatever the writer refuses.
    """
    # A full temporary folder says nothing of the result's own place.
    with tempfile.TemporaryDirectory(prefix="stylemaster-") as folder, suppress(DiskError):
        write(Path(folder) / f"trial{output.suffix}", stand_in((1, *size[1:])))
