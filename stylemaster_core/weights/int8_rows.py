"""Weights in 8 bits with a scale for each row, as the small model is shipped.

A matrix or kernel W of shape [rows, ...] is stored as whole numbers -127..127 under its key, and
max|W[row]| / 127 of each row as float32 beside it; readers get W in float16 back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..errors import WeightsError

SCALE = ".row_scale"
LARGE = 16_384  # numbers; smaller tensors are not worth it
LEVELS = 127


def pack_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store the large tensors in 8 bits; the others stay as they are.

    Args:
        tensors: floating point, any shapes.

    Returns:
        The same keys, and `KEY.row_scale`, float32 [rows], for each that was packed.
    """
    packed = {}
    for key, value in tensors.items():
        if value.ndim < 2 or value.numel() < LARGE or not value.is_floating_point():
            packed[key] = value
            continue
        rows = value.float().flatten(1)
        scale = rows.abs().amax(1).clamp(min=1e-12) / LEVELS
        packed[key] = (rows / scale[:, None]).round().to(torch.int8).reshape(value.shape)
        packed[key + SCALE] = scale
    return packed


def unpack_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack_rows` stored, in float16, under the keys alone.

    Raises:
        WeightsError: if a scale has no 8-bit tensor of as many rows beside it.
    """
    scales = scale_keys(tensors)
    if not scales:
        return dict(tensors)
    unpacked = {key: value for key, value in tensors.items() if key not in scales}
    for name in scales:
        key, scale = name.removesuffix(SCALE), tensors[name]
        rows = tensors.get(key)
        if rows is None or rows.dtype != torch.int8 or scale.shape != rows.shape[:1]:
            found = "nothing" if rows is None else f"{rows.dtype} {list(rows.shape)}"
            raise WeightsError(
                f"{name} {list(scale.shape)} needs an int8 tensor of as many rows under {key!r}, "
                f"found {found}; the file is damaged, get it again"
            )
        shape = (-1, *[1] * (rows.ndim - 1))
        unpacked[key] = (rows.float() * scale.float().view(shape)).half()
    return unpacked


def scale_keys(keys: Collection[str]) -> list[str]:
    """Those keys that are scales."""
    return [key for key in keys if key.endswith(SCALE)]
