"""From a style picture and a prompt to style tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.content_shuffle import content_shuffle
from ..data.images import CropMode, clip_pixels
from ..errors import ConfigError
from ..models.style_tokens import Style, provenance_of
from ..models.texture_selector import PAPER_KEEP, Selection, SelectionMode, relevance_map
from .models import Models


@dataclass(frozen=True)
class TextureConfig:
    """How a style picture becomes tokens."""

    selection: SelectionMode = "release"
    drop_rate: float | None = None  # share of patches dropped; None: 0.95
    keep: int | None = None  # patches kept, instead of a drop rate
    include_cls: bool = True
    crop: CropMode = "center"
    seed: int = 0  # of the content shuffle and of selection "random"


class EncodedStyle(NamedTuple):
    """Result of `encode_style`."""

    """A style, and what was seen on the way to it."""

    style: Style
    similarity: Tensor  # [1, h, w] of each patch with the prompt
    kept: Tensor  # [1, h, w] bool
    shuffled: np.ndarray  # uint8 [H, W, 3] content-shuffled picture


@torch.no_grad()
def encode_style(
    models: Models,
    image: np.ndarray,
    prompt: str,
    config: TextureConfig | None = None,
    *,
    name: str = "",
) -> EncodedStyle:
    """Encode one style picture.

    Args:
        models: provides CLIP, the adapter and, where patches are ranked by the prompt, a text
            encoder.
        image: uint8 [H, W, 3].
        prompt: the prompt of the generation: selection compares patches with it.
        config: selection, crop and seed.
        name: of the picture, for the provenance.

    Raises:
        LayoutError, ConfigError, WeightsError: for pictures, options or files that cannot work.

    Source: StyleMaster, sec. 3.1, and its released code.
    """
    config = config or TextureConfig()
    shuffled = content_shuffle(image, seed=config.seed)
    with models.style_projector() as projector, models.image_encoder() as encoder:
        views = torch.stack(
            [
                clip_pixels(view, crop=config.crop, size=encoder.image_size)
                for view in (image, shuffled)
            ]
        )
        features = encoder.encode(views)
        view = 0 if projector.global_embeds == "image_embeds" else 1
        patches = features.patch_features[:1]
        prompt_features = similarity = None
        keep = config.keep
        if config.selection == "release":
            prompt_features = models.encode_text([prompt])
        elif config.selection == "paper":
            from ..models.clip_text import joint_similarity

            if not prompt:
                raise ConfigError(
                    "texture selection 'paper' compares patches with the prompt: give one"
                )
            with models.clip_text() as clip_text:
                similarity = joint_similarity(encoder, patches, clip_text.encode([prompt]))
            if keep is None and config.drop_rate is None:
                keep = PAPER_KEEP
        result = projector(
            patches,
            features.image_embeds[view : view + 1],
            None if prompt_features is None else prompt_features.to(patches.device),
            selection=config.selection,
            drop_rate=config.drop_rate,
            keep=keep,
            include_cls=config.include_cls,
            similarity=similarity,
            seed=config.seed,
        )
    texture = asdict(config) | {"shuffle_seed": config.seed}
    del texture["crop"]  # stands beside it, as for every method
    provenance = provenance_of(
        [image],
        method="stylemaster",
        adapter=Path(models.files.adapter or models.files.transformer or "").name,
        crop=config.crop,
        names=[name],
        texture=texture,
        prompt=prompt,
    )
    style = Style(result.tokens.float().cpu(), provenance)
    maps = relevance_map(Selection(result.kept, result.similarity), patches.shape[1])
    return EncodedStyle(style, *maps, shuffled)


@torch.no_grad()
def encode_stylecrafter(
    models: Models,
    images: Sequence[np.ndarray],
    *,
    crop: CropMode = "center",
    names: Sequence[str] = (),
) -> Style:
    """Encode pictures that are references of one style, with a StyleCrafter adapter for Wan.

    Args:
        models: provides CLIP and the adapter.
        images: uint8 [H, W, 3] each; they are read together.
        crop: how CLIP's square is cut.
        names: of the pictures, for the provenance.

    Raises:
        LayoutError, WeightsError: for pictures or files that cannot work.

    Source: StyleCrafter, sec. 3.2. Deviation: the features are CLIP's last hidden state as this
    project's training data hold it, without post-layernorm on CLS, and prepared by CLIP's own rule.
    """
    with models.stylecrafter() as adapter, models.image_encoder() as encoder:
        pixels = [clip_pixels(image, crop=crop, size=encoder.image_size)[None] for image in images]
        tokens = adapter([encoder.encode(picture).patch_features for picture in pixels])
    provenance = provenance_of(
        images,
        method="stylecrafter-wan",
        adapter=Path(models.files.adapter or "").name,
        crop=crop,
        names=names,
    )
    return Style(tokens.float().cpu(), provenance)
