"""What the frozen encoders make of a sample: the tensors that training reads."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..layouts import LATENT_CHANNELS, frames_to_video, latent_shape
from .clips import Clip, ClipConfig, load_clip
from .content_shuffle import content_shuffle
from .gray_tile import gray_tile
from .images import CropMode, clip_pixels, read_image
from .pairs import Pair, check_pair
from .samples import Sample, is_video

if TYPE_CHECKING:
    from ..models.image_encoder import ImageEncoder
    from ..models.patch_vae import PatchVAE
    from ..models.text_encoder import TextEncoder
    from ..models.vae import WanVAE

StoreDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class EncodeConfig:
    """How samples become tensors.

    Attributes:
        clip: size, rate and length.
        tile: control latents of the gray tile for every sample, not only for those that ask.
        tile_factor: how much smaller the tile is.
        crop: of the style picture, for CLIP.
        seed: of the content shuffle, together with the sample's id.
        dtype: of the tensors in the cache.
    """

    clip: ClipConfig = ClipConfig()
    tile: bool = False
    tile_factor: int = 8
    crop: CropMode = "center"
    seed: int = 0
    dtype: StoreDtype = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in get_args(StoreDtype):
            raise ConfigError(f"cache dtype {self.dtype!r}; use one of {get_args(StoreDtype)}")


class Encoders(NamedTuple):
    """The frozen models."""

    vae: WanVAE | PatchVAE
    text_encoder: TextEncoder
    image_encoder: ImageEncoder


class Pixels(NamedTuple):
    """What the encoders look at, made without them so that it can be made ahead."""

    clip: Clip
    views: Tensor  # [2, 3, 224, 224] style picture and its content shuffle, for CLIP


def load_pixels(sample: Sample, config: EncodeConfig, image_size: int = 224) -> Pixels:
    """Read a sample's files.

    Raises:
        LayoutError: if one is missing or damaged, or the clip has too few frames.
    """
    clip = load_clip(sample, config.clip)
    picture = clip.picture if sample.style is None else read_image(sample.style)
    seed = zlib.crc32(f"{config.seed} {sample.id}".encode())
    views = [
        clip_pixels(view, crop=config.crop, size=image_size)
        for view in (picture, content_shuffle(picture, seed=seed))
    ]
    return Pixels(clip, torch.stack(views))


@torch.no_grad()
def encode_sample(
    sample: Sample, pixels: Pixels, encoders: Encoders, config: EncodeConfig
) -> dict[str, Tensor]:
    """Encode a sample.

    Returns:
        On the CPU, in `config.dtype`: `latents` [16, t, h, w]; `text` [L, D], the tokens of the
        caption without padding; `patch_features` [257, C]; `image_embeds` [E] of the style picture;
        `shuffled_embeds` [E] of its content shuffle; and `control_latents` like `latents`, if the
        sample has a tile.

    Raises:
        LayoutError: if something is not finite, as in a dtype too small for it.
    """
    frames = pixels.clip.frames
    features = encoders.image_encoder.encode(pixels.views)
    tensors = {
        "latents": encoders.vae.encode(frames_to_video(frames))[0],
        "text": _unpadded(encoders.text_encoder.encode([sample.caption])[0]),
        "patch_features": features.patch_features[0],
        "image_embeds": features.image_embeds[0],
        "shuffled_embeds": features.image_embeds[1],
    }
    if sample.tile or config.tile:
        tile = gray_tile(frames, *frames.shape[1:3], factor=config.tile_factor)
        tensors["control_latents"] = encoders.vae.encode(tile[None])[0]
    return stored_tensors(tensors, config.dtype)


@torch.no_grad()
def encode_null_text(text_encoder: TextEncoder, dtype: StoreDtype) -> Tensor:
    """Features [L, D] of the empty prompt, without padding: what a dropped caption becomes."""
    text = _unpadded(text_encoder.encode([""])[0])
    name = "features of the empty prompt"
    return stored_tensors({name: text}, dtype)[name]


def load_pair_pixels(pair: Pair, image_size: int = 224, crop: CropMode = "center") -> Tensor:
    """Read both pictures of a pair for CLIP: [2, 3, 224, 224].

    Raises:
        LayoutError: if a file is damaged, or the pictures do not consist of the same pixels.
    """
    if problem := check_pair(pair):
        raise LayoutError(problem)
    pictures = (read_image(pair.first), read_image(pair.second))
    return torch.stack([clip_pixels(p, crop=crop, size=image_size) for p in pictures])


@torch.no_grad()
def encode_pair(
    pixels: Tensor, image_encoder: ImageEncoder, dtype: StoreDtype
) -> dict[str, Tensor]:
    """Encode a pair: `first_embeds` [E] and `second_embeds` [E]."""
    embeds = image_encoder.encode(pixels).image_embeds
    return stored_tensors({"first_embeds": embeds[0], "second_embeds": embeds[1]}, dtype)


def sample_bytes(sample: Sample, config: EncodeConfig) -> int:
    """About how many bytes a sample's latents take in a cache, at the largest size."""
    num_frames = sample.repeat or (config.clip.num_frames if is_video(sample.media) else 1)
    height, width = max(config.clip.sizes, key=lambda size: size[0] * size[1])
    values = LATENT_CHANNELS * math.prod(latent_shape(num_frames, height, width))
    return values * (1 + (sample.tile or config.tile)) * (4 if config.dtype == "float32" else 2)


def _unpadded(text: Tensor) -> Tensor:
    """Cut the zeros after the prompt's end."""
    length = int(text.ne(0).any(-1).nonzero().max()) + 1 if text.any() else 1
    return text[:length]


def stored_tensors(tensors: dict[str, Tensor], dtype: StoreDtype) -> dict[str, Tensor]:
    """Tensors as a cache holds them: on the CPU, in its dtype.

    Raises:
        LayoutError: if something is not finite, as in a dtype too small for it.
    """
    stored = {key: value.to("cpu", getattr(torch, dtype)) for key, value in tensors.items()}
    for key, value in stored.items():
        if not torch.isfinite(value).all():
            raise LayoutError(
                f"the {key} hold NaN or infinity in {dtype}; try the cache in float32 or bfloat16"
            )
    return stored
