"""Animated and still images, and folders of images, as videos; through Pillow."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import LayoutError
from .images import read_image
from .media_files import IMAGE_ENDINGS, media_files
from .picture_pixels import open_picture, to_rgb, to_rgba
from .timing import IMAGES_FPS, UNTIMED_FPS, TimedFrame, Timing, timing_of

logger = logging.getLogger("stylemaster")

_ANIMATED = frozenset({"GIF", "PNG", "WEBP", "AVIF", "TIFF"})
# GIF counts in hundredths of a second, which is too coarse for most rates.
_TICK_S = 0.01


def is_images(path: Path) -> bool:
    """Whether this is read as images: a folder, or a file that ends like one."""
    return path.is_dir() or path.suffix.lower() in IMAGE_ENDINGS


def image_files(folder: Path) -> list[Path]:
    """The images of a folder in natural order.

    Raises:
        LayoutError: if there are none.
    """
    files = media_files(folder, IMAGE_ENDINGS)
    if not files:
        raise LayoutError(f"the folder {folder} holds no images; give PNG or JPEG files")
    return sorted(files, key=_natural_order)


def image_timing(path: Path) -> tuple[int, Timing]:
    """The number of frames of images, and when they are shown.

    Raises:
        LayoutError: if there are none, or the file is damaged.
    """
    if path.is_dir():
        return len(image_files(path)), Timing(IMAGES_FPS)
    with _animation(path) as image:
        count = _num_frames(image)
        if count == 1:
            return 1, Timing(IMAGES_FPS)
        if image.format == "GIF" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
            logger.warning("%s does not end as GIFs do; the file may be cut short", path)
        starts_s, end_s = [], 0.0
        for duration_s in (_duration_s(image, index) for index in range(count)):
            starts_s.append(end_s)
            end_s += duration_s
    return count, timing_of(starts_s, end_s - starts_s[-1], [IMAGES_FPS], _TICK_S)


def image_frames(path: Path, *, keep_alpha: bool = False) -> Iterator[TimedFrame]:
    """Decode images one by one: uint8 [H, W, 3], upright, on white.

    Args:
        path: an image or a folder of them.
        keep_alpha: give uint8 [H, W, 4] of those with transparency.

    Raises:
        LayoutError: if there are none, or one is damaged.
    """
    if path.is_dir():
        for index, file in enumerate(image_files(path)):
            pixels = read_image(file, keep_alpha=keep_alpha)
            yield TimedFrame(pixels, index / float(IMAGES_FPS), 1 / float(IMAGES_FPS))
        return
    with _animation(path) as image:
        count = _num_frames(image)
        if count > 1:
            start_s = 0.0
            # Of some only later frames are transparent.
            with_alpha = keep_alpha and any(_is_transparent(image, i) for i in range(count))
            for index in range(count):
                duration_s = _duration_s(image, index)
                pixels = to_rgba(image) if with_alpha else to_rgb(image)
                yield TimedFrame(pixels, start_s, duration_s)
                start_s += duration_s
            return
    yield TimedFrame(read_image(path, keep_alpha=keep_alpha), 0.0, 1 / float(IMAGES_FPS))


@contextmanager
def _animation(path: Path) -> Iterator[Image.Image]:
    try:
        with open_picture(path) as image:
            yield image
    except LayoutError:
        raise
    except Image.UnidentifiedImageError as error:
        raise LayoutError(
            f"{path} is not an image that Pillow can read; give PNG or JPEG"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        raise LayoutError(
            f"the animation {path} cannot be read ({error}); is it damaged?"
        ) from error


def _num_frames(image: Image.Image) -> int:
    """Frames of an animation; a camera's JPEG may carry further pictures that are none."""
    return getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1


def _is_transparent(image: Image.Image, index: int) -> bool:
    image.seek(index)
    image.load()
    return image.has_transparency_data


def _duration_s(image: Image.Image, index: int) -> float:
    """Go to a frame, and say how long it is shown."""
    image.seek(index)
    image.load()  # not before: WebP and AVIF say it only then
    info: dict[Any, Any] = image.info
    return float(info.get("duration", 0)) / 1000 or 1 / float(UNTIMED_FPS)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort frame_2 before frame_10."""
    parts = re.findall(r"\d+|\D+", path.name.lower())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
