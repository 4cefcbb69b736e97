"""Content clips: moving shapes before hills, clouds, tiles or stripes, drawn at random."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import cv2
import numpy as np

SHAPES = ("circle", "square", "triangle", "bar", "ring", "person", "house", "tree")
HELD_OUT_SHAPES = ("star", "boat", "circle", "house", "person")
BACKGROUNDS = ("sky", "hills", "clouds", "tiles", "stripes")
HUE_NAMES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SUBPIXEL_BITS = 4


def draw_clip(
    rng: np.random.Generator, num_frames: int, height: int, width: int, *, held_out: bool = False
) -> tuple[np.ndarray, str]:
    """A random scene in motion.

    Args:
        rng: source of all randomness.
        num_frames: of the clip.
        height: of a frame, pixels.
        width: of a frame, pixels.
        held_out: with shapes and backgrounds (two of them laid over each other) that other clips
            do not have.

    Returns:
        uint8 [T, H, W, 3], and a caption.
    """
    background = str(rng.choice(BACKGROUNDS))
    paint = _background(rng, background, height, width, num_frames)
    if held_out:
        other = str(rng.choice([name for name in BACKGROUNDS if name != background]))
        second, share = _background(rng, other, height, width, num_frames), rng.uniform(0.3, 0.7)
        first = paint
        paint = lambda t: first(t) * share + second(t) * (1 - share)  # noqa: E731
        background = f"{background} and {other}"
    kinds = HELD_OUT_SHAPES if held_out else SHAPES
    things = [_Thing(rng, str(rng.choice(kinds)), height) for _ in range(rng.integers(1, 5))]
    light = _light(rng, height, width)
    frames = []
    for number in range(num_frames):
        frame = np.ascontiguousarray(paint(number), np.float32)
        for thing in things:
            thing.draw(frame, number)
        frames.append(frame * light)
    clip = _stretched(np.stack(frames))
    names = " and ".join(f"a {thing.hue_name} {thing.kind}" for thing in things)
    return clip, f"{names} before {background}"


def _stretched(frames: np.ndarray) -> np.ndarray:
    """Float frames as uint8, in which dark and bright places are at least a half apart."""
    low, high = np.quantile(frames, (0.02, 0.98))
    gain = max(1.0, 0.55 / max(high - low, 0.05))
    middle = np.clip((low + high) / 2, 0.35, 0.65)
    spread = (frames - (low + high) / 2) * gain + middle
    return (np.clip(spread, 0, 1) * 255).round().astype(np.uint8)


class _Thing:
    """A shape that moves, turns and grows."""

    def __init__(self, rng: np.random.Generator, kind: str, height: int) -> None:
        self.kind, self.height = kind, height
        self.place = rng.uniform(0.1, 0.9, 2)
        self.place[0] *= 1.3
        self.velocity = rng.normal(0, 0.02, 2)
        self.size = rng.uniform(0.1, 0.28)
        self.growth = rng.normal(0, 0.008)
        upright = kind in ("person", "house", "tree", "boat")
        self.angle = rng.normal(0, 0.1) if upright else rng.uniform(0, 2 * np.pi)
        self.spin = rng.normal(0, 0.01 if upright else 0.06)
        hue = rng.random()
        self.hue_name = HUE_NAMES[int(hue * len(HUE_NAMES))]
        self.colours = [
            np.array(colorsys.hsv_to_rgb((hue + rng.normal(0, 0.05)) % 1, rng.random(), value))
            for value in (rng.uniform(0.15, 1.0), rng.uniform(0.05, 0.9))
        ]

    def draw(self, frame: np.ndarray, time: int) -> None:
        size = self.size * np.exp(self.growth * time) * self.height
        centre = (self.place + self.velocity * time) * self.height
        angle = self.angle + self.spin * time
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        for number, outline in enumerate(_OUTLINES[self.kind]):
            points = (outline * size) @ turn.T + centre
            fixed = np.round(points * (1 << SUBPIXEL_BITS)).astype(np.int32)
            colour = tuple(float(c) for c in self.colours[number % 2])
            cv2.fillPoly(frame, [fixed], colour, cv2.LINE_AA, SUBPIXEL_BITS)


def _light(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Brightness that falls to one side, [H, W, 1]."""
    y, x = np.mgrid[0:height, 0:width] / height
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.45)
    slope = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)
    return (1 - depth * np.clip(0.5 + slope, 0, 1))[..., None].astype(np.float32)


def _background(
    rng: np.random.Generator, kind: str, height: int, width: int, num_frames: int
) -> Callable[[int], np.ndarray]:
    """A painter of frame `t`, float [H, W, 3]: a window that moves over a larger picture."""
    speed = rng.normal(0, 0.012, 2) * height
    margin = int(np.ceil(np.abs(speed).max() * max(num_frames - 1, 0))) + 2
    canvas = _CANVASES[kind](rng, height, height + 2 * margin, width + 2 * margin)

    def window(time: int) -> np.ndarray:
        x, y = margin + speed * time
        shift = np.array([[1, 0, -x], [0, 1, -y]], np.float64)
        return cv2.warpAffine(canvas, shift, (width, height), flags=cv2.INTER_LINEAR)

    return window


def _two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    hue = rng.random()
    first = colorsys.hsv_to_rgb(hue, rng.uniform(0, 0.9), rng.uniform(0.5, 1))
    second = colorsys.hsv_to_rgb((hue + rng.normal(0, 0.2)) % 1, rng.random(), rng.uniform(0, 0.7))
    if rng.random() < 0.5:
        first, second = second, first
    return np.array(first, np.float32), np.array(second, np.float32)


def _mixed(rng: np.random.Generator, share: np.ndarray) -> np.ndarray:
    first, second = _two_colours(rng)
    return (first + (second - first) * np.clip(share, 0, 1)[..., None]).astype(np.float32)


def _noise(rng: np.random.Generator, cells: float, height: int, width: int) -> np.ndarray:
    """Smooth noise in 0..1 of three octaves; `cells` pixels each at the coarsest."""
    total = np.zeros((height, width), np.float32)
    for octave in range(3):
        size = max(cells / 2**octave, 2.0)
        shape = int(height / size) + 2, int(width / size) + 2
        coarse = rng.random(shape, np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    return (total - total.min()) / (np.ptp(total) + 1e-6)


def _sky(rng: np.random.Generator, unit: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width] / unit
    canvas = _mixed(rng, y - 0.3)
    centre, radius = rng.uniform(0.1, 0.9, 2), rng.uniform(0.05, 0.2)
    disc = np.hypot(x - centre[0], y - centre[1]) < radius
    return np.where(disc[..., None], np.float32(1.0), canvas)


def _hills(rng: np.random.Generator, unit: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width] / unit
    canvas = _mixed(rng, y - 0.2)
    for number in range(int(rng.integers(2, 4))):
        phase, waves = rng.uniform(0, 6, 2), rng.uniform(2, 9, 2)
        ridge = 0.3 + 0.22 * number + 0.1 * np.sin(waves[0] * x + phase[0])
        ridge = ridge + 0.05 * np.sin(waves[1] * 2.3 * x + phase[1])
        ground = _mixed(rng, 2 * (y - ridge))
        canvas = np.where((y > ridge)[..., None], ground, canvas)
    return canvas


def _clouds(rng: np.random.Generator, unit: int, height: int, width: int) -> np.ndarray:
    return _mixed(rng, _noise(rng, unit * rng.uniform(0.15, 0.5), height, width))


def _tiles(rng: np.random.Generator, unit: int, height: int, width: int) -> np.ndarray:
    size = unit * rng.uniform(0.2, 0.45)
    y, x = np.mgrid[0:height, 0:width] / size
    shades = rng.random((int(height / size) + 1, int(width / size) + 1))
    return _mixed(rng, shades[y.astype(int), x.astype(int)])


def _stripes(rng: np.random.Generator, unit: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width] / unit
    angle, waves = rng.uniform(0, np.pi), rng.uniform(8, 20)
    wave = np.sin(waves * (x * np.cos(angle) + y * np.sin(angle)))
    return _mixed(rng, 0.5 + wave * rng.uniform(0.5, 3))


_CANVASES = {
    "sky": _sky,
    "hills": _hills,
    "clouds": _clouds,
    "tiles": _tiles,
    "stripes": _stripes,
}


def _polygon(count: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    angles = np.arange(count) * 2 * np.pi / count
    radius = np.array([radii[i % len(radii)] for i in range(count)])
    return np.stack([np.sin(angles), -np.cos(angles)], -1) * radius[:, None]


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


# Outlines of size about 1 around the origin, y down; drawn in turn in the thing's two colours.
_OUTLINES = {
    "circle": [_polygon(28)],
    "square": [_box(-0.8, -0.8, 0.8, 0.8), _box(-0.35, -0.35, 0.35, 0.35)],
    "triangle": [_polygon(3)],
    "bar": [_box(-1.2, -0.25, 1.2, 0.25)],
    "ring": [_polygon(28), _polygon(28) * 0.55],
    "star": [_polygon(10, (1.0, 0.45))],
    "person": [
        np.concatenate([_box(-0.4, -0.4, 0.4, 0.3), [[-0.35, 1.1], [-0.4, 0.3]]]),
        _polygon(16) * 0.32 - [0, 0.75],
        _box(0.05, 0.3, 0.35, 1.1),
    ],
    "house": [
        _box(-0.7, -0.2, 0.7, 0.9),
        np.array([[-0.95, -0.2], [0, -1.0], [0.95, -0.2]]),
        _box(-0.55, 0.05, -0.15, 0.45),
        _box(0.15, 0.2, 0.45, 0.9),
    ],
    "tree": [_polygon(12, (0.75, 0.6)) - [0, 0.35], _box(-0.12, 0.2, 0.12, 1.0)],
    "boat": [
        np.array([[-1.0, 0.4], [1.0, 0.4], [0.65, 0.85], [-0.65, 0.85]]),
        np.array([[-0.05, 0.3], [-0.05, -1.0], [0.75, 0.3]]),
    ],
}
