"""Small pictures to be kept inside of other files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import LayoutError
from .images import check_image

MAX_BYTES = 20_000
SIDES_PX = (256, 192, 128, 64)  # of the longer side; pure noise needs the smaller ones
QUALITIES = (88, 75, 60, 45)


def thumbnail_jpeg(image: np.ndarray) -> bytes:
    """A small copy of a picture as JPEG.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        A JPEG of at most `MAX_BYTES`, its longer side at most 256 pixels.

    Raises:
        LayoutError: if `image` is not uint8 [H, W, 3].
    """
    picture = Image.fromarray(check_image(image))
    data = b""
    for side in SIDES_PX:
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            stream = io.BytesIO()
            small.save(stream, "JPEG", quality=quality, optimize=True)
            data = stream.getvalue()
            if len(data) <= MAX_BYTES:
                return data
    raise AssertionError(f"64 x 64 pixels took {len(data)} bytes")


def read_thumbnail(data: bytes) -> np.ndarray:
    """Read what `thumbnail_jpeg` made; anybody may have written it.

    Returns:
        uint8 [H, W, 3].

    Raises:
        LayoutError: if it is no JPEG, damaged, or larger than a thumbnail is.
    """
    if len(data) > MAX_BYTES:
        raise LayoutError(f"a thumbnail has at most {MAX_BYTES} bytes, got {len(data)}")
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
            if max(picture.size) > SIDES_PX[0]:
                width, height = picture.size
                raise LayoutError(
                    f"a thumbnail has at most 256 pixels a side, got {width}x{height}"
                )
            return np.asarray(picture.convert("RGB"))
    except LayoutError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise LayoutError(f"the thumbnail is no whole JPEG ({error})") from error
