"""The sampling loop of SDXL: noise in, clean latents out, guided by text and style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..models.decoupled_attention import BlockStyle, StyleRegion, check_overlap
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

    def predict(model_input: Tensor, timestep: Tensor, texts: list[Any]) -> Tensor:
        return unet(
            model_input,
            timestep,
            encoder_hidden_states=torch.cat([text.tokens for text in texts]),
            added_cond_kwargs={
                "text_embeds": torch.cat([text.pooled for text in texts]),
                "time_ids": time_ids.expand(len(texts), -1),
            },
            return_dict=False,
        )[0]

    if noise.ndim != 4 or noise.shape[0] != 1:
        raise LayoutError(f"the noise must be [1, 4, h, w], got {list(noise.shape)}")
    extra = {"generator": generator} if _takes_generator(scheduler) else {}
    return denoise_styled(
        unet,
        scheduler,
        noise,
        predict,
        num_steps=num_steps,
        text=text,
        negative_text=negative_text,
        regions=regions,
        keys_values=keys_values,
        guidance=GuidanceWeights.of_stylecrafter(text_scale, style_scale if regions else 0.0),
        callback=lambda step, _: callback(step),
        **extra,
    )


Predict = Callable[[Tensor, Tensor, list[Any]], Tensor]  # rows of branches, timestep, their texts


@torch.no_grad()
def denoise_styled(
    unet: Any,
    scheduler: Any,
    noise: Tensor,
    predict: Predict,
    *,
    num_steps: int,
    text: Any,
    negative_text: Any,
    regions: Sequence[StyleRegion],
    keys_values: Sequence[Sequence[LayerKV]],
    guidance: GuidanceWeights,
    callback: Callable[[int, Tensor], object],
    **step_options: Any,
) -> Tensor:
    """Sample on a UNet of diffusers with StyleCrafter's styles; the rows may be frames of a video.

    Args:
        unet: whose cross-attentions the styles act on.
        scheduler: of diffusers, for noise prediction.
        noise: [T, 4, h, w] of unit variance: a picture, or the frames of a video.
        predict: runs the UNet on [branches * T, 4, h, w], with a text for each branch.
        num_steps: steps of the sampling.
        text: of the prompt, as `predict` takes it.
        negative_text: of the negative prompt.
        regions: styles with gains, strengths, ranges and masks.
        keys_values: of each region.
        guidance: weights of the branches.
        callback: called after each step with its number, from 0, and the guess of the clean
            latents, or the latents where the scheduler makes none.
        step_options: passed on to the scheduler's `step`.

    Returns:
        [T, 4, h, w] latents.

    Raises:
        ConfigError, LayoutError: for numbers, shapes or several styles without masks.
    """
    from ..models.sdxl_unet import StyledUNet

    if len(regions) != len(keys_values):
        raise ConfigError(f"got keys and values of {len(keys_values)} styles for {len(regions)}")
    check_overlap(regions)
    scheduler.set_timesteps(num_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    num_rows = noise.shape[0]
    styles: dict[tuple[int, ...], tuple[list[BlockStyle], Any]] = {}
    with StyledUNet(unet) as styled:
        for step, timestep in enumerate(scheduler.timesteps):
            active = tuple(
                i for i, r in enumerate(regions) if in_range(step, num_steps, r.start, r.end)
            )
            if active and active not in styles:
                chosen = [regions[i] for i in active]
                layers = layer_styles(chosen, [keys_values[i] for i in active], noise)
                size = (num_rows, noise.shape[2], noise.shape[3])
                styles[active] = (
                    [layer.of_rows([0] * num_rows) for layer in layers],
                    level_masks(chosen, size, noise),
                )
            styled.set(*styles.get(active, (None, {})))
            branches = _branches(guidance, text, negative_text, styled=bool(active))
            model_input = scheduler.scale_model_input(latents, timestep)
            predicted = predict(
                model_input.repeat(len(branches), 1, 1, 1), timestep, [t for _, t in branches]
            )
            weights = predicted.new_tensor([weight for weight, _ in branches])
            guided = (predicted.unflatten(0, (-1, num_rows)) * weights.view(-1, 1, 1, 1, 1)).sum(0)
            result = scheduler.step(guided, timestep, latents, **step_options)
            latents = result.prev_sample
            seen = getattr(result, "pred_original_sample", None)
            callback(step, latents if seen is None else seen)
    return latents


def _branches(
    guidance: GuidanceWeights, text: Any, negative_text: Any, *, styled: bool
) -> list[tuple[float, Any]]:
    """Weights and prompts of the branches that are run; the styled one is the last."""
    negative, plain, full = guidance
    if not styled:  # no style at this step: the styled branch equals that of the text
        plain, full = plain + full, 0.0
    wanted = [(negative, negative_text), (plain, text), (full, text)]
    return [branch for branch in wanted if branch[0] != 0]


def _takes_generator(scheduler: Any) -> bool:
    import inspect

    return "generator" in inspect.signature(scheduler.step).parameters
