"""Pictures that explain a style: what was seen, ranked and kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..data.images import CLIP_MEAN, CLIP_STD, CropMode, clip_pixels

SIDE_PX = 256
LABEL_PX = 18
UNLIT = 0.15  # brightness of patches that were not kept


def selection_picture(
    image: np.ndarray,
    similarity: Tensor,
    kept: Tensor,
    shuffled: np.ndarray,
    *,
    crop: CropMode = "center",
) -> np.ndarray:
    """Four panels: what CLIP sees, similarity to the prompt, kept patches lit, shuffled picture.

    Args:
        image: uint8 [H, W, 3] style picture.
        similarity: [h, w] from `relevance_map`.
        kept: [h, w] bool.
        shuffled: uint8 [H, W, 3].
        crop: as used for encoding.

    Returns:
        uint8 [256, 1024, 3].
    """
    seen = _panel(_clip_view(image, crop), Image.Resampling.BICUBIC)
    spread = (similarity.max() - similarity.min()).clamp(min=1e-8)
    levels = ((similarity - similarity.min()) / spread * 255).byte().numpy()
    heat = _panel(np.repeat(levels[..., None], 3, axis=2), Image.Resampling.NEAREST)
    light = _panel(
        np.repeat(kept.byte().numpy()[..., None] * 255, 3, axis=2), Image.Resampling.NEAREST
    )
    lit = (seen * (UNLIT + (1 - UNLIT) * (light / 255.0))).astype(np.uint8)
    return np.concatenate([seen, heat, lit, _panel(_clip_view(shuffled, crop))], axis=1)


def clip_view_picture(image: np.ndarray, crop: CropMode) -> np.ndarray:
    """What CLIP sees of a picture: uint8 [H, W, 3] -> uint8 [256, 256, 3]."""
    return _panel(_clip_view(image, crop))


def _clip_view(image: np.ndarray, crop: CropMode) -> np.ndarray:
    pixels = rearrange(clip_pixels(image, crop=crop).numpy(), "c h w -> h w c")
    return ((pixels * CLIP_STD + CLIP_MEAN) * 255).round().clip(0, 255).astype(np.uint8)


def _panel(image: np.ndarray, how: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((SIDE_PX, SIDE_PX), how))


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], side_px: int = 192
) -> np.ndarray:
    """Rows of pictures under a label each, for comparing results.

    Args:
        rows: label and uint8 [H, W, 3] pictures; all are fitted into squares of `side_px`.
        side_px: of a picture.

    Returns:
        uint8 [rows * (side + label), columns * side, 3]; short rows end in white.
    """
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (columns * side_px, len(rows) * (side_px + LABEL_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, pictures) in enumerate(rows):
        top = row * (side_px + LABEL_PX)
        draw.text((4, top + 3), label, fill="black")
        for column, picture in enumerate(pictures):
            fitted = ImageOps.contain(Image.fromarray(picture), (side_px - 4, side_px - 4))
            sheet.paste(fitted, (column * side_px + 2, top + LABEL_PX))
    return np.asarray(sheet)
