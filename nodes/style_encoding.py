"""Style pictures through ComfyUI's CLIP vision to style tokens."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import numpy as np
import torch
from torch import Tensor

from ..stylemaster_core.data.content_shuffle import content_shuffle
from ..stylemaster_core.data.images import CropMode, clip_pixels, stylecrafter_video_pixels
from ..stylemaster_core.errors import ConfigError, LayoutError
from ..stylemaster_core.models.style_adapter import StyleCrafterAdapter, StyleMasterAdapter
from ..stylemaster_core.models.style_tokens import BlendMode, Style, blend_styles, provenance_of
from ..stylemaster_core.models.texture_selector import (
    Selection,
    SelectionMode,
    prompt_similarity,
    relevance_map,
)
from ..stylemaster_core.pipelines.pictures import clip_view_picture, selection_picture
from .conditionings import Conditioning
from .layouts import clip_view_to_image, image_to_frames, pictures_to_image
from .sockets import StyleFeatures

_SAMPLED = 64  # numbers of each weight


def encode_pictures(
    clip_vision: Any, image: Tensor, shuffle_seed: int, crop: CropMode
) -> StyleFeatures:
    """CLIP features of pictures and of their content-shuffled versions.

    Raises:
        LayoutError: for pictures without pixels, or a vision model without projected embedding.
    """
    pictures = list(image_to_frames(image, "the style picture"))
    shuffled = [content_shuffle(picture, seed=shuffle_seed) for picture in pictures]
    seen = _look_at(clip_vision, pictures + shuffled, crop)
    patches, penultimate = (
        seen[name][: len(pictures)].float().cpu()
        for name in ("last_hidden_state", "penultimate_hidden_states")
    )
    embeds, shuffled_embeds = seen["image_embeds"].float().cpu().chunk(2)
    joint = _joint_patches(clip_vision.model, patches)
    return StyleFeatures(
        patches,
        penultimate,
        embeds,
        shuffled_embeds,
        joint,
        pictures,
        shuffled,
        crop,
        shuffle_seed,
        functools.partial(video_features, clip_vision, pictures, crop),
    )


def _look_at(clip_vision: Any, pictures: Sequence[np.ndarray], crop: CropMode) -> Any:
    views = [clip_pixels(view, crop=crop, size=clip_vision.image_size) for view in pictures]
    seen = clip_vision.encode_image(clip_view_to_image(torch.stack(views)))
    if seen["image_embeds"] is None or seen["image_embeds"].ndim != 2:
        raise LayoutError(
            "this CLIP_VISION gives no projected image embedding; load CLIP ViT-H/14 "
            "(clip_vision_h.safetensors)"
        )
    return seen


def search_embeds(clip_vision: Any, pictures: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """What pictures are found by: [B, D] each of their content-shuffled versions, and as they are.

    Raises:
        LayoutError: as `encode_pictures`.
    """
    shuffled = [content_shuffle(picture, seed=0) for picture in pictures]
    seen = _look_at(clip_vision, [*shuffled, *pictures], "center")
    style, whole = seen["image_embeds"].float().cpu().chunk(2)
    return {"style": style, "whole": whole}


def encoder_identity(clip_vision: Any) -> str:
    """Tells vision models apart: a hash of some of the numbers of every weight."""
    digest = hashlib.sha256()
    for key, value in sorted(clip_vision.get_sd().items()):
        flat = value.detach().flatten()
        some = flat[:: max(flat.numel() // _SAMPLED, 1)][:_SAMPLED]
        digest.update(f"{key} {list(value.shape)}".encode())
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def video_features(clip_vision: Any, pictures: Sequence[np.ndarray], crop: CropMode) -> Tensor:
    """What StyleCrafter's video adapter takes: CLIP's last layer, of pictures prepared its way.

    Raises:
        ConfigError: for another crop than the only one that it has.
    """
    if crop != "center":
        raise ConfigError(
            "StyleCrafter's adapter for VideoCrafter prepares pictures in a way of its own, which "
            f"has only the crop center; got {crop}"
        )
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    # Not by `encode_image`, which rounds to 8 bits and cuts what the resize overshoots.
    pixels = torch.stack([stylecrafter_video_pixels(picture) for picture in pictures])
    tokens = clip_vision.model(pixel_values=pixels.to(clip_vision.load_device))[0].float()
    first = clip_vision.model.vision_model.post_layernorm(tokens[:, :1])
    return torch.cat([first, tokens[:, 1:]], dim=1).cpu()


def _joint_patches(model: Any, patches: Tensor) -> Tensor | None:
    """Every patch in the joint text-image space, as CLIP brings the CLS token there."""
    if not hasattr(getattr(model, "vision_model", None), "post_layernorm"):
        return None
    return model.visual_projection(model.vision_model.post_layernorm(patches)).float().cpu()


def joint_similarity(features: StyleFeatures, clip_prompt: Conditioning) -> Tensor:
    """Similarity [B, N] of patches with a prompt that CLIP itself has encoded.

    Raises:
        LayoutError: if that CLIP is not the text half of the vision model.
    """
    pooled, joint = clip_prompt[0][1].get("pooled_output"), features.joint_patches
    if pooled is None or joint is None or pooled.shape[-1] != joint.shape[-1]:
        found = "no pooled embedding" if pooled is None else f"one of {list(pooled.shape)}"
        wanted = "none" if joint is None else f"[1, {joint.shape[-1]}]"
        raise LayoutError(
            f"the clip_prompt carries {found}, the style features need {wanted}; encode the prompt "
            "with the text half of the same CLIP (ViT-H/14), not with UMT5"
        )
    return prompt_similarity(joint, pooled.float().cpu()[:1, None])


@torch.no_grad()
def encode_stylecrafter(
    adapter: StyleCrafterAdapter, features: StyleFeatures, several: BlendMode
) -> tuple[Style, Tensor]:
    """Style tokens of the pictures, and an IMAGE of what CLIP saw; all patches count.

    Args:
        adapter: its encoder is widened to float32 for this one use.
        features: several pictures are references of one style.
        several: `concatenate` lets the adapter read them together, as in the paper; `mean` mixes
            the tokens of each.

    Raises:
        LayoutError: for features of another vision model.
    """
    encoder = copy.deepcopy(adapter.encoder).float()
    seen = features.seen_by(adapter).split(1)
    groups = [list(seen)] if several == "concatenate" else [[view] for view in seen]
    provenance = provenance_of(
        features.pictures, method=adapter.method, adapter=adapter.name, crop=features.crop
    )
    styles = [Style(encoder(group), provenance) for group in groups]
    style = styles[0] if len(styles) == 1 else blend_styles(styles)
    views = [clip_view_picture(picture, features.crop) for picture in features.pictures]
    return style, pictures_to_image(views)


def select_textures(
    adapter: StyleMasterAdapter,
    features: StyleFeatures,
    prompt: Conditioning,
    mode: SelectionMode,
    *,
    drop_rate: float,
    keep: int,
    seed: int,
    several: BlendMode,
    clip_prompt: Conditioning | None,
) -> tuple[Style, Tensor]:
    """Style tokens of the pictures, and an IMAGE of what was kept of each."""
    similarity = None
    if mode == "paper" and clip_prompt is not None:
        similarity = joint_similarity(features, clip_prompt)
    # Kept as stored and widened for this one use: the socket outlives it, float32 would double it.
    projector = copy.deepcopy(adapter.projector).float()
    with torch.no_grad():
        result = projector(
            features.patches,
            getattr(features, projector.global_embeds),
            prompt[0][0].float().cpu(),
            selection=mode,
            drop_rate=None if keep or mode == "all" else drop_rate,
            keep=None if mode == "all" else keep or None,
            similarity=similarity,
            seed=seed,
        )
    texture = {"selection": mode, "drop_rate": drop_rate, "keep": keep, "seed": seed}
    texture |= {"include_cls": True, "shuffle_seed": features.shuffle_seed}
    origin = {"method": adapter.method, "adapter": adapter.name, "crop": features.crop}
    styles = [
        Style(tokens[None].float(), provenance_of([picture], **origin, texture=texture))
        for tokens, picture in zip(result.tokens, features.pictures, strict=True)
    ]
    selection = Selection(result.kept, result.similarity)
    maps = zip(*relevance_map(selection, features.patches.shape[1]), strict=True)
    seen = zip(features.pictures, features.shuffled, maps, strict=True)
    panels = [
        selection_picture(picture, *map_, shuffled, crop=features.crop)
        for picture, shuffled, map_ in seen
    ]
    style = styles[0] if len(styles) == 1 else blend_styles(styles, mode=several)
    return style, pictures_to_image(panels)
