"""The sinusoidal embedding of the timestep, the same for transformer and ControlNet."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoidal_embedding(timestep: Tensor, width: int) -> Tensor:
    """[B] -> [B, width] of cosines, then sines, computed in float64 as the release does."""
    half = width // 2
    device = "cpu" if timestep.device.type == "mps" else timestep.device
    exponent = torch.arange(half, dtype=torch.float64, device=device) / half
    angle = timestep.to(device, torch.float64)[:, None] * torch.pow(10000.0, -exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=1).to(torch.float32).to(timestep.device)
