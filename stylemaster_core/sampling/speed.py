"""Fewer passes of the model: between noise levels that lie near each other the velocity is guessed.

It changes little from step to step, most of all at high noise, where the shift puts most steps. So
it is computed only once the noise level has fallen by a gap since it was last computed, and taken
from the line through the last two in between. A mode means nearly the same at any number of steps
and any shift, and leaves out all branches and the control network of a step.
"""

from __future__ import annotations

from collections import deque
from typing import Literal, get_args

from torch import Tensor

from ..errors import ConfigError

SpeedName = Literal["exact", "balanced", "fast", "draft"]
# By how much the noise level, 1 to 0, falls until the velocity is computed anew; 0: in every step.
GAPS: dict[SpeedName, float] = {"exact": 0.0, "balanced": 0.1, "fast": 0.15, "draft": 0.2}
LEAST_STEPS = 8  # fewer lie so far apart that there is hardly one to leave out
_ROUNDING = 1e-6


def velocity_gap(name: SpeedName, num_steps: int) -> float:
    """The gap of a mode.

    Args:
        name: of the mode.
        num_steps: of the sampling.

    Raises:
        ConfigError: for an unknown name, or too few steps to leave any out.
    """
    if name not in GAPS:
        raise ConfigError(f"the speed {name!r} is unknown; use one of {get_args(SpeedName)}")
    if name != "exact" and num_steps < LEAST_STEPS:
        raise ConfigError(
            f"the speed {name!r} leaves out steps that lie near each other, and {num_steps} steps "
            f"lie too far apart for that; use the speed 'exact', or at least {LEAST_STEPS} steps"
        )
    return GAPS[name]


class VelocityLine:
    """The last two velocities that were computed, and the line through them."""

    def __init__(self, gap: float) -> None:
        """Nothing is kept with a gap of 0."""
        self.gap = gap
        self.cause: object = None
        self.known: deque[tuple[float, Tensor]] = deque(maxlen=2)

    def at(self, level: float, cause: object = None) -> Tensor | None:
        """The velocity at a noise level, or None where it must be computed.

        Args:
            level: below that of those that were kept.
            cause: what it depends on beside level and latents, such as the styles that act;
                velocities of another cause are forgotten.
        """
        if cause != self.cause:
            self.cause = cause
            self.known.clear()
        if not self.known or self.known[-1][0] - level >= self.gap - _ROUNDING:
            return None
        if len(self.known) < 2:
            return self.known[-1][1]
        (before, earlier), (after, later) = self.known
        return later.lerp(earlier, (level - after) / (before - after))

    def keep(self, level: float, velocity: Tensor) -> Tensor:
        """The velocity that was computed at a level, which is returned."""
        if self.gap > 0:
            self.known.append((level, velocity))
        return velocity
