"""From the styles of a batch's rows to what each block of the transformer adds at one step.

ComfyUI batches conditionings in any order and mixture, so every row says for itself which of its
styles act, where, and whether it is styled at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..stylemaster_core.errors import UnsupportedHostError
from ..stylemaster_core.models.decoupled_attention import (
    BlockStyle,
    StyleKV,
    region_masks,
)
from .conditionings import Row, StyleCondition

# Sigmas are float32; neighbouring steps of even 1000-step schedules differ by more than 1e-4.
SIGMA_TOLERANCE = 1e-5


def percent_reached(model_sampling: Any, sigma: float, percent: float) -> bool:
    """Whether the sampling has come to `percent` (0..1) of its way at this sigma, or further."""
    if percent <= 0:
        return True
    return sigma <= float(model_sampling.percent_to_sigma(percent)) + SIGMA_TOLERANCE


def in_range(model_sampling: Any, sigma: float, start: float, end: float) -> bool:
    """Whether a sigma lies in a range of the sampling, both ends included."""
    if not percent_reached(model_sampling, sigma, start):
        return False
    return end >= 1 or sigma >= float(model_sampling.percent_to_sigma(end)) - SIGMA_TOLERANCE


def window_frames(window: Any) -> list[int]:
    """Latent frames of a context window, in the order in which the model sees them.

    ComfyUI 0.21 and newer put a frame before every window but the first; it is only looked at.
    """
    anchor = getattr(window, "causal_anchor_index", None)
    return [*([] if anchor is None or anchor < 0 else [anchor]), *window.index_list]


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """Tokens (t, h, w) of the latents at hand, and the context window that they are, if one."""

    size: tuple[int, int, int]
    window: Any

    def masks(self, condition: StyleCondition, active: tuple[int, ...]) -> tuple[Tensor, ...]:
        """`region_masks` of the active styles, at these tokens."""
        regions = [condition.styles[i].region for i in active]
        given = [region.mask for region in regions if region.mask is not None]
        video_frames = self._video_frames(given)
        total = video_frames or self.size[0]
        key = (active, total, self.size[1:])
        if key not in condition.masks:
            condition.masks[key] = region_masks(regions, (total, *self.size[1:]))
        masks = condition.masks[key]
        if video_frames is None:
            return masks
        index = window_frames(self.window)
        return tuple(mask.unflatten(1, (total, -1))[:, index].flatten(1, 2) for mask in masks)

    def _video_frames(self, masks: Sequence[Tensor]) -> int | None:
        """Latent frames of the whole video if the masks must be cut to a window of it."""
        if self.window is None or not masks:
            return None
        if self.window.dim != 2:
            raise UnsupportedHostError(
                "style masks work with context windows over frames (dim 2), not over dim "
                f"{self.window.dim}; use windows over frames, or a style without a mask"
            )
        if all(mask.ndim == 2 or mask.shape[0] == 1 for mask in masks):
            return None
        total = getattr(self.window, "total_frames", 0)
        if not total:
            raise UnsupportedHostError(
                "style masks that change over time do not work with the context windows of this "
                "ComfyUI, which do not tell how long the video is; update it to 0.8.0, or use a "
                "mask of one frame"
            )
        return total


@dataclass(frozen=True, eq=False)
class _Share:
    """What a row takes of each of its styles at this step."""

    styles: list[Tensor | None]  # None, or a weight [1, L or 1, 1]
    rest: Tensor  # weight of "no style" [1, L or 1, 1]
    masked: bool
    no_style: Tensor  # [blocks, D]


def _share(condition: StyleCondition, grid: TokenGrid, model_sampling: Any, sigma: float) -> _Share:
    active = [
        i
        for i, style in enumerate(condition.styles)
        if in_range(model_sampling, sigma, style.region.start, style.region.end)
    ]
    # The strongest active style sets the strength of "no style"; where none is active, of all.
    counted = [condition.styles[i] for i in active] or list(condition.styles)
    strongest = [
        max(counted, key=lambda style: style.scales[block])  # noqa: B023
        for block in range(len(counted[0].scales))
    ]
    no_style = torch.stack([style.no_style[block] for block, style in enumerate(strongest)])
    weights: list[Tensor | None] = [None] * len(condition.styles)
    if not condition.styled or not active:
        return _Share(weights, torch.ones(1, 1, 1), False, no_style)
    masks = grid.masks(condition, tuple(active))
    *given, rest = masks or (torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
    for i, weight in zip(active, given, strict=True):
        weights[i] = weight
    return _Share(weights, rest, bool(masks), no_style)


def block_styles(
    rows: Sequence[Row], grid: TokenGrid, model_sampling: Any, sigma: float, like: Tensor
) -> list[BlockStyle]:
    """What each block adds, for rows of any mixture of styled and "no style".

    Args:
        rows: conditions with as many styles each, of the same shapes (see `COND.can_concat`).
        grid: tokens of the latents.
        model_sampling: ComfyUI's; it knows what percent of the sampling a sigma is.
        sigma: of this step.
        like: any tensor of the wanted device and dtype.

    Returns:
        for each block a `BlockStyle` whose keys and values have all rows, and whose `no_style` is
        [B, 1, D].
    """
    by_condition = {
        id(condition): _share(condition, grid, model_sampling, sigma) for condition, _ in rows
    }
    shared = [(row, by_condition[id(row[0])]) for row in rows]
    used = [
        i
        for i in range(len(rows[0][0].styles))
        if any(share.styles[i] is not None for _, share in shared)
    ]
    no_style = torch.stack([share.no_style for _, share in shared], 1).to(like)[:, :, None]
    masked = len(used) > 1 or any(share.masked for _, share in shared)
    pairs = [_stack(shared, i, None if masked else no_style, like) for i in used]
    masks = tuple(_stack_masks([share for _, share in shared], used, like)) if masked else ()
    return [
        BlockStyle(
            tuple(pair.keys[block] for pair in pairs),
            tuple(pair.values[block] for pair in pairs),
            masks,
            no_style[block],
            tuple((pair.norm[0][block], pair.norm[1][block]) for pair in pairs if pair.norm),
        )
        for block in range(no_style.shape[0])
    ]


def _stack(
    shared: Sequence[tuple[Row, _Share]], index: int, no_style: Tensor | None, like: Tensor
) -> StyleKV:
    """Keys and values [blocks, B, S, D] of one style for all rows.

    Rows without the style get `no_style` [blocks, B, 1, D], or, where masks hide it, the style.
    """
    keys, values, norms = [], [], []
    for number, ((condition, sample), share) in enumerate(shared):
        kv = condition.styles[index].sample(sample, like)
        if share.styles[index] is None and no_style is not None:
            # Equal keys attend evenly, so equal values come out as they are.
            norm = kv.norm and (torch.zeros_like(kv.norm[0]), torch.zeros_like(kv.norm[1]))
            kv = StyleKV(torch.zeros_like(kv.keys), no_style[:, number].expand_as(kv.values), norm)
        keys.append(kv.keys)
        values.append(kv.values)
        norms.append(kv.norm)
    norm = None
    if norms[0] is not None:
        norm = (torch.stack([n[0] for n in norms], 1), torch.stack([n[1] for n in norms], 1))
    return StyleKV(torch.stack(keys, 1), torch.stack(values, 1), norm)


def _stack_masks(shares: Sequence[_Share], used: Sequence[int], like: Tensor) -> Iterator[Tensor]:
    """Weights [B, L or 1, 1] of the used styles, and last of "no style"."""
    zero = torch.zeros(1, 1, 1)
    columns = [[share.styles[i] for share in shares] for i in used]
    columns.append([share.rest for share in shares])
    for column in columns:
        masks = [zero if mask is None else mask for mask in column]
        length = max(mask.shape[1] for mask in masks)
        yield torch.cat([mask.expand(1, length, 1) for mask in masks]).to(like)
