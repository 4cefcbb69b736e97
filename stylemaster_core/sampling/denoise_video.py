"""The sampling loop of VideoCrafter: noise in, clean latents of a video's frames out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ..errors import ConfigError
from ..models.decoupled_attention import StyleRegion
from ..models.stylecrafter_sdxl import LayerKV
from .denoise_image import denoise_styled
from .guidance import GuidanceWeights


def create_ddim() -> Any:
    """VideoCrafter's sampler: steps from 981 down to 1, and the last one ends at noise level 0's.

    Source: VideoCrafter's released code (its last step ends at the first alpha, not at 1).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def denoise_video(
    unet: Any,
    noise: Tensor,
    *,
    num_steps: int,
    text: Tensor,
    negative_text: Tensor,
    regions: Sequence[StyleRegion],
    keys_values: Sequence[Sequence[LayerKV]],
    text_scale: float,
    style_scale: float,
    eta: float = 1.0,
    fps: float = 8.0,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], object] = lambda step, denoised: None,
) -> Tensor:
    """Sample with guidance by text and style.

    Args:
        unet: `VideoCrafterUNet`.
        noise: [T, 4, h, w] of unit variance, the frames of one video; one frame is a picture.
        num_steps: steps of the sampling, at most 1000 (release: 50).
        text: [1, L, Dt] features of the prompt.
        negative_text: the same of the negative prompt.
        regions: styles with gains, strengths, ranges and masks; none for plain guidance.
        keys_values: of each region.
        text_scale: guidance by the prompt (release: 15); 1 runs the styled branch alone.
        style_scale: guidance by the style (release: 7.5); 0 for plain guidance by `text_scale`.
        eta: noise that each step adds; 1 as the release, 0 for none.
        fps: frames per second, for weights that know of it.
        generator: of the noise of the steps.
        callback: called after each step with its number, from 0, and the guess of the clean
            latents.

    Returns:
        [T, 4, h, w] latents.

    Raises:
        ConfigError, LayoutError: for numbers, shapes or several styles without masks.

    Source: StyleCrafter's video code; deviation: none.
    """
    if not 1 <= num_steps <= 1000 or not 0 <= eta <= 1:
        raise ConfigError(
            f"steps must be in 1 to 1000 and eta in 0 to 1, got {num_steps} and {eta}"
        )
    num_frames = noise.shape[0]

    def predict(model_input: Tensor, timestep: Tensor, texts: list[Any]) -> Tensor:
        of_rows = torch.cat([text.expand(num_frames, -1, -1) for text in texts])
        return unet(model_input, timestep, of_rows, num_frames, fps)

    return denoise_styled(
        unet,
        create_ddim(),
        noise,
        predict,
        num_steps=num_steps,
        text=text,
        negative_text=negative_text,
        regions=regions,
        keys_values=keys_values,
        guidance=GuidanceWeights.of_stylecrafter_video(text_scale, style_scale if regions else 0.0),
        callback=callback,
        eta=eta,
        generator=generator,
    )
