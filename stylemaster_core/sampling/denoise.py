"""The sampling loop: latents of noise in, clean latents out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..models.decoupled_attention import StyleRegion
from .guidance import GuidanceWeights
from .samplers import SamplerName, create_sampler
from .schedules import TIMESTEPS, in_range

NullStyle = Literal["zero", "none"]


class StepProgress(NamedTuple):
    """What a callback sees after each step."""

    step: int  # 0-based
    num_steps: int
    sigma: float  # noise level the step started from
    latents: Tensor  # after the step
    denoised: Tensor  # the model's present guess of the clean latents: a preview


Callback = Callable[[StepProgress], None]


@torch.no_grad()
def denoise(
    transformer: Any,
    latents: Tensor,
    *,
    sigmas: Tensor,
    text: Tensor,
    negative_text: Tensor | None,
    style: Tensor | Sequence[StyleRegion] | None,
    text_scale: float,
    style_scale: float,
    controlnet: Any = None,
    control_latents: Tensor | None = None,
    control_scale: float = 1.0,
    control_range: tuple[float, float] = (0.0, 1.0),
    callback: Callback | None = None,
    sampler: SamplerName = "euler",
    null_style: NullStyle = "zero",
    batch_branches: bool = True,
) -> Tensor:
    """Sample from `sigmas[0]` down to `sigmas[-1]` with guidance by text and style.

    Args:
        transformer: from `load_transformer`.
        latents: [B, 16, t, h, w] at noise level sigmas[0].
        sigmas: [N + 1] descending, e.g. from `flow_match_sigmas`.
        text: [B or 1, L, Dt] features of the prompt.
        negative_text: the same of the negative prompt; None if text_scale is 1.
        style: [B or 1, S, Ds] tokens, styles with regions and ranges, or None for plain text guidance.
        text_scale: guidance scale of the text; 1 switches all guidance off (see `GuidanceWeights`).
        style_scale: guidance scale of the style.
        controlnet: from `load_gray_tile_controlnet`, run once a step whatever the number of branches.
        control_latents: [B or 1, 16, t, h, w] clean latents of the gray tile, same t, h, w as `latents`.
        control_scale: strength of the control.
        control_range: part of the sampling in which it acts, both ends included (release: 0.0 to 0.7).
        callback: called after each step with `StepProgress`; an exception from it ends the sampling.
        sampler: `euler`, `unipc` or `dpm++`.
        null_style: the branches without style attend to all-zero tokens (`zero`, as the release does) or
            skip the style branch (`none`).
        batch_branches: run the guidance branches as one batch, or one by one to save memory.

    Returns:
        [B, 16, t, h, w] latents in the dtype of the input.

    Raises:
        ConfigError, LayoutError: for ranges, shapes or numbers that cannot work.

    Source: StyleMaster, sec. 3.5, and its released code; deviation: timesteps are not rounded to bfloat16.
    """
    _check(latents, sigmas, text, negative_text, text_scale, control_latents, control_range)
    if (controlnet is None) != (control_latents is None):
        raise ConfigError("control needs both a control network and control latents; got only one")
    num_steps = len(sigmas) - 1
    regions = [StyleRegion(style)] if isinstance(style, Tensor) else list(style or [])
    guidance = GuidanceWeights.of(text_scale, style_scale if regions else 0.0)
    if not regions and text_scale == 1:
        guidance = GuidanceWeights(0.0, 1.0, 0.0)
    branches = _Branches(transformer, latents, text, negative_text, guidance, regions, null_style)
    control_text = None if controlnet is None else controlnet.prepare_text(text)
    steps = create_sampler(sampler, sigmas)
    for step in range(num_steps):
        timestep = sigmas[step : step + 1].float() * TIMESTEPS
        timestep = timestep.to(latents.device)
        control = None
        if controlnet is not None and control_scale and in_range(step, num_steps, *control_range):
            control = controlnet(control_latents, timestep, control_text)
        weights, prepared = branches.at(step, num_steps)
        velocities = transformer.velocities(
            latents,
            timestep,
            prepared,
            control=control,
            control_scale=control_scale,
            batched=batch_branches,
        )
        velocity = sum(
            weight * v.to(latents.dtype) for weight, v in zip(weights, velocities, strict=True)
        )
        sigma = float(sigmas[step])
        denoised = latents - sigma * velocity
        latents = steps.step(velocity, step, latents)
        if callback is not None:
            callback(StepProgress(step, num_steps, sigma, latents, denoised))
    return latents


class _Branches:
    """The guidance branches that a step needs, with their weights; prepared once per set of active styles."""

    def __init__(
        self,
        transformer: Any,
        latents: Tensor,
        text: Tensor,
        negative_text: Tensor | None,
        guidance: GuidanceWeights,
        regions: Sequence[StyleRegion],
        null_style: NullStyle,
    ) -> None:
        self.transformer = transformer
        self.grid = transformer.token_grid(latents)
        self.guidance = guidance
        self.regions = regions
        self.no_style = null_style == "zero"
        batch = latents.shape[0]
        self.text = (
            transformer.embed_text(text, batch) if guidance.text or guidance.styled else None
        )
        self.negative = transformer.embed_text(negative_text, batch) if guidance.negative else None
        self.cache: dict[tuple[int, ...], tuple[list[float], list[Any]]] = {}

    def at(self, step: int, num_steps: int) -> tuple[list[float], list[Any]]:
        """Weights and branches of a step."""
        active = tuple(
            i for i, r in enumerate(self.regions) if in_range(step, num_steps, r.start, r.end)
        )
        if active not in self.cache:
            self.cache[active] = self._prepare([self.regions[i] for i in active])
        return self.cache[active]

    def _prepare(self, active: list[StyleRegion]) -> tuple[list[float], list[Any]]:
        negative, text, styled = self.guidance
        if not active:  # the style is off at this step: its branch equals that of the text
            text, styled = text + styled, 0.0
        # Which styles "no style" stands for decides its strength; off-range it is that of all.
        regions = active or self.regions or None
        wanted = [
            (negative, self.negative, False),
            (text, self.text, False),
            (styled, self.text, True),
        ]
        chosen = [(w, kv, is_styled) for w, kv, is_styled in wanted if w != 0]
        style = self.transformer.prepare_style(regions, self.grid, self.no_style)
        branches = [
            self.transformer.prepare_branch(kv, style, styled=is_styled)
            for _, kv, is_styled in chosen
        ]
        return [w for w, _, _ in chosen], branches


def _check(
    latents: Tensor,
    sigmas: Tensor,
    text: Tensor,
    negative_text: Tensor | None,
    text_scale: float,
    control_latents: Tensor | None,
    control_range: tuple[float, float],
) -> None:
    for name, value in (
        ("latents", latents),
        ("text", text),
        ("negative text", negative_text),
        ("control latents", control_latents),
    ):
        if value is not None and not torch.isfinite(value).all():
            raise LayoutError(f"the {name} hold NaN or infinity; check what made them")
    if sigmas.ndim != 1 or len(sigmas) < 2 or not (sigmas[:-1] > sigmas[1:]).all():
        raise ConfigError("sigmas must be at least two numbers in descending order")
    if negative_text is None and text_scale != 1:
        raise ConfigError(f"a text scale of {text_scale} needs a negative prompt ('' will do)")
    if control_latents is not None and control_latents.shape[2:] != latents.shape[2:]:
        raise LayoutError(
            f"control latents are {list(control_latents.shape[2:])} (t, h, w), the video's latents "
            f"{list(latents.shape[2:])}; make the gray tile at the size of the video"
        )
    start, end = control_range
    if not 0.0 <= start <= end <= 1.0:
        raise ConfigError(
            f"the control range must satisfy 0 <= start <= end <= 1, got {start} to {end}"
        )
