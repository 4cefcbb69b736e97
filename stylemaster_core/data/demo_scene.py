"""A clip and style pictures drawn by code: a demonstration needs no downloads and no rights."""

from __future__ import annotations

import numpy as np


def demo_clip(num_frames: int = 17, height: int = 128, width: int = 192) -> np.ndarray:
    """A boat crossing a bay at sunset: sky, sun, two ranges of hills in parallax, waves, a sail.

    Returns:
        uint8 [T, H, W, 3].
    """
    return np.stack([_bay(i / max(num_frames - 1, 1), height, width) for i in range(num_frames)])


def _bay(time: float, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / height, y / height
    aspect = width / height
    frame = _mix(np.array([70, 110, 190]), np.array([250, 190, 130]), np.clip(y / 0.55, 0, 1))
    frame = _paint(frame, (x - 0.72 * aspect) ** 2 + (y - 0.3) ** 2 < 0.11**2, (255, 225, 120))
    for speed, base, tall, colour in (
        (0.1, 0.5, 0.1, (120, 110, 150)),
        (0.25, 0.56, 0.08, (70, 80, 90)),
    ):
        u = x + speed * time
        ridge = base - tall * (np.sin(5 * u) * 0.5 + np.sin(11.3 * u + 1) * 0.3)
        frame = _paint(frame, (y > ridge) & (y < 0.62), colour)
    wave = np.sin(40 * y + 8 * np.sin(6 * x + 5 * time) + 9 * time)
    water = _mix(
        np.array([40, 90, 130]), np.array([150, 180, 190]), np.clip(wave * 0.5 + 0.3, 0, 1)
    )
    frame = np.where((y >= 0.6)[..., None], water, frame)
    boat_x, boat_y = (0.12 + 0.7 * time) * aspect, 0.72 + 0.015 * np.sin(12 * time)
    dx, dy = x - boat_x, y - boat_y
    frame = _paint(frame, (np.abs(dx) < 0.15 - dy) & (dy > 0) & (dy < 0.06), (130, 50, 40))
    sail = (dx > -0.01) & (dx < 0.14 * (1 + dy / 0.3)) & (dy < -0.01) & (dy > -0.3)
    frame = _paint(frame, sail, (245, 240, 225))
    frame = _paint(frame, (np.abs(dx + 0.015) < 0.006) & (dy < 0) & (dy > -0.32), (60, 40, 35))
    return frame.round().clip(0, 255).astype(np.uint8)


def demo_styles(size: int = 256) -> dict[str, np.ndarray]:
    """Style pictures, each uint8 [size, size, 3]: a woodcut, a mosaic and a neon screen print."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    field = np.sin(7 * x + 3 * np.sin(4 * y)) + np.cos(9 * y - 2 * x)
    tone = (field - field.min()) / (field.max() - field.min())
    return {"woodcut": _woodcut(x, y, tone), "mosaic": _mosaic(x, y), "neon": _neon(x, y, tone)}


def _woodcut(x: np.ndarray, y: np.ndarray, tone: np.ndarray) -> np.ndarray:
    lines = (np.sin(190 * y + 12 * tone) + 1) / 2
    ink = (lines > tone)[..., None]
    return np.where(ink, np.array([38, 30, 34]), np.array([236, 222, 190])).astype(np.uint8)


def _mosaic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    cells, grout = 16, 0.12
    column, row = (x * cells).astype(int), (y * cells).astype(int)
    palette = np.array(
        [[20, 70, 120], [30, 140, 160], [230, 180, 60], [200, 80, 40], [240, 235, 220]]
    )
    choice = (column * 7 + row * 13 + (column * row) % 5) % len(palette)
    edge = ((x * cells) % 1 < grout) | ((y * cells) % 1 < grout)
    return np.where(edge[..., None], np.array([50, 50, 55]), palette[choice]).astype(np.uint8)


def _neon(x: np.ndarray, y: np.ndarray, tone: np.ndarray) -> np.ndarray:
    palette = np.array(
        [[20, 10, 60], [120, 20, 160], [240, 40, 140], [255, 170, 40], [60, 240, 220]]
    )
    picture = palette[np.minimum((tone * len(palette)).astype(int), len(palette) - 1)]
    dots = (((x * 64) % 1 - 0.5) ** 2 + ((y * 64) % 1 - 0.5) ** 2) < 0.05
    return np.where(dots[..., None], picture // 3, picture).astype(np.uint8)


def _mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    return first + (second - first) * share[..., None]


def _paint(frame: np.ndarray, where: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.where(where[..., None], np.array(colour, np.float32), frame)
