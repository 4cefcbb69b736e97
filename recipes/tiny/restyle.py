"""Restyle many clips of one size at once, as `stylize` does one: the gates need hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stylemaster_core.data.gray_tile import gray_tile
from stylemaster_core.layouts import latent_shape, video_to_frames
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.motion_adapter import attached_motion
from stylemaster_core.pipelines.encode_style import encode_style
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.stylize import StylizeConfig, draw_noise
from stylemaster_core.sampling.denoise import denoise
from stylemaster_core.sampling.schedules import flow_match_sigmas

from .held_out import Clips

BATCH = 4


def style_tokens(models: Models, references: Clips, captions: Sequence[str]) -> Tensor:
    """Style tokens [N, S, D] of references, uint8 [1, H, W, 3] each, for these prompts."""
    pairs = zip(references, captions, strict=True)
    return torch.cat([encode_style(models, r[0], caption).style.tokens for r, caption in pairs])


@torch.no_grad()
def restyle(
    models: Models,
    contents: Clips,
    captions: Sequence[str],
    styles: Sequence[StyleRegion],
    config: StylizeConfig,
    on_clip: Callable[[int], object] = lambda count: None,
) -> list[np.ndarray]:
    """What `stylize` gives for each clip, with its caption as the prompt.

    Args:
        models: all kept loaded.
        contents: uint8 [T, H, W, 3] each, of one size that needs no padding.
        captions: of the contents.
        styles: with tokens [N, S, D], those of a clip in its row.
        config: of video-to-video; clip i has the seed `config.seed` + i.
        on_clip: called with the number of clips that have been made.

    Returns:
        uint8 [T, H, W, 3] for each clip.
    """
    sigmas = flow_match_sigmas(config.num_steps, shift=config.shift)
    results: list[np.ndarray] = []
    for start in range(0, len(contents), BATCH):
        part = slice(start, start + BATCH)
        text = models.encode_text(captions[part])
        tiles = [gray_tile(c, *c.shape[1:3], factor=config.tile_factor) for c in contents[part]]
        with (
            models.vae() as vae,
            models.transformer() as transformer,
            models.controlnet() as controlnet,
            attached_motion(transformer, config.motion_scale, is_video=len(contents[start]) > 1),
        ):
            latents = denoise(
                transformer,
                _noise(contents[part], config, start),
                sigmas=sigmas,
                text=text,
                negative_text=models.encode_text([config.negative_prompt]),
                style=[replace(style, tokens=style.tokens[part]) for style in styles],
                text_scale=config.text_scale,
                style_scale=3.0 if config.style_scale is None else config.style_scale,
                controlnet=controlnet,
                control_latents=vae.encode(torch.stack(tiles)),
                control_scale=config.control_scale,
                control_range=config.control_range,
                sampler=config.sampler,
            )
            results += [video_to_frames(video) for video in vae.decode(latents).split(1)]
        on_clip(len(tiles))
    return results


def _noise(contents: Clips, config: StylizeConfig, start: int) -> Tensor:
    shape = (1, 16, *latent_shape(*contents[0].shape[:3]))
    seeds = range(config.seed + start, config.seed + start + len(contents))
    return torch.cat([draw_noise(shape, seed, same=config.same_noise) for seed in seeds])
