"""stylemaster-tiny by its name: the small trained model that comes with this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import WeightsError
from .models import ModelFiles

FOLDER = Path(__file__).parents[1] / "tiny"
SIDE_PX = 256  # the short side to which what it restyles is brought
TRAINED_PX = 128  # of what it learned from, parts of larger pictures, and of what it makes up
NUM_FRAMES = 17  # of a video without input
# Of `StylizeConfig`, where they differ from the release's.
SETTINGS: dict[str, Any] = {
    "num_steps": 12,
    "text_scale": 1.5,
    "style_scale": 1.5,
    "tile_factor": 2,
    "control_range": (0.0, 1.0),
    "same_noise": True,  # of what is restyled; what is made up would hardly move
}
_PARTS = {
    "transformer": "transformer.safetensors",
    "vae": "vae.safetensors",
    "text_encoder": "text_encoder.json",
    "image_encoder": "image_encoder",
    "adapter": "style_adapter.safetensors",
    "controlnet": "controlnet.safetensors",
    "motion_adapter": "motion_adapter.safetensors",
}
# The same base with StyleCrafter's adapter and its LoRA for videos.
_STYLECRAFTER = {
    "adapter": "stylecrafter_adapter.safetensors",
    "motion_adapter": "stylecrafter_video_lora.safetensors",
}
_INSIDE = {"image_encoder": ("config.json", "model.safetensors")}


def tiny_files(folder: Path = FOLDER, *, stylecrafter: bool = False) -> ModelFiles:
    """Paths of the small model.

    Args:
        folder: another place to look in.
        stylecrafter: with StyleCrafter's adapter instead of StyleMaster's.

    Raises:
        WeightsError: naming each file that is not there.
    """
    parts = _PARTS | (_STYLECRAFTER if stylecrafter else {})
    wanted = [folder / part / inner for part in parts.values() for inner in _inside(part)]
    missing = [path.relative_to(folder).as_posix() for path in wanted if not path.is_file()]
    if missing:
        raise WeightsError(
            f"stylemaster-tiny is not complete: {folder} lacks {', '.join(missing)}; get the "
            "repository with its weights again, or train them: make tiny"
        )
    return ModelFiles(**{name: folder / part for name, part in parts.items()})


def _inside(part: str) -> tuple[str, ...]:
    return _INSIDE.get(part, ("",))


def tiny_settings(frames: np.ndarray | None = None, *, still: bool = False) -> dict[str, Any]:
    """Fields of `StylizeConfig` that suit the small model.

    Args:
        frames: uint8 [T, H, W, 3] input, if there is one; its short side is brought to at most 256
            pixels, both sides to multiples of 16.
        still: one picture is made.
    """
    if frames is None:
        made_up = {"size": (TRAINED_PX, TRAINED_PX), "same_noise": False}
        return SETTINGS | made_up | ({} if still else {"num_frames": NUM_FRAMES})
    height, width = frames.shape[1:3]
    scale = min(SIDE_PX / min(height, width), 1.0)
    size = tuple(max(round(side * scale / 16) * 16, 16) for side in (height, width))
    return SETTINGS | {"size": size}
