"""The flow-matching loss: predict noise - clean, weighted by a bell over the timesteps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LayoutError
from ..sampling.schedules import TIMESTEPS, flow_match_sigmas


class TrainingSchedule(NamedTuple):
    """The noise levels a training step draws from, and the weight of the loss at each."""

    sigmas: Tensor  # [1000] float32, descending
    timesteps: Tensor  # [1000], sigma * 1000
    weights: Tensor  # [1000], mean 1; 0 at index 0


def training_schedule(*, shift: float = 5.0) -> TrainingSchedule:
    """1000 shifted noise levels with a bell-shaped weight around timestep 500.

    Source: StyleMaster's released code (from DiffSynth-Studio's flow-match scheduler).
    """
    sigmas = flow_match_sigmas(TIMESTEPS, shift=shift)[:-1]
    timesteps = sigmas * TIMESTEPS
    bell = torch.exp(-2 * ((timesteps - TIMESTEPS / 2) / TIMESTEPS) ** 2)
    bell = bell - bell.min()
    return TrainingSchedule(sigmas, timesteps, bell * (TIMESTEPS / bell.sum()))


def flow_match_loss(velocity: Tensor, clean: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Mean over the batch of `flow_match_losses`."""
    return flow_match_losses(velocity, clean, noise, weight).mean()


def flow_match_losses(velocity: Tensor, clean: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Loss of each sample, weight * mse(velocity, noise - clean), in float32.

    Args:
        velocity: [B, 16, t, h, w] prediction.
        clean: latents of the same shape.
        noise: of the same shape.
        weight: [B] from `TrainingSchedule.weights`.

    Returns:
        [B] float32.

    Raises:
        LayoutError: if the shapes differ.

    Source: StyleMaster's released training code.
    """
    if not velocity.shape == clean.shape == noise.shape or weight.shape != velocity.shape[:1]:
        raise LayoutError(
            f"velocity {list(velocity.shape)}, clean {list(clean.shape)}, noise "
            f"{list(noise.shape)} and weight {list(weight.shape)} do not belong together"
        )
    error = F.mse_loss(velocity.float(), (noise - clean).float(), reduction="none")
    return error.flatten(1).mean(1) * weight.float()
