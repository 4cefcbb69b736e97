"""The sampling loop: latents of noise in, clean latents out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..models.decoupled_attention import StyleRegion, check_overlap, region_masks
from ..models.text_padding import merge_padding
from .guidance import GuidanceWeights
from .samplers import SamplerName, create_sampler
from .schedules import TIMESTEPS, add_noise, in_range
from .speed import SpeedName, VelocityLine, velocity_gap
from .windows import WindowBlend, WindowConfig, plan_windows

NullStyle = Literal["zero", "none"]


class StepProgress(NamedTuple):
    """What a callback sees after each step."""

    step: int  # 0-based
    num_steps: int
    sigma: float  # noise level the step started from
    latents: Tensor  # after the step
    denoised: Tensor  # the model's present guess of the clean latents: a preview


Callback = Callable[[StepProgress], object]


class Lead(NamedTuple):
    """What a video goes on from: its first latent frames, which are known."""

    clean: Tensor  # [1 or B, 16, k, h, w] latents
    noise: Tensor  # of the same shape, by which they are brought to each noise level

    def put(self, latents: Tensor, sigma: float) -> Tensor:
        """Latents [B, 16, t, h, w] at noise level sigma, their first k frames replaced."""
        known = add_noise(self.clean, self.noise, sigma).to(latents)
        known = known.expand(len(latents), -1, -1, -1, -1)
        return torch.cat([known, latents[:, :, known.shape[2] :]], dim=2)


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
    windows: WindowConfig | None = None,
    lead: Lead | None = None,
    speed: SpeedName = "exact",
) -> Tensor:
    """Sample from `sigmas[0]` down to `sigmas[-1]` with guidance by text and style.

    Args:
        transformer: from `load_transformer`.
        latents: [B, 16, t, h, w] at noise level sigmas[0].
        sigmas: [N + 1] descending, e.g. from `flow_match_sigmas`.
        text: [B or 1, L, Dt] features of the prompt.
        negative_text: the same of the negative prompt; None if text_scale is 1.
        style: [B or 1, S, Ds] tokens, styles with regions and ranges, or None for plain text
            guidance.
        text_scale: guidance scale of the text; 1 switches all guidance off (see
            `GuidanceWeights`).
        style_scale: guidance scale of the style.
        controlnet: from `load_gray_tile_controlnet`, run once a step for all branches.
        control_latents: [B or 1, 16, t, h, w] clean latents of the gray tile, as long, high and
            wide as `latents`.
        control_scale: strength of the control.
        control_range: part of the sampling in which it acts, both ends included (release: 0.0 to
            0.7).
        callback: called after each step with `StepProgress`; an exception from it ends sampling.
        sampler: `euler`, `unipc` or `dpm++`.
        null_style: the branches without style attend to all-zero tokens (`zero`, as the release
            does) or skip the style branch (`none`).
        batch_branches: run the guidance branches as one batch, or one by one to save memory.
        windows: for long videos: overlapping windows of latent frames, blended at every step.
        lead: clean first frames to go on from, noised to the level of each step, as in inpainting.
        speed: `exact`, or a mode of `sampling.speed` that computes fewer steps and comes near.

    Returns:
        [B, 16, t, h, w] latents in the dtype of the input.

    Raises:
        ConfigError, LayoutError: for ranges, shapes or numbers that cannot work.

    Source: StyleMaster, sec. 3.5, and its released code; deviation: timesteps are not rounded to
    bfloat16.
    """
    _check(latents, sigmas, text, negative_text, text_scale, control_latents, control_range)
    _check_lead(lead, latents)
    if (controlnet is None) != (control_latents is None):
        raise ConfigError("control needs both a control network and control latents; got only one")
    num_steps = len(sigmas) - 1
    line = VelocityLine(velocity_gap(speed, num_steps))
    regions = [StyleRegion(style)] if isinstance(style, Tensor) else list(style or [])
    check_overlap(regions)
    branches = _Branches(
        transformer,
        latents,
        text,
        negative_text,
        text_scale,
        style_scale,
        regions,
        null_style,
        batch_branches,
    )
    control_text = None
    if controlnet is not None:
        (merged,), padding = merge_padding([text])
        control_text = controlnet.prepare_text(merged, padding=padding)
    steps = create_sampler(sampler, sigmas)
    num_frames = latents.shape[2]
    parts = plan_windows(num_frames, windows)
    blend = WindowBlend(parts, num_frames, windows.overlap if windows else 0, latents)
    # Once, as a copy to the device in each step would make the host wait.
    timesteps = (sigmas[:-1].float() * TIMESTEPS).to(latents.device)
    levels = sigmas.tolist()
    for step in range(num_steps):
        if lead is not None:
            latents = lead.put(latents, levels[step])
        timestep = timesteps[step : step + 1]
        has_control = control_scale != 0 and in_range(step, num_steps, *control_range)
        active = branches.active(step, num_steps)
        velocity = line.at(levels[step], (active, has_control))
        if velocity is None:
            velocities = []
            for window in parts:
                control = None
                if controlnet is not None and control_latents is not None and has_control:
                    control = controlnet(control_latents[:, :, window], timestep, control_text)
                weights, prepared = branches.at(active, window)
                predicted = transformer.velocities(
                    latents[:, :, window],
                    timestep,
                    prepared,
                    control=control,
                    control_scale=control_scale,
                )
                velocities.append(_weighted_sum(weights, predicted, latents.dtype))
            velocity = line.keep(levels[step], blend(velocities))
        before, latents = latents, steps.step(velocity, step, latents)
        if callback is not None:
            denoised = before - levels[step] * velocity
            callback(StepProgress(step, num_steps, levels[step], latents, denoised))
        del before
    return latents if lead is None else lead.put(latents, levels[-1])


def _weighted_sum(
    weights: Sequence[float], velocities: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    total = velocities[0].to(dtype) * weights[0]
    for weight, velocity in zip(weights[1:], velocities[1:], strict=True):
        total = total + velocity.to(dtype) * weight
    return total


class _Branches:
    """The guidance branches of each step and window; what they are made of is made once."""

    def __init__(
        self,
        transformer: Any,
        latents: Tensor,
        text: Tensor,
        negative_text: Tensor | None,
        text_scale: float,
        style_scale: float,
        regions: Sequence[StyleRegion],
        null_style: NullStyle,
        batched: bool,
    ) -> None:
        self.transformer = transformer
        self.grid = transformer.token_grid(latents)
        self.guidance = GuidanceWeights.of(text_scale, style_scale if regions else 0.0)
        self.regions = regions
        self.no_style = null_style == "zero"
        batch = latents.shape[0]
        negatives = [negative_text] if self.guidance.negative and negative_text is not None else []
        texts = [text, *negatives]
        # Only texts of one length go into one batch.
        parts = [texts] if batched else [[text] for text in texts]
        self.text, *rest = [
            transformer.embed_text(merged, batch, padding)
            for part_texts, padding in map(merge_padding, parts)
            for merged in part_texts
        ]
        self.negative = rest[0] if rest else None
        self.keys_values = transformer.style_keys_values(regions) if regions else []
        self.batched = batched
        self.cache: dict[object, tuple[list[float], Any]] = {}

    def active(self, step: int, num_steps: int) -> tuple[int, ...]:
        """Which styles act in a step."""
        regions = enumerate(self.regions)
        return tuple(i for i, r in regions if in_range(step, num_steps, r.start, r.end))

    def at(self, active: tuple[int, ...], window: slice) -> tuple[list[float], Any]:
        """Weights and branches of a step in which these styles act."""
        key = (active, window.start)
        if key not in self.cache:
            self.cache[key] = self._prepare(active, window)
        return self.cache[key]

    def _prepare(self, active: tuple[int, ...], window: slice) -> tuple[list[float], Any]:
        negative, text, styled = self.guidance
        if not active:  # no style at this step: the styled branch equals that of the text
            text, styled = text + styled, 0.0
        wanted = [
            (negative, self.negative, False),
            (text, self.text, False),
            (styled, self.text, True),
        ]
        wanted = [branch for branch in wanted if branch[0] != 0]
        style = self._style(active or tuple(range(len(self.regions))), window)
        prepare = self.transformer.prepare_branch
        branches = [prepare(kv, style, styled=is_styled) for _, kv, is_styled in wanted]
        groups = self.transformer.group_branches(branches, batched=self.batched)
        return [weight for weight, _, _ in wanted], groups

    def _style(self, indices: tuple[int, ...], window: slice) -> Any:
        if not indices:
            return None
        regions = [self.regions[i] for i in indices]
        tokens_per_frame = self.grid[1] * self.grid[2]
        cut = slice(window.start * tokens_per_frame, window.stop * tokens_per_frame)
        masks = [mask[:, cut] for mask in region_masks(regions, self.grid)]
        keys_values = [self.keys_values[i] for i in indices]
        return self.transformer.prepare_style(regions, keys_values, masks, self.no_style)


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


def _check_lead(lead: Lead | None, latents: Tensor) -> None:
    if lead is None:
        return
    clean, (batch, channels, num_frames, *size) = lead.clean, latents.shape
    fits = clean.ndim == 5 and clean.shape[0] in (1, batch) and clean.shape[2] < num_frames
    if not fits or [clean.shape[1], *clean.shape[3:]] != [channels, *size]:
        raise LayoutError(
            f"the frames to go on from are latents of {list(clean.shape)}; expected "
            f"[1, {channels}, fewer than {num_frames}, {size[0]}, {size[1]}]"
        )
    if lead.noise.shape != clean.shape:
        raise LayoutError(
            f"the noise of the frames to go on from is {list(lead.noise.shape)}, they are "
            f"{list(clean.shape)}; expected the same shape"
        )
    if not torch.isfinite(clean).all():
        raise LayoutError("the latents to go on from hold NaN or infinity; check what made them")
