"""How much of the content a result has kept: luma correlation and SSIM."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import LayoutError
from ..layouts import check_frames

LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
SSIM_WINDOW_PX, SSIM_SIGMA_PX = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def luma(frames: np.ndarray) -> np.ndarray:
    """Luma of uint8 [T, H, W, 3], float32 [T, H, W] in 0..1.

    Raises:
        LayoutError: if `frames` is not uint8 [T, H, W, 3].

    Source: ITU-R BT.601.
    """
    return check_frames(frames).astype(np.float32) @ (LUMA_WEIGHTS / 255)


def fit_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill another size: scaled (bicubic) until both sides are covered, the rest cut off evenly.

    Args:
        frames: uint8 [T, H, W, 3].
        height: wanted, pixels.
        width: wanted, pixels.

    Returns:
        uint8 [T, height, width, 3]; the same array where nothing had to change.
    """
    if check_frames(frames).shape[1:3] == (height, width):
        return frames
    how = Image.Resampling.BICUBIC
    return np.stack(
        [np.asarray(ImageOps.fit(Image.fromarray(f), (width, height), how)) for f in frames]
    )


def luma_correlation(frames: np.ndarray, content: np.ndarray) -> float:
    """Absolute Pearson correlation of the luma at a quarter of the size, averaged over frames.

    Absolute, because a palette may invert luma. A frame of one single luma counts 0.

    Args:
        frames: uint8 [T, H, W, 3], the result.
        content: uint8 of the same shape.

    Returns:
        0 to 1.

    Raises:
        LayoutError: if the shapes differ, or a side is below 8 pixels.
    """
    first, second = _pair(frames, content, 8)
    small = [F.avg_pool2d(x, 4).flatten(1) for x in (first, second)]
    centred = [x - x.mean(1, keepdim=True) for x in small]
    norms = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    products = (centred[0] * centred[1]).sum(1).abs()
    flat = norms < 1e-6
    return float((products / norms.masked_fill(flat, 1)).masked_fill(flat, 0).clamp(max=1).mean())


def ssim(frames: np.ndarray, content: np.ndarray) -> float:
    """Structural similarity of the luma, averaged over pixels and frames.

    Args:
        frames: uint8 [T, H, W, 3], the result.
        content: uint8 of the same shape.

    Returns:
        -1 to 1; 1 for equal clips.

    Raises:
        LayoutError: if the shapes differ, or a side is below 11 pixels.

    Source: Wang et al. 2004 (window 11 x 11, Gaussian of 1.5 pixels, K1 0.01, K2 0.03, windows
    wholly inside the picture); deviation: none.
    """
    scores = []
    for first, second in zip(
        *(x.split(1) for x in _pair(frames, content, SSIM_WINDOW_PX)), strict=True
    ):
        mean_x, mean_y = _blur(first), _blur(second)
        var_x = _blur(first * first) - mean_x**2
        var_y = _blur(second * second) - mean_y**2
        covariance = _blur(first * second) - mean_x * mean_y
        likeness = (2 * mean_x * mean_y + SSIM_K1**2) * (2 * covariance + SSIM_K2**2)
        scale = (mean_x**2 + mean_y**2 + SSIM_K1**2) * (var_x + var_y + SSIM_K2**2)
        scores.append((likeness / scale).mean())
    return float(torch.stack(scores).mean())


def _pair(frames: np.ndarray, content: np.ndarray, smallest: int) -> tuple[Tensor, Tensor]:
    """Lumas [T, 1, H, W]; float64, since SSIM subtracts nearly equal squares."""
    check_frames(frames, "the result")
    check_frames(content, "the content")
    if frames.shape != content.shape:
        raise LayoutError(
            f"the result has shape {list(frames.shape)}, the content {list(content.shape)}; they "
            "are compared pixel by pixel: cut or fit_frames one to the other"
        )
    if min(frames.shape[1:3]) < smallest:
        raise LayoutError(
            f"frames of {frames.shape[2]} x {frames.shape[1]} pixels are too small; expected at "
            f"least {smallest} x {smallest}"
        )
    first, second = (torch.from_numpy(luma(x)).double()[:, None] for x in (frames, content))
    return first, second


def _blur(pixels: Tensor) -> Tensor:
    offsets = torch.arange(SSIM_WINDOW_PX, dtype=pixels.dtype) - SSIM_WINDOW_PX // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA_PX**2))
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(pixels, weights[None, None, :, None]), weights[None, None, None])
