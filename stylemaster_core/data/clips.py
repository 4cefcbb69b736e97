"""Clips of the size, rate and length that training wants, of videos and pictures of any kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from ..errors import ConfigError, LayoutError
from ..layouts import SIZE_MULTIPLE, TEMPORAL_STRIDE
from .gray_tile import cover_resize_frames
from .images import read_image
from .picture_sequences import square_pixels
from .samples import Sample
from .still_videos import check_num_frames, still_clip
from .timing import Timing, as_fps, pick_at_rate
from .videos import iter_video, probe_video

Short = Literal["reject", "trim"]
CHUNK_FRAMES = 16


@dataclass(frozen=True)
class ClipConfig:
    """What every clip is brought to.

    Attributes:
        sizes: (height, width) in pixels, multiples of 16; a clip gets the one of the most similar
            shape.
        num_frames: 4n+1, or as `frame_stride` says; pictures have one frame whatever this is.
        fps: frames are picked at this rate; None takes every frame.
        short: what becomes of clips with fewer frames: reported and left out, or cut to the largest
            4n+1 that they have.
        frame_stride: frames that the VAE makes one of: Wan's 4; with 1 any number of frames does.
    """

    sizes: tuple[tuple[int, int], ...] = ((480, 832),)
    num_frames: int = 81
    fps: float | None = 16.0
    short: Short = "reject"
    frame_stride: int = TEMPORAL_STRIDE

    def __post_init__(self) -> None:
        check_num_frames(self.num_frames, self.frame_stride)
        if not self.sizes:
            raise ConfigError("no size for the clips; give at least one, such as 832x480")
        for height, width in self.sizes:
            if min(height, width) < 1 or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
                raise ConfigError(
                    f"a size of {width}x{height} pixels; both must be multiples of {SIZE_MULTIPLE}"
                )
        if self.fps is not None:
            as_fps(self.fps)
        if self.short not in get_args(Short):
            raise ConfigError(f"short clips: {self.short!r}; expected one of {get_args(Short)}")


class Clip(NamedTuple):
    """A clip ready to be encoded."""

    frames: np.ndarray  # uint8 [T, H, W, 3], of one of the sizes
    picture: np.ndarray  # uint8 [H', W', 3], the middle frame at its own size


def load_clip(sample: Sample, config: ClipConfig) -> Clip:
    """Read a sample's clip or picture, pick its frames, and scale and cut them to a size.

    Raises:
        LayoutError: if the file is missing or damaged, or has too few frames.
    """
    if sample.repeat is not None:
        check_num_frames(sample.repeat, config.frame_stride)
        picture = read_image(sample.media)
        small = cover_resize_frames(picture[None], *choose_size(picture.shape, config.sizes))
        return Clip(still_clip(small[0], sample.repeat), picture)
    info = probe_video(sample.media)
    num_frames = 1 if info.num_frames == 1 else config.num_frames
    if info.times_s is None or config.fps is None:
        wanted = pick_frames(num_frames, info.fps, config.fps)
    else:
        wanted = pick_at_rate(Timing(info.fps, info.times_s), info.num_frames, as_fps(config.fps))
        wanted = wanted[:num_frames].tolist()
    size = choose_size((info.height, round(info.width * info.pixel_aspect)), config.sizes)
    middle = min(num_frames, info.num_frames) // 2
    frames, picture = _read(sample.media, wanted, size, middle, info.pixel_aspect)
    if len(frames) < num_frames:
        frames = _shortened(frames, sample.media, config)
    return Clip(frames, picture)


def choose_size(shape: Sequence[int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of `sizes` whose ratio is nearest to that of `shape` (H, W, ...)."""
    ratio = math.log(shape[1] / shape[0])
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - ratio))


def pick_frames(num_frames: int, source_fps: Fraction, fps: float | None) -> list[int]:
    """Which frames of a video show it at `fps`, from its start; None: all of them in order."""
    step = Fraction(1) if fps is None else source_fps / as_fps(fps)
    return [int(index * step + Fraction(1, 2)) for index in range(num_frames)]


def _read(
    path: Path, wanted: Sequence[int], size: tuple[int, int], middle: int, pixel_aspect: Fraction
) -> tuple[np.ndarray, np.ndarray]:
    """Read the wanted frames at the size, and one near the middle at its own."""
    frames: list[np.ndarray] = []
    picture = None
    start = 0
    # Frames are scaled as they come: a long clip at full size does not fit into the memory.
    for chunk in iter_video(path, chunk_frames=CHUNK_FRAMES, max_frames=wanted[-1] + 1):
        chosen = [index - start for index in wanted if start <= index < start + len(chunk)]
        if chosen:
            if pixel_aspect != 1:
                chunk = np.stack([square_pixels(frame, pixel_aspect) for frame in chunk])
            if picture is None or len(frames) <= middle:
                picture = chunk[chosen[min(max(middle - len(frames), 0), len(chosen) - 1)]].copy()
            frames.extend(cover_resize_frames(chunk[chosen], *size))
        start += len(chunk)
    assert picture is not None, "frame 0 is always wanted"
    return np.stack(frames), picture


def _shortened(frames: np.ndarray, path: Path, config: ClipConfig) -> np.ndarray:
    rate = "" if config.fps is None else f" at {config.fps:g} frames a second"
    if config.short == "reject":
        raise LayoutError(
            f"{path} has {len(frames)} frames{rate}, {config.num_frames} are wanted; use longer "
            "clips, fewer frames, or trim short ones"
        )
    return frames[: (len(frames) - 1) // config.frame_stride * config.frame_stride + 1]
