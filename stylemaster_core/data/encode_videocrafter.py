"""What VideoCrafter's frozen encoders make of a sample: the tensors that its training reads."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..layouts import SPATIAL_STRIDE, frames_to_video
from .clips import Clip, load_clip
from .encode import EncodeConfig, StoreDtype, stored_tensors
from .images import check_aspect, read_image, stylecrafter_video_pixels
from .samples import Sample, is_video

if TYPE_CHECKING:
    from ..models.image_encoder import ImageEncoder
    from ..models.sd_parts import FrameVAE, TextEncoder

CROP_PX, SHORT_SIDE_PX = 512, 800  # of the style picture
LATENT_CHANNELS = 4


class VideoCrafterEncoders(NamedTuple):
    """The frozen models."""

    vae: FrameVAE
    text_encoder: TextEncoder
    image_encoder: ImageEncoder


class VideoCrafterPixels(NamedTuple):
    """What the encoders look at, made without them so that it can be made ahead."""

    clip: Clip
    style: Tensor  # [3, 224, 224] for CLIP


def load_videocrafter_pixels(sample: Sample, config: EncodeConfig) -> VideoCrafterPixels:
    """Read a sample's files. A clip's style picture is its middle frame, unless it has another.

    Raises:
        LayoutError: if one is missing or damaged, or the clip has too few frames.
    """
    clip = load_clip(sample, config.clip)
    picture = clip.picture if sample.style is None else read_image(sample.style)
    crop = style_crop(picture, seed=zlib.crc32(f"{config.seed} {sample.id}".encode()))
    return VideoCrafterPixels(clip, stylecrafter_video_pixels(crop))


def style_crop(picture: np.ndarray, *, seed: int) -> np.ndarray:
    """A random square of a picture, so that the style is learned, and not the picture's layout.

    Args:
        picture: uint8 [H, W, 3].
        seed: of the place.

    Returns:
        uint8 [512, 512, 3], of the picture with a short side of 800.

    Raises:
        LayoutError: if `picture` is not uint8 [H, W, 3], or thinner than 50:1.

    Source: StyleCrafter, sec. 3.4, and its SDXL training code; deviation: it is drawn once for each
    sample, as training reads encoded pictures.
    """
    height, width, _ = check_aspect(picture).shape
    short = min(height, width)
    size = int(SHORT_SIDE_PX * width / short), int(SHORT_SIDE_PX * height / short)
    image = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    draws = np.random.default_rng(seed)
    left, top = (int(draws.integers(side - CROP_PX + 1)) for side in size)
    return np.asarray(image.crop((left, top, left + CROP_PX, top + CROP_PX)))


@torch.no_grad()
def encode_videocrafter_sample(
    sample: Sample, pixels: VideoCrafterPixels, encoders: VideoCrafterEncoders, dtype: StoreDtype
) -> dict[str, Tensor]:
    """Encode a sample.

    Returns:
        On the CPU, in `dtype`: `latents` [4, T, h, w]; `text` [77, D] of the caption;
        `patch_features` [257, C], the style picture as StyleCrafter's video adapter sees it.

    Raises:
        LayoutError: if something is not finite, as in a dtype too small for it.
    """
    features = encoders.image_encoder.stylecrafter_video(pixels.style[None])
    tensors = {
        "latents": encoders.vae.encode(frames_to_video(pixels.clip.frames))[0],
        "text": encoders.text_encoder.encode(sample.caption)[0],
        "patch_features": features[0],
    }
    return stored_tensors(tensors, dtype)


def encode_empty_prompt(text_encoder: TextEncoder, dtype: StoreDtype) -> Tensor:
    """Features [77, D] of the empty prompt: what a dropped caption becomes."""
    return stored_tensors({"text": text_encoder.encode("")[0]}, dtype)["text"]


def videocrafter_sample_bytes(sample: Sample, config: EncodeConfig) -> int:
    """About how many bytes a sample's latents take in a cache, at the largest size."""
    num_frames = sample.repeat or (config.clip.num_frames if is_video(sample.media) else 1)
    area = max(height * width for height, width in config.clip.sizes) // SPATIAL_STRIDE**2
    return LATENT_CHANNELS * num_frames * area * (4 if config.dtype == "float32" else 2)
