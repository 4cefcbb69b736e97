"""The sampling loop of SDXL: noise in, clean latents out, guided by text and style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..models.decoupled_attention import BlockStyle, StyleRegion
from ..models.stylecrafter_sdxl import LayerKV, layer_styles, level_masks
from .guidance import GuidanceWeights
from .schedules import in_range


class ImageText(NamedTuple):
    """What SDXL takes of a prompt."""

    tokens: Tensor  # [1, 77, 2048] of both text encoders
    pooled: Tensor  # [1, 1280]


@torch.no_grad()
def denoise_image(
    unet: Any,
    scheduler: Any,
    noise: Tensor,
    *,
    num_steps: int,
    text: ImageText,
    negative_text: ImageText,
    time_ids: Tensor,
    regions: Sequence[StyleRegion],
    keys_values: Sequence[Sequence[LayerKV]],
    text_scale: float,
    style_scale: float,
    generator: torch.Generator | None = None,
    callback: Callable[[int], object] = lambda step: None,
) -> Tensor:
    """Sample with guidance by text and style.

    Args:
        unet: diffusers' `UNet2DConditionModel` of SDXL.
        scheduler: of diffusers, for noise prediction.
        noise: [1, 4, h, w] of unit variance.
        num_steps: steps of the sampling.
        text: of the prompt.
        negative_text: of the negative prompt.
        time_ids: [1, 6] sizes and crop, the same for all branches.
        regions: styles with gains, strengths, ranges and masks; none for plain guidance.
        keys_values: of each region.
        text_scale: guidance by the prompt (release: 7.5); 1 runs the styled branch alone.
        style_scale: guidance by the style (release: 5); 0 as equal to `text_scale`.
        generator: of samplers that draw noise in every step.
        callback: called after each step with its number, from 0.

    Returns:
        [1, 4, h, w] latents.

    Raises:
        ConfigError, LayoutError: for numbers, shapes or several styles without masks.

    Source: StyleCrafter, eq. 2, and its SDXL code; deviation: none.
    """
    from ..models.sdxl_unet import StyledUNet

    if len(regions) != len(keys_values):
        raise ConfigError(f"got keys and values of {len(keys_values)} styles for {len(regions)}")
    if noise.ndim != 4 or noise.shape[0] != 1:
        raise LayoutError(f"the noise must be [1, 4, h, w], got {list(noise.shape)}")
    scheduler.set_timesteps(num_steps, device=noise.device)
    extra = {"generator": generator} if _takes_generator(scheduler) else {}
    latents = noise * scheduler.init_noise_sigma
    guidance = GuidanceWeights.of_stylecrafter(text_scale, style_scale if regions else 0.0)
    styles: dict[tuple[int, ...], tuple[list[BlockStyle], Any]] = {}
    with StyledUNet(unet) as styled:
        for step, timestep in enumerate(scheduler.timesteps):
            active = tuple(
                i for i, r in enumerate(regions) if in_range(step, num_steps, r.start, r.end)
            )
            if active and active not in styles:
                chosen = [regions[i] for i in active]
                styles[active] = (
                    layer_styles(chosen, [keys_values[i] for i in active], noise),
                    level_masks(chosen, (noise.shape[2], noise.shape[3]), noise),
                )
            styled.set(*styles.get(active, (None, {})))
            branches = _branches(guidance, text, negative_text, styled=bool(active))
            model_input = scheduler.scale_model_input(latents, timestep)
            predicted = unet(
                model_input.expand(len(branches), -1, -1, -1),
                timestep,
                encoder_hidden_states=torch.cat([t.tokens for _, t in branches]),
                added_cond_kwargs={
                    "text_embeds": torch.cat([t.pooled for _, t in branches]),
                    "time_ids": time_ids.expand(len(branches), -1),
                },
                return_dict=False,
            )[0]
            weights = predicted.new_tensor([weight for weight, _ in branches])
            guided = (predicted * weights.view(-1, 1, 1, 1)).sum(0, keepdim=True)
            latents = scheduler.step(guided, timestep, latents, return_dict=False, **extra)[0]
            callback(step)
    return latents


def _branches(
    guidance: GuidanceWeights, text: ImageText, negative_text: ImageText, *, styled: bool
) -> list[tuple[float, ImageText]]:
    """Weights and prompts of the branches that are run; the styled one is the last."""
    negative, plain, full = guidance
    if not styled:  # no style at this step: the styled branch equals that of the text
        plain, full = plain + full, 0.0
    wanted = [(negative, negative_text), (plain, text), (full, text)]
    return [branch for branch in wanted if branch[0] != 0]


def _takes_generator(scheduler: Any) -> bool:
    import inspect

    return "generator" in inspect.signature(scheduler.step).parameters
