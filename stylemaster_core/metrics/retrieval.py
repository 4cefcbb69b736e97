"""Whether a result is nearer to its own style picture than to those of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

# Pictures, uint8 [N, H, W, 3], to embeddings [N, D].
EmbedPictures = Callable[[np.ndarray], Tensor]


def p_own_nearer(distances: np.ndarray, own: Sequence[int]) -> float:
    """Share of (clip, other reference) pairs in which the own reference is nearer.

    Args:
        distances: [clips, references].
        own: for each clip, the number of its reference.

    Returns:
        0 to 1; 0.5 is chance. Equal distances count as not nearer.

    Raises:
        ConfigError: for fewer than two references, or numbers that do not fit.
    """
    _check(distances.shape[1], len(distances), own)
    nearest = distances[np.arange(len(distances)), list(own)]
    others = np.ones(distances.shape, bool)
    others[np.arange(len(distances)), list(own)] = False
    return float((nearest[:, None] < distances)[others].mean())


def embed_clip(embed: EmbedPictures, frames: np.ndarray) -> Tensor:
    """Direction in which the frames of a clip lie on average, float32 [D], of length 1."""
    return F.normalize(F.normalize(embed(frames).float(), dim=-1).mean(0), dim=0)


def retrieval_at_1(
    clips: Tensor,
    references: Tensor,
    own: Sequence[int],
    *,
    num_candidates: int = 32,
    seed: int = 0,
) -> float:
    """Share of clips whose nearest reference (cosine) is their own; as `retrieved` finds them.

    Returns:
        0 to 1; chance is 1 / candidates.
    """
    return float(
        np.mean(retrieved(clips, references, own, num_candidates=num_candidates, seed=seed))
    )


def retrieved(
    clips: Tensor,
    references: Tensor,
    own: Sequence[int],
    *,
    num_candidates: int = 32,
    seed: int = 0,
) -> list[bool]:
    """Whether the nearest reference (cosine) of each clip is its own.

    Args:
        clips: [clips, D] from `embed_clip`.
        references: [references, D].
        own: for each clip, the number of its reference.
        num_candidates: how many references a clip chooses among; more than that are drawn anew for
            each clip, its own always among them. With fewer references, all are candidates.
        seed: of that draw.

    Returns:
        one for each clip. Equally near references count as not found.

    Raises:
        ConfigError: for fewer than two references or candidates, or numbers that do not fit.
    """
    _check(len(references), len(clips), own)
    if num_candidates < 2:
        raise ConfigError(f"{num_candidates} candidates; expected at least 2")
    similarity = F.normalize(clips.float(), dim=-1) @ F.normalize(references.float(), dim=-1).T
    generator = np.random.default_rng(seed)
    found = []
    for row, mine in zip(similarity, own, strict=True):
        others = np.delete(np.arange(len(references)), mine)
        if len(others) > num_candidates - 1:
            others = generator.choice(others, num_candidates - 1, replace=False)
        found.append(bool(row[mine] > row[torch.from_numpy(others)].max()))
    return found


def _check(num_references: int, num_clips: int, own: Sequence[int]) -> None:
    if num_references < 2 or not num_clips:
        raise ConfigError(
            f"{num_clips} clips and {num_references} style pictures; to ask which is nearer, give "
            "at least one clip and two pictures"
        )
    if len(own) != num_clips or not all(0 <= number < num_references for number in own):
        raise ConfigError(
            f"own references {list(own)[:8]} of {num_clips} clips and {num_references} pictures; "
            "expected one number below the pictures for each clip"
        )
