"""ComfyUI's IMAGE, MASK and LATENT to the core's layouts and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from ..stylemaster_core.data.images import CLIP_MEAN, CLIP_STD
from ..stylemaster_core.errors import ConfigError, LayoutError
from ..stylemaster_core.layouts import (
    LATENT_CHANNELS,
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    Padding,
    fit_size,
    latent_shape,
    padded_num_frames,
)

PADDING_KEY = "stylemaster_padding"  # in a LATENT: frames, height, width before padding

Latent = dict[str, Any]


def image_to_frames(image: Tensor, what: str) -> np.ndarray:
    """IMAGE [T, H, W, C >= 3] in 0..1 to uint8 [T, H, W, 3]; more channels than 3 are left out.

    Raises:
        LayoutError: for another shape, no pixels, or numbers that are not finite.
    """
    if image.ndim != 4 or image.shape[-1] < 3 or 0 in image.shape:
        raise LayoutError(
            f"{what} has the shape {list(image.shape)}; expected an IMAGE [frames, height, width, "
            "3] of at least one pixel"
        )
    image = image[..., :3].detach().float().cpu()
    if not torch.isfinite(image).all():
        raise LayoutError(f"{what} holds NaN or infinity; look at the node that made it")
    return image.mul(255).round_().clamp_(0, 255).to(torch.uint8).numpy()


def frames_to_image(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] to IMAGE."""
    return torch.from_numpy(np.ascontiguousarray(frames)).float().div_(255)


def sound_to_audio(samples: np.ndarray, sample_rate: int) -> dict[str, Any]:
    """Sound float32 [channels, samples] to AUDIO."""
    return {"waveform": torch.from_numpy(samples)[None], "sample_rate": sample_rate}


def pictures_to_image(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures uint8 [H, W, 3] of one size to IMAGE."""
    return frames_to_image(np.stack(pictures))


def clip_view_to_image(pixels: Tensor) -> Tensor:
    """Pixels that are normalised for CLIP [B, 3, S, S] to IMAGE, which ComfyUI normalises again."""
    mean, std = (pixels.new_tensor(values) for values in (CLIP_MEAN, CLIP_STD))
    return (rearrange(pixels, "b c h w -> b h w c") * std + mean).clamp_(0, 1)


def video_to_image(video: Tensor) -> Tensor:
    """One video [3, T, H, W] in -1..1 to IMAGE."""
    return rearrange(video, "c t h w -> t h w c").add(1).div_(2).contiguous()


def latent_video_size(latent: Latent) -> tuple[int, int, int]:
    """Frames, height and width of the video that a LATENT will become.

    Raises:
        LayoutError: if it is not the LATENT of a Wan video.
    """
    samples = latent["samples"]
    if samples.ndim != 5 or samples.shape[1] != LATENT_CHANNELS or 0 in samples.shape:
        raise LayoutError(
            f"this LATENT has the shape {list(samples.shape)}; expected [batch, {LATENT_CHANNELS}, "
            "t, h, w] of a Wan 2.1 video: make it with StyleMaster Latent"
        )
    t, h, w = samples.shape[2:]
    return (t - 1) * TEMPORAL_STRIDE + 1, h * SPATIAL_STRIDE, w * SPATIAL_STRIDE


def latent_padding(latent: Latent) -> Padding:
    """Size before padding; that of the LATENT itself if nothing was padded."""
    return Padding(*latent.get(PADDING_KEY, latent_video_size(latent)))


def padded_size(padding: Padding) -> tuple[int, int, int]:
    """Frames, height and width after padding."""
    return (padded_num_frames(padding.num_frames), *fit_size(padding.height, padding.width))


def empty_latent(padding: Padding) -> Latent:
    """LATENT of zeros for a video of any size, which it remembers."""
    t, h, w = latent_shape(*padded_size(padding))
    return {"samples": torch.zeros(1, LATENT_CHANNELS, t, h, w), PADDING_KEY: tuple(padding)}


def crop_image(image: Tensor, latent: Latent) -> Tensor:
    """Cut a decoded video [T, H, W, C] back to the size that its LATENT remembers.

    Raises:
        LayoutError: if the LATENT remembers none, or the video is not as long as the LATENT.
    """
    if PADDING_KEY not in latent:
        raise LayoutError(
            "this LATENT remembers no size; link the one that comes from StyleMaster Latent (or "
            "from the sampler after it)"
        )
    padding = latent_padding(latent)
    expected = padded_num_frames(padding.num_frames)
    if image.shape[0] != expected:
        raise LayoutError(
            f"{image.shape[0]} frames came, but this LATENT becomes {expected}; link the frames "
            "that were decoded from it, of one video at a time"
        )
    return padding.crop(image)


def region_mask(
    mask: Tensor | None, first_frame: int, last_frame: int, latent: Latent | None
) -> Tensor | None:
    """Where and when a style acts.

    Args:
        mask: MASK [T, H, W] or [H, W]; one for all frames, or one for each.
        first_frame: of the video, from 0.
        last_frame: inclusive; -1 for the end.
        latent: of the video; needed for a range of frames unless there is a mask for each.

    Returns:
        [t, H, W] of latent frames, t = 1 for all; None for everywhere and always.

    Raises:
        LayoutError, ConfigError: for a mask or a range that does not fit the video.
    """
    if mask is not None:
        mask = _check_mask(mask)
    lengths = _video_lengths(mask, latent)
    if first_frame == 0 and last_frame == -1:
        return mask if mask is None or len(mask) == 1 else _to_latent_frames(mask)
    if not lengths:
        raise ConfigError(
            "a range of frames needs the length of the video: link the LATENT that will be sampled"
        )
    length = lengths[0]
    last = length - 1 if last_frame == -1 else last_frame
    if not 0 <= first_frame <= last < length:
        raise ConfigError(
            f"frames {first_frame} to {last_frame} are no part of a video of {length} frames; "
            f"expected 0 <= first <= last <= {length - 1}, or -1 for the last"
        )
    when = torch.zeros(length, 1, 1)
    when[first_frame : last + 1] = 1
    if mask is None:
        mask = torch.ones(1, 1, 1)
    return _to_latent_frames(mask[:length] * when)


def picture_mask(mask: Tensor | None, first_frame: int, last_frame: int) -> Tensor | None:
    """Where a style acts on a picture: [1, H, W], or None for everywhere.

    Raises:
        ConfigError: for a range of frames.
        LayoutError: for several masks.
    """
    if (first_frame, last_frame) != (0, -1):
        raise ConfigError(
            f"first_frame {first_frame} and last_frame {last_frame} are for videos; on a picture "
            "leave them at 0 and -1"
        )
    if mask is None:
        return None
    mask = _check_mask(mask)
    if len(mask) > 1:
        raise LayoutError(f"{len(mask)} masks came for a picture; give one")
    return mask


def _check_mask(mask: Tensor) -> Tensor:
    mask = mask if mask.ndim == 3 else mask[None]
    if mask.ndim != 3 or 0 in mask.shape:
        raise LayoutError(
            f"this MASK has the shape {list(mask.shape)}; expected [frames, height, width] of at "
            "least one pixel"
        )
    return mask.detach().float().cpu()


def _video_lengths(mask: Tensor | None, latent: Latent | None) -> list[int]:
    """Lengths that the video may be said to have: before padding, and after."""
    count = 0 if mask is None else len(mask)
    if latent is None:
        return [count] if count > 1 else []
    lengths = [latent_padding(latent).num_frames, latent_video_size(latent)[0]]
    if count > 1 and count not in lengths:
        raise LayoutError(
            f"{count} masks came for a video of {lengths[0]} frames; give one mask, or one for "
            "each frame"
        )
    return lengths


def _to_latent_frames(mask: Tensor) -> Tensor:
    """Mean over the frames that share a latent frame: the first alone, then fours."""
    missing = padded_num_frames(len(mask)) - len(mask)
    mask = torch.cat([mask, repeat(mask[-1], "h w -> n h w", n=missing)])
    rest = rearrange(mask[1:], "(t n) h w -> t n h w", n=TEMPORAL_STRIDE).mean(1)
    return torch.cat([mask[:1], rest])
