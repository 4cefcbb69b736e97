"""The VAE of stylemaster-tiny: a PCA of pixel blocks, then residual networks trained on it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from stylemaster_core.dtypes import autocast
from stylemaster_core.errors import ConfigError, WeightsError
from stylemaster_core.models.patch_vae import (
    BLOCK_VALUES,
    PatchVAE,
    create_patch_vae,
    save_patch_vae,
    video_to_blocks,
)
from stylemaster_core.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    read_checkpoint,
    to_cpu,
    write_checkpoint,
)
from stylemaster_core.training.ema import MovingAverage
from stylemaster_core.weights.files import read_state_dict

from .contents import draw_clip
from .limit import TimeLimit, TimeOver
from .styles import draw_style

logger = logging.getLogger("stylemaster")

CLIP_FRAMES = 9
# (side in pixels, frames, clips in a batch of 1): about the same work each, and share of the steps.
SIZES = ((64, 9, 4), (128, 1, 3), (128, 5, 1))
SHARES = (0.5, 0.25, 0.25)
PLAIN_SHARE = 0.12  # of clips without a style: the content itself is encoded, too
GRAY_SHARE = 0.08  # of clips that become gray and coarse, as the tiles of the control are
NOISE_SHARE, NOISE_STD = 0.5, 0.1  # of the normalised latents in front of the decoder
POOL = {64: 4000, 128: 2000}  # side in pixels: clips
PCA_BLOCKS = 400_000
EMA_DECAY = 0.998
LOG_STEPS, CHECKPOINT_STEPS = 250, 500


@dataclass(frozen=True)
class ClipPool:
    """Clips that were drawn once: uint8 [N, 9, S, S, 3] for each side S."""

    clips: dict[int, np.ndarray]

    def batch(self, rng: np.random.Generator, size: int, frames: int, count: int) -> Tensor:
        """A batch of random cut-outs, float32 [B, 3, T, S, S] in -1..1."""
        sides = [side for side in self.clips if side >= size]
        result = []
        for _ in range(count):
            side = int(rng.choice(sides))
            clip = self.clips[side][rng.integers(len(self.clips[side]))]
            t, y, x = (rng.integers(n + 1) for n in (CLIP_FRAMES - frames, *[side - size] * 2))
            clip = clip[t : t + frames, y : y + size, x : x + size]
            clip = clip[:: rng.choice([-1, 1]), :: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
            clip = clip.transpose(0, 2, 1, 3) if rng.random() < 0.5 else clip
            clip = clip[..., rng.permutation(3)]
            if rng.random() < GRAY_SHARE:
                clip = _coarse_gray(clip, int(rng.choice([2, 4])))
            result.append(clip)
        video = torch.from_numpy(np.stack(result)).permute(0, 4, 1, 2, 3)
        return video.float().div_(127.5).sub_(1)


def draw_clips(count: int, size: int, seed: int, *, held_out: bool = False) -> np.ndarray:
    """Stylized clips, uint8 [N, 9, S, S, 3]; some of those for training have no style."""
    clips = np.empty((count, CLIP_FRAMES, size, size, 3), np.uint8)
    for index in tqdm(range(count), desc=f"clips of {size} px", disable=None):
        rng = np.random.default_rng([seed, size, held_out, index])
        frames, _ = draw_clip(rng, CLIP_FRAMES, size, size, held_out=held_out)
        styled = held_out or rng.random() >= PLAIN_SHARE
        clips[index] = draw_style(rng, held_out=held_out).apply(frames) if styled else frames
    return clips


def clip_pool(folder: Path, counts: dict[int, int], seed: int) -> ClipPool:
    """The clips for training, from the files in `folder` or drawn and written there.

    Args:
        folder: of the files, which are named by side, number and seed.
        counts: how many clips of each side in pixels.
        seed: of all draws.
    """
    clips = {}
    for size, count in counts.items():
        path = folder / f"clips-{size}px-{count}-seed{seed}.npy"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}.tmp.npy")
            np.save(part, draw_clips(count, size, seed))
            os.replace(part, path)
        clips[size] = np.load(path)
    return ClipPool(clips)


def fit_pca(pool: ClipPool, seed: int, num_blocks: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean [768] and covariance [768, 768] of blocks, half of stills, half of moving clips."""
    rng = np.random.default_rng([seed, 1])
    means, squares = [], torch.zeros(BLOCK_VALUES, BLOCK_VALUES).double()
    for frames in (1, 5):
        total, seen = torch.zeros(BLOCK_VALUES).double(), 0
        products = torch.zeros(BLOCK_VALUES, BLOCK_VALUES).double()
        while seen < (num_blocks or PCA_BLOCKS) / 2:
            blocks = video_to_blocks(pool.batch(rng, 64, frames, 64))
            last = blocks.unflatten(0, (64, -1))[:, -1]
            flat = last.permute(0, 2, 3, 1).reshape(-1, BLOCK_VALUES)
            total, products = total + flat.sum(0), products + flat.T @ flat
            seen += len(flat)
        means.append(total / seen)
        squares = squares + products / seen / 2
    mean = (means[0] + means[1]) / 2
    return mean, squares - torch.outer(mean, mean)


def train_vae(
    out: str | Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch: int = 4,
    lr: float = 1e-3,
    device: str = "cpu",
    pool: ClipPool | None = None,
    limit: TimeLimit | None = None,
    start: str | Path | None = None,
    pca_blocks: int | None = None,
) -> Path:
    """Train a `PatchVAE` and write it as float16; an interrupted run goes on from its checkpoint.

    Args:
        out: folder of the checkpoints and of `vae.safetensors`, which is replaced.
        minutes: time to train for; the learning rate falls to 0 over it. Either this or `steps`.
        steps: optimiser steps.
        seed: of weights, clips and noise.
        batch: factor on the numbers of clips in `SIZES`.
        lr: highest learning rate.
        device: where to train.
        pool: of clips; without it one is kept beside `out`.
        limit: of this call.
        start: a file of weights whose decoder is trained further; its encoder, and so the latents,
            stay as they are, and its refiner is left out.
        pca_blocks: how many blocks of pixels the PCA sees.

    Returns:
        The file of weights, the moving average.

    Raises:
        ConfigError: unless exactly one of `minutes` and `steps` is given.
        TimeOver: when the limit is reached; a checkpoint is written before.
    """
    if (minutes is None) == (steps is None):
        raise ConfigError(f"minutes {minutes} and steps {steps}; give one of them")
    out = Path(out)
    torch.manual_seed(seed)
    pool = pool or clip_pool(out.parent, POOL, seed)
    folder = out / "checkpoints"
    latest = latest_checkpoint(folder)
    if start is not None:
        vae = create_patch_vae(read_state_dict(start).tensors, str(start))
        vae.patch_decoder.requires_grad_(True)
        vae.patch_refiner = None
    else:
        vae = PatchVAE()
        if latest is None:
            vae.set_linear(*fit_pca(pool, seed, pca_blocks))
    vae.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    parameters = {name: p for name, p in vae.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    average = MovingAverage(parameters, EMA_DECAY)
    step, spent = 0, 0.0
    if latest is not None:
        step, spent = resume_step(latest, vae, optimizer, average)
    began = time.monotonic() - spent
    bar = tqdm(total=1000, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", disable=None)
    while True:
        spent = time.monotonic() - began
        done = spent / (60 * minutes) if minutes is not None else step / (steps or 1)
        bar.update(int(min(done, 1) * 1000) - bar.n)
        if done >= 1:
            break
        set_rate(optimizer, lr, step, done)
        rng = np.random.default_rng([seed, 2, step])
        size, frames, count = SIZES[rng.choice(len(SIZES), p=SHARES)]
        video = pool.batch(rng, size, frames, batch * count).to(device)
        loss, error = _losses(vae, video, rng)
        if not torch.isfinite(loss):
            raise WeightsError(f"the loss of step {step} is {loss.item()}; use a lower lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        step += 1
        bar.set_postfix_str(f"step {step} {_db(error):.1f} dB", refresh=False)
        if step % LOG_STEPS == 0:
            with average.applied():
                value = evaluate_vae(vae, clips=_held_out(16, 64))["psnr_pooled"]
            logger.info("step %d, %.0f s, %.2f dB at 64 px", step, spent, value)
        over = limit is not None and limit.left_s <= 0
        if step % CHECKPOINT_STEPS == 0 or over:
            save_step(folder, step, spent, vae, optimizer, average)
        if over:
            raise TimeOver
    bar.close()
    save_step(folder, step, spent, vae, optimizer, average)
    with average.applied():
        final = create_patch_vae(to_cpu(vae.state_dict()), "the trained VAE")
    if start is None:
        final.fold_statistics(*latent_statistics(final, pool, seed))
    return save_patch_vae(out / "vae.safetensors", final, overwrite=True)


@torch.no_grad()
def latent_statistics(vae: PatchVAE, pool: ClipPool, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [16] of the latents of 512 clips of 5 frames."""
    rng = np.random.default_rng([seed, 3])
    latents = [vae.encode(pool.batch(rng, 64, 5, 64)).transpose(0, 1).flatten(1) for _ in range(8)]
    values = torch.cat(latents, dim=1)
    return values.mean(1), values.std(1)


def evaluate_vae(
    vae: PatchVAE, *, clips: np.ndarray | None = None, num_clips: int = 64, size: int = 128
) -> dict[str, Any]:
    """PSNR in dB on held-out stylized clips of 9 frames, after rounding to 8 bits.

    Args:
        vae: to judge.
        clips: uint8 [N, 9, S, S, 3] to judge on; drawn if not given.
        num_clips: how many to draw.
        size: of their sides in pixels.

    Returns:
        `psnr_mean` of the clips' own, `psnr_pooled` of the mean squared error of all, and the mean
        absolute error `mae` of values in -1..1.
    """
    clips = _held_out(num_clips, size) if clips is None else clips
    errors, absolute = [], []
    for clip in clips:
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        decoded = vae.decode(vae.encode(video)).cpu()
        decoded = ((decoded + 1) * 127.5).round() / 127.5 - 1
        errors.append((decoded - video).square().mean().item())
        absolute.append((decoded - video).abs().mean().item())
    values = np.array(errors)
    return {
        "psnr_mean": float(np.mean([_db(error) for error in values])),
        "psnr_pooled": _db(float(values.mean())),
        "mae": float(np.mean(absolute)),
        "num_clips": len(values),
        "size_px": clips.shape[2],
    }


_HELD_OUT: dict[tuple[int, int], np.ndarray] = {}


def _held_out(count: int, size: int) -> np.ndarray:
    if (count, size) not in _HELD_OUT:
        _HELD_OUT[count, size] = draw_clips(count, size, seed=9, held_out=True)
    return _HELD_OUT[count, size]


def _losses(vae: PatchVAE, video: Tensor, rng: np.random.Generator) -> tuple[Tensor, float]:
    """The loss to minimise, and the mean squared error for the log."""
    with autocast(video.device):
        latents = vae.to_latents(video).float()
        flat = latents.transpose(0, 1).flatten(1)
        # Keeps the scale, or the noise would only make the latents larger.
        drift = flat.mean(1).square().mean() + (flat.std(1).clamp(min=1e-3).log()).square().mean()
        if rng.random() < NOISE_SHARE:
            generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
            noise = torch.randn(latents.shape, generator=generator) * NOISE_STD
            latents = latents + noise.to(latents.device)
        decoded = vae.to_video(latents).float()
    error = functional.mse_loss(decoded, video)
    steps = [(decoded.diff(dim=dim) - video.diff(dim=dim)).abs().mean() for dim in (-1, -2)]
    loss = 4 * error + 0.5 * functional.l1_loss(decoded, video) + 0.25 * sum(steps)
    return loss + 1e-3 * drift, error.item()


def _db(error: float) -> float:
    """PSNR of a mean squared error of values in -1..1."""
    return float(10 * np.log10(4 / max(error, 1e-12)))


def _coarse_gray(clip: np.ndarray, factor: int) -> np.ndarray:
    """Gray cells of `factor` pixels, uint8 [T, H, W, 3]."""
    t, h, w, _ = clip.shape
    cells = clip.reshape(t, h // factor, factor, w // factor, factor, 3).mean((2, 4, 5))
    gray = cells.round().astype(np.uint8).repeat(factor, 1).repeat(factor, 2)
    return np.repeat(gray[..., None], 3, -1)


def set_rate(
    optimizer: torch.optim.Optimizer,
    lr: float,
    step: int,
    done: float,
    *,
    warmup_steps: int = 100,
    final_share: float = 0.0,
) -> None:
    """The rate of a step: it rises at first, and falls to a share as a cosine of what is done."""
    falling = final_share + (1 - final_share) * 0.5 * (1 + np.cos(np.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = lr * min((step + 1) / warmup_steps, 1.0) * falling


def save_step(
    folder: Path,
    step: int,
    spent: float,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: MovingAverage,
) -> None:
    """Write what `resume_step` goes on from."""
    checkpoint = Checkpoint(
        step=step,
        trainer="patch_vae",
        config={"spent_s": spent},
        hashes={},
        num_processes=1,
        weights=to_cpu(network.state_dict()),
        optimizer=optimizer.state_dict(),
        average=to_cpu(average.average),
    )
    write_checkpoint(folder, checkpoint, keep=1)


def resume_step(
    latest: Path, network: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage
) -> tuple[int, float]:
    """Go on from a checkpoint; steps and seconds done."""
    checkpoint = read_checkpoint(latest)
    network.load_state_dict(checkpoint.weights)
    optimizer.load_state_dict(checkpoint.optimizer)
    average.load(checkpoint.average or {})
    return checkpoint.step, checkpoint.config["spent_s"]


def main() -> None:
    """Train, then write the PSNR beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--start", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    path = train_vae(
        args.out,
        minutes=args.minutes,
        steps=args.steps,
        seed=args.seed,
        batch=args.batch,
        lr=args.lr,
        start=args.start,
    )
    pool = clip_pool(args.out.parent, POOL, args.seed)
    linear = PatchVAE()
    linear.set_linear(*fit_pca(pool, args.seed))
    report = {
        "trained": evaluate_vae(create_patch_vae(read_state_dict(path).tensors, str(path))),
        "linear": evaluate_vae(linear),
    }
    (args.out / "psnr.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    logger.info("%s", report)


if __name__ == "__main__":
    main()
