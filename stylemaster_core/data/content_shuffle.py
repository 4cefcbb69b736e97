"""Content shuffle: a smooth random warp that keeps an image's texture and destroys its content."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError
from .images import check_aspect

RESOLUTION_PX = 512
GRID_PX = 256


def content_shuffle(image: np.ndarray, *, seed: int) -> np.ndarray:
    """Warp an image by a smooth random flow.

    Args:
        image: uint8 [H, W, 3].
        seed: of the flow; the same as `np.random.seed(seed)` before the release's code, which
            draws from the global generator.

    Returns:
        uint8 [H', W', 3], the short side about 512, both sides multiples of 64.

    Raises:
        LayoutError: if `image` is not uint8 [H, W, 3], is empty, or thinner than 50:1.
        ConfigError: if `seed` is not in 0..2**32-1.

    Source: ControlNet 1.1's content shuffle, as StyleMaster's release uses it; deviation: own
    arithmetic in place of OpenCV, so that it need not be installed: at most one gray level, save
    single columns that OpenCV rounds to the neighbouring pixel in a few sizes.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"content shuffle seed {seed}; expected 0 to {2**32 - 1}")
    resized = _resize_short_side(check_aspect(image))
    height, width, _ = resized.shape
    generator = np.random.RandomState(seed)
    # x is drawn before y: the order decides which numbers each gets.
    x = _smooth_noise(generator, height, width) * (width - 1)
    y = _smooth_noise(generator, height, width) * (height - 1)
    return _sample_bilinear(resized, x.astype(np.float32), y.astype(np.float32))


def _resize_short_side(image: np.ndarray) -> np.ndarray:
    """Resize to the release's size: Lanczos when enlarging, area average when shrinking."""
    height, width, _ = image.shape
    scale = RESOLUTION_PX / min(height, width)
    new_height, new_width = (int(np.round(side * scale / 64)) * 64 for side in (height, width))
    if scale > 1:
        weights = _lanczos4_weights
    elif new_height <= height and new_width <= width:
        weights = _area_weights
    else:
        weights = _area_enlarge_weights
    rows, columns = weights(height, new_height), weights(width, new_width)
    resized = np.einsum("ah,hwc->awc", rows, image.astype(np.float32), optimize=True)
    resized = np.einsum("bw,awc->abc", columns, resized, optimize=True)
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


def _smooth_noise(generator: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Draw [height, width] noise in 0..1 that changes over about GRID_PX pixels."""
    grid = generator.uniform(0, 1, (height // GRID_PX + 2, width // GRID_PX + 2))
    rows = _cubic_weights(grid.shape[0], height + 2 * GRID_PX)[GRID_PX : GRID_PX + height]
    columns = _cubic_weights(grid.shape[1], width + 2 * GRID_PX)[GRID_PX : GRID_PX + width]
    noise = rows @ grid @ columns.T
    noise -= noise.min()
    return noise / noise.max()


def _sample_bilinear(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Read `image` at the pixel coordinates x, y [H, W], all of them inside the image."""
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    right = np.minimum(left + 1, image.shape[1] - 1)
    bottom = np.minimum(top + 1, image.shape[0] - 1)
    across, down = (x - left)[..., None], (y - top)[..., None]
    upper = image[top, left] * (1 - across) + image[top, right] * across
    lower = image[bottom, left] * (1 - across) + image[bottom, right] * across
    return np.clip(np.rint(upper * (1 - down) + lower * down), 0, 255).astype(np.uint8)


def _scatter(taps: np.ndarray, first: np.ndarray, size: int) -> np.ndarray:
    """Spread taps [out, n] that begin at input `first` [out] over a matrix [out, size].

    Taps beyond the border count for the border pixel.
    """
    matrix = np.zeros((len(taps), size))
    columns = np.clip(first[:, None] + np.arange(taps.shape[1]), 0, size - 1)
    np.add.at(matrix, (np.arange(len(taps))[:, None], columns), taps)
    return matrix


def _centres(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where each output pixel's centre lies in the input: the pixel, and the fraction."""
    position = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    pixel = np.floor(position).astype(np.int64)
    return pixel, position - pixel


def _lanczos4_weights(size: int, new_size: int) -> np.ndarray:
    pixel, fraction = _centres(size, new_size)
    distance = fraction[:, None] - np.arange(-3, 5)
    taps = np.sinc(distance) * np.sinc(distance / 4)
    return _scatter(taps / taps.sum(1, keepdims=True), pixel - 3, size)


def _cubic_weights(size: int, new_size: int) -> np.ndarray:
    pixel, fraction = _centres(size, new_size)
    distance = np.abs(fraction[:, None] - np.arange(-1, 3))
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return _scatter(np.where(distance <= 1, near, far), pixel - 1, size)


def _area_weights(size: int, new_size: int) -> np.ndarray:
    """Weights of the overlap of each output pixel with each input pixel; new_size <= size."""
    edges = np.linspace(0, size, new_size + 1)
    inputs = np.arange(size)
    overlap = np.minimum(edges[1:, None], inputs + 1) - np.maximum(edges[:-1, None], inputs)
    return np.maximum(overlap, 0) * (new_size / size)


def _area_enlarge_weights(size: int, new_size: int) -> np.ndarray:
    """The area rule where one side grows: a blend only in the pixels that straddle an input."""
    outputs = np.arange(new_size)
    # Integer arithmetic: floats would put outputs that begin exactly on an input one too low.
    pixel = outputs * size // new_size
    fraction = np.maximum((outputs + 1) - (pixel + 1) * (new_size / size), 0) % 1
    return _scatter(np.stack([1 - fraction, fraction], 1), pixel, size)
