"""The refiner of the VAE: sharper pictures without the grid of its blocks.

Encoder and decoder stay as they are. It learns on latents with noise, since those of the model are
not exact either.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from stylemaster_core.layouts import SPATIAL_STRIDE, frames_to_video, video_to_frames
from stylemaster_core.models.patch_vae import PatchVAE, PixelRefiner, create_patch_vae
from stylemaster_core.training.checkpoint import latest_checkpoint
from stylemaster_core.training.ema import MovingAverage
from stylemaster_core.weights.files import read_state_dict, write_state_dict

from .judges import seam
from .limit import TimeLimit, TimeOver
from .vae import NOISE_SHARE, NOISE_STD, ClipPool, resume_step, save_step, set_rate

logger = logging.getLogger("stylemaster")

WIDTH = 96
# (side in pixels, frames, clips in a batch of 1) and share of the steps.
SIZES = ((128, 1, 4), (64, 1, 12), (64, 5, 2), (128, 5, 1))
SHARES = (0.45, 0.25, 0.15, 0.15)
BORDER_WEIGHT, DETAIL_WEIGHT, SEAM_WEIGHT = 0.1, 1.0, 0.1
SIDE = 8  # pixels of the squares in which there is to be as much detail as in the picture
LOG_STEPS = 250


def train_refiner(
    folder: Path,
    vae_file: Path,
    pool: ClipPool,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    device: str = "cpu",
    limit: TimeLimit | None = None,
    start: Path | None = None,
) -> dict[str, Tensor]:
    """Train a refiner; an interrupted run goes on from its checkpoint.

    Args:
        folder: of the checkpoints.
        vae_file: of the VAE.
        pool: of clips.
        steps: optimiser steps.
        batch: factor on the numbers of clips in `SIZES`.
        lr: highest learning rate.
        seed: of weights, clips and noise.
        device: where to train.
        limit: of this call.
        start: a file whose refiner, if it has one, is trained further.

    Returns:
        weights of the VAE with its refiner, the moving average.

    Raises:
        TimeOver: when the limit is reached; a checkpoint is written before.
    """
    torch.manual_seed(seed)
    vae = create_patch_vae(read_state_dict(vae_file).tensors, str(vae_file)).to(device)
    started = start and create_patch_vae(read_state_dict(start).tensors, str(start)).patch_refiner
    refiner, vae.patch_refiner = started or PixelRefiner(WIDTH), None
    refiner.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    parameters = dict(refiner.requires_grad_(True).named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    average = MovingAverage(parameters, 0.998)
    latest = latest_checkpoint(folder)
    first = 0 if latest is None else resume_step(latest, refiner, optimizer, average)[0]
    for step in tqdm(range(first, steps), desc="refiner", disable=None):
        if limit is not None and limit.left_s <= 0:
            save_step(folder, step, 0.0, refiner, optimizer, average)
            raise TimeOver
        set_rate(optimizer, lr, step, step / steps)
        rng = np.random.default_rng([seed, 4, step])
        size, frames, count = SIZES[rng.choice(len(SIZES), p=SHARES)]
        video = pool.batch(rng, size, frames, batch * count).to(device)
        latents = vae.encode(video)
        if rng.random() < NOISE_SHARE:
            noise = rng.normal(0, NOISE_STD, latents.shape)
            latents = latents + torch.from_numpy(noise).to(latents)
        with torch.no_grad():
            decoded = vae.to_video(latents)
        loss = refiner_loss(refiner(decoded), video)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(refiner.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        if (step + 1) % LOG_STEPS == 0:
            save_step(folder, step + 1, 0.0, refiner, optimizer, average)
            logger.info("refiner, step %d: loss %.4f", step + 1, loss.item())
    with average.applied():
        vae.patch_refiner = refiner
        return {key: value.detach().cpu().clone() for key, value in vae.state_dict().items()}


def refiner_loss(refined: Tensor, video: Tensor) -> Tensor:
    """Errors of pixels, of the steps between them, and of the amount of detail.

    Without the last, what cannot be known is left out, and the borders of blocks stand out from a
    smooth ground.
    """
    loss = 4 * functional.mse_loss(refined, video) + 0.5 * functional.l1_loss(refined, video)
    for dim in (-1, -2):
        found, wanted = (pixels.diff(dim=dim).movedim(dim, -1) for pixels in (refined, video))
        loss = loss + 0.25 * (found - wanted).abs().mean()
        borders = (found - wanted)[..., SPATIAL_STRIDE - 1 :: SPATIAL_STRIDE]
        loss = loss + BORDER_WEIGHT * borders.abs().mean()
        detail = functional.avg_pool3d(found.abs() - wanted.abs(), (1, SIDE, SIDE)).abs().mean()
        seams = (seam_ratios(found) - seam_ratios(wanted)).abs().sum()
        loss = loss + DETAIL_WEIGHT * detail + SEAM_WEIGHT * seams
    return loss


def seam_ratios(steps: Tensor) -> Tensor:
    """How large steps [..., N] are at the borders of blocks, and of tokens, over those inside."""
    sizes = steps.abs().flatten(0, -2).mean(0)
    place = torch.arange(1, len(sizes) + 1, device=steps.device)
    inside = sizes[place % SPATIAL_STRIDE != 0].mean() + 1e-3
    sides = SPATIAL_STRIDE, 2 * SPATIAL_STRIDE
    return torch.stack([sizes[place % side == 0].mean() for side in sides]) / inside


def mean_seam(vae: PatchVAE, clips: np.ndarray) -> float:
    """Mean of `judges.seam` of uint8 [N, T, H, W, 3], encoded and decoded."""
    decoded = [vae.decode(vae.encode(frames_to_video(clip))) for clip in clips]
    return float(np.mean([seam(video_to_frames(video)) for video in decoded]))


def write_refined(path: Path, weights: dict[str, Tensor], source: Path) -> None:
    """Write the VAE as float16, with the metadata of the file that it was made from."""
    half = {key: value.half().contiguous() for key, value in weights.items()}
    write_state_dict(path, half, read_state_dict(source).metadata, overwrite=True)
