"""Reading videos through PyAV, and animations and folders of images through Pillow."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np

from ..errors import ConfigError, LayoutError
from .animations import IMAGE_ENDINGS, image_frames, image_timing, is_images
from .containers import VideoFacts, container_facts, decode_frames, existing
from .frame_pixels import FrameConverter
from .memory import check_frames_fit
from .picture_sequences import check_numbered, is_numbered
from .timecode import tags_at
from .timing import (
    IMAGES_FPS,
    TimedFrame,
    Timing,
    as_fps,
    at_rate,
    pick_at_rate,
    timing_of,
    usual_gap_s,
)
from .video_writing import VIDEO_CODECS, WRITTEN_ENDINGS, Codec, write_video

logger = logging.getLogger("stylemaster")

__all__ = [
    "IMAGES_FPS",
    "IMAGE_ENDINGS",
    "VIDEO_CODECS",
    "WRITTEN_ENDINGS",
    "Codec",
    "VideoClip",
    "VideoFrames",
    "VideoInfo",
    "as_fps",
    "check_numbered",
    "is_numbered",
    "iter_video",
    "probe_video",
    "read_video",
    "write_video",
]


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, without its pixels.

    Attributes:
        num_frames: as the container counts them; a damaged file may hold fewer.
        height: upright, pixels.
        width: upright, pixels.
        fps: frames per second; the average where the rate varies.
        has_audio: whether `audio_from` of `write_video` would find something.
        times_s: float64 [num_frames + 1], where each frame begins and the last ends, seconds from
            the first frame; None where the rate is constant.
        pixel_aspect: width of a pixel by its height.
    """

    num_frames: int
    height: int
    width: int
    fps: Fraction
    has_audio: bool
    times_s: np.ndarray | None = None
    pixel_aspect: Fraction = Fraction(1)

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        if self.times_s is not None:
            return float(self.times_s[-1])
        return float(self.num_frames / self.fps)


@dataclass(frozen=True)
class VideoClip:
    """A video in memory.

    Attributes:
        frames: uint8 [T, H, W, 3], upright.
        fps: frames per second; the average where the rate varies.
        audio_from: the file whose audio belongs to the frames, for `write_video`; None without.
        start_s: where in that file the frames begin, seconds.
        times_s: float64 [T + 1], where each frame begins and the last ends, seconds from the first
            frame; None where the rate is constant.
        pixel_aspect: width of a pixel by its height.
        alpha: uint8 [T, H, W] opacity, if it was asked for and is there; `frames` are on white.
        tags: `creation_time`, and `timecode` of the first frame, if the file has them.
    """

    frames: np.ndarray
    fps: Fraction
    audio_from: Path | None = None
    start_s: float = 0.0
    times_s: np.ndarray | None = None
    pixel_aspect: Fraction = Fraction(1)
    alpha: np.ndarray | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        if self.times_s is not None:
            return float(self.times_s[-1])
        return float(len(self.frames) / self.fps)


def probe_video(path: str | Path) -> VideoInfo:
    """Look at a video, an animated or still image, or a folder of images.

    Raises:
        LayoutError: if there is nothing that can be decoded.
    """
    path = existing(path)
    facts = _facts(path)
    convert = FrameConverter(path)
    first = next(_decoded(path, convert), None)
    if first is None:
        raise LayoutError(f"{path} has a video stream without frames; give another video")
    height, width = first.pixels.shape[:2]
    return VideoInfo(
        num_frames=facts.num_frames,
        height=height,
        width=width,
        fps=facts.timing.fps,
        has_audio=facts.has_audio,
        times_s=facts.timing.times_s,
        pixel_aspect=_upright_aspect(facts, convert),
    )


def iter_video(
    path: str | Path,
    *,
    chunk_frames: int = 81,
    start_frame: int = 0,
    max_frames: int | None = None,
) -> Iterator[np.ndarray]:
    """Read a long video in chunks of uint8 [<= chunk_frames, H, W, 3].

    Args:
        path: a video, an animated or still image, or a folder of images in natural order.
        chunk_frames: in every chunk but the last.
        start_frame: how many frames to leave out at the beginning (they are decoded all the same).
        max_frames: how many to read at most; None for all.

    Raises:
        ConfigError: if a number is out of range.
        LayoutError: if the file is missing, damaged, has no video, or no frame is left.
    """
    if chunk_frames < 1:
        raise ConfigError(f"chunk_frames {chunk_frames}; expected at least 1")
    _check_range(start_frame, max_frames)
    path = existing(path)
    stop = None if max_frames is None else start_frame + max_frames
    frames = islice(_of_one_size(_decoded(path), path), start_frame, stop)
    empty = True
    while chunk := [frame.pixels for frame in islice(frames, chunk_frames)]:
        empty = False
        yield np.stack(chunk)
    if empty:
        raise _no_frame(path, start_frame)


def read_video(
    path: str | Path,
    *,
    start_frame: int = 0,
    max_frames: int | None = None,
    fps: float | Fraction | None = None,
    keep_alpha: bool = False,
) -> VideoClip:
    """Read a video into memory.

    Args:
        path: a video, an animated or still image, or a folder of images in natural order.
        start_frame: how many frames to leave out at the beginning.
        max_frames: how many to read at most; None for all.
        fps: resample to this constant rate: each frame stays at its own time, repeated or left out;
            the other numbers count the resampled frames. None keeps every frame and its time.
        keep_alpha: keep the opacity of transparent files beside the frames.

    Raises:
        ConfigError: if a number is out of range.
        LayoutError: if the file is missing, damaged, has no video, or no frame is left.
    """
    source = VideoFrames(
        path, start_frame=start_frame, max_frames=max_frames, fps=fps, keep_alpha=keep_alpha
    )
    return source.clip(_gather(source))


class VideoFrames:
    """The frames of a video one by one; what belongs to them is known once all were read.

    Attributes:
        path: the video.
        num_frames: as the container announces; a damaged file may hold fewer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        start_frame: int = 0,
        max_frames: int | None = None,
        fps: float | Fraction | None = None,
        keep_alpha: bool = False,
    ) -> None:
        """Look at the file; arguments and errors as `read_video`."""
        _check_range(start_frame, max_frames)
        self.path = existing(path)
        self.start_frame, self.max_frames = start_frame, max_frames
        self._rate = None if fps is None else as_fps(fps)
        self._facts = facts = _facts(self.path)
        num_frames = facts.num_frames
        if self._rate is not None:
            num_frames = len(pick_at_rate(facts.timing, facts.num_frames, self._rate))
        wanted = max(num_frames - start_frame, 0)
        self.num_frames = wanted if max_frames is None else min(wanted, max_frames)
        self._convert = FrameConverter(self.path, keep_alpha=keep_alpha)
        self._starts_s: list[float] = []
        self._last_s: float | None = None

    @property
    def fps(self) -> Fraction:
        """Frames per second; the average where the rate varies."""
        return self._rate or self._facts.timing.fps

    def __iter__(self) -> Iterator[np.ndarray]:
        """Decode from the beginning: uint8 [H, W, 3], or [H, W, 4] with opacity.

        Raises:
            LayoutError: if the file is damaged, or no frame is left.
        """
        source = _of_one_size(_decoded(self.path, self._convert), self.path)
        if self._rate is not None:
            gap_s, length_s = usual_gap_s(self._facts.timing), _length_s(self._facts)
            source = at_rate(source, self._rate, gap_s=gap_s, duration_s=length_s)
        stop = None if self.max_frames is None else self.start_frame + self.max_frames
        self._starts_s, self._last_s = [], None
        for index, frame in enumerate(islice(source, stop)):
            self._starts_s.append(np.nan if frame.start_s is None else frame.start_s)
            if index >= self.start_frame:
                self._last_s = frame.duration_s
                yield frame.pixels
        if len(self._starts_s) <= self.start_frame:
            raise _no_frame(self.path, self.start_frame)
        found = len(self._starts_s) - self.start_frame
        whole = self.max_frames is None
        _warn_if_cut(self.path, self._facts, self.num_frames, found, whole=whole)

    def clip(self, frames: np.ndarray) -> VideoClip:
        """The clip of these frames, all of which were read before.

        Args:
            frames: uint8 [T, H, W, 3 or 4]; none, for what belongs to them alone.
        """
        facts, starts_s, rate = self._facts, self._starts_s, self._rate
        if rate is not None:
            timing = Timing(rate)
        else:
            timing = _timing(facts, starts_s, self.start_frame, self._last_s)
        if rate is not None or facts.timing.times_s is None or np.isnan(starts_s).any():
            start_s = float(self.start_frame / timing.fps)
        else:
            start_s = starts_s[self.start_frame] - starts_s[0]
        return VideoClip(
            frames[..., :3],
            timing.fps,
            self.path if facts.has_audio else None,
            start_s,
            timing.times_s,
            pixel_aspect=_upright_aspect(facts, self._convert),
            alpha=frames[..., 3] if frames.shape[-1] == 4 else None,
            tags=tags_at(facts.tags, self.start_frame, facts.timing.fps, timing.fps),
        )


def _check_range(start_frame: int, max_frames: int | None) -> None:
    if start_frame < 0 or (max_frames is not None and max_frames < 1):
        raise ConfigError(
            f"start_frame {start_frame}, max_frames {max_frames}; expected at least 0 and 1"
        )


def _no_frame(path: Path, start_frame: int) -> LayoutError:
    return LayoutError(
        f"{path} has no frame from frame {start_frame} on; choose an earlier start or another video"
    )


def _facts(path: Path) -> VideoFacts:
    if not is_images(path):
        return container_facts(path)
    count, timing = image_timing(path)
    return VideoFacts(count, count, timing, (timing.fps,))


def _upright_aspect(facts: VideoFacts, convert: FrameConverter) -> Fraction:
    return 1 / facts.pixel_aspect if convert.turned else facts.pixel_aspect


def _length_s(facts: VideoFacts) -> float:
    if facts.timing.times_s is not None:
        return float(facts.timing.times_s[-1])
    return float(facts.num_frames / facts.timing.fps)


def _timing(
    facts: VideoFacts, starts_s: list[float], start_frame: int, last_s: float | None
) -> Timing:
    if np.isnan(starts_s).any():
        return Timing(facts.timing.fps)
    expected_s = facts.timing.times_s
    if expected_s is not None and len(starts_s) < len(expected_s):
        begins_s = expected_s[: len(starts_s)] + starts_s[0]
        if np.abs(begins_s - starts_s).max() <= facts.tick_s:
            # The frame after it says best how long the last one is shown.
            last_s = float(expected_s[len(starts_s)] - expected_s[len(starts_s) - 1])
    return timing_of(starts_s[start_frame:], last_s, (facts.timing.fps, *facts.rates), facts.tick_s)


def _gather(source: VideoFrames) -> np.ndarray:
    """Collect frames in an array that is made once."""
    frames, count, wanted = None, 0, max(source.num_frames, 1)
    for pixels in source:
        if frames is None:
            check_frames_fit(source.path, wanted, pixels.shape)
            frames = np.empty((wanted, *pixels.shape), np.uint8)
        elif count == len(frames):
            # In place: the container counted too few.
            frames.resize((count + count // 2 + 1, *frames.shape[1:]), refcheck=False)
        frames[count] = pixels
        count += 1
    assert frames is not None  # a source without a frame is refused
    if count < len(frames):
        frames.resize((count, *frames.shape[1:]), refcheck=False)
    return frames


def _warn_if_cut(path: Path, facts: VideoFacts, wanted: int, found: int, *, whole: bool) -> None:
    if found < wanted:
        logger.warning(
            "%s announces %d frames, only %d could be read; the file may be cut short",
            path,
            wanted,
            found,
        )
    elif whole and facts.missing_s:
        logger.warning(
            "%s announces %.2f seconds more than the %d frames that could be read; the file may be "
            "cut short",
            path,
            facts.missing_s,
            found,
        )


def _decoded(path: Path, convert: FrameConverter | None = None) -> Iterator[TimedFrame]:
    """Decode upright frames, uint8 [H, W, 3], one by one."""
    convert = convert or FrameConverter(path)
    if is_images(path):
        return image_frames(path, keep_alpha=convert.keep_alpha)
    return decode_frames(path, convert)


def _of_one_size(frames: Iterator[TimedFrame], path: Path) -> Iterator[TimedFrame]:
    size = None
    for frame in frames:
        size = size or frame.pixels.shape
        if frame.pixels.shape != size:
            raise LayoutError(
                f"the frames of {path} change size from {list(size[:2])} to "
                f"{list(frame.pixels.shape[:2])}; bring them to one size"
            )
        yield frame
