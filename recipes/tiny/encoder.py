"""Train the style encoder of stylemaster-tiny: a small CLIP vision model, from pictures of styles.

It has no positions (they stay zero): the embedding is the same for permuted patches, so that it
cannot know the content's layout, and a random quarter of the patches is enough to train it.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from stylemaster_core.data.images import CLIP_MEAN, CLIP_STD
from stylemaster_core.dtypes import autocast
from stylemaster_core.errors import ConfigError
from stylemaster_core.models.image_encoder import ImageEncoder, load_image_encoder
from stylemaster_core.training.ema import MovingAverage
from stylemaster_core.weights.files import write_state_dict

from .encoder_paintings import (
    PaintingBatch,
    PaintingHeads,
    Paintings,
    draw_crops,
    painting_losses,
)
from .encoder_pool import SIZE_PX, Pool, load_or_draw_pool
from .encoder_probe import embed, probe_encoder
from .limit import TimeLimit, TimeOver

logger = logging.getLogger("stylemaster")

PATCH_PX, WIDTH, NUM_LAYERS, NUM_HEADS, MLP_WIDTH, PROJECTION = 8, 96, 3, 3, 192, 128
NUM_CHROMA = 16
NUM_FAMILIES = 11
STATE = "training.pt"
POOL_SIZES = {"num_styles": 8000, "pictures": 3, "contents": 3000}
HELD_OUT_SIZES = {"num_styles": 608, "pictures": 2, "contents": 600, "siblings": False}


@dataclass(frozen=True)
class EncoderConfig:
    """How to train; one picture is SIZE_PX pixels wide."""

    batch_styles: int = 64  # two pictures of each
    patches: int = 64  # of about 256, drawn at random for each picture
    batch_paintings: int = 64  # where there are any
    lr: float = 2e-3
    weight_decay: float = 0.02
    warmup_steps: int = 100
    temperature: float = 0.1
    average_decay: float = 0.995
    save_every_s: float = 60.0
    probe_every_s: float = 240.0


class Heads(nn.Module):
    """Linear readings of the features, for training only."""

    def __init__(self, num_textures: int, num_colours: int) -> None:
        super().__init__()
        self.sizes = [NUM_FAMILIES, num_textures, num_colours]
        self.embeds = nn.Linear(PROJECTION, sum(self.sizes))
        self.patches = nn.Linear(WIDTH, sum(self.sizes))


class Batch(NamedTuple):
    """Two pictures of each of N / 2 styles: rows i and i + N / 2."""

    patches: Tensor  # float32 [N, L, 192], normalised for CLIP
    families: Tensor  # int64 [N]
    textures: Tensor  # float32 [N, 25], standardised
    colours: Tensor  # float32 [N, 21], standardised


def train_encoder(
    out: str | Path,
    *,
    seed: int,
    steps: int | None = None,
    minutes: float | None = None,
    pool: Pool,
    held_out: Pool | None = None,
    config: EncoderConfig | None = None,
    paintings: Paintings | None = None,
    start: Path | None = None,
    device: str = "cpu",
    limit: TimeLimit | None = None,
    progress: bool = True,
) -> list[float]:
    """Train a style encoder, or go on where a run in `out` stopped.

    Args:
        out: folder of the result in Hugging Face format, and of the run's state while it lasts.
        seed: of weights and batches.
        steps: how long; or
        minutes: of training, probes and writing not counted.
        pool: what it learns from.
        held_out: what it is probed with, or None: no probes.
        config: how to train.
        paintings: what it learns from besides.
        start: folder of an encoder to go on from; else the weights are new.
        device: where to train.
        limit: of this call.
        progress: show a bar.

    Returns:
        The loss of each step of this call.

    Raises:
        ConfigError: unless exactly one of `steps` and `minutes` is given.
        TimeOver: when the limit is reached; the state is written before.
    """
    if (steps is None) == (minutes is None):
        raise ConfigError(
            f"steps={steps} and minutes={minutes}; give one of them, the length of the training"
        )
    out, config = Path(out), config or EncoderConfig()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = create_encoder(pool, seed)
    if start is not None:
        model.load_state_dict(load_image_encoder(start).model.state_dict())
    heads = Heads(pool.textures.shape[-1], pool.colours.shape[-1]).to(device)
    model.to(device)  # type: ignore[arg-type]
    modules: dict[str, nn.Module] = {"model": model, "heads": heads}
    painting_heads = PaintingHeads().to(device)
    if paintings is not None:
        modules["painting_heads"] = painting_heads
    trained = dict(nn.ModuleDict(modules).named_parameters())
    trained = {name: p for name, p in trained.items() if p.requires_grad}
    average = MovingAverage(trained, config.average_decay)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim > 1]},
            {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
    )
    step, elapsed = _resume(out / STATE, trained, average, optimizer)
    scales = [
        (v.reshape(-1, v.shape[-1]).mean(0), v.reshape(-1, v.shape[-1]).std(0) + 1e-4)
        for v in (pool.textures, pool.colours)
    ]
    losses, saved, probed = [], elapsed, elapsed
    with tqdm(total=steps, initial=step, disable=not progress, unit="step", mininterval=10) as bar:
        while True:
            done = step / steps if steps is not None else elapsed / (60 * (minutes or 1))
            if done >= 1:
                break
            began = time.monotonic()
            lr = config.lr * min(1, (step + 1) / config.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done))
            rng = np.random.default_rng([seed, step])
            drawn = draw_batch(pool, scales, rng, config)
            batch = Batch(*[values.to(device) for values in drawn])
            painted = None
            if paintings is not None:
                painted = draw_paintings(paintings, rng, config.batch_paintings, config.patches)
                painted = PaintingBatch(*[values.to(device) for values in painted])
            with autocast(torch.device(device)):
                parts = encoder_losses(model, heads, batch, config.temperature)
                if painted is not None:
                    encoded = encode_patches(model, painted.patches)
                    parts |= painting_losses(*encoded, painting_heads, painted)
            loss = torch.stack(list(parts.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            optimizer.step()
            average.update(step)
            step += 1
            losses.append(loss.item())
            elapsed += time.monotonic() - began
            bar.update()
            bar.set_postfix({k: f"{v.item():.3f}" for k, v in parts.items()}, refresh=False)
            over = limit is not None and limit.left_s <= 0
            if elapsed - saved > config.save_every_s or over:
                saved = elapsed
                _save(out / STATE, step, elapsed, trained, average, optimizer)
            if over:
                raise TimeOver
            if held_out is not None and elapsed - probed > config.probe_every_s:
                probed = elapsed
                with average.applied():
                    result = probe_encoder(ImageEncoder(_copy(model)), pool, held_out)
                tqdm.write(f"step {step} after {elapsed:.0f} s: {result}")
    _save(out / STATE, step, elapsed, trained, average, optimizer)
    with average.applied():
        write_encoder(out, model, pool)
    if held_out is not None:
        result = probe_encoder(load_image_encoder(out), pool, held_out)
        tqdm.write(f"step {step} after {elapsed:.0f} s, as written: {result}")
    return losses


def create_encoder(pool: Pool, seed: int) -> CLIPVisionModelWithProjection:
    """An untrained encoder.

    Its patch embedding is a cosine transform: 64 luma waves and 16 slow waves of each of two
    colour differences, scaled to unit variance over patches of the pool.
    """
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP_WIDTH,
        projection_dim=PROJECTION,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        image_size=SIZE_PX,
        patch_size=PATCH_PX,
        hidden_act="gelu",
        # In bfloat16 on a CPU the fused attention is far slower; a step takes a third with this.
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = CLIPVisionModelWithProjection(config)
    embeddings: Any = model.vision_model.embeddings
    basis = _cosine_basis()
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(pool.families), 200)
    patches = input_patches(pool.pictures[chosen, 0]).reshape(-1, basis.shape[1])
    basis = basis / ((patches @ basis.T).std(0, keepdim=True).T + 1e-3)
    with torch.no_grad():
        embeddings.patch_embedding.weight.copy_(
            rearrange(basis, "n (c y x) -> n c y x", c=3, y=PATCH_PX)
        )
        embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight.requires_grad_(False)
    return model


def _cosine_basis() -> Tensor:
    """96 orthogonal waves over a patch, float32 [96, 192], channels first."""
    place = torch.arange(PATCH_PX) + 0.5
    waves = torch.cos(math.pi / PATCH_PX * place * torch.arange(PATCH_PX)[:, None])
    products = torch.einsum("ay,bx->abyx", waves, waves).flatten(0, 1).flatten(1)
    products = products / products.norm(dim=1, keepdim=True)
    order = torch.arange(PATCH_PX)
    slow = torch.argsort((order[:, None] + order).flatten(), stable=True)[:NUM_CHROMA]
    # In units of the normalised channels, so that luma is the same mixture as elsewhere.
    mixtures = torch.tensor([[0.299, 0.587, 0.114], [0.5, -0.5, 0.0], [-0.25, -0.25, 0.5]])
    mixtures = mixtures * torch.tensor(CLIP_STD)
    kinds = [products, products[slow], products[slow]]
    return torch.cat(
        [torch.einsum("c,np->ncp", m, k).flatten(1) for m, k in zip(mixtures, kinds, strict=True)]
    )


def draw_batch(
    pool: Pool,
    scales: list[tuple[np.ndarray, np.ndarray]],
    rng: np.random.Generator,
    config: EncoderConfig,
) -> Batch:
    """Draw siblings, two contents of each, a place of the patches' grid and some of its patches."""
    num_styles, num_pictures = pool.pictures.shape[:2]
    half = rng.choice(num_styles // 2, min(config.batch_styles, num_styles) // 2, replace=False)
    styles = np.concatenate([2 * half, 2 * half + 1])
    # Siblings on the same contents: nothing but the texture tells them apart.
    two = np.stack([rng.permutation(num_pictures)[:2] for _ in half])
    first, second = np.concatenate([two, two]).T
    rows, columns = np.concatenate([styles, styles]), np.concatenate([first, second])
    top, left = rng.integers(0, PATCH_PX, 2)
    size = SIZE_PX - PATCH_PX
    crops = pool.pictures[rows, columns, top : top + size, left : left + size]
    targets = [
        torch.from_numpy((values[rows, columns] - mean) / std)
        for values, (mean, std) in zip((pool.textures, pool.colours), scales, strict=True)
    ]
    return Batch(
        some_patches(crops, rng, config.patches),
        torch.from_numpy(pool.families[rows]),
        *targets,
    )


def some_patches(pictures: np.ndarray, rng: np.random.Generator, count: int) -> Tensor:
    """Patches of uint8 [N, H, W, 3], drawn at random, normalised for CLIP: float32 [N, L, 192]."""
    patches = _patches(pictures)
    keep = np.argsort(rng.random(patches.shape[:2]), axis=1)[:, :count]
    return _normalised(np.take_along_axis(patches, keep[..., None], 1))


def input_patches(pictures: np.ndarray) -> Tensor:
    """All patches of uint8 [N, H, W, 3], normalised for CLIP: float32 [N, L, 192]."""
    return _normalised(_patches(pictures))


def draw_paintings(
    paintings: Paintings, rng: np.random.Generator, count: int, patches: int
) -> PaintingBatch:
    """A batch of crops of paintings with what is to be read off them."""
    crops, vectors, colours = draw_crops(paintings, rng, count)
    return PaintingBatch(some_patches(crops, rng, patches), vectors, colours)


def encode_patches(model: CLIPVisionModelWithProjection, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, L, C] and image embeddings [N, D] of any patches [N, L, 192].

    What the model computes of whole pictures, while its positions are zero.
    """
    vision: Any = model.vision_model
    weight = vision.embeddings.patch_embedding.weight.flatten(1)
    tokens = F.linear(patches, weight)
    cls = vision.embeddings.class_embedding.expand(len(tokens), 1, -1)
    hidden_states = vision.pre_layrnorm(torch.cat([cls, tokens], 1))
    features = vision.encoder(inputs_embeds=hidden_states).last_hidden_state
    embeds = model.visual_projection(vision.post_layernorm(features[:, 0]))
    return features[:, 1:], embeds


def encoder_losses(
    model: CLIPVisionModelWithProjection, heads: Heads, batch: Batch, temperature: float
) -> dict[str, Tensor]:
    """Weighted losses: contrast of styles, families, texture and colour signatures."""
    features, embeds = encode_patches(model, batch.patches)
    unit = F.normalize(embeds.float(), dim=1)
    first, second = unit.chunk(2)
    similarity = first @ second.T / temperature
    own = torch.arange(len(first))
    contrast = F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)
    losses = {"contrast": contrast / 2}
    for name, readings, weight in (
        ("embeds", heads.embeds(embeds), 1.0),
        ("patches", heads.patches(features.mean(1)), 0.5),
    ):
        family, texture, colour = readings.float().split(heads.sizes, 1)
        losses[f"{name}_family"] = weight * F.cross_entropy(family, batch.families)
        losses[f"{name}_texture"] = weight * F.mse_loss(texture, batch.textures)
        losses[f"{name}_colour"] = 0.5 * weight * F.mse_loss(colour, batch.colours)
    return losses


def _patches(pictures: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] to uint8 [N, L, 192], channels first."""
    return rearrange(pictures, "n (h y) (w x) c -> n (h w) (c y x)", y=PATCH_PX, x=PATCH_PX)


def _normalised(patches: np.ndarray) -> Tensor:
    mean = torch.tensor(CLIP_MEAN).repeat_interleave(PATCH_PX**2)
    std = torch.tensor(CLIP_STD).repeat_interleave(PATCH_PX**2)
    return (torch.from_numpy(patches).float() / 255 - mean) / std


def write_encoder(folder: Path, model: CLIPVisionModelWithProjection, pool: Pool) -> None:
    """Write config.json and float16 model.safetensors, embeddings scaled to unit variance.

    The mean square of an element of image_embeds over pictures of the pool is 1, so their norm is
    about 11; cosines and what the patch features are do not change.
    """
    model = _copy(model)  # on the CPU
    sample = pool.pictures[:: max(1, len(pool.pictures) // 256), 0]
    embeds, _ = embed(ImageEncoder(model), sample)
    with torch.no_grad():
        model.visual_projection.weight.div_(embeds.square().mean().sqrt())
    weights = {name: value.half() for name, value in model.state_dict().items()}
    metadata = {"format": "pt", "num_heads": str(NUM_HEADS)}
    write_state_dict(folder / "model.safetensors", weights, metadata, overwrite=True)
    model.config.architectures = ["CLIPVisionModelWithProjection"]
    model.config.save_pretrained(str(folder))


def _copy(model: CLIPVisionModelWithProjection) -> CLIPVisionModelWithProjection:
    copy = CLIPVisionModelWithProjection(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def _save(
    path: Path,
    step: int,
    elapsed: float,
    trained: dict[str, nn.Parameter],
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    state = {
        "step": step,
        "elapsed_s": elapsed,
        "weights": {name: p.detach() for name, p in trained.items()},
        "average": average.average,
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, part)
    part.replace(path)


def _resume(
    path: Path,
    trained: dict[str, nn.Parameter],
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["weights"][name])
    average.load(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("Going on after step %d of %s", state["step"], path)
    return state["step"], state["elapsed_s"]


def main() -> None:
    """Draw the pool beside the output folder, train, probe."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, required=True, help="of the data and the weights")
    parser.add_argument("--minutes", type=float, required=True, help="of training, on one thread")
    parser.add_argument("--out", type=Path, required=True, help="folder of the encoder")
    options = parser.parse_args()
    folder = options.out.with_name(f"{options.out.name}_pool")
    pool = load_or_draw_pool(folder / "training", options.seed, **POOL_SIZES)
    held_out = load_or_draw_pool(folder / "held_out", options.seed, held_out=True, **HELD_OUT_SIZES)
    train_encoder(
        options.out, seed=options.seed, minutes=options.minutes, pool=pool, held_out=held_out
    )


if __name__ == "__main__":
    main()
