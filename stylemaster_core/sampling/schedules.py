"""Flow-matching noise schedule: latents at sigma are (1 - sigma) * clean + sigma * noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError

TIMESTEPS = 1000  # the model's time is sigma * TIMESTEPS


def flow_match_sigmas(num_steps: int, *, shift: float, denoise: float = 1.0) -> Tensor:
    """Noise levels of a generation.

    Args:
        num_steps: number of model steps, at least 1.
        shift: moves steps towards high noise; the release uses 5, 1 leaves them even.
        denoise: 1 starts from pure noise; less keeps that much of a given video.

    Returns:
        [num_steps + 1] float32, descending, last 0.

    Raises:
        ConfigError: for a count below 1, a shift that is not positive, or a denoise outside
            0 < x <= 1.

    Source: Wan 2.1 and StyleMaster's release: sigma' = shift * sigma / (1 + (shift - 1) * sigma).
    """
    if num_steps < 1:
        raise ConfigError(f"the number of steps must be at least 1, got {num_steps}")
    if not 0 < shift < float("inf"):
        raise ConfigError(f"the shift must be positive and finite, got {shift}")
    if not 0 < denoise <= 1:
        raise ConfigError(f"denoise must be above 0 and at most 1, got {denoise}")
    sigmas = torch.linspace(denoise, 0.0, num_steps + 1)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def in_range(step: int, num_steps: int, start: float, end: float) -> bool:
    """Whether step `step` of `num_steps` lies in a range of the sampling, both ends included.

    Source: StyleMaster's released code, for the ControlNet (0.0 to 0.7: 36 of 50 steps).
    """
    return start <= step / num_steps <= end


def same_in_every_frame(noise: Tensor) -> Tensor:
    """Noise [..., t, h, w] whose first frame stands in all frames.

    Source: the extreme of "mixed" noise in PYoCo (arXiv 2305.10474).
    """
    return noise[..., :1, :, :].expand_as(noise).clone()


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Latents at noise level sigma; sigma is a number or [B]."""
    if isinstance(sigma, Tensor) and sigma.ndim:
        sigma = sigma.reshape(-1, *[1] * (clean.ndim - 1)).to(clean)
    return (1 - sigma) * clean + sigma * noise
