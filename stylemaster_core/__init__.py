"""StyleMaster (arXiv 2412.07744): reference-style video generation and restyling on Wan 2.1.

The names below are the public API. They load on first use, because importing this package must
stay cheap inside ComfyUI, which imports it at start-up.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, LayoutError, StyleMasterError, UnsupportedHostError, WeightsError

if TYPE_CHECKING:
    from .data.content_shuffle import content_shuffle
    from .data.gray_tile import gray_tile
    from .models.decoupled_attention import StyleRegion
    from .models.gray_tile_controlnet import load_gray_tile_controlnet
    from .models.motion_adapter import load_motion_adapter
    from .models.style_projector import load_style_projector
    from .models.wan_transformer import load_transformer
    from .pipelines.stylize import stylize
    from .sampling.denoise import StepProgress, denoise
    from .sampling.guidance import combine_guidance
    from .sampling.schedules import flow_match_sigmas

__version__ = "0.1.0"

_LAZY = {
    "content_shuffle": "data.content_shuffle",
    "gray_tile": "data.gray_tile",
    "StyleRegion": "models.decoupled_attention",
    "load_gray_tile_controlnet": "models.gray_tile_controlnet",
    "load_motion_adapter": "models.motion_adapter",
    "load_style_projector": "models.style_projector",
    "load_transformer": "models.wan_transformer",
    "stylize": "pipelines.stylize",
    "StepProgress": "sampling.denoise",
    "denoise": "sampling.denoise",
    "combine_guidance": "sampling.guidance",
    "flow_match_sigmas": "sampling.schedules",
}

__all__ = [
    "ConfigError",
    "LayoutError",
    "StepProgress",
    "StyleMasterError",
    "StyleRegion",
    "UnsupportedHostError",
    "WeightsError",
    "combine_guidance",
    "content_shuffle",
    "denoise",
    "flow_match_sigmas",
    "gray_tile",
    "load_gray_tile_controlnet",
    "load_motion_adapter",
    "load_style_projector",
    "load_transformer",
    "stylize",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
