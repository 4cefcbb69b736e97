"""Pictures that explain a style: what was seen, ranked and kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..data.images import CLIP_MEAN, CLIP_STD, CropMode, clip_pixels
from ..errors import LayoutError

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


Row = tuple[str | Sequence[str], Sequence[np.ndarray]]


def contact_sheet(rows: Sequence[Row], side_px: int = 192) -> np.ndarray:
    """Rows of pictures under labels, for comparing results.

    Args:
        rows: a label for the row, or one for each picture (cut to its width); and uint8
            [H, W, 3] pictures. All are fitted into squares of `side_px`.
        side_px: of a picture.

    Returns:
        uint8 [rows * (side + label), columns * side, 3]; short rows end in white.
    """
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (columns * side_px, len(rows) * (side_px + LABEL_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, pictures) in enumerate(rows):
        top = row * (side_px + LABEL_PX)
        labels = [label] if isinstance(label, str) else [_cut(draw, x, side_px - 8) for x in label]
        for column, text in enumerate(labels):
            draw.text((column * side_px + 4, top + 3), text, fill="black")
        for column, picture in enumerate(pictures):
            small = Image.fromarray(fitted(picture, side_px))
            sheet.paste(small, (column * side_px + 2, top + LABEL_PX))
    return np.asarray(sheet)


def fitted(picture: np.ndarray, side_px: int = 192) -> np.ndarray:
    """A picture, uint8 [H, W, 3], at the size at which a contact sheet shows it."""
    return np.asarray(ImageOps.contain(Image.fromarray(picture), (side_px - 4, side_px - 4)))


def _cut(draw: ImageDraw.ImageDraw, text: str, width_px: int) -> str:
    """As much of a text as fits, with its end, which tells results of one style apart."""
    if len(text) > 200:  # no cell is as wide
        text = text[:100] + text[-100:]
    shown = text
    for length in range(len(text) - 1, 1, -1):
        if draw.textlength(shown) <= width_px:
            break
        shown = f"{text[: length // 2]}..{text[len(text) - length // 2 :]}"
    return shown


def grid_rows(
    names: Sequence[str], strengths: Sequence[float], results: Sequence[Sequence[np.ndarray]]
) -> list[Row]:
    """Rows of a contact sheet of each style at each strength.

    Args:
        names: of the styles.
        strengths: of each style.
        results: frames uint8 [H, W, 3] of each style at each strength, the strengths of the first
            style first.

    Returns:
        Where each result is one frame, a row for each style with its strengths side by side; else
        a row for each result with its frames side by side.

    Raises:
        LayoutError: if there are not as many results as styles times strengths.
    """
    labels = [f"{name}, {strength:g}" for name in names for strength in strengths]
    if len(results) != len(labels):
        raise LayoutError(
            f"{len(results)} results came for {len(names)} styles at {len(strengths)} strengths; "
            f"expected {len(labels)}"
        )
    if any(len(frames) > 1 for frames in results):
        return list(zip(labels, results, strict=True))
    columns = len(strengths)
    return [
        (labels[start : start + columns], [frame for (frame,) in results[start : start + columns]])
        for start in range(0, len(labels), columns)
    ]
