"""Still videos: a picture as a clip in which nothing moves, which the motion adapter learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from einops import repeat

from ..errors import ConfigError
from ..layouts import TEMPORAL_STRIDE
from .images import check_image
from .samples import Sample, is_video


def still_samples(samples: Sequence[Sample], num_frames: int) -> list[Sample]:
    """Mark pictures to be used as clips of `num_frames` equal frames; no frame is copied on disk.

    Raises:
        ConfigError: if `num_frames` is not 4n+1, or a sample is a video.

    Source: StyleMaster, sec. 3.3.
    """
    check_num_frames(num_frames)
    if moving := [sample.id for sample in samples if is_video(sample.media)]:
        raise ConfigError(
            f"{len(moving)} samples are videos ({', '.join(moving[:3])}, ...); still clips are "
            "made of pictures"
        )
    return [replace(sample, repeat=num_frames) for sample in samples]


def still_clip(image: np.ndarray, num_frames: int) -> np.ndarray:
    """Repeat a uint8 [H, W, 3] picture: uint8 [T, H, W, 3]."""
    return repeat(check_image(image), "h w c -> t h w c", t=num_frames)


def check_num_frames(num_frames: int, stride: int = TEMPORAL_STRIDE) -> None:
    """Check that a clip's length is 4n+1, as Wan's VAE needs.

    Args:
        num_frames: length of the clip.
        stride: frames that the VAE makes one of; with 1 any length does.

    Raises:
        ConfigError: if not.
    """
    if num_frames < 1 or (num_frames - 1) % stride:
        lengths = f"{stride}n+1: 1, 5, 9, ..., 81" if stride == TEMPORAL_STRIDE else "at least 1"
        raise ConfigError(f"{num_frames} frames; expected {lengths}")
