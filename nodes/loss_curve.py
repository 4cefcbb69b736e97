"""Pictures of a training run: its loss, and its sample frames below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

SIZE = (640, 360)
SHEET_HEIGHT = 360  # of sample frames, at most
MARGIN = 44
BACKGROUND, AXIS, TEXT = (24, 26, 30), (90, 94, 102), (210, 214, 220)
RAW, SMOOTH, HELD_OUT = (70, 92, 120), (110, 180, 255), (255, 170, 80)
MEMORY = 0.95  # of the running mean

Points = list[tuple[float, float]]


def draw_loss_curve(stats: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Loss of each step, its running mean, and the held-out loss.

    Args:
        stats: lines of `stats.jsonl`, maybe none.

    Returns:
        RGB, of `SIZE`.
    """
    picture = Image.new("RGB", SIZE, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    loss, held_out = _points(stats, "loss"), _points(stats, "validation_loss")
    everything = loss + held_out
    left, top, right, bottom = MARGIN, 28, SIZE[0] - 16, SIZE[1] - 28
    draw.rectangle((left, top, right, bottom), outline=AXIS)
    if not everything:
        draw.text((left + 8, top + 8), "no step yet", fill=TEXT)
        return picture
    last = max(max(x for x, _ in everything), 1)
    low, high = min(y for _, y in everything), max(y for _, y in everything)
    span = (high - low) or 1.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        return left + (right - left) * x / last, bottom - (bottom - top) * (y - low) / span

    draw.line([place(p) for p in loss], fill=RAW)
    draw.line([place(p) for p in _running_mean(loss)], fill=SMOOTH, width=2)
    draw.line([place(p) for p in held_out], fill=HELD_OUT, width=2)
    for x, y in map(place, held_out):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=HELD_OUT)
    draw.text((2, top), f"{high:.4g}", fill=TEXT)
    draw.text((2, bottom - 12), f"{low:.4g}", fill=TEXT)
    draw.text((right - 60, bottom + 6), f"step {last:g}", fill=TEXT)
    draw.text((left, 8), "loss", fill=SMOOTH)
    draw.text((left + 48, 8), "held-out loss", fill=HELD_OUT)
    return picture


def draw_run(stats: Sequence[Mapping[str, Any]], sheet: Image.Image | None) -> Image.Image:
    """The loss curve, and below it sample frames, as large as fits.

    Args:
        stats: lines of `stats.jsonl`, maybe none.
        sheet: RGB, of any size, or None.

    Returns:
        RGB, as wide as the curve.
    """
    curve = draw_loss_curve(stats)
    if sheet is None:
        return curve
    scale = min(SIZE[0] / sheet.width, SHEET_HEIGHT / sheet.height)
    size = max(1, round(sheet.width * scale)), max(1, round(sheet.height * scale))
    picture = Image.new("RGB", (SIZE[0], SIZE[1] + size[1]), BACKGROUND)
    picture.paste(curve, (0, 0))
    picture.paste(sheet.resize(size), ((SIZE[0] - size[0]) // 2, SIZE[1]))
    return picture


def _points(stats: Sequence[Mapping[str, Any]], key: str) -> Points:
    found = [(line["step"], line[key]) for line in stats if line.get(key) is not None]
    return [(float(x), float(y)) for x, y in found if math.isfinite(y)]


def _running_mean(points: Points) -> Points:
    """Mean that forgets slowly, corrected for its start at nothing."""
    smooth, total, weight = [], 0.0, 0.0
    for x, y in points:
        total, weight = MEMORY * total + y, MEMORY * weight + 1
        smooth.append((x, total / weight))
    return smooth
