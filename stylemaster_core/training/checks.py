"""What is looked at before training starts, so that nothing fails hours later."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, StyleMasterError, WeightsError
from .checkpoint import Checkpoint
from .config import TrainConfig, config_from_dict, config_to_dict
from .samples import TrainingData, check_keys_of, group_by_size
from .trainer import Trainer

# What may change when a run goes on: none of it decides what a step computes.
FREE_FIELDS = {
    "run.num_steps",
    "run.checkpoint_blocks",
    "run.compile_blocks",
    "run.num_workers",
    "run.save_every",
    "run.keep_checkpoints",
    "run.validate_every",
    "run.validation_draws",
    "run.sample_every",
    "run.sample_steps",
    "run.sample_text_scale",
    "run.sample_style_scale",
    "run.output_dtype",
    "run.tensorboard",
}
BATCH_FIELDS = {"run.batch_size", "run.accumulation"}


def check_data(trainer: Trainer, data: TrainingData, what: str = "training data") -> None:
    """Check that there are samples, that they hold what the trainer reads, and that it fits.

    Raises:
        StyleMasterError: naming the sample.
    """
    groups = group_by_size(data)
    check_keys_of(data, trainer.draws.keys)
    for group in groups:
        sample = data[group[0]]
        shapes = {key: tuple(value.shape) for key, value in sample.items()}
        try:
            trainer.check(shapes, len(data))
        except StyleMasterError as error:
            raise type(error)(f"{what}, sample {data.ids[group[0]]!r}: {error}") from error


def check_hashes(expected: Mapping[str, str], found: Mapping[str, str], what: str) -> None:
    """Check that two sets of hashes do not contradict each other.

    Raises:
        WeightsError: naming the models that differ.
    """
    differing = sorted(k for k in {*expected} & {*found} if expected[k] != found[k])
    if differing:
        said = ", ".join(f"{k} {found[k][:12]} instead of {expected[k][:12]}" for k in differing)
        raise WeightsError(
            f"{what} was made with other models (SHA-256: {said}); use the same models throughout, "
            "or encode the data again"
        )


def check_resume(
    checkpoint: Checkpoint, config: TrainConfig, hashes: Mapping[str, str], num_processes: int
) -> None:
    """Check that going on from a checkpoint continues the same run.

    Raises:
        WeightsError: if it is another trainer's, or was trained on other models.
        ConfigError: if a setting that decides what a step computes has changed.
    """
    if checkpoint.trainer != config.trainer:
        raise WeightsError(
            f"the checkpoint is one of the trainer {checkpoint.trainer!r}, this is "
            f"{config.trainer!r}; go on with that trainer, or choose another folder"
        )
    check_hashes(checkpoint.hashes, hashes, "what the run is to go on with")
    # Settings that came with a later version had their defaults.
    begun = config_to_dict(config_from_dict(checkpoint.config))
    before, after = _flat(begun), _flat(config_to_dict(config))
    differing = sorted(
        key
        for key in {*before, *after} - FREE_FIELDS - BATCH_FIELDS
        if before.get(key) != after.get(key)
    )
    if differing:
        said = ", ".join(f"{k} {after.get(k)!r} instead of {before.get(k)!r}" for k in differing)
        raise ConfigError(
            f"the run was begun with other settings ({said}); resume it with those, or start a new "
            "run from its trained file in another folder"
        )
    batches = [
        values["run.batch_size"] * values["run.accumulation"] * count
        for values, count in ((before, checkpoint.num_processes), (after, num_processes))
    ]
    if batches[0] != batches[1]:
        raise ConfigError(
            f"a step had {batches[0]} samples (batch size x accumulation x processes), and would "
            f"now have {batches[1]}; change them so that the product stays"
        )


def check_disk(out: Path, needed: int) -> None:
    """Check that checkpoints and trained files will fit.

    Raises:
        ConfigError: if there is too little space.
    """
    free = shutil.disk_usage(out).free
    if free < needed:
        raise ConfigError(
            f"{out} has {free / 1e9:.2f} GB free, and the run may need {needed / 1e9:.2f} GB for "
            "checkpoints and the trained file; make room, choose another folder, or "
            "lower run.keep_checkpoints"
        )


def disk_bytes(trainer: Trainer, *, sharded: bool = False) -> int:
    """Bytes that checkpoints (one more while one is written) and trained files take at most.

    Sharded checkpoints, accelerate's own, hold the frozen weights, too.
    """
    optimizer = trainer.config.optimizer
    numbers = sum(p.numel() for p in trainer.trained().values())
    moments = 2 if optimizer.name == "adamw8bit" else 8
    checkpoint = numbers * (4 + moments + (4 if optimizer.ema_decay else 0))
    if sharded:
        frozen = [p for p in trainer.parameters() if not p.requires_grad]
        checkpoint += sum(p.numel() * p.element_size() for p in frozen)
    output = numbers * (4 if trainer.config.run.output_dtype == "float32" else 2)
    return checkpoint * (trainer.config.run.keep_checkpoints + 1) + output


def check_trained(trainer: Trainer) -> None:
    """Check what must hold of every trainer: trained weights are float32, and there are some."""
    trained = trainer.trained()
    assert trained, f"the trainer {trainer.name} trains nothing"
    assert all(p.dtype == torch.float32 for p in trained.values())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
