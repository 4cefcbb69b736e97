"""Samplers: each turns a velocity into the next latents."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ..errors import ConfigError
from .schedules import TIMESTEPS

SamplerName = Literal["euler", "unipc", "dpm++"]


class Sampler(Protocol):
    """What the sampling loop needs of a sampler."""

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """Latents at sigmas[index] and their velocity -> latents at sigmas[index + 1]."""
        ...


class EulerSampler:
    """x + v * (sigma_next - sigma); the release's sampler."""

    def __init__(self, sigmas: Tensor) -> None:
        # Numbers, as a tensor would have to go to the device in every step.
        self.changes = [after - before for before, after in pairwise(sigmas.tolist())]

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        return latents + velocity * self.changes[index]


class DiffusersSampler:
    """A multistep scheduler of diffusers on our own noise levels."""

    def __init__(self, scheduler: Any, sigmas: Tensor) -> None:
        scheduler.set_timesteps(len(sigmas) - 1)
        scheduler.sigmas = sigmas.float().cpu()
        # One distinct number per step: the scheduler finds its step by it.
        scheduler.timesteps = sigmas[:-1].float().cpu() * TIMESTEPS
        self.scheduler = scheduler

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        timestep = self.scheduler.timesteps[index]
        return self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]


def create_sampler(name: SamplerName, sigmas: Tensor) -> Sampler:
    """A sampler for noise levels [N + 1].

    Args:
        name: `euler` (release), `unipc` (Wan's own choice), `dpm++` (2M).
        sigmas: descending noise levels, last 0.

    Raises:
        ConfigError: for an unknown name.
    """
    if name == "euler":
        return EulerSampler(sigmas)
    options: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if name == "unipc":
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        # At exactly 1 the logarithm of the signal is -inf, and UniPC solves equations with it: to
        # NaN by some linear algebra libraries, such as that of PyTorch 2.4.
        below = sigmas.float().clamp(max=1 - torch.finfo(torch.float32).eps / 2)
        return DiffusersSampler(UniPCMultistepScheduler(**options), below)
    if name == "dpm++":
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        options["algorithm_type"] = "dpmsolver++"
        return DiffusersSampler(DPMSolverMultistepScheduler(**options), sigmas)
    raise ConfigError(f"the sampler {name!r} is unknown; use one of {get_args(SamplerName)}")
