"""What the style encoder learns from paintings: the teacher's numbers, and the colours."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stylemaster_core.models.image_encoder import ImageEncoder

from .encoder_pool import COLOUR_LEVELS, SIZE_PX, colour_quantiles
from .encoder_probe import embed
from .pictures import resized
from .teacher import STYLE_VALUES

CROP_PX = 120  # a whole number of patches, with room for the place of their grid
COLOUR_WEIGHT = 20.0  # quantiles in 0..1 deviate by about 0.2, the teacher's numbers by 1
HELD_OUT = 256  # the first paintings, or a tenth of a small collection
EMBED_WIDTH, PATCH_WIDTH = 128, 96


class Paintings(NamedTuple):
    """Paintings and the teacher's numbers of them.

    Attributes:
        pictures: uint8 [N, S, S, 3], the first of which are held out.
        vectors: float32 [M, 100] of the first M, whitened.
    """

    pictures: np.ndarray
    vectors: np.ndarray


class PaintingBatch(NamedTuple):
    """Crops of N paintings."""

    patches: Tensor  # float32 [N, L, 192], normalised for CLIP
    vectors: Tensor  # float32 [N, 100]
    colours: Tensor  # float32 [N, 21] quantiles, 0..1


class PaintingHeads(nn.Module):
    """Linear readings of the features, for training only."""

    def __init__(self) -> None:
        super().__init__()
        values = STYLE_VALUES + 3 * len(COLOUR_LEVELS)
        self.embeds = nn.Linear(EMBED_WIDTH, values)
        self.patches = nn.Linear(PATCH_WIDTH, values)


def num_held_out(count: int) -> int:
    """How many of so many paintings only probe the encoder."""
    return min(HELD_OUT, max(count // 10, 1))


def whitened(vectors: np.ndarray) -> np.ndarray:
    """Each number brought to mean 0 and deviation 1 over the pictures."""
    return (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6)


def draw_crops(
    paintings: Paintings, rng: np.random.Generator, count: int
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Crops uint8 [N, 120, 120, 3], mirrored by chance, enlarged or not; numbers and colours."""
    known = len(paintings.vectors)
    chosen = rng.integers(num_held_out(known), known, count)
    crops = np.empty((count, CROP_PX, CROP_PX, 3), np.uint8)
    for row, number in enumerate(chosen):
        picture = paintings.pictures[number]
        # The whole picture at the encoder's size is what it sees later; a part is coarser.
        if rng.random() < 0.5:
            picture = resized(picture, SIZE_PX, SIZE_PX)
        y, x = rng.integers(0, len(picture) - CROP_PX + 1, 2)
        crop = picture[y : y + CROP_PX, x : x + CROP_PX]
        crops[row] = crop[:, ::-1] if rng.random() < 0.5 else crop
    colours = np.stack([colour_quantiles(crop[None]) for crop in crops])
    return crops, torch.from_numpy(paintings.vectors[chosen]).float(), torch.from_numpy(colours)


def painting_losses(
    features: Tensor, embeds: Tensor, heads: PaintingHeads, batch: PaintingBatch
) -> dict[str, Tensor]:
    """Weighted errors of the teacher's numbers and the colours, from both kinds of features."""
    losses = {}
    for name, readings, weight in (
        ("embeds", heads.embeds(embeds), 1.0),
        ("patches", heads.patches(features.mean(1)), 0.5),
    ):
        vectors, colours = readings.float().split([STYLE_VALUES, batch.colours.shape[1]], 1)
        losses[f"{name}_teacher"] = weight * F.mse_loss(vectors, batch.vectors)
        losses[f"{name}_quantiles"] = weight * COLOUR_WEIGHT * F.mse_loss(colours, batch.colours)
    return losses


class PaintingProbe(NamedTuple):
    """What a ridge regression reads off the embeddings of held-out paintings."""

    teacher: float  # explained share of the variance of the teacher's numbers
    colours: float  # mean absolute error of the quantiles, 0..1
    retrieval: float  # share of foretold numbers whose own painting is nearest of 64


def probe_paintings(
    encoder: ImageEncoder, paintings: Paintings, fitting: int = 1000
) -> PaintingProbe:
    """Fit on some paintings and test on the held-out ones."""
    first = num_held_out(len(paintings.vectors))
    last = min(first + fitting, len(paintings.vectors))
    pictures = np.stack([resized(p, SIZE_PX, SIZE_PX) for p in paintings.pictures[:last]])
    embeds, _ = embed(encoder, pictures)
    colours = torch.from_numpy(np.stack([colour_quantiles(p[None]) for p in pictures]))
    wanted = torch.cat([torch.from_numpy(paintings.vectors[:last]).float(), colours], 1)
    inputs = torch.cat([embeds, torch.ones(len(embeds), 1)], 1)
    fit = inputs[first:]
    normal = fit.T @ fit + len(fit) * 1e-2 * torch.eye(fit.shape[1])
    read = inputs[:first] @ torch.linalg.solve(normal, fit.T @ wanted[first:])
    vectors, found = wanted[:first, :STYLE_VALUES], read[:, :STYLE_VALUES]
    similar = F.normalize(found, dim=1) @ F.normalize(vectors, dim=1).T
    groups = [
        block[:, 64 * i : 64 * i + 64].argmax(1) == torch.arange(len(block))
        for i, block in enumerate(similar.split(64))
    ]
    return PaintingProbe(
        1 - float((found - vectors).square().mean() / vectors.square().mean()),
        float((read[:, STYLE_VALUES:] - colours[:first]).abs().mean()),
        float(torch.cat(groups).float().mean()),
    )
