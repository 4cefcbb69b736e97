"""Colour distance: how far apart the colours of two clips or pictures are, wherever they stand."""

from __future__ import annotations

import numpy as np

from ..layouts import check_frames

NUM_DIRECTIONS, NUM_QUANTILES = 48, 64
# Quantiles of more pixels differ by less than 0.001, and sorting them would take seconds.
MAX_PIXELS = 1 << 16
SEED = 0


def colour_signature(frames: np.ndarray) -> np.ndarray:
    """Quantiles of the pixels projected on fixed random directions of RGB.

    Args:
        frames: uint8 [T, H, W, 3]; a picture is one frame.

    Returns:
        float32 [64, 48], quantiles 0.01 to 0.99 along each of 48 unit directions.

    Raises:
        LayoutError: if `frames` is not uint8 [T, H, W, 3].

    Source: sliced Wasserstein distance (Bonneel et al. 2015); deviation: of more than 65536 pixels
    so many are drawn, with a fixed seed.
    """
    pixels = check_frames(frames).reshape(-1, 3)
    if len(pixels) > MAX_PIXELS:
        chosen = np.random.default_rng(SEED).choice(len(pixels), MAX_PIXELS, replace=False)
        pixels = pixels[chosen]
    directions = np.random.default_rng(SEED).standard_normal((NUM_DIRECTIONS, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    projected = (pixels.astype(np.float32) / 255) @ directions.T.astype(np.float32)
    return np.quantile(projected, np.linspace(0.01, 0.99, NUM_QUANTILES), axis=0).astype(np.float32)


def colour_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Sliced Wasserstein-1 distance of the colours; 0 for the same colours, at most about 1.7.

    Args:
        first: uint8 [T, H, W, 3].
        second: uint8 [T, H, W, 3]; may have another size and length.

    Raises:
        LayoutError: if one is not uint8 [T, H, W, 3].
    """
    return signature_distance(colour_signature(first), colour_signature(second))


def signature_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of two signatures of one shape."""
    return float(np.abs(first - second).mean())
