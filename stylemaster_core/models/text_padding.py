"""Padding of prompts: equal rows of text are attended to as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge_padding(texts: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Cut the padding at the end of prompts down to a single row, in all of them alike.

    Args:
        texts: features of prompts, each [B, L, D], that shall stay equally long.

    Returns:
        the prompts, each [B, L', D], and how many rows the last row of each stands for; 1 if
        nothing was cut. Pass the number on as `padding`, which `padding_bias` turns into a bias.

    Source: none; exact, because n equal keys take exp(s) each, which is one key of exp(s + log n).
    """
    length = texts[0].shape[1]
    if any(text.shape[1] != length for text in texts):
        return list(texts), 1
    kept = 1
    for text in texts:
        differs = (text != text[:, -1:]).flatten(2).any(2).any(0).nonzero()
        if len(differs):
            kept = max(kept, int(differs[-1]) + 2)
    return [text[:, :kept] for text in texts], length - kept + 1


def padding_bias(length: int, padding: int, like: Tensor) -> Tensor | None:
    """[length] to add to the logits: 0, and log(padding) for the last key; None for no padding."""
    if padding == 1:
        return None
    bias = torch.zeros(length, dtype=like.dtype, device=like.device)
    bias[-1] = math.log(padding)
    return bias
