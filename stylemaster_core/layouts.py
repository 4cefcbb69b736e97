"""Layouts of pixels and latents, and the padding that the Wan VAE and transformer need."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .errors import ConfigError, LayoutError

LATENT_CHANNELS = 16
TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8
# The VAE halves a side three times and the transformer's patch once more.
SIZE_MULTIPLE = 16

Frames = TypeVar("Frames", np.ndarray, Tensor)


class LatentShape(NamedTuple):
    """Sizes of the latents of a video: frames, height, width."""

    t: int
    h: int
    w: int


def check_frames(frames: np.ndarray, what: str = "the video") -> np.ndarray:
    """Check that `frames` is uint8 [T, H, W, 3] and not empty, and return it.

    Raises:
        LayoutError: for another type or shape, or no pixels.
    """
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        kind = getattr(frames, "dtype", type(frames).__name__)
        raise LayoutError(f"{what} is {kind}; expected a numpy array of uint8 (0 to 255)")
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise LayoutError(
            f"{what} has shape {list(frames.shape)}; expected [frames, height, width, 3]"
        )
    if 0 in frames.shape:
        raise LayoutError(f"{what} is empty: shape {list(frames.shape)}; give at least one frame")
    return frames


def check_video(video: Tensor) -> None:
    """Check what a VAE is to encode: [B, 3, T, H, W], T = 4n+1, H and W multiples of 8.

    Raises:
        LayoutError: for another shape, or NaN or infinity.
    """
    if video.ndim != 5 or video.shape[1] != 3:
        raise LayoutError(
            f"the video has shape {list(video.shape)}; expected [batch, 3, frames, height, width]"
        )
    latent_shape(*video.shape[2:])
    _check_finite(video, "the video to encode")


def check_latents(latents: Tensor) -> None:
    """Check what a VAE is to decode: [B, 16, t, h, w], not empty.

    Raises:
        LayoutError: for another shape, or NaN or infinity.
    """
    if latents.ndim != 5 or latents.shape[1] != LATENT_CHANNELS or 0 in latents.shape:
        raise LayoutError(
            f"the latents have shape {list(latents.shape)}; expected "
            f"[batch, {LATENT_CHANNELS}, frames, height, width]"
        )
    _check_finite(latents, "the latents to decode")


def frames_to_video(frames: np.ndarray) -> Tensor:
    """Turn uint8 [T, H, W, 3] (0..255) into a core video, float32 [1, 3, T, H, W] (-1..1).

    Raises:
        LayoutError: if `frames` is not uint8 [T, H, W, 3] or is empty.
    """
    check_frames(frames)
    video = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "t h w c -> 1 c t h w")
    return video.float().div_(127.5).sub_(1)


def video_to_frames(video: Tensor) -> np.ndarray:
    """Turn a core video [1, 3, T, H, W] (-1..1, any float dtype) into uint8 [T, H, W, 3].

    Values outside -1..1 are clipped, fractions are rounded.

    Raises:
        LayoutError: if the shape differs, the batch is not 1, or a value is not finite.
    """
    if video.ndim != 5 or video.shape[0] != 1 or video.shape[1] != 3:
        raise LayoutError(
            f"the video has shape {list(video.shape)}; expected [1, 3, frames, height, width]"
        )
    video = video.detach()
    if not torch.isfinite(video).all():
        raise LayoutError(
            "the video holds NaN or infinity; the model diverged: try float32, a lower guidance "
            "scale or adapter strength"
        )
    # Frame by frame, as a second copy in float32 of a long video is large.
    frames = [
        frame.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        for frame in rearrange(video, "1 c t h w -> t h w c").unbind()
    ]
    return torch.stack(frames).cpu().numpy()


def latent_shape(num_frames: int, height: int, width: int) -> LatentShape:
    """Return the latent sizes of a video of 4n+1 frames whose sides are multiples of 8.

    Raises:
        LayoutError: for other numbers.
    """
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_STRIDE:
        raise LayoutError(
            f"{num_frames} frames; the Wan VAE needs 4n+1 (1, 5, 9, ..., 81): "
            f"use {padded_num_frames(max(num_frames, 1))} or pad_video"
        )
    if height < 1 or width < 1 or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
        raise LayoutError(
            f"{width} x {height} pixels; both sides must be multiples of {SPATIAL_STRIDE}: "
            "resize, or use pad_video"
        )
    return LatentShape(
        (num_frames - 1) // TEMPORAL_STRIDE + 1, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
    )


def padded_num_frames(num_frames: int) -> int:
    """Return the smallest 4n+1 that is not below `num_frames`."""
    return -(-(num_frames - 1) // TEMPORAL_STRIDE) * TEMPORAL_STRIDE + 1


def fit_size(height: int, width: int, *, multiple: int = SIZE_MULTIPLE) -> tuple[int, int]:
    """Return the smallest (height, width) of multiples of `multiple` that hold the given size.

    Raises:
        ConfigError: if a number is below 1.
    """
    if min(height, width, multiple) < 1:
        raise ConfigError(f"size {width} x {height}, multiple {multiple}: all must be at least 1")
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def fit_area(
    height: int, width: int, area_px: int, *, multiple: int = SIZE_MULTIPLE
) -> tuple[int, int]:
    """Return the (height, width) of this shape that has about so many pixels.

    Args:
        height: of the shape.
        width: of the shape.
        area_px: pixels of a frame.
        multiple: of both sides; they are rounded to it, and are at least as long.

    Raises:
        ConfigError: if a number is below 1.
    """
    if min(height, width, area_px, multiple) < 1:
        raise ConfigError(
            f"shape {width} x {height}, area {area_px}, multiple {multiple}: all must be at least 1"
        )
    scale = math.sqrt(area_px / (height * width)) / multiple
    return max(round(height * scale), 1) * multiple, max(round(width * scale), 1) * multiple


class Padding(NamedTuple):
    """The size of a video before `pad_video`."""

    num_frames: int
    height: int
    width: int

    def crop(self, frames: Frames) -> Frames:
        """Cut [T, H, W, C] frames back to the size before padding (a view).

        Raises:
            LayoutError: if `frames` is smaller than that size.
        """
        if frames.ndim != 4 or any(
            have < want for have, want in zip(frames.shape, self, strict=False)
        ):
            raise LayoutError(
                f"cannot cut frames of shape {list(frames.shape)} back to {list(self)}; "
                "expected [frames, height, width, channels] at least that large"
            )
        return frames[: self.num_frames, : self.height, : self.width]


def pad_video(frames: np.ndarray, multiple: int = SIZE_MULTIPLE) -> tuple[np.ndarray, Padding]:
    """Pad a video to 4n+1 frames and sides that are multiples of `multiple`.

    The last frame is repeated; the right and lower edges are continued, because a black border
    would bleed into the picture through the VAE.

    Args:
        frames: uint8 [T, H, W, 3].
        multiple: of both sides.

    Returns:
        The padded frames (the same array where nothing was missing), and what `crop` needs to
        undo it.

    Raises:
        LayoutError: if `frames` is not uint8 [T, H, W, 3].
        ConfigError: if `multiple` is below 1.
    """
    num_frames, height, width, _ = check_frames(frames).shape
    full_height, full_width = fit_size(height, width, multiple=multiple)
    missing = (
        (0, padded_num_frames(num_frames) - num_frames),
        (0, full_height - height),
        (0, full_width - width),
        (0, 0),
    )
    padding = Padding(num_frames, height, width)
    if not any(after for _, after in missing):
        return frames, padding
    return np.pad(frames, missing, mode="edge"), padding


def _check_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise LayoutError(f"{what} hold NaN or infinity; the model or its input went wrong before")
