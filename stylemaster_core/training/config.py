"""What a training run is told: frozen dataclasses, presets, and the JSON they are kept as."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ..errors import ConfigError
from ..models.texture_selector import SelectionMode
from ..reading import reading

TrainerName = Literal[
    "global-projection",
    "style",
    "motion",
    "control",
    "base",
    "stylecrafter",
    "stylecrafter-video",
    "videocrafter-adapter",
    "videocrafter-temporal",
]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class RunConfig:
    """The loop: how long, how much at once, and what is written when."""

    num_steps: int = 1000  # optimiser steps
    batch_size: int = 1  # samples per process and pass
    accumulation: int = 1  # passes per optimiser step
    seed: int = 0  # of the order of samples, noise, timesteps, dropout and new weights
    # bfloat16: autocast, trained weights stay float32. auto: what the device is fast at.
    precision: Precision = "float32"
    checkpoint_blocks: int = 0  # recompute every n-th block in the backward pass; 0: none
    compile_blocks: bool = False  # torch.compile for the transformer's blocks
    num_workers: int = 0  # processes that read samples
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # older ones are removed
    validate_every: int = 100  # steps; 0: never
    validation_samples: int = 16  # held out of the data where no validation data are given
    validation_draws: int = 4  # noise levels per held-out sample, spread evenly
    sample_every: int = 0  # steps between sample generations; 0: never
    sample_steps: int = 20  # model steps of a sample generation
    sample_text_scale: float = 1.0  # guidance of a sample generation; 1: none
    sample_style_scale: float = 1.0  # the same for the style; counts where there is text guidance
    output_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the trained file
    tensorboard: bool = False  # also write TensorBoard events


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, the course of its learning rate, clipping, and the moving average of the weights."""

    name: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit needs bitsandbytes
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # of all gradients together; 0: no clipping
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0  # the rate rises linearly from 0 before the schedule begins
    final_share: float = 0.0  # of lr, at the last step of cosine and linear
    ema_decay: float = 0.0  # 0: no moving average


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching: which noise levels are drawn, how they weigh, and text dropout."""

    shift: float = 5.0  # of the noise levels, as in sampling
    timesteps: Literal["uniform", "logit_normal"] = "uniform"  # before the shift
    weighting: Literal["bell", "none"] = "bell"  # the release's weight, or 1
    drop_text: float = 0.1  # share of samples with the empty prompt
    same_noise: float = 0.0  # share of clips whose noise is the same in every frame, as in PYoCo
    text_length: int = 512  # tokens; shorter prompts are followed by zeros, as in sampling


@dataclass(frozen=True)
class StyleConfig:
    """The style branch: sizes of a new one, and dropout. Dropped style is all-zero tokens."""

    drop_style: float = 0.1  # share of samples without style
    drop_both: float = 0.1  # share of samples with neither text nor style
    selection: SelectionMode = "release"  # which patches become texture tokens
    drop_rate: float | None = None  # of patches; None: the release's
    keep: int | None = None  # number of patches instead of a rate
    global_embeds: Literal["auto", "shuffled", "plain"] = "auto"  # auto: plain if contrastive
    local_tokens: int = 2
    global_tokens: int = 14
    num_layers: int = 3  # of the query transformer
    num_heads: int = 8  # of the query transformer


@dataclass(frozen=True)
class ProjectionConfig:
    """The contrastive projection and its loss."""

    loss: Literal["triplet", "infonce"] = "triplet"
    margin: float = 0.3  # of the triplet loss, in distance on the unit sphere (0..2)
    mse_weight: float = 1.0  # beside the triplet loss
    temperature: float = 0.1  # of InfoNCE
    num_negatives: int = 1  # pictures of other styles per pair; InfoNCE wants 32 or more
    hidden_width: int = 2048
    train_tokens: bool = False  # also train the projection to global tokens
    global_tokens: int = 14  # of that projection
    token_width: int = 4096


@dataclass(frozen=True)
class MotionConfig:
    """The motion adapter."""

    rank: int = 64


@dataclass(frozen=True)
class ControlConfig:
    """The gray-tile ControlNet."""

    stride: int = 2  # copy every n-th block of the base
    drop_control: float = 0.0  # share of samples without control
    style: Literal["none", "frozen", "train"] = "none"  # the style branch while control is trained


@dataclass(frozen=True)
class BaseConfig:
    """Sizes of a new base transformer, where none is given to start from."""

    width: int = 256
    ffn_width: int = 768
    num_blocks: int = 6
    text_width: int = 4096  # ComfyUI's Wan needs 4096


@dataclass(frozen=True)
class StyleCrafterConfig:
    """StyleCrafter on Wan or VideoCrafter: sizes of a new adapter, and the second stage."""

    num_tokens: int = 16
    num_layers: int = 3  # of the query transformer
    num_heads: int | None = None  # of the query transformer; None: width / 64
    scale_width: int = 512  # of the scale predictor; on VideoCrafter it is that of the text
    scale_num_layers: int = 2
    scale_num_heads: int | None = None  # None: width / 64
    norm: bool = True  # LayerNorm of the style branch on Wan; it starts at 0: at the base model
    # What the first stage trains: "scales" is the scale predictor alone (a new one says gain 1),
    # "style" all the rest.
    train: Literal["all", "style", "scales"] = "all"
    rank: int = 32  # of the second stage's LoRA on Wan
    image_share: float = 0.2  # of the second stage's samples
    fps: float | None = None  # that VideoCrafter2 is told; None: the one the data were encoded at


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run is told. Sections that a trainer has no use for are ignored by it."""

    trainer: TrainerName = "style"
    run: RunConfig = field(default_factory=RunConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    style: StyleConfig = field(default_factory=StyleConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    stylecrafter: StyleCrafterConfig = field(default_factory=StyleCrafterConfig)

    def __post_init__(self) -> None:
        _check(self)


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """A config from JSON values; what is left out has its default.

    Raises:
        ConfigError: for an unknown field, or a value of the wrong type.
    """
    return _from_dict(TrainConfig, values, "")


def read_config(name: str | Path) -> TrainConfig:
    """A preset by its name, or a config from a JSON file.

    Raises:
        ConfigError: for neither.
    """
    if str(name) in PRESETS:
        return PRESETS[str(name)]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"{str(name)!r} is neither a preset ({', '.join(PRESETS)}) nor a file; write a JSON "
            "file with the fields of TrainConfig, or name a preset"
        )
    advice = "mend it, or name a preset"
    with reading(path, "a config in JSON", error=ConfigError, advice=advice):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ConfigError(f"it holds a {type(values).__name__}; expected an object of fields")
        return config_from_dict(values)


def override(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """A config with some fields changed.

    Args:
        config: where the other fields come from.
        assignments: such as `optimizer.lr=1e-4`; the value is JSON, or else a plain word.

    Raises:
        ConfigError: for an unknown field, or a value of the wrong type.
    """
    values = config_to_dict(config)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r} sets nothing; write SECTION.FIELD=VALUE")
        *sections, last = name.strip().split(".")
        node: Any = values
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node or isinstance(node[last], dict):
            raise ConfigError(
                f"there is no field {name!r}; fields are {', '.join(_fields(values))}"
            )
        try:
            node[last] = json.loads(text)
        except json.JSONDecodeError:
            node[last] = text
    return config_from_dict(values)


def _fields(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in values.items():
        inner = _fields(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
        names.extend(inner)
    return names


def _from_dict(kind: Any, values: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'the config'} must be an object of fields")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(
            f"unknown field {prefix}{unknown[0]}; known are {', '.join(prefix + n for n in hints)}"
        )
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            arguments[name] = _from_dict(hint, value, f"{prefix}{name}.")
        else:
            arguments[name] = _coerce(value, hint, prefix + name)
    return kind(**arguments)


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """A JSON value as the type of its field: whole numbers serve as floats, lists as tuples."""
    origin = get_origin(hint)
    if origin is Literal and value in get_args(hint):
        return value
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
        return _coerce(value, hint, name)
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(get_args(hint)):
        return tuple(_coerce(v, t, name) for v, t in zip(value, get_args(hint), strict=True))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    wanted = f"one of {get_args(hint)}" if origin is Literal else getattr(hint, "__name__", hint)
    raise ConfigError(f"{name} is {value!r}; expected {wanted}")


def _check(config: TrainConfig) -> None:
    run, optimizer, flow, style = config.run, config.optimizer, config.flow, config.style
    projection = config.projection
    at_least_one = {
        "run.num_steps": run.num_steps,
        "run.batch_size": run.batch_size,
        "run.accumulation": run.accumulation,
        "run.save_every": run.save_every,
        "run.keep_checkpoints": run.keep_checkpoints,
        "run.validation_draws": run.validation_draws,
        "run.sample_steps": run.sample_steps,
        "projection.num_negatives": projection.num_negatives,
        "projection.hidden_width": projection.hidden_width,
        "flow.text_length": flow.text_length,
        "motion.rank": config.motion.rank,
        "control.stride": config.control.stride,
        "stylecrafter.num_tokens": config.stylecrafter.num_tokens,
        "stylecrafter.rank": config.stylecrafter.rank,
    }
    not_negative = {
        "run.checkpoint_blocks": run.checkpoint_blocks,
        "run.num_workers": run.num_workers,
        "run.validate_every": run.validate_every,
        "run.validation_samples": run.validation_samples,
        "run.sample_every": run.sample_every,
        "optimizer.warmup_steps": optimizer.warmup_steps,
        "optimizer.clip_norm": optimizer.clip_norm,
        "optimizer.weight_decay": optimizer.weight_decay,
    }
    shares = {
        "optimizer.final_share": optimizer.final_share,
        "flow.drop_text": flow.drop_text,
        "style.drop_style": style.drop_style,
        "style.drop_both": style.drop_both,
        "control.drop_control": config.control.drop_control,
        "stylecrafter.image_share": config.stylecrafter.image_share,
    }
    positive = {
        "optimizer.lr": optimizer.lr,
        "optimizer.eps": optimizer.eps,
        "flow.shift": flow.shift,
        "projection.margin": projection.margin,
        "projection.temperature": projection.temperature,
        "stylecrafter.fps": 1.0 if config.stylecrafter.fps is None else config.stylecrafter.fps,
    }
    rules = [
        *((n, v, v >= 1, "at least 1") for n, v in at_least_one.items()),
        *((n, v, v >= 0, "0 or more") for n, v in not_negative.items()),
        *((n, v, 0 <= v <= 1, "in 0..1") for n, v in shares.items()),
        *((n, v, 0 < v < float("inf"), "positive and finite") for n, v in positive.items()),
        ("optimizer.ema_decay", optimizer.ema_decay, 0 <= optimizer.ema_decay < 1, "in 0..<1"),
    ]
    for name, value, holds, wanted in rules:
        if not holds:
            raise ConfigError(f"{name} is {value}; it must be {wanted}")
    if flow.drop_text + style.drop_style + style.drop_both > 1:
        raise ConfigError("flow.drop_text, style.drop_style and style.drop_both sum to above 1")


_BIG = RunConfig(
    precision="auto",
    num_workers=2,
    output_dtype="bfloat16",
    sample_text_scale=8.0,
    sample_style_scale=4.0,
)

_NO_DROPOUT = FlowConfig(drop_text=0.0), StyleConfig(drop_style=0.0, drop_both=0.0)

_VIDEOCRAFTER = StyleCrafterConfig(num_tokens=8, num_heads=8, scale_num_heads=8)

PRESETS: dict[str, TrainConfig] = {
    # Paper, sec. 3.1: triplet and MSE, lr 1e-4, 10k pairs. The number of steps is ours.
    "global-projection": TrainConfig(
        "global-projection",
        RunConfig(num_steps=5000, batch_size=64, validate_every=250, validation_samples=256),
        OptimizerConfig(lr=1e-4, schedule="cosine", warmup_steps=100),
    ),
    # Stage A, still images (paper: 40k steps).
    "style-images": TrainConfig(
        "style",
        dataclasses.replace(_BIG, num_steps=40_000, batch_size=16, save_every=1000),
        OptimizerConfig(lr=1e-4, warmup_steps=500, ema_decay=0.999),
    ),
    # Stage B, clips; starts from the adapter of stage A.
    "style-clips": TrainConfig(
        "style",
        dataclasses.replace(_BIG, num_steps=10_000, accumulation=4, checkpoint_blocks=1),
        OptimizerConfig(lr=2e-5, warmup_steps=200, ema_decay=0.999),
    ),
    # Paper, sec. 3.3: about 300 iterations at batch 64 on still videos: that of 8 processes.
    "motion": TrainConfig(
        "motion",
        dataclasses.replace(
            _BIG, num_steps=300, accumulation=8, checkpoint_blocks=1, save_every=50
        ),
        OptimizerConfig(lr=1e-4, weight_decay=0.0, warmup_steps=20),
    ),
    # Paper, sec. 3.4: 20k steps.
    "control": TrainConfig(
        "control",
        dataclasses.replace(_BIG, num_steps=20_000, accumulation=4, checkpoint_blocks=1),
        OptimizerConfig(lr=5e-5, warmup_steps=500, ema_decay=0.999),
    ),
    # StyleCrafter, stage 1 (its SDXL version: 80k steps of 128, lr 5e-5, no dropout of conditions).
    # The original trains the scale predictor along. Here the style branch grows from nothing, and a
    # predictor beside it learns to say "more" until its tanh is flat.
    "stylecrafter-images": TrainConfig(
        "stylecrafter",
        dataclasses.replace(_BIG, num_steps=40_000, batch_size=16, save_every=1000),
        OptimizerConfig(lr=5e-5, weight_decay=0.0),
        *_NO_DROPOUT,
        stylecrafter=StyleCrafterConfig(train="style"),
    ),
    # The rest of stage 1, best on pictures that the adapter has not seen. The numbers are ours.
    "stylecrafter-scales": TrainConfig(
        "stylecrafter",
        dataclasses.replace(_BIG, num_steps=2000, batch_size=16),
        OptimizerConfig(lr=1e-4, schedule="cosine", weight_decay=0.0),
        *_NO_DROPOUT,
        stylecrafter=StyleCrafterConfig(train="scales"),
    ),
    # Stage 2 (its video version: 20k steps on 8 GPUs), from the adapter of stage 1.
    "stylecrafter-clips": TrainConfig(
        "stylecrafter-video",
        dataclasses.replace(_BIG, num_steps=20_000, accumulation=8, checkpoint_blocks=1),
        OptimizerConfig(lr=5e-5, weight_decay=0.0),
        *_NO_DROPOUT,
    ),
    # StyleCrafter's own stages, on VideoCrafter: 40k steps of 256 pictures, then 20k of 8 clips.
    # Its learning rates are not published; that of its SDXL version stands here.
    "videocrafter-images": TrainConfig(
        "videocrafter-adapter",
        dataclasses.replace(
            _BIG,
            num_steps=40_000,
            batch_size=32,
            accumulation=8,
            save_every=1000,
            sample_text_scale=6.0,
            sample_style_scale=0.0,
        ),
        OptimizerConfig(lr=5e-5, weight_decay=0.0),
        *_NO_DROPOUT,
        stylecrafter=_VIDEOCRAFTER,
    ),
    "videocrafter-clips": TrainConfig(
        "videocrafter-temporal",
        dataclasses.replace(
            _BIG,
            num_steps=20_000,
            accumulation=8,
            checkpoint_blocks=1,
            sample_text_scale=15.0,
            sample_style_scale=7.5,
        ),
        OptimizerConfig(lr=5e-5, weight_decay=0.0),
        *_NO_DROPOUT,
        stylecrafter=_VIDEOCRAFTER,
    ),
    "base": TrainConfig(
        "base",
        RunConfig(num_steps=20_000, batch_size=64, precision="auto", num_workers=2),
        OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=200, ema_decay=0.999),
        FlowConfig(timesteps="logit_normal", weighting="none"),
    ),
}
# Where it is not the trainer's name.
DEFAULT_PRESET: dict[str, str] = {
    "style": "style-images",
    "stylecrafter": "stylecrafter-images",
    "stylecrafter-video": "stylecrafter-clips",
    "videocrafter-adapter": "videocrafter-images",
    "videocrafter-temporal": "videocrafter-clips",
}
