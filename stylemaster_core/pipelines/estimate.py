"""What a generation needs at least, so that what cannot fit is refused before any work."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..data.memory import free_main_memory
from ..errors import ConfigError
from ..layouts import fit_size, padded_num_frames

# Bytes a pixel of x264 and VP9 at crf 16 on a textured clip of 832 x 480; grain needs six times it.
VIDEO_BYTES_PER_PX = 0.05
LOSSLESS_BYTES_PER_PX = 1.5  # of FFV1 on restyled frames
PICTURE_BYTES_PER_PX = 3.0  # of a PNG that cannot be compressed
# Decoding holds the float32 video twice, before and after it is limited to -1..1.
DECODED_BYTES_PER_PX = 24
FRAME_BYTES_PER_PX = 3  # uint8 RGB


class Needs(NamedTuple):
    """Bytes that a generation needs at least, beside the weights."""

    main: int  # main memory
    gpu: int  # memory of the GPU
    disk: int  # the result


def estimate_needs(
    result: tuple[int, int, int], source: tuple[int, int, int] | None, *, gpu: bool, video: bool
) -> Needs:
    """Estimate from below what the frames take at the time when most of them are in memory.

    Args:
        result: (frames, height, width) of the result.
        source: the same of the input; None without.
        gpu: whether the VAE decodes on a GPU.
        video: whether the result is a video and not a picture.

    Source: own; `tests/unit/test_estimate.py` measures it: 24 bytes a pixel of the padded result
    where it is decoded, 3 for each set of frames.
    """
    num_frames, height, width = result
    padded_px = padded_num_frames(num_frames) * math.prod(fit_size(height, width))
    decoded = DECODED_BYTES_PER_PX * padded_px
    frames = FRAME_BYTES_PER_PX * padded_px
    if source is not None:
        frames += FRAME_BYTES_PER_PX * math.prod(source)
    per_px = VIDEO_BYTES_PER_PX if video else PICTURE_BYTES_PER_PX
    disk = round(per_px * math.prod(result))
    return Needs(frames, decoded, disk) if gpu else Needs(frames + decoded, 0, disk)


def check_memory(
    needs: Needs,
    device: torch.device,
    result: tuple[int, int, int],
    *,
    option: str | None,
    streamed: Needs | None = None,
) -> None:
    """Refuse what cannot fit, with the numbers that would.

    Args:
        needs: from `estimate_needs`.
        device: of the VAE.
        result: (frames, height, width).
        option: the one that shortens the video; None for a picture.
        streamed: of one segment, where --stream can be; it is named if that fits.

    Raises:
        ConfigError: if a memory is too small.
    """
    main_free = free_main_memory()
    gpu_free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else needs.gpu
    places = [
        ("main memory", needs.main, main_free),
        ("memory of the GPU", needs.gpu, gpu_free),
    ]
    for name, needed, free in places:
        if needed <= free:
            continue
        num_frames, height, width = result
        share = max(free, 0) / needed
        choices = []
        if streamed is not None and streamed.main <= main_free and streamed.gpu <= gpu_free:
            choices.append("--stream")
        if option is not None and int(num_frames * share) >= 1:
            choices.append(f"{option} {int(num_frames * share)}")
        side = math.sqrt(share)
        sides = (max(int(x * side) // 16 * 16, 16) for x in (width, height))
        choices.append("--size {}x{}".format(*sides))
        raise ConfigError(
            f"{num_frames} frames of {width} x {height} need at least {needed / 1e9:.1f} GB of "
            f"{name}, beside the weights, and {free / 1e9:.1f} GB are free; pass "
            f"{' or '.join(choices)}, or less"
        )
