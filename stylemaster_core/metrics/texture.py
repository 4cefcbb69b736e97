"""Gabor distance: how differently two clips or pictures are textured, whatever their colours."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LayoutError
from .colour import signature_distance
from .content import luma

WAVELENGTHS_PX = (4.0, 5.5, 7.5, 10.0)
NUM_ORIENTATIONS = 6
FILTER_PX = 15
SIGMA_PER_WAVELENGTH = 0.45
BORDER_PX = 4
CHUNK_FRAMES = 4  # at 480p the responses of a frame take 40 MB


@lru_cache(maxsize=1)
def texture_filters() -> Tensor:
    """24 Gabor filters and a Laplacian, float32 [25, 1, 15, 15], each of zero mean and unit L1.

    Source: Gabor filters (even phase) and the 4-neighbour Laplacian; the Laplacian has unit L1,
    too.
    """
    half = FILTER_PX // 2
    y, x = torch.meshgrid(*[torch.arange(-half, half + 1.0)] * 2, indexing="ij")
    bank = []
    for wavelength in WAVELENGTHS_PX:
        envelope = torch.exp(-(x**2 + y**2) / (2 * (SIGMA_PER_WAVELENGTH * wavelength) ** 2))
        for step in range(NUM_ORIENTATIONS):
            angle = math.pi * step / NUM_ORIENTATIONS
            along = x * math.cos(angle) + y * math.sin(angle)
            bank.append(envelope * torch.cos(2 * math.pi * along / wavelength))
    laplacian = ((x.abs() + y.abs()) == 1).float()
    laplacian[half, half] = -4
    filters = torch.stack([*bank, laplacian])
    filters = filters - filters.mean((1, 2), keepdim=True)
    return (filters / filters.abs().sum((1, 2), keepdim=True))[:, None]


def texture_signature(frames: np.ndarray) -> np.ndarray:
    """Log energies of the filter responses, averaged over the frames.

    The luma of each frame is brought to mean 0 and standard deviation about 1 first; its border is
    continued with zeros, and 4 px of the responses are left out there.

    Args:
        frames: uint8 [T, H, W, 3]; a picture is one frame. Sizes matter: textures are compared in
            pixels.

    Returns:
        float32 [25].

    Raises:
        LayoutError: if `frames` is not uint8 [T, H, W, 3], or a side is below 16 pixels.
    """
    pixels = luma(frames)
    if min(pixels.shape[1:]) < 16:
        raise LayoutError(
            f"frames of {pixels.shape[2]} x {pixels.shape[1]} pixels are too small to compare "
            "textures; expected at least 16 x 16"
        )
    energies = []
    for chunk in torch.from_numpy(pixels).split(CHUNK_FRAMES):
        spread = chunk.std((1, 2), keepdim=True, correction=0) + 0.03
        normal = (chunk - chunk.mean((1, 2), keepdim=True)) / spread
        responses = F.conv2d(normal[:, None], texture_filters(), padding=FILTER_PX // 2)
        inner = responses[..., BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX]
        energies.append(torch.log(inner.square().mean((2, 3)) + 1e-4))
    return torch.cat(energies).mean(0).numpy()


def gabor_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of the 25 log energies; 0 for the same texture.

    Args:
        first: uint8 [T, H, W, 3].
        second: uint8 [T, H, W, 3]; may have another size and length.

    Raises:
        LayoutError: as in `texture_signature`.
    """
    return signature_distance(texture_signature(first), texture_signature(second))
