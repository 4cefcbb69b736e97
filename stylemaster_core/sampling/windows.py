"""Long videos: overlapping windows of latent frames whose velocities are blended at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class WindowConfig:
    """Windows in latent frames (one for the first frame, then one for every 4 frames)."""

    length: int = 21  # 81 frames, what Wan was trained on
    overlap: int = 7

    def __post_init__(self) -> None:
        if self.length < 1 or not 0 <= self.overlap < self.length:
            raise ConfigError(
                f"a window of {self.length} latent frames with an overlap of {self.overlap} cannot "
                "work; use 0 <= overlap < length"
            )


def plan_windows(num_frames: int, config: WindowConfig | None) -> list[slice]:
    """Windows of equal length that cover [0, num_frames); the last is moved back to fit."""
    if config is None or num_frames <= config.length:
        return [slice(0, num_frames)]
    stride = config.length - config.overlap
    starts = list(range(0, num_frames - config.length, stride)) + [num_frames - config.length]
    return [slice(start, start + config.length) for start in starts]


def window_weights(window: slice, num_frames: int, overlap: int) -> Tensor:
    """Weight of each frame of a window: 1 inside, a linear ramp over the overlap at inner ends."""
    length = window.stop - window.start
    weights = torch.ones(length)
    ramp = torch.arange(1, overlap + 1) / (overlap + 1)
    if overlap and window.start > 0:
        weights[:overlap] = ramp
    if overlap and window.stop < num_frames:
        weights[length - overlap :] = torch.minimum(weights[length - overlap :], ramp.flip(0))
    return weights


class WindowBlend:
    """Weighted mean of the results of windows; the weights are made once."""

    def __init__(self, windows: list[slice], num_frames: int, overlap: int, like: Tensor) -> None:
        """Make the weights, in the dtype and on the device of `like` [B, C, num_frames, h, w]."""
        self.windows = windows
        if len(windows) < 2:
            return
        self.weights = [
            window_weights(window, num_frames, overlap).to(like)[:, None, None]
            for window in windows
        ]
        self.weight_sum = like.new_zeros(num_frames, 1, 1)
        for window, weights in zip(windows, self.weights, strict=True):
            self.weight_sum[window] += weights
        self.total = torch.empty_like(like)

    def __call__(self, parts: list[Tensor]) -> Tensor:
        """[B, C, t, h, w] of each window -> [B, C, num_frames, h, w]."""
        if len(parts) == 1:
            return parts[0]
        self.total.zero_()
        for part, window, weights in zip(parts, self.windows, self.weights, strict=True):
            self.total[:, :, window] += part * weights
        return self.total / self.weight_sum
