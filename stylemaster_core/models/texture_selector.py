"""Texture selection (StyleMaster, sec. 3.1): which patches of a style picture carry texture."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, LayoutError

SelectionMode = Literal["release", "paper", "all", "random"]
RELEASE_DROP_RATE = 0.95
PAPER_KEEP = 15


class Selection(NamedTuple):
    """Which patches were chosen, and by what."""

    kept: Tensor  # [B, K] ascending indices into the patch tokens; 0 is CLS
    similarity: Tensor | None  # [B, N] with the prompt; None for modes that need no prompt


def prompt_similarity(patch_features: Tensor, prompt_features: Tensor) -> Tensor:
    """Cosine similarity of each patch with the prompt, as the release measures it.

    Text features are average-pooled over the feature axis to the patches' width, then averaged over
    all tokens, padding included. The two spaces are unrelated, so the ranking is arbitrary; the
    released weights were trained with it.

    Args:
        patch_features: [B, N, C] CLIP tokens, CLS first.
        prompt_features: [B or 1, L, Dt] text encoder features.

    Returns:
        [B, N] in -1..1, float32 at least.

    Raises:
        LayoutError: for text features of the wrong shape.

    Source: StyleMaster's released code. Deviation: pools to C where the release hard-codes 1280.
    """
    batch = patch_features.shape[0]
    if prompt_features.ndim != 3 or prompt_features.shape[0] not in (1, batch):
        raise LayoutError(
            f"prompt features must be [1 or {batch}, L, D], got {list(prompt_features.shape)}"
        )
    dtype = torch.promote_types(patch_features.dtype, torch.float32)
    patches = patch_features.to(dtype)
    prompt = F.adaptive_avg_pool1d(prompt_features.to(patches), patches.shape[-1]).mean(1)
    return F.cosine_similarity(patches, prompt[:, None], dim=-1)


def select_patches(
    patch_features: Tensor,
    prompt_features: Tensor | None = None,
    *,
    mode: SelectionMode = "release",
    drop_rate: float | None = None,
    keep: int | None = None,
    include_cls: bool = True,
    similarity: Tensor | None = None,
    seed: int | None = None,
) -> Selection:
    """Choose the patches that go on to the query transformer.

    Args:
        patch_features: [B, N, C] CLIP tokens, CLS first.
        prompt_features: [B or 1, L, Dt]; `release` and `paper` need it or `similarity`.
        mode: `release` keeps the MOST similar patches (what the released weights were trained
            with), `paper` the LEAST similar ones, `all` every patch, `random` a seeded choice.
        drop_rate: share of patches to drop, 0 <= rate < 1; int(N * rate) are dropped. Default 0.95.
        keep: number of patches to keep instead of a drop rate.
        include_cls: whether the CLS token is a candidate.
        similarity: [B, N] measured elsewhere, e.g. in CLIP's joint text-image space.
        seed: needed by `random`.

    Raises:
        ConfigError: for an unknown mode, an impossible count, or what the mode needs and lacks.
        LayoutError: for tensors of the wrong shape or with NaN.

    Source: StyleMaster, sec. 3.1 (`paper`) and its released code (`release`).
    """
    if mode not in get_args(SelectionMode):
        raise ConfigError(f"texture selection {mode!r} is unknown; use {get_args(SelectionMode)}")
    if patch_features.ndim != 3 or not torch.isfinite(patch_features).all():
        raise LayoutError(
            f"patch features must be finite and [B, N, C], got {list(patch_features.shape)}"
        )
    batch, num_patches = patch_features.shape[:2]
    first = 0 if include_cls else 1
    num_keep = num_kept(num_patches - first, mode, drop_rate, keep)
    if similarity is None and mode in ("release", "paper"):
        if prompt_features is None:
            raise ConfigError(f"texture selection {mode!r} ranks patches by the prompt: give one")
        similarity = prompt_similarity(patch_features, prompt_features)
    if similarity is not None and similarity.shape != (batch, num_patches):
        raise LayoutError(
            f"similarity must be {[batch, num_patches]}, got {list(similarity.shape)}"
        )
    if similarity is not None and not torch.isfinite(similarity).all():
        raise LayoutError("the similarity with the prompt holds NaN or infinity")
    if similarity is not None and mode in ("release", "paper"):
        rank = similarity if mode == "release" else -similarity
    elif mode == "random":
        if seed is None:
            raise ConfigError("texture selection 'random' needs a seed")
        generator = torch.Generator().manual_seed(seed)
        rank = torch.rand(batch, num_patches, generator=generator).to(patch_features.device)
    else:
        rank = torch.zeros(batch, num_patches, device=patch_features.device)
    order = rank[:, first:].argsort(dim=-1, stable=True)[:, num_patches - first - num_keep :]
    return Selection((order + first).sort(-1).values, similarity)


def num_kept(candidates: int, mode: str, drop_rate: float | None, keep: int | None) -> int:
    """How many of the candidates are kept.

    Raises:
        ConfigError: for a share or number that cannot be.
    """
    if drop_rate is not None and keep is not None:
        raise ConfigError("give a drop rate or a number of patches to keep, not both")
    if mode == "all":
        if drop_rate is not None or keep is not None:
            raise ConfigError(
                "texture selection 'all' keeps every patch; leave the drop rate and the number to "
                "keep out, or choose another selection"
            )
        return candidates
    if keep is None:
        rate = RELEASE_DROP_RATE if drop_rate is None else drop_rate
        if not 0.0 <= rate < 1.0:
            raise ConfigError(f"the drop rate must be at least 0 and below 1, got {rate}")
        keep = candidates - int(candidates * rate)
    if not 1 <= keep <= candidates:
        raise ConfigError(f"cannot keep {keep} of {candidates} patches; keep 1 to {candidates}")
    return keep


def relevance_map(selection: Selection, num_patches: int) -> tuple[Tensor, Tensor]:
    """Maps for a picture of what was selected, one per reference image.

    Args:
        selection: result of `select_patches` for T reference images.
        num_patches: number of tokens, CLS included; 257 for ViT-H at 224 px.

    Returns:
        similarity [T, h, w] (zeros if the mode measured none) and kept [T, h, w] of bool.

    Raises:
        LayoutError: if the patches do not form a square.
    """
    side = int((num_patches - 1) ** 0.5)
    if side * side != num_patches - 1:
        raise LayoutError(f"{num_patches} tokens are not CLS and a square of patches")
    kept = torch.zeros(selection.kept.shape[0], num_patches, dtype=torch.bool)
    kept.scatter_(1, selection.kept.cpu(), True)
    similarity = selection.similarity
    similarity = torch.zeros(kept.shape) if similarity is None else similarity.float().cpu()
    return similarity[:, 1:].unflatten(1, (side, side)), kept[:, 1:].unflatten(1, (side, side))
