"""A clip and style pictures drawn by code: a demonstration needs no downloads and no rights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .images import write_image
from .videos import write_video

FPS = 16
TINY_FRAMES, TINY_SIZE, TINY_STYLE_PX = 33, (128, 192), 128


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
    """Style pictures, each uint8 [size, size, 3]: a woodcut, a mosaic and a neon screen print.

    Their textures are of 7 to 10 pixels, whatever the size.
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    u, v = x / size, y / size
    field = np.sin(7 * u + 3 * np.sin(4 * v)) + np.cos(9 * v - 2 * u)
    tone = (field - field.min()) / (field.max() - field.min())
    return {
        "woodcut": _woodcut(x, y, tone),
        "mosaic": _mosaic(x, y, tone),
        "neon": _neon(x, y, tone),
    }


def write_demo_inputs(folder: Path) -> list[Path]:
    """Write the clip and the style pictures as small as stylemaster-tiny likes them.

    Args:
        folder: such as ComfyUI's `input`; files that are there already are left as they are.

    Returns:
        `stylemaster_clip.mp4`, then `stylemaster_<name>.png` of each style.
    """
    clip = folder / "stylemaster_clip.mp4"
    if not clip.exists():
        write_video(clip, demo_clip(TINY_FRAMES, *TINY_SIZE), fps=FPS)
    pictures = []
    for name, pixels in demo_styles(TINY_STYLE_PX).items():
        pictures.append(folder / f"stylemaster_{name}.png")
        if not pictures[-1].exists():
            write_image(pictures[-1], pixels)
    return [clip, *pictures]


def _woodcut(x: np.ndarray, y: np.ndarray, tone: np.ndarray) -> np.ndarray:
    lines = (np.sin(2 * np.pi * (0.9 * y + 0.4 * x) / 8) + 1) / 2
    ink = (lines > tone)[..., None]
    return np.where(ink, np.array([38, 30, 34]), np.array([236, 222, 190])).astype(np.uint8)


def _mosaic(x: np.ndarray, y: np.ndarray, tone: np.ndarray) -> np.ndarray:
    cell, joint = 8, 1.2
    palette = np.array([[18, 40, 95], [30, 90, 160], [95, 165, 200], [240, 232, 205]])
    # Each stone has the tone of its middle.
    row, column = (np.minimum(n // cell * cell + cell // 2, len(n) - 1).astype(int) for n in (y, x))
    stones = palette[np.minimum((tone[row, column] * len(palette)).astype(int), len(palette) - 1)]
    edge = ((x % cell) < joint) | ((y % cell) < joint)
    return np.where(edge[..., None], stones * 0.45, stones).astype(np.uint8)


def _neon(x: np.ndarray, y: np.ndarray, tone: np.ndarray) -> np.ndarray:
    palette = np.array([[35, 5, 80], [150, 20, 150], [245, 70, 150], [255, 190, 205]])
    screen = 0.5 + 0.2 * (np.cos(2 * np.pi * (x + y) / 9) + np.cos(2 * np.pi * (x - y) / 9))
    printed = np.clip(tone * 0.5 + np.clip((tone - screen) * 2 + 0.5, 0, 1) * 0.5, 0, 1)
    place = printed * (len(palette) - 1)
    known = np.arange(len(palette))
    return np.stack([np.interp(place, known, c) for c in palette.T], -1).astype(np.uint8)


def _mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    return first + (second - first) * share[..., None]


def _paint(frame: np.ndarray, where: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.where(where[..., None], np.array(colour, np.float32), frame)
