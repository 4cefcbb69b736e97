"""Pictures of any of Pillow's modes to upright sRGB pixels."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

logger = logging.getLogger("stylemaster")

# Others, which Pillow opens by what is in a file, run programs (PostScript) or follow names.
_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM"),
    *("TGA", "ICO", "QOI"),
)


def open_picture(path: Path) -> Image.Image:
    """`PIL.Image.open` for the formats that are meant, whatever else Pillow knows."""
    Image.init()
    return Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN])


def to_rgb(image: Image.Image) -> np.ndarray:
    """Turn a Pillow image of any mode into uint8 [H, W, 3], upright, on white where transparent."""
    image = _upright_srgb(image)
    if image.has_transparency_data:
        return np.ascontiguousarray(on_white(np.array(image.convert("RGBA")))[..., :3])
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def to_rgba(image: Image.Image) -> np.ndarray:
    """The same with its opacity, uint8 [H, W, 4]."""
    return on_white(np.array(_upright_srgb(image).convert("RGBA")))


def on_white(pixels: np.ndarray) -> np.ndarray:
    """Put uint8 [H, W, 4] on white, so that no hidden colour shows; the opacity stays."""
    image = Image.fromarray(pixels)
    shown = np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))
    shown[..., 3] = pixels[..., 3]
    return shown


def _upright_srgb(image: Image.Image) -> Image.Image:
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # or it would be copied, too
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit gray at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("F", "I"):
        return Image.fromarray(_levels(np.asarray(image)))
    return _in_srgb(image)


def _levels(values: np.ndarray) -> np.ndarray:
    """Gray of any numbers to uint8: floats in 0..1 as they are, others by their own range."""
    finite = np.isfinite(values)
    low, high = (float(f(values[finite])) for f in (np.min, np.max)) if finite.any() else (0.0, 0.0)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    else:
        logger.warning(
            "a picture holds %s from %g to %g; its darkest becomes black, its brightest white",
            values.dtype,
            low,
            high,
        )
    shares = (np.where(finite, values, low).astype(np.float64) - low) / max(high - low, 1e-300)
    return np.rint(shares * 255).astype(np.uint8)


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert a picture from its embedded colour profile to sRGB; without one, leave it."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        opacity = None
        if image.has_transparency_data:
            opacity = image.convert("RGBA").getchannel("A")
        if image.mode not in ("RGB", "L", "CMYK"):
            image = image.convert("RGBA").convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        logger.warning("the colour profile of a picture cannot be used (%s); taken for sRGB", error)
        return image
    assert shown is not None, "it is not converted in place"
    if opacity is not None:
        shown.putalpha(opacity)
    return shown
