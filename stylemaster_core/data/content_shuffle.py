"""Content shuffle: a smooth random warp that keeps an image's texture and destroys its content."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..seeds import check_seed
from .images import check_aspect

RESOLUTION_PX = 512
GRID_PX = 256


def content_shuffle(image: np.ndarray, *, seed: int) -> np.ndarray:
    """Warp an image by a smooth random flow.

    Args:
        image: uint8 [H, W, 3].
        seed: of the flow; the same as `np.random.seed(seed)` before the release's code, which
            draws from the global generator; beyond 32 bits, as with the two halves of the seed.

    Returns:
        uint8 [H', W', 3], the short side about 512, both sides multiples of 64.

    Raises:
        LayoutError: if `image` is not uint8 [H, W, 3], is empty, or thinner than 50:1.
        ConfigError: if `seed` is not in 0..2**64-1.

    Source: ControlNet 1.1's content shuffle, as StyleMaster's release uses it; deviation: own
    arithmetic in place of OpenCV, so that it need not be installed: at most one gray level, save
    single columns that OpenCV rounds to the neighbouring pixel in a few sizes.
    """
    check_seed(seed, "seed of the content shuffle")
    resized = _resize_short_side(check_aspect(image))
    height, width, _ = resized.shape
    # The generator takes 32 bits as a number, and more as a list of such numbers.
    words = seed if seed < 2**32 else [seed % 2**32, seed >> 32]
    generator = np.random.RandomState(words)
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
        taps = _lanczos4_taps
    elif new_height <= height and new_width <= width:
        taps = _area_taps
    else:
        taps = _area_enlarge_taps
    if (new_height, new_width) == (height, width):
        return image
    resized = torch.from_numpy(image).float()
    if new_height != height:
        resized = _resample(taps(height, new_height), resized, 0)
    if new_width != width:
        resized = _resample(taps(width, new_width), resized, 1)
    return resized.round_().clamp_(0, 255).byte().numpy()


def _smooth_noise(generator: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Draw [height, width] noise in 0..1 that changes over about GRID_PX pixels."""
    grid = generator.uniform(0, 1, (height // GRID_PX + 2, width // GRID_PX + 2))
    noise = torch.from_numpy(grid)
    for axis, size in enumerate((height, width)):
        taps = _cubic_taps(grid.shape[axis], size + 2 * GRID_PX)
        noise = _resample(taps.cut(GRID_PX, size), noise, axis)
    noise -= noise.min()
    return (noise / noise.max()).numpy()


def _sample_bilinear(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Read `image` at the pixel coordinates x, y [H, W], all of them inside the image."""
    height, width, _ = image.shape
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    grid = np.stack([x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1], axis=-1)
    found = F.grid_sample(pixels, torch.from_numpy(grid)[None], align_corners=True)
    return found[0].round_().byte().permute(1, 2, 0).contiguous().numpy()


class _Taps(NamedTuple):
    """What each output takes of the inputs: `weights` [out, n] of those from `first` [out] on."""

    weights: np.ndarray
    first: np.ndarray

    def cut(self, start: int, length: int) -> _Taps:
        return _Taps(*(part[start : start + length] for part in self))


def _resample(taps: _Taps, x: Tensor, axis: int) -> Tensor:
    """Weighted sums along an axis, in the dtype of `x`; taps beyond the border count for it."""
    total: Tensor | None = None
    for i, weights in enumerate(torch.from_numpy(taps.weights).to(x.dtype).unbind(1)):
        index = torch.from_numpy(np.clip(taps.first + i, 0, x.shape[axis] - 1))
        shape = [-1 if d == axis else 1 for d in range(x.ndim)]
        part = x.index_select(axis, index)
        if total is None:
            total = part.mul_(weights.view(shape))
        else:
            total.addcmul_(part, weights.view(shape))
    assert total is not None
    return total


def _centres(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where each output pixel's centre lies in the input: the pixel, and the fraction."""
    position = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    pixel = np.floor(position).astype(np.int64)
    return pixel, position - pixel


def _lanczos4_taps(size: int, new_size: int) -> _Taps:
    pixel, fraction = _centres(size, new_size)
    distance = fraction[:, None] - np.arange(-3, 5)
    taps = np.sinc(distance) * np.sinc(distance / 4)
    return _Taps(taps / taps.sum(1, keepdims=True), pixel - 3)


def _cubic_taps(size: int, new_size: int) -> _Taps:
    pixel, fraction = _centres(size, new_size)
    distance = np.abs(fraction[:, None] - np.arange(-1, 3))
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return _Taps(np.where(distance <= 1, near, far), pixel - 1)


def _area_taps(size: int, new_size: int) -> _Taps:
    """Weights of the overlap of each output pixel with the input pixels; new_size <= size."""
    edges = np.linspace(0, size, new_size + 1)
    first = edges[:-1].astype(np.int64)
    inputs = first[:, None] + np.arange(int(np.ceil(size / new_size)) + 1)
    overlap = np.minimum(edges[1:, None], inputs + 1) - np.maximum(edges[:-1, None], inputs)
    return _Taps(np.maximum(overlap, 0) * (new_size / size), first)


def _area_enlarge_taps(size: int, new_size: int) -> _Taps:
    """The area rule where one side grows: a blend only in the pixels that straddle an input."""
    outputs = np.arange(new_size)
    # Integer arithmetic: floats would put outputs that begin exactly on an input one too low.
    pixel = outputs * size // new_size
    fraction = np.maximum((outputs + 1) - (pixel + 1) * (new_size / size), 0) % 1
    return _Taps(np.stack([1 - fraction, fraction], 1), pixel)
