"""The sockets of this pack, what travels through them, and the schema that all nodes share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from comfy_api.latest import io
from torch import Tensor

from ..stylemaster_core.data.images import CropMode
from ..stylemaster_core.models.style_adapter import StyleCrafterAdapter
from .menu import category, is_trainer, mark_advanced

StyleAdapterSocket: Any = io.Custom("STYLE_ADAPTER")  # the core's StyleAdapter
StyleFeaturesSocket: Any = io.Custom("STYLE_FEATURES")  # StyleFeatures
StyleSocket: Any = io.Custom("STYLE")  # the core's Style
ControlNetSocket: Any = io.Custom("GRAY_TILE_CONTROLNET")  # from `load_native_controlnet`
GridSocket: Any = io.Custom("STYLE_GRID")  # Grid
MotionAdapterSocket: Any = io.Custom("MOTION_ADAPTER")  # the core's MotionAdapter


@dataclass(frozen=True, eq=False)
class StyleFeatures:
    """What CLIP sees in B style pictures, on the CPU."""

    patches: Tensor  # [B, N, C] last hidden state, CLS first
    penultimate: Tensor  # [B, N, C] the hidden state before that
    image_embeds: Tensor  # [B, D] of the pictures
    shuffled_embeds: Tensor  # [B, D] of the content-shuffled pictures
    joint_patches: Tensor | None  # [B, N, D] in the joint space; None if the model has none
    pictures: list[np.ndarray]  # uint8 [H, W, 3]
    shuffled: list[np.ndarray]  # uint8 [H, W, 3]
    crop: CropMode
    shuffle_seed: int
    for_video: Callable[[], Tensor]  # [B, N, C] as StyleCrafter's video adapter takes them

    def seen_by(self, adapter: StyleCrafterAdapter) -> Tensor:
        """What a StyleCrafter adapter takes of the pictures: [B, N, C]."""
        if adapter.unet_layers is None:
            return self.patches
        return self.for_video() if adapter.unet_layers.video_layers else self.penultimate


@dataclass(frozen=True)
class Grid:
    """Which styles and strengths are compared; the first style's strengths come first."""

    names: tuple[str, ...]
    strengths: tuple[float, ...]


def range_inputs(begins: str, ends: str, *, end: float = 1.0) -> list[io.Float.Input]:
    """Inputs `start` and `end` for a part of the sampling, with their tooltips."""
    return [
        io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)
        for name, default, tooltip in (("start", 0.0, begins), ("end", end, ends))
    ]


def schema(*, search_aliases: list[str], **fields: Any) -> io.Schema:
    """A node's schema; what this ComfyUI does not know yet is left out of it."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    if "search_aliases" in known:
        fields["search_aliases"] = search_aliases
    node_id = fields["node_id"]
    mark_advanced(node_id, fields["inputs"])
    return io.Schema(category=category(node_id), is_experimental=is_trainer(node_id), **fields)
