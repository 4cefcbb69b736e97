"""What a style encoder sees: a linear probe of the texture families, and retrieval of styles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stylemaster_core.data.images import clip_pixels
from stylemaster_core.models.image_encoder import ImageEncoder

from .encoder_pool import Pool

RETRIEVAL_STYLES = 32
PROBE_DECAY = 1e-3
CHUNK_PICTURES = 32


class Probe(NamedTuple):
    """Shares of right answers, 0..1."""

    texture: float  # linear probe of the families on image_embeds
    patch_texture: float  # the same on the mean of the patch features
    retrieval: float  # the other picture of the same style is the nearest of 32


def probe_encoder(encoder: ImageEncoder, training: Pool, held_out: Pool) -> Probe:
    """Probe an encoder.

    Args:
        encoder: what is probed.
        training: the first picture of each of up to 1500 of its styles fits the linear probe.
        held_out: [S, >= 2, ...] styles and contents the encoder and the probe have not seen; the
            first picture of each tests the probe, the second must be found from the first.

    Source: the gates of stylemaster-tiny; deviation: retrieval is averaged over all the groups of
    32 held-out styles, not over one.
    """
    stride = max(1, len(training.families) // 1500)
    fit = embed(encoder, training.pictures[::stride, 0][:1500])
    families = torch.from_numpy(training.families[::stride][:1500])
    test = embed(encoder, held_out.pictures[:, 0])
    other, _ = embed(encoder, held_out.pictures[:, 1])
    truth = torch.from_numpy(held_out.families)
    texture, patch_texture = [
        (linear_probe(x, families, y) == truth).float().mean().item()
        for x, y in zip(fit, test, strict=True)
    ]
    return Probe(texture, patch_texture, retrieval_at_1(test[0], other))


@torch.no_grad()
def embed(encoder: ImageEncoder, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
    """Image embeddings [N, D] and mean patch features [N, C] of uint8 [N, H, W, 3]."""
    embeds, patches = [], []
    for start in range(0, len(pictures), CHUNK_PICTURES):
        chunk = pictures[start : start + CHUNK_PICTURES]
        pixels = [clip_pixels(picture, size=encoder.image_size) for picture in chunk]
        features = encoder.encode(torch.stack(pixels))
        embeds.append(features.image_embeds.float())
        patches.append(features.patch_features[:, 1:].float().mean(1))
    return torch.cat(embeds), torch.cat(patches)


def linear_probe(features: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Labels [M] that a logistic regression on features [N, D] gives to test [M, D]."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    features, test = (features - mean) / std, (test - mean) / std
    num_classes = int(labels.max()) + 1
    weight = torch.zeros(features.shape[1], num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels)
        loss = loss + PROBE_DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return (test @ weight + bias).argmax(1).detach()


def retrieval_at_1(queries: Tensor, keys: Tensor) -> float:
    """Share of queries [N, D] whose nearest key by cosine, among 32, is their own."""
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    right = [
        (q @ k.T).argmax(1) == torch.arange(len(q))
        for q, k in zip(queries.split(RETRIEVAL_STYLES), keys.split(RETRIEVAL_STYLES), strict=True)
        if len(q) == RETRIEVAL_STYLES
    ]
    return torch.cat(right).float().mean().item()
