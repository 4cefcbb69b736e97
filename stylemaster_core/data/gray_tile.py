"""The gray tile: what the content ControlNet sees of a video, coarse and without colour."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from ..layouts import check_frames

# Pillow is used on purpose: its resize rounds to uint8 after each step and always antialiases,
# which the released weights were trained with.
BILINEAR = Image.Resampling.BILINEAR


def cover_resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale an image until it covers [height, width], then cut the centre out."""
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    # Python's round() goes to the even neighbour, as the release's does: keep it.
    size = (round(image.width * scale), round(image.height * scale))
    left = int(round((size[0] - width) / 2.0))
    top = int(round((size[1] - height) / 2.0))
    return image.resize(size, BILINEAR).crop((left, top, left + width, top + height))


def cover_resize_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale uint8 frames [T, H, W, 3] until they cover the size, and cut the centre out."""
    check_frames(frames)
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([np.asarray(cover_resize(Image.fromarray(f), height, width)) for f in frames])


def gray_tile(frames: np.ndarray, height: int, width: int, *, factor: int = 8) -> Tensor:
    """Return the control video of `frames` at the size of the generated video.

    Cover-resize and centre crop, down by `factor`, up again, gray; bilinear, rounded to uint8
    after each step.

    Args:
        frames: uint8 [T, H, W, 3], any size.
        height: of the result, pixels.
        width: of the result, pixels.
        factor: how much smaller the tile is; the released weights know 8.

    Returns:
        float32 [3, T, height, width] in -1..1; the three channels are one, which they share.

    Raises:
        LayoutError: if `frames` is not uint8 [T, H, W, 3] or is empty.
        ConfigError: if `factor` is below 1 or a side is smaller than one tile.

    Source: StyleMaster, sec. 3.4, and its released code; deviation: none.
    """
    check_frames(frames)
    if factor < 1:
        raise ConfigError(f"gray tile factor {factor}; expected 1 or more (the release has 8)")
    if height < factor or width < factor:
        raise ConfigError(
            f"a video of {width} x {height} pixels is smaller than one tile of {factor}; "
            "use a larger size or a smaller factor"
        )
    tile = np.empty((len(frames), height, width), dtype=np.uint8)
    for index, frame in enumerate(frames):
        image = cover_resize(Image.fromarray(frame), height, width)
        image = image.resize((width // factor, height // factor), BILINEAR)
        tile[index] = np.asarray(image.resize((width, height), BILINEAR).convert("L"))
    gray = torch.from_numpy(tile).float().div_(255).sub_(0.5).div_(0.5)
    return gray.expand(3, -1, -1, -1)
