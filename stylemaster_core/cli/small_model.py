"""What the trainers need to train stylemaster-tiny further: its files, and how it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..pipelines.models import ModelFiles
from ..pipelines.tiny import tiny_files
from ..weights.files import read_keys

# As the recipe trained it; the presets are for Wan.
SETTINGS = (
    "flow.shift=3",
    "flow.timesteps=logit_normal",
    "flow.weighting=none",
    "flow.text_length=24",
    "run.sample_steps=12",
    "run.sample_text_scale=1.5",
    "run.sample_style_scale=1.5",
)
# Trainer: the files that it goes on from, by the option that names them.
_STARTS: dict[str, dict[str, str]] = {
    "style": {"base": "transformer", "adapter": "adapter"},
    "motion": {"base": "transformer", "motion_adapter": "motion_adapter"},
    "control": {"base": "transformer", "controlnet": "controlnet", "adapter": "adapter"},
    "base": {"base": "transformer"},
    "stylecrafter": {"base": "transformer", "adapter": "adapter"},
    "stylecrafter-video": {
        "base": "transformer",
        "adapter": "adapter",
        "motion_adapter": "motion_adapter",
    },
}
_ENCODERS = ("vae", "text_encoder")


def small_model_files(trainer: str, model: str, files: ModelFiles | None = None) -> dict[str, Path]:
    """The files of the small model that a trainer starts from, and its VAE and text encoder.

    Args:
        trainer: one of the trainers.
        model: tiny or tiny-stylecrafter, which the trainer must be able to train.
        files: of the model; None for those that come with the package.

    Returns:
        paths by option, such as `base` or `motion_adapter`.

    Raises:
        ConfigError: if the trainer trains another kind of adapter.
        WeightsError: if files are missing.
    """
    if trainer.startswith("videocrafter"):
        raise ConfigError(
            f"the trainer {trainer!r} trains no part of {model}; name the files of VideoCrafter"
        )
    stylecrafter = model.endswith("stylecrafter")
    if stylecrafter != trainer.startswith("stylecrafter") and trainer != "base":
        right = "tiny" if stylecrafter else "tiny-stylecrafter"
        raise ConfigError(f"the trainer {trainer!r} trains no part of {model}; use --model {right}")
    found = vars(files or tiny_files(stylecrafter=stylecrafter))
    if trainer == "global-projection":  # it sees neither latents nor text
        projected = any("contrastive" in key for key in read_keys(found["adapter"]))
        return {"global_projection": found["adapter"]} if projected else {}
    names = _STARTS[trainer] | {name: name for name in _ENCODERS}
    return {option: found[name] for option, name in names.items()}


def small_model_settings(trainer: str) -> list[str]:
    """Changes of a preset by which the small model is trained as the recipe trained it."""
    return [] if trainer == "global-projection" else list(SETTINGS)


def encode_settings() -> dict[str, Any]:
    """Size, frames and tile factor of the samples that it is trained on."""
    from ..pipelines.tiny import NUM_FRAMES, TRAINED_PX
    from ..pipelines.tiny import SETTINGS as tiny

    return {
        "size": [(TRAINED_PX, TRAINED_PX)],
        "frames": NUM_FRAMES,
        "tile_factor": tiny["tile_factor"],
    }
