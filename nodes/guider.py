"""Guidance by text and style as a ComfyUI GUIDER; serves every sampler and scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import comfy.samplers
from torch import Tensor

from ..stylemaster_core.errors import ConfigError
from ..stylemaster_core.sampling.guidance import GuidanceWeights
from .block_styles import percent_reached

Schedule = float | Sequence[float]


class StyleGuider(comfy.samplers.CFGGuider):
    """negative + text (positive - negative) + style (styled - positive), on denoised predictions.

    Denoised latents are affine in the velocity, so this is the release's guidance (StyleMaster,
    eq. 6). A branch whose weight is 0 is not run; a text scale of exactly 1 runs the styled branch
    alone.
    """

    def set_conds(self, styled: Any, positive: Any, negative: Any) -> None:
        """Set the conditionings; those without a style come from `unstyled_conditioning`."""
        # ComfyUI spreads controls and GLIGEN from the one that is named "positive".
        self.inner_set_conds({"positive": styled, "middle": positive, "negative": negative})

    def set_cfg(self, text: Schedule, style: Schedule) -> None:
        """Set the guidance scales.

        Args:
            text: one number above 0, or several that divide the sampling evenly by its percent:
                with as many numbers as steps, each step gets its own.
            style: the same for the style, of any sign.

        Raises:
            ConfigError: for an empty list, a number that is not finite, or a text scale of 0.
        """
        self.text_scales = _schedule(text, "text")
        self.style_scales = _schedule(style, "style")
        if min(self.text_scales) <= 0:
            raise ConfigError(
                f"the text cfg must be above 0, got {min(self.text_scales)}; 1 means no guidance"
            )
        self.cfg = self.text_scales[0]

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Denoised latents of one step."""
        model_options = model_options or {}
        text_scale, style_scale = (
            self._now(scales, timestep) for scales in (self.text_scales, self.style_scales)
        )
        weights = GuidanceWeights.of(text_scale, style_scale)
        needs_negative = weights.negative != 0 or model_options.get("disable_cfg1_optimization")
        conds: list[Any] = [
            self.conds["positive"] if weights.styled else None,
            self.conds["middle"] if weights.text else None,
            self.conds["negative"] if needs_negative else None,
        ]
        styled, positive, negative = comfy.samplers.calc_cond_batch(
            self.inner_model, conds, x, timestep, model_options
        )
        # One conditional prediction: then ComfyUI's own function guides, with all patches on it.
        conditional = (weights.text * positive + weights.styled * styled) / text_scale
        return comfy.samplers.cfg_function(
            self.inner_model,
            conditional,
            negative,
            text_scale,
            x,
            timestep,
            model_options=model_options,
            cond=conds[0] or conds[1],
            uncond=conds[2],
        )

    def _now(self, scales: Sequence[float], timestep: Tensor) -> float:
        sigma, count = float(timestep.max()), len(scales)
        sampling = self.inner_model.model_sampling
        passed = sum(percent_reached(sampling, sigma, k / count) for k in range(1, count))
        return scales[passed]


def _schedule(values: Schedule, name: str) -> list[float]:
    numbers = [float(v) for v in values] if isinstance(values, Sequence) else [float(values)]
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"the {name} cfg must be finite numbers, at least one; got {values!r}")
    return numbers
