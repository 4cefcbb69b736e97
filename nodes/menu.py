"""Where each node stands in ComfyUI's menu, and which of its inputs are rarely used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ROOT = "stylemaster"
TRAINING = "training"
GROUPS = {
    "loaders": ("AdapterLoader", "TinyLoader", "MotionAdapter", "VideoCrafterLoader"),
    "style": (
        "StyleEncoder",
        "TextureSelector",
        "BlendStyles",
        "SaveStyle",
        "LoadStyle",
        "FindStyle",
        "ApplyStyle",
        "ShowScales",
    ),
    "control": ("GrayTileControl",),
    "sampling": ("Sampler", "Guider", "Latent", "Crop"),
    "video": ("FolderVideo", "CompareStyles", "StyleGrid", "StyleSheet"),
    TRAINING: (
        "Dataset",
        "IllusionDataset",
        "EncodeDataset",
        "TrainStyle",
        "TrainMotionAdapter",
        "TrainGrayTileControl",
        "TrainGlobalProjection",
        "TrainStyleCrafter",
        "TrainingMonitor",
    ),
}
_TRAINER = ("run_name", "accumulation", "save_every", "resume", "settings")
# Folded away by ComfyUI 0.9 and newer until they are asked for.
ADVANCED = {
    "StyleEncoder": ("shuffle_seed",),
    "TextureSelector": ("keep", "selection_seed"),
    "ApplyStyle": ("blocks", "block_weights", "first_frame", "last_frame"),
    "MotionAdapter": ("start", "end"),
    "VideoCrafterLoader": ("fps",),
    "CompareStyles": ("columns", "side"),
    "Sampler": ("same_noise",),
    "StyleSheet": ("side",),
    "FolderVideo": ("first_frame",),
    "TrainStyle": _TRAINER,
    "TrainMotionAdapter": _TRAINER,
    "TrainGrayTileControl": _TRAINER,
    "TrainGlobalProjection": _TRAINER,
    "TrainStyleCrafter": _TRAINER,
}
_PREFIX = "StyleMaster"
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def category(node_id: str) -> str:
    group = _GROUP_OF.get(node_id.removeprefix(_PREFIX))
    return f"{ROOT}/{group}" if group else ROOT


def is_trainer(node_id: str) -> bool:
    return node_id.startswith(f"{_PREFIX}Train") and not node_id.endswith("Monitor")


def mark_advanced(node_id: str, inputs: Iterable[Any]) -> None:
    """Mark the rarely used inputs of a node, where this ComfyUI knows such a mark."""
    rare = ADVANCED.get(node_id.removeprefix(_PREFIX), ())
    for given in inputs:
        if given.id in rare and hasattr(given, "advanced"):
            given.advanced = True
