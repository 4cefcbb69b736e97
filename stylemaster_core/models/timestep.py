"""The sinusoidal embedding of the timestep, the same for transformer and ControlNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """What all steps of a generation need alike: made when it is first asked for."""

    def __init__(self) -> None:
        self._key: object = None
        self._value: list[T] = []

    def get(self, key: object, make: Callable[[], T]) -> T:
        """The result of `make`, which is not called again while the key stays the same."""
        # What was made in inference mode cannot be trained with.
        key = (key, torch.is_inference_mode_enabled())
        if key != self._key:
            self._value, self._key = [make()], key
        return self._value[0]


def wave_frequencies(width: int, device: torch.device) -> Tensor:
    """[width / 2] float64, for `sinusoidal_embedding`; on the CPU in place of MPS."""
    half = width // 2
    device = torch.device("cpu") if device.type == "mps" else device
    exponent = torch.arange(half, dtype=torch.float64, device=device) / half
    return torch.pow(10000.0, -exponent)


def sinusoidal_embedding(timestep: Tensor, frequencies: Tensor) -> Tensor:
    """[B] -> [B, width] of cosines, then sines, computed in float64 as the release does."""
    angle = timestep.to(frequencies)[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1).to(torch.float32).to(timestep.device)
