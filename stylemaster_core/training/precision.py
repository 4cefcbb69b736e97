"""What `run.precision=auto` comes to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..dtypes import choose_precision
from .checkpoint import latest_checkpoint, read_settings
from .config import TrainConfig, config_from_dict

if TYPE_CHECKING:
    import torch


def settle_precision(
    config: TrainConfig, device: torch.device | None = None, begun: Path | None = None
) -> TrainConfig:
    """A config that names the precision it runs in.

    Args:
        config: of the run; one that names its precision is obeyed.
        device: to train on; None for the one that accelerate takes.
        begun: folder of a run that is to go on, in the precision that it was begun with.
    """
    from ..pipelines.models import choose_device

    precision = config.run.precision
    if precision == "float32":
        return config
    if precision == "auto" and begun is not None:
        latest = latest_checkpoint(begun / "checkpoints")
        if latest is not None:
            precision = config_from_dict(read_settings(latest)).run.precision
    chosen = choose_precision(precision, device or choose_device())
    return dataclasses.replace(config, run=dataclasses.replace(config.run, precision=chosen))
