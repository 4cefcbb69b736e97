"""The refiner goes on with latents that the model makes: their blocks fit worse than the VAE's own.

The model begins from the teacher's pictures under noise, so that what it makes of them lies where
theirs does, and pixels can be compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from stylemaster_core.data.gray_tile import gray_tile
from stylemaster_core.layouts import SPATIAL_STRIDE, frames_to_video
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.patch_vae import PatchVAE
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.stylize import StylizeConfig
from stylemaster_core.pipelines.tiny import SETTINGS, tiny_files
from stylemaster_core.sampling.denoise import denoise
from stylemaster_core.sampling.schedules import add_noise, flow_match_sigmas
from stylemaster_core.training.ema import MovingAverage

from .limit import TimeLimit
from .real_samples import in_colours_of, same_part
from .refiner import refiner_loss, seam_ratios
from .restyle import style_tokens
from .teacher import Pairs
from .vae import set_rate

SIDE, BATCH = 128, 16
FIRST_SIGMA = 0.86  # noise levels up to it are left to the model
GUIDANCE = 1.5, 2.5  # by the style; the second in SECOND_SHARE of the batches
SECOND_SHARE = 0.7
SEAM_WEIGHT, BACK_SHARE = 0.6, 0.25
WARMUP_STEPS, FINAL_SHARE = 50, 0.02


class Made(NamedTuple):
    """What the model made of pictures."""

    latents: Tensor  # [N, 16, 1, 16, 16]
    video: Tensor  # [N, 3, 1, 128, 128] the pictures


@torch.no_grad()
def draw_made(
    model: Path, pairs: Pairs, paintings: np.ndarray, *, seed: int, device: str = "cpu"
) -> Made:
    """Let a model restyle the contents of the teacher's pairs.

    Args:
        model: folder of its files, laid out as the shipped.
        pairs: of the teacher.
        paintings: uint8 [N, S, S, 3] whose styles they have.
        seed: of parts, noise and guidance.
        device: where to run it.
    """
    models = Models(tiny_files(model), device=device, keep_loaded=True)
    sigmas = flow_match_sigmas(SETTINGS["num_steps"], shift=StylizeConfig.shift)
    sigmas = sigmas[sigmas <= FIRST_SIGMA]
    text = models.encode_text([""])
    rng = np.random.default_rng([seed, 15])
    latents, videos = [], []
    for first in tqdm(range(0, len(pairs.styles), BATCH), desc="made latents", disable=None):
        tiles, clean, references = [], [], []
        with models.vae() as vae:
            for i in range(first, min(first + BATCH, len(pairs.styles))):
                painting = paintings[pairs.styles[i]]
                target = in_colours_of(pairs.stylized[i], painting)
                content, target = map(
                    np.ascontiguousarray, same_part(rng, SIDE, SIDE, pairs.contents[i], target)
                )
                tiles.append(gray_tile(content, SIDE, SIDE, factor=SETTINGS["tile_factor"]))
                clean.append(frames_to_video(target))
                references.append(painting[None])
            controls = vae.encode(torch.stack(tiles))
            video = torch.cat(clean)
            known = vae.encode(video)
        noise = torch.from_numpy(rng.standard_normal(known.shape, np.float32)).to(known)
        scale = GUIDANCE[int(rng.random() < SECOND_SHARE)]
        tokens = style_tokens(models, references, [""] * len(references))
        with models.transformer() as transformer, models.controlnet() as controlnet:
            made = denoise(
                transformer,
                add_noise(known, noise, float(sigmas[0])),
                sigmas=sigmas,
                text=text,
                negative_text=text,
                style=[StyleRegion(tokens)],
                text_scale=scale,
                style_scale=scale,
                controlnet=controlnet,
                control_latents=controls,
            )
        latents.append(made.cpu())
        videos.append(video)
    return Made(torch.cat(latents), torch.cat(videos))


def refine_on_made(
    vae: PatchVAE,
    made: Made,
    paintings: np.ndarray,
    *,
    steps: int,
    lr: float,
    seed: int,
    limit: TimeLimit | None = None,
) -> dict[str, Tensor]:
    """Train a refiner, half on what the model made and half on the VAE's own latents.

    Args:
        vae: with a refiner, which is trained further.
        made: of the model.
        paintings: uint8 [N, S, S, 3] for the other half.
        steps: optimiser steps of 4 pictures.
        lr: highest learning rate.
        seed: of the pictures' order.
        limit: of this call.

    Returns:
        weights of the VAE, the moving average.

    Raises:
        TimeOver: when the limit is reached; nothing is kept, as it takes minutes.
    """
    refiner, vae.patch_refiner = vae.patch_refiner, None
    assert refiner is not None
    with torch.no_grad():
        of_model = torch.cat([vae.to_video(latents) for latents in made.latents.split(BATCH)])
    parameters = dict(refiner.requires_grad_(True).named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    average = MovingAverage(parameters, 0.99)
    before = {key: value.detach().clone() for key, value in parameters.items()}
    rng = np.random.default_rng([seed, 16])
    for step in tqdm(range(steps), desc="refiner on made latents", disable=None):
        if limit is not None:
            limit.check()
        set_rate(
            optimizer, lr, step, step / steps, warmup_steps=WARMUP_STEPS, final_share=FINAL_SHARE
        )
        some = rng.integers(0, len(made.video), 2)
        wanted = torch.cat([_part(rng, paintings[i]) for i in rng.integers(0, len(paintings), 2)])
        with torch.no_grad():
            own = vae.to_video(vae.encode(wanted))
        refined = refiner(torch.cat([of_model[some], own]))
        loss = 2 * refiner_loss(refined[2:], wanted) + 5 * functional.mse_loss(refined[2:], wanted)
        loss = loss + made_loss(refined[:2], of_model[some], made.video[some])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(refiner.parameters(), 1.0)
        optimizer.step()
        average.update(step)
    with average.applied(), torch.no_grad():
        # Part of the way back to what it was: what is gained at borders costs pixels elsewhere.
        for key, value in refiner.named_parameters():
            value.lerp_(before[key], BACK_SHARE)
        vae.patch_refiner = refiner
        return {key: value.detach().clone() for key, value in vae.state_dict().items()}


def _part(rng: np.random.Generator, painting: np.ndarray) -> Tensor:
    (part,) = same_part(rng, SIDE, SIDE, painting)
    part = part if rng.random() < 0.5 else part[:, :, ::-1]
    return frames_to_video(np.ascontiguousarray(part))


def made_loss(refined: Tensor, decoded: Tensor, video: Tensor) -> Tensor:
    """What was decoded is to stay, but for the borders of blocks, which a picture does not have.

    Args:
        refined: [B, 3, T, H, W] pixels.
        decoded: the same without the refiner.
        video: what the model began from; only how large steps at borders are is taken from it.
    """
    loss = 4 * functional.mse_loss(refined, decoded)
    loss = loss + 0.25 * functional.l1_loss(refined, decoded)
    for dim in (-1, -2):
        found, before, wanted = (
            x.diff(dim=dim).movedim(dim, -1) for x in (refined, decoded, video)
        )
        loss = loss + SEAM_WEIGHT * (seam_ratios(found) - seam_ratios(wanted)).abs().sum()
        inside = torch.arange(1, found.shape[-1] + 1, device=found.device) % SPATIAL_STRIDE != 0
        found, before = found[..., inside], before[..., inside]
        loss = loss + 0.5 * (found.abs().mean() - before.abs().mean()).abs()
        loss = loss + 0.25 * (found - before).abs().mean()
    return loss
