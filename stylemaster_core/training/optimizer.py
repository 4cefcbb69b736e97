"""The optimiser, and the course of its learning rate as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedHostError
from .config import OptimizerConfig


def create_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """AdamW, in 32 or 8 bits.

    Raises:
        UnsupportedHostError: if 8 bits are asked for and bitsandbytes cannot be used.
    """
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(list(parameters), **options)
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError as error:
        raise UnsupportedHostError(
            "optimizer.name=adamw8bit needs bitsandbytes, which is not installed; install it "
            "(pip install bitsandbytes), or use optimizer.name=adamw"
        ) from error
    return bitsandbytes.optim.AdamW8bit(list(parameters), **options)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of a step (0-based) of `num_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    share = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.lr * (config.final_share + (1 - config.final_share) * share)
