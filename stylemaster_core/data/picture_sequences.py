"""Writing videos as animations and as numbered pictures, through Pillow."""

from __future__ import annotations

import logging
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ConfigError
from ..writing import disk_errors, written_beside
from .timing import Timing, pick_at_rate, steady_fps

logger = logging.getLogger("stylemaster")

ANIMATIONS = (".gif", ".webp")
_CLEAR = 255  # the colour of a GIF that is none
_NUMBER = re.compile(r"%0?\d*d")


def is_numbered(path: Path) -> bool:
    """Whether a name stands for numbered pictures, such as frames/%05d.png."""
    return path.suffix.lower() == ".png" and _NUMBER.search(path.name) is not None


def check_numbered(path: Path) -> None:
    """Check that numbered pictures can be written.

    Raises:
        ConfigError: if the name has several numbers, or their folder holds something already.
    """
    if len(_NUMBER.findall(path.name)) > 1 or "%" in _NUMBER.sub("", path.name):
        raise ConfigError(f"{path.name!r}: expected a single number, such as %05d.png")
    if path.parent.exists() and (not path.parent.is_dir() or any(path.parent.iterdir())):
        raise ConfigError(
            f"{path.parent} holds something already; name a new folder for the frames"
        )


def numbered(path: Path, index: int) -> Path:
    """The name of a picture, counted from 1."""
    return path.with_name(_NUMBER.sub(lambda form: form[0] % index, path.name))


def write_pictures(
    path: Path,
    frames: Iterator[np.ndarray],
    timing: Timing,
    *,
    quality: int,
    overwrite: bool,
    progress: Callable[[int], None] | None,
) -> None:
    """Write an animation, numbered pictures, or a single one as .png.

    Args:
        path: the new file, or the numbered name in a new folder.
        frames: uint8 [H, W, 3 or 4].
        timing: of the frames.
        quality: of .webp, 1 to 100 (lossless).
        overwrite: replace an existing file.
        progress: called with the number of frames taken so far.

    Raises:
        ConfigError: if several frames go to a plain .png, or something is there already.
    """
    frames = _counted(frames, progress)
    if path.suffix.lower() in ANIMATIONS:
        # Pillow wants the durations first, and keeps the pictures anyway.
        pictures = [Image.fromarray(frame) for frame in frames]
        with written_beside(path, overwrite=overwrite) as part:
            _save_animation(part, pictures, timing, quality)
    elif is_numbered(path):
        _write_numbered(path, frames, timing)
    else:
        first = next(frames)
        if next(frames, None) is not None:
            raise ConfigError(
                f"{path} can hold one frame; end the name in .mp4 for a video, or write "
                f"{path.stem}/%05d.png"
            )
        with written_beside(path, overwrite=overwrite) as part:
            Image.fromarray(first).save(part)


def _counted(
    frames: Iterator[np.ndarray], progress: Callable[[int], None] | None
) -> Iterator[np.ndarray]:
    for count, frame in enumerate(frames, 1):
        yield frame
        if progress is not None:
            progress(count)


def _save_animation(part: Path, pictures: list[Image.Image], timing: Timing, quality: int) -> None:
    """GIF rounds times to 10 ms, WebP to 1 ms; the rounding does not add up.

    Opacity of GIF is on or off, with the border at one half.
    """
    times_s = timing.times_s
    if times_s is None:
        times_s = np.arange(len(pictures) + 1) / float(timing.fps)
    is_gif = part.suffix.lower() == ".gif"
    step_ms = 10 if is_gif else 1
    ticks = np.rint((times_s - times_s[0]) * 1000 / step_ms).astype(int) * step_ms
    durations = np.maximum(np.diff(ticks), step_ms).tolist()
    options: dict[str, Any] = {} if is_gif else {"quality": quality, "lossless": quality == 100}
    is_transparent = pictures[0].mode == "RGBA"
    if is_transparent and is_gif:
        pictures = [_on_or_off(picture) for picture in pictures]
        # Or what a frame leaves transparent would show the frame before.
        # Not optimised: a frame without clear colour would lose it, and what it uncovers later.
        options = {"disposal": 2, "transparency": _CLEAR, "optimize": False}
    elif is_transparent and all(picture == pictures[0] for picture in pictures):
        # The encoder would make a still of them by itself, and an opaque one.
        pictures[0].save(part, **options)
        return
    pictures[0].save(
        part, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **options
    )
    if is_transparent and not is_gif:
        _say_transparent(part)


def _on_or_off(picture: Image.Image) -> Image.Image:
    """A picture of 255 colours, and one that is transparent."""
    clear = picture.getchannel("A").point([255] * 128 + [0] * 128)
    shown = picture.convert("RGB").quantize(_CLEAR)
    palette = (shown.getpalette() or [])[: 3 * _CLEAR]
    shown.putpalette(palette + [255] * (3 * (_CLEAR + 1) - len(palette)))
    shown.paste(_CLEAR, mask=clear)
    return shown


def _say_transparent(part: Path) -> None:
    """Set the flag of opacity in a WebP's header.

    Frames are stored without their transparent borders; if that leaves opaque ones only, the
    encoder takes the whole for opaque, and readers fill the borders.
    """
    with part.open("r+b") as file:
        head = file.read(21)
        if head[12:16] == b"VP8X":
            file.seek(20)
            file.write(bytes([head[20] | 0x10]))


def _write_numbered(path: Path, frames: Iterator[np.ndarray], timing: Timing) -> None:
    """Write pictures into a new folder, which appears once it is whole."""
    check_numbered(path)
    folder = path.parent.absolute()
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    repeats: Counter[int] | None = None
    if timing.times_s is not None:
        rate = steady_fps(timing.times_s)
        logger.warning("pictures have no times: the frames are repeated at %.5g a second", rate)
        repeats = Counter(pick_at_rate(timing, len(timing.times_s) - 1, rate).tolist())
    with disk_errors(path):
        part.mkdir(parents=True)
    try:
        count = 0
        for index, frame in enumerate(frames):
            for _ in range(1 if repeats is None else repeats[index]):
                count += 1
                with disk_errors(path):
                    Image.fromarray(frame).save(part / numbered(path, count).name)
        with disk_errors(path):
            if folder.exists():
                folder.rmdir()
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def square_pixels(frame: np.ndarray, pixel_aspect: Fraction) -> np.ndarray:
    """Scale uint8 [H, W, C] in width so that its pixels are square."""
    if pixel_aspect == 1:
        return frame
    height, width = frame.shape[:2]
    size = max(round(width * pixel_aspect), 1), height
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
