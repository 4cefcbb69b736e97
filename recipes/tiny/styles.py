"""Style filters: a palette, a tone curve and a texture, drawn at random.

A filter applied to any picture gives a picture in its style, so that a reference and a target of
exactly one style can be made of any two contents.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace

import cv2
import numpy as np

FAMILIES = (
    "none",
    "hatch",
    "cross-hatch",
    "halftone",
    "mosaic",
    "ink",
    "oil",
    "blur",
    "grain",
    "weave",
    "scanlines",
)
PERIODIC = tuple(
    FAMILIES.index(n) for n in ("hatch", "cross-hatch", "halftone", "mosaic", "weave", "scanlines")
)
NUM_HUES, NUM_ANGLES = 24, 12
MIN_PERIOD_PX, MAX_PERIOD_PX = 4.5, 8.0
LEVELS = 256


@dataclass(frozen=True)
class StyleFilter:
    """A style. Lengths are in pixels, whatever the size of the frame.

    Attributes:
        palette: float32 [n, 3] in 0..1, for dark to bright tones.
        smooth: tones between two colours of the palette are mixed; else the nearest one is taken.
        gamma: of the tone, before the palette.
        strength: share of the palette's colours, the rest are the picture's own.
        family: number of the texture in `FAMILIES`.
        second: of another texture, applied first; 0 for none.
        period_px: of the texture.
        angle: of the texture, radians.
        amount: how much of the tone the texture decides, 0..1.
        seed: of the grain.
    """

    palette: np.ndarray
    smooth: bool
    gamma: float
    strength: float
    family: int
    second: int
    period_px: float
    angle: float
    amount: float
    seed: int

    def apply(self, frames: np.ndarray) -> np.ndarray:
        """The frames in this style.

        Args:
            frames: uint8 [T, H, W, 3].

        Returns:
            uint8 [T, H, W, 3].
        """
        pixels = frames.astype(np.float32) / 255
        for family in (self.second, self.family):
            pixels = np.stack([_SPATIAL[family](frame, self) for frame in pixels])
        tone = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
        tone = np.clip(tone, 0, 1) ** self.gamma
        for family in (self.second, self.family):
            tone = _textured(tone, family, self)
        table = self._table()
        mapped = table[np.clip(tone * (LEVELS - 1), 0, LEVELS - 1).round().astype(np.int32)]
        # What keeps its own colours keeps the texture, too.
        base = pixels.mean(-1, keepdims=True) + 0.05
        own = np.clip(pixels * ((tone[..., None] + 0.05) / base), 0, 1)
        mixed = own + (mapped - own) * self.strength
        return (mixed * 255).round().clip(0, 255).astype(np.uint8)

    def _table(self) -> np.ndarray:
        """Colour of each tone, float32 [256, 3]."""
        place = np.linspace(0, len(self.palette) - 1, LEVELS)
        if not self.smooth:
            place = place.round()
        known = np.arange(len(self.palette))
        return np.stack([np.interp(place, known, c) for c in self.palette.T], -1).astype(np.float32)


def draw_style(rng: np.random.Generator, *, held_out: bool = False) -> StyleFilter:
    """A random style.

    Args:
        rng: source of all randomness.
        held_out: draw from the hues and angles that are left out otherwise: every fourth hue of 24
            starts a palette, every fourth angle of 12 turns a texture, only in held-out styles.
    """
    family = int(rng.integers(len(FAMILIES)))
    if rng.random() < 0.25:
        family = int(rng.choice(PERIODIC))
    palette = _draw_palette(rng, held_out)
    style = StyleFilter(
        palette=palette,
        # Two colours without mixtures leave little of the content.
        smooth=bool(rng.random() < 0.75) or len(palette) == 2,
        gamma=float(np.exp(rng.uniform(-0.45, 0.45))),
        strength=float(rng.uniform(0.45, 1.0)) if rng.random() < 0.5 else 1.0,
        family=family,
        second=0,
        period_px=float(rng.uniform(MIN_PERIOD_PX, MAX_PERIOD_PX)),
        angle=_draw_angle(rng, held_out),
        amount=float(rng.uniform(0.25, 0.55)),
        seed=int(rng.integers(1 << 30)),
    )
    if rng.random() < 0.2:
        style = replace(style, second=int(rng.choice([5, 6, 7, 8])))
    return style


def with_other_texture(style: StyleFilter, rng: np.random.Generator) -> StyleFilter:
    """The same colours in another texture."""
    step = int(rng.integers(1, len(FAMILIES)))
    return replace(
        style,
        family=(style.family + step) % len(FAMILIES),
        period_px=float(rng.uniform(MIN_PERIOD_PX, MAX_PERIOD_PX)),
        amount=float(rng.uniform(0.25, 0.55)),
    )


def _draw_palette(rng: np.random.Generator, held_out: bool) -> np.ndarray:
    count = int(rng.integers(2, 6))
    bins = [i for i in range(NUM_HUES) if (i % 4 == 3) == held_out]
    hue = (float(rng.choice(bins)) + rng.random()) / NUM_HUES
    spread = float(rng.choice([0.05, 0.15, 0.35, 0.5]))
    low, high = rng.uniform(0.0, 0.3), rng.uniform(0.7, 1.0)
    colours = []
    for value in np.linspace(low, high, count):
        turned = hue + (rng.random() - 0.5) * 2 * spread if colours else hue
        saturation = rng.uniform(0.15, 1.0) if rng.random() < 0.85 else 0.0
        colours.append(colorsys.hsv_to_rgb(turned % 1, saturation, 1.0))
        # The brightness follows the tone, whatever the hue.
        bright = np.array(colours[-1]) @ [0.299, 0.587, 0.114]
        target = float(value)
        colour = np.array(colours[-1])
        scaled = colour * min(target / max(bright, 1e-3), 1.0)
        rest = target - scaled @ [0.299, 0.587, 0.114]
        colours[-1] = tuple(np.clip(scaled + max(rest, 0.0), 0, 1))
    palette = np.array(colours, np.float32)
    return palette[::-1].copy() if rng.random() < 0.12 else palette


def _draw_angle(rng: np.random.Generator, held_out: bool) -> float:
    bins = [i for i in range(NUM_ANGLES) if (i % 4 == 3) == held_out]
    return float((rng.choice(bins) + rng.random()) / NUM_ANGLES * np.pi)


def _textured(tone: np.ndarray, family: int, style: StyleFilter) -> np.ndarray:
    """Tones [T, H, W] with the pattern of a family, which stands still on the screen."""
    pattern = _PATTERNS.get(FAMILIES[family])
    if pattern is None:
        return tone
    height, width = tone.shape[1:]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    screen = pattern(x, y, style)
    # A screen: where the tone is above the pattern's threshold it is bright, else dark.
    sharp = np.clip((tone - screen) * 2 + 0.5, 0, 1)
    return tone + (sharp * 0.9 + tone * 0.1 - tone) * style.amount


def _turned(x: np.ndarray, y: np.ndarray, angle: float, period: float) -> np.ndarray:
    return (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period)


def _hatch(x: np.ndarray, y: np.ndarray, style: StyleFilter) -> np.ndarray:
    return 0.5 + 0.42 * np.sin(_turned(x, y, style.angle, style.period_px))


def _cross_hatch(x: np.ndarray, y: np.ndarray, style: StyleFilter) -> np.ndarray:
    first = np.sin(_turned(x, y, style.angle, style.period_px))
    second = np.sin(_turned(x, y, style.angle + np.pi / 2.5, style.period_px))
    return 0.45 + 0.4 * np.maximum(first, second)


def _halftone(x: np.ndarray, y: np.ndarray, style: StyleFilter) -> np.ndarray:
    first = np.cos(_turned(x, y, style.angle, style.period_px))
    second = np.cos(_turned(x, y, style.angle + np.pi / 2, style.period_px))
    return 0.5 + 0.22 * (first + second)


def _weave(x: np.ndarray, y: np.ndarray, style: StyleFilter) -> np.ndarray:
    u = _turned(x, y, style.angle, 2 * style.period_px)
    v = _turned(x, y, style.angle + np.pi / 2, 2 * style.period_px)
    over = np.sin(u) * np.sin(v) > 0
    threads = np.where(over, np.cos(2 * u), np.cos(2 * v))
    return 0.5 + 0.2 * threads + 0.22 * np.where(over, -1, 1)


def _scanlines(x: np.ndarray, y: np.ndarray, style: StyleFilter) -> np.ndarray:
    del x
    return 0.4 + 0.45 * np.sin(y * (2 * np.pi / style.period_px))


def _grain(x: np.ndarray, y: np.ndarray, style: StyleFilter) -> np.ndarray:
    noise = np.random.default_rng(style.seed).standard_normal(x.shape).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), 0.2 * style.period_px)
    return 0.5 + 0.22 * noise / (noise.std() + 1e-6)


_PATTERNS = {
    "hatch": _hatch,
    "cross-hatch": _cross_hatch,
    "halftone": _halftone,
    "weave": _weave,
    "scanlines": _scanlines,
    "grain": _grain,
}


def _as_is(frame: np.ndarray, style: StyleFilter) -> np.ndarray:
    del style
    return frame


def _mosaic(frame: np.ndarray, style: StyleFilter) -> np.ndarray:
    height, width, _ = frame.shape
    size = style.period_px
    rows, columns = max(round(height / size), 1), max(round(width / size), 1)
    small = cv2.resize(frame, (columns, rows), interpolation=cv2.INTER_AREA)
    tiles = cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    joint = ((x * columns / width) % 1 < 1.2 / size) | ((y * rows / height) % 1 < 1.2 / size)
    return np.where(joint[..., None], tiles * (1 - 0.7 * style.amount), tiles)


def _ink(frame: np.ndarray, style: StyleFilter) -> np.ndarray:
    gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    soft = cv2.GaussianBlur(gray, (0, 0), 1.0)
    x, y = cv2.Sobel(soft, cv2.CV_32F, 1, 0), cv2.Sobel(soft, cv2.CV_32F, 0, 1)
    edge = np.clip(np.sqrt(x * x + y * y) * 1.6 - 0.1, 0, 1)
    thick = cv2.dilate(edge, np.ones((2, 2), np.uint8))
    flat = cv2.GaussianBlur(frame, (0, 0), 1.0) * 0.8 + 0.2
    return flat * (1 - thick * style.amount)[..., None]


def _oil(frame: np.ndarray, style: StyleFilter) -> np.ndarray:
    size = 5 if style.period_px < 6.5 else 7
    small = cv2.medianBlur((frame * 255).astype(np.uint8), size).astype(np.float32) / 255
    return small + (np.round(small * 6) / 6 - small) * 0.5 * style.amount


def _blur(frame: np.ndarray, style: StyleFilter) -> np.ndarray:
    return cv2.GaussianBlur(frame, (0, 0), 0.12 * style.period_px + 1.2 * style.amount)


_SPATIAL = [_as_is] * len(FAMILIES)
for _name, _function in (("mosaic", _mosaic), ("ink", _ink), ("oil", _oil), ("blur", _blur)):
    _SPATIAL[FAMILIES.index(_name)] = _function
