"""From files and a config to a trainer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, WeightsError
from ..reading import reading
from ..weights.files import read_keys, read_state_dict, sha256_of
from ..weights.numbers import check_weights
from ..weights.state_dict import (
    describe_kind,
    detect_kind,
    shapes_of,
    split_release,
    strip_prefix,
)
from .base_model import create_base_trainer
from .checks import check_hashes
from .config import TrainConfig
from .global_projection import create_projection_trainer
from .gray_tile_controlnet import create_control_trainer
from .motion_adapter import create_motion_trainer
from .samples import TrainingData
from .style_modulation import create_style_trainer
from .stylecrafter import (
    create_stylecrafter_trainer,
    create_stylecrafter_video_trainer,
    heads_as_trained,
)
from .trainer import Trainer
from .videocrafter import (
    create_videocrafter_adapter_trainer,
    create_videocrafter_temporal_trainer,
)

logger = logging.getLogger("stylemaster")

_KINDS = {
    "base": {"stylemaster", "wan_native", "wan_diffusers"},
    "adapter": {"style_adapter", "stylemaster"},
    "controlnet": {"gray_tile_controlnet"},
    "motion_adapter": {"motion_adapter"},
    "temporal": {"stylecrafter_temporal"},
    "global_projection": {"style_adapter"},
}
_STYLECRAFTER = {"adapter": {"stylecrafter_wan"}}
_VIDEOCRAFTER = {"base": {"videocrafter_unet"}, "adapter": {"stylecrafter_video"}}
_SECOND_STAGES = ("stylecrafter-video", "videocrafter-temporal")
_USED: dict[str, tuple[str, ...]] = {
    "global-projection": ("global_projection",),
    "style": ("base", "adapter", "global_projection"),
    "motion": ("base", "motion_adapter"),
    "control": ("base", "controlnet", "adapter", "global_projection"),
    "base": ("base",),
    "stylecrafter": ("base", "adapter"),
    "stylecrafter-video": ("base", "adapter", "motion_adapter"),
    "videocrafter-adapter": ("base", "adapter"),
    "videocrafter-temporal": ("base", "adapter", "temporal"),
}


@dataclass(frozen=True)
class TrainingFiles:
    """Weights that training starts from; None for new ones.

    Attributes:
        base: Wan transformer, or the whole release, of which only the base is used, or
            VideoCrafter's UNet. File or folder. Needed, except to train a new base.
        adapter: style adapter.
        controlnet: gray-tile ControlNet.
        motion_adapter: LoRA.
        temporal: temporal layers of VideoCrafter, which take the place of the base's.
        global_projection: file of the trainer of that name.
    """

    base: Path | None = None
    adapter: Path | None = None
    controlnet: Path | None = None
    motion_adapter: Path | None = None
    temporal: Path | None = None
    global_projection: Path | None = None


def create_trainer(
    config: TrainConfig,
    files: TrainingFiles,
    data: TrainingData,
    *,
    null_text: Tensor | None = None,
    meta: bool = False,
    skip_check: bool = False,
) -> Trainer:
    """Read the files and make the trainer that the config names.

    Args:
        config: of the run.
        files: weights to start from.
        data: samples; the first one's shapes decide the widths of new weights.
        null_text: [L, Dt] features of the empty prompt.
        meta: read shapes alone and make everything without numbers, for a dry run.
        skip_check: do not look for NaN and infinity in the weights.

    Raises:
        StyleMasterError: for missing or unfitting files.
    """
    name = config.trainer
    given = {f.name: getattr(files, f.name) for f in dataclasses.fields(files)}
    unused = [key for key, path in given.items() if path is not None and key not in _USED[name]]
    if unused:
        raise ConfigError(
            f"the trainer {name!r} has no use for {unused[0].replace('_', ' ')}; leave it out"
        )
    if files.base is None and name not in ("global-projection", "base"):
        raise WeightsError(f"the trainer {name!r} needs a base transformer; give one")
    if len(data) == 0:
        raise ConfigError("the dataset is empty; add samples, or look at what was skipped and why")
    config = _told_of_fps(config, data)
    provenance = {f"data_{model}_sha256": value for model, value in data.hashes.items()}
    weights: dict[str, dict[str, Tensor] | None] = {}
    for key, path in given.items():
        weights[key] = None
        if path is not None:
            logger.info("reading the %s: %s", key.replace("_", " "), path)
            kinds = _kinds_of(name)[key]
            with reading(path, f"the {key.replace('_', ' ')}"):
                weights[key], metadata = _read(path, key, kinds, meta)
                if not (meta or skip_check):
                    check_weights(weights[key] or {}, path)
            if not meta:
                provenance[f"{key}_sha256"] = _hash(path)
            if key == "adapter":
                if "crafter" in name:
                    config = heads_as_trained(config, metadata)
                else:
                    config = _as_trained(config, metadata, files.global_projection is not None)
            check_hashes(
                {k: v for k, v in metadata.items() if k.startswith("data_")},
                provenance,
                f"the data that {path.name} is to be trained on",
            )
            _compare_base(provenance, metadata, path)
    features = {key: tuple(value.shape) for key, value in data[0].items()}
    with torch.device("meta" if meta else "cpu"):
        if meta and null_text is not None:
            null_text = null_text.to("meta")
        return _create(config, weights, features, null_text=null_text, provenance=provenance)


def _create(
    config: TrainConfig,
    weights: Mapping[str, Any],
    features: Mapping[str, tuple[int, ...]],
    *,
    null_text: Tensor | None,
    provenance: Mapping[str, str],
) -> Trainer:
    if config.trainer == "global-projection":
        start = weights["global_projection"]
        return create_projection_trainer(config, features, start=start, provenance=provenance)
    more: dict[str, Any] = {"null_text": null_text, "provenance": provenance}
    base = weights["base"]
    if config.trainer == "base":
        return create_base_trainer(config, base, **more)
    if config.trainer in _SECOND_STAGES and weights["adapter"] is None:
        raise WeightsError(
            f"the trainer {config.trainer!r} needs the adapter of the first stage; give it"
        )
    if config.trainer == "videocrafter-temporal":
        return create_videocrafter_temporal_trainer(
            config, base, weights["adapter"], temporal=weights["temporal"], **more
        )
    if config.trainer == "videocrafter-adapter":
        return create_videocrafter_adapter_trainer(
            config, base, features, adapter=weights["adapter"], **more
        )
    if config.trainer == "stylecrafter":
        return create_stylecrafter_trainer(
            config, base, features, adapter=weights["adapter"], **more
        )
    if config.trainer == "stylecrafter-video":
        adapter, lora = weights["adapter"], weights["motion_adapter"]
        return create_stylecrafter_video_trainer(config, base, adapter, lora=lora, **more)
    if config.trainer == "motion":
        return create_motion_trainer(config, base, adapter=weights["motion_adapter"], **more)
    more |= {"adapter": weights["adapter"], "contrastive": weights["global_projection"]}
    if config.trainer == "style":
        return create_style_trainer(config, base, features, **more)
    return create_control_trainer(config, base, features, controlnet=weights["controlnet"], **more)


def _kinds_of(trainer: str) -> dict[str, set[str]]:
    """Kinds of file that a trainer starts from."""
    own = {"stylecrafter": _STYLECRAFTER, "videocrafter": _VIDEOCRAFTER}
    return _KINDS | own.get(trainer.split("-")[0], {})


def _told_of_fps(config: TrainConfig, data: TrainingData) -> TrainConfig:
    """VideoCrafter is told the frame rate at which the data were encoded."""
    fps = getattr(data, "settings", {}).get("fps")
    if "videocrafter" not in config.trainer or config.stylecrafter.fps or not fps:
        return config
    crafter = dataclasses.replace(config.stylecrafter, fps=float(fps))
    return dataclasses.replace(config, stylecrafter=crafter)


def _read(
    path: Path, key: str, kinds: set[str], meta: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a file, or of all safetensors of a folder, and the file's metadata."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in _files_of(path):
        if meta:
            for name, (shape, dtype) in read_keys(file).items():
                tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
        else:
            content = read_state_dict(file)
            tensors |= content.tensors
            metadata |= content.metadata
    tensors = strip_prefix(tensors)
    kind = detect_kind(shapes_of(tensors))
    if kind not in kinds:
        raise WeightsError(
            f"{key.replace('_', ' ')}: {path} is {describe_kind(kind)}; a file of another kind "
            "is needed here"
        )
    if kinds in _VIDEOCRAFTER.values():
        return tensors, metadata
    base, adapter = split_release(tensors)
    if key == "base" and kind == "stylemaster":
        logger.info("%s is the whole release; its style branch is left out", path)
        return base, metadata
    if key == "adapter":
        if not any("_img." in name for name in adapter):
            raise WeightsError(
                f"adapter: {path} holds no k_img and v_img; if the trainer of the global "
                "projection wrote it, give it as that"
            )
        return adapter, metadata
    return tensors, metadata


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{path} holds no .safetensors files; give a file, or another folder")
    return files


def _hash(path: Path) -> str:
    return "-".join(sha256_of(file) for file in _files_of(path))


def _as_trained(
    config: TrainConfig, metadata: Mapping[str, str], new_contrastive: bool
) -> TrainConfig:
    """An adapter's header tells what cannot be read off its weights: heads, and the embedding."""
    style = config.style
    style = dataclasses.replace(
        style, num_heads=int(metadata.get("style_num_heads", style.num_heads))
    )
    found = metadata.get("global_embeds")
    if style.global_embeds == "auto" and found is not None and not new_contrastive:
        chosen: Literal["plain", "shuffled"] = "plain" if found == "image_embeds" else "shuffled"
        style = dataclasses.replace(style, global_embeds=chosen)
    return dataclasses.replace(config, style=style)


def _compare_base(provenance: Mapping[str, str], metadata: Mapping[str, str], path: Path) -> None:
    trained_on = metadata.get("base_sha256")
    ours = provenance.get("base_sha256")
    if trained_on and ours and trained_on != ours:
        logger.warning(
            "%s was trained on another base (SHA-256 %s, this one %s)",
            path,
            trained_on[:12],
            ours[:12],
        )
