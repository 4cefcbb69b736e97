"""Reading and writing images, and the pixels that CLIP looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..writing import written_beside
from .memory import check_picture_fits
from .picture_pixels import open_picture, to_rgb, to_rgba

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CropMode = Literal["center", "pad", "squash"]
# Scaling the short side up makes the long one this much longer: thinner images exhaust the memory.
MAX_ASPECT = 50


def check_image(image: np.ndarray) -> np.ndarray:
    """Check that `image` is uint8 [H, W, 3] and not empty, and return it.

    Raises:
        LayoutError: for another type or shape, or no pixels.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = getattr(image, "dtype", type(image).__name__)
        raise LayoutError(f"the image is {kind}; expected a numpy array of uint8 (0 to 255)")
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise LayoutError(f"the image has shape {list(image.shape)}; expected [height, width, 3]")
    return image


def check_aspect(image: np.ndarray) -> np.ndarray:
    """Check that `image` [H, W, 3] is not so thin that scaling its short side up is senseless.

    Raises:
        LayoutError: if one side is more than MAX_ASPECT times the other.
    """
    height, width, _ = check_image(image).shape
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise LayoutError(
            f"the image of {width} x {height} pixels is too thin; cut it to a ratio below "
            f"{MAX_ASPECT}:1"
        )
    return image


def read_image(path: str | Path, *, keep_alpha: bool = False) -> np.ndarray:
    """Read the first picture of an image file.

    Args:
        path: the file.
        keep_alpha: give the opacity, too, if there is any.

    Returns:
        uint8 [H, W, 3], sRGB, turned upright by its EXIF orientation, transparency put on white;
        [H, W, 4] with its opacity.

    Raises:
        LayoutError: if the file is missing, empty, truncated, or no image.
    """
    path = Path(path)
    if not path.is_file():
        raise LayoutError(f"there is no image file {path}; check the path")
    if path.stat().st_size == 0:
        raise LayoutError(f"the image file {path} is empty (0 bytes); give another")
    try:
        with open_picture(path) as image:
            check_picture_fits(path, *image.size)
            with_alpha = keep_alpha and image.has_transparency_data
            return to_rgba(image) if with_alpha else to_rgb(image)
    except LayoutError:
        raise
    except UnidentifiedImageError as error:
        raise LayoutError(
            f"{path} is not an image that Pillow can read; give PNG or JPEG"
        ) from error
    except Image.DecompressionBombError as error:
        raise LayoutError(
            f"the image {path} has more pixels than are read ({error}); scale it down to at most "
            f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise LayoutError(
            f"the image {path} cannot be read ({error}); it may be damaged"
        ) from error


def write_image(
    path: str | Path,
    image: np.ndarray,
    *,
    alpha: np.ndarray | None = None,
    quality: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a uint8 [H, W, 3] image; the ending of `path` decides the format.

    Args:
        path: the new file.
        image: uint8 [H, W, 3].
        alpha: uint8 [H, W] opacity, for .png and .webp.
        quality: of .jpg and .webp, 1 to 100 (.webp: lossless); None for Pillow's own.
        overwrite: replace an existing file.

    Raises:
        LayoutError: if `image` is not uint8 [H, W, 3], or `alpha` does not fit it.
        ConfigError: if the ending is unknown, the quality out of range, the format cannot be
            transparent, or the file exists already.
        DiskError: if the disk does not take it.
    """
    picture = Image.fromarray(check_image(image))
    suffix = Path(path).suffix.lower()
    if suffix not in Image.registered_extensions():
        raise ConfigError(f"no image format ends in {Path(path).suffix!r}; use .png, .jpg or .webp")
    if quality is not None and not 1 <= quality <= 100:
        raise ConfigError(f"quality {quality}; expected 1 to 100")
    if alpha is not None:
        if suffix not in (".png", ".webp"):
            raise ConfigError(f"{suffix} cannot be transparent; use .png or .webp")
        if alpha.shape != image.shape[:2] or alpha.dtype != np.uint8:
            raise LayoutError(f"alpha is {alpha.dtype} {list(alpha.shape)}; expected uint8 [H, W]")
        picture.putalpha(Image.fromarray(alpha))
    options: dict[str, Any] = {}
    if quality is not None and suffix in (".jpg", ".jpeg", ".webp"):
        options = {"quality": quality, "lossless": quality == 100 and suffix == ".webp"}
    with written_beside(path, overwrite=overwrite) as part:
        picture.save(part, **options)


def clip_pixels(image: np.ndarray, *, crop: CropMode = "center", size: int = 224) -> Tensor:
    """Resize an image for CLIP and normalise it.

    Args:
        image: uint8 [H, W, 3].
        crop: `center` fills the square and cuts the long side, as CLIP was trained and the release
            does; `pad` keeps the whole image, the rest is CLIP's mean colour; `squash` distorts.
        size: side of the square, pixels.

    Returns:
        float32 [3, size, size], normalised with CLIP's mean and standard deviation.

    Raises:
        LayoutError: if `image` is not uint8 [H, W, 3], or thinner than 50:1 where it is cut.
        ConfigError: if `crop` is another word or `size` is below 1.

    Source: transformers' CLIPImageProcessor (Pillow, bicubic); deviation: none for `center`.
    """
    height, width, _ = check_image(image).shape
    if size < 1:
        raise ConfigError(f"CLIP image size {size}; expected 1 or more (ViT-H/14 has 224)")
    picture = Image.fromarray(image)
    bicubic = Image.Resampling.BICUBIC
    if crop == "squash":
        return _normalise(np.asarray(picture.resize((size, size), bicubic)))
    if crop == "center":
        short = min(check_aspect(image).shape[:2])
        new_width, new_height = int(size * width / short), int(size * height / short)
        left, top = (new_width - size) // 2, (new_height - size) // 2
        picture = picture.resize((new_width, new_height), bicubic)
        return _normalise(np.asarray(picture.crop((left, top, left + size, top + size))))
    if crop == "pad":
        long = max(height, width)
        new_width, new_height = (max(round(size * side / long), 1) for side in (width, height))
        left, top = (size - new_width) // 2, (size - new_height) // 2
        inner = _normalise(np.asarray(picture.resize((new_width, new_height), bicubic)))
        pixels = torch.zeros(3, size, size)
        pixels[:, top : top + new_height, left : left + new_width] = inner
        return pixels
    raise ConfigError(f"crop {crop!r}; expected center, pad or squash")


def stylecrafter_video_pixels(image: np.ndarray) -> Tensor:
    """Prepare a style picture for CLIP as StyleCrafter's video code does.

    Short side 512 (bilinear), middle 512 x 512, a slight blur, 224 x 224 (bicubic, corners on
    corners).

    Args:
        image: uint8 [H, W, 3].

    Returns:
        float32 [3, 224, 224], normalised with CLIP's mean and standard deviation.

    Raises:
        LayoutError: if `image` is not uint8 [H, W, 3], or thinner than 50:1.

    Source: StyleCrafter's video code (kornia's resize with antialiasing); deviation: none.
    """
    height, width, _ = check_aspect(image).shape
    size, short, clip_size = 512, min(height, width), 224
    new_width, new_height = int(size * width / short), int(size * height / short)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    picture = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    picture = picture.crop((left, top, left + size, top + size))
    pixels = rearrange(torch.from_numpy(np.array(picture)).float(), "h w c -> c 1 h w") / 127.5 - 1
    # Of kornia: the blur that belongs to shrinking by this factor.
    sigma = (size / clip_size - 1) / 2
    reach = int(max(4 * sigma, 3)) // 2
    kernel = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    pixels = F.pad(pixels, (reach, reach, reach, reach), mode="reflect")
    pixels = F.conv2d(F.conv2d(pixels, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    pixels = F.interpolate(
        pixels, (clip_size, clip_size), mode="bicubic", align_corners=True
    ).squeeze(1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std


def _normalise(pixels: np.ndarray) -> Tensor:
    mean, std = (np.array(values, dtype=np.float32) for values in (CLIP_MEAN, CLIP_STD))
    normalised = (pixels.astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(rearrange(normalised, "h w c -> c h w").copy())
