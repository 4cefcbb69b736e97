"""Writing videos through PyAV, with their sound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import ConfigError, LayoutError, UnsupportedHostError
from ..layouts import check_frames
from ..writing import written_beside
from .animations import is_images
from .containers import existing
from .images import write_image
from .sound import open_sound
from .timing import as_fps

if TYPE_CHECKING:
    import av
    from av.container import OutputContainer

VIDEO_CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9"}
# Every common rate divides it, and .mp4 and .mov keep it.
_VARYING_TICK = Fraction(1, 90000)


def write_video(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],
    *,
    fps: float | Fraction,
    times_s: np.ndarray | None = None,
    audio_from: str | Path | None = None,
    audio_start_s: float = 0.0,
    crf: int = 16,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a video; the ending of `path` decides the container.

    H.264 in .mp4, .mov and .mkv, VP9 in .webm, 4:2:0, BT.709. H.264 cannot halve an odd side's
    colour, so odd sizes are written as 4:4:4, which keeps the size but which some players refuse.
    One frame may be written as .png. The audio is copied where the container takes it, re-encoded
    where not, and ends with the video.

    Args:
        path: the new file.
        frames: uint8 [T, H, W, 3], or an iterable of such chunks.
        fps: frames per second.
        times_s: float64 [T + 1], where each frame begins and the last ends, as in `VideoClip`; None
            for a constant rate.
        audio_from: a file whose first audio stream is added; one without audio adds nothing.
        audio_start_s: where in that file the frames begin, seconds.
        crf: quality of x264 or VP9, 0 (largest) to 51.
        overwrite: replace an existing file.
        progress: called with the number of frames written so far.

    Raises:
        ConfigError: for an unknown ending, a number out of range, or an existing file.
        LayoutError: if the frames are not uint8 [T, H, W, 3] of one size, there are none, or
            `times_s` does not fit them.
        UnsupportedHostError: if this PyAV lacks the encoder.
        DiskError: if the disk does not take the file.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    clock = _Clock(as_fps(fps), None if times_s is None else _ticks(times_s))
    chunks = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first = check_frames(next(chunks, np.empty((0, 0, 0, 3), np.uint8)), "the video to write")
    if suffix == ".png":
        if len(first) != 1 or next(chunks, None) is not None:
            raise ConfigError(f"{path} can hold one frame; end the name in .mp4 for a video")
        return write_image(path, first[0], overwrite=overwrite)
    if suffix not in VIDEO_CODECS:
        raise ConfigError(f"no video is written as {suffix!r}; use {', '.join(VIDEO_CODECS)}")
    if not 0 <= crf <= 51:
        raise ConfigError(f"crf {crf}; expected 0 (largest file) to 51")
    from av.error import FFmpegError

    audio_path = None if audio_from is None else existing(audio_from)
    with written_beside(path, overwrite=overwrite) as part:
        try:
            _encode(part, chain([first], chunks), clock, audio_path, audio_start_s, crf, progress)
        except FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise UnsupportedHostError(
                f"{path} could not be written ({error}); try another ending"
            ) from error


class _Clock(NamedTuple):
    """When frames are shown: at a constant rate, or by ticks [T + 1] of 1/90000 s."""

    fps: Fraction
    ticks: np.ndarray | None = None

    @property
    def time_base(self) -> Fraction:
        return 1 / self.fps if self.ticks is None else _VARYING_TICK

    def start(self, index: int) -> int:
        """Where a frame begins, or the last one ends, in units of the time base."""
        if self.ticks is None:
            return index
        if index >= len(self.ticks):
            raise LayoutError(f"there are more frames than the {len(self.ticks) - 1} times given")
        return int(self.ticks[index])


def _ticks(times_s: np.ndarray) -> np.ndarray:
    times_s = np.asarray(times_s, np.float64)
    if times_s.ndim != 1 or len(times_s) < 2 or not np.isfinite(times_s).all():
        raise LayoutError(f"times of shape {list(times_s.shape)}; expected [frames + 1] seconds")
    ticks = np.rint((times_s - times_s[0]) / float(_VARYING_TICK)).astype(np.int64)
    if (np.diff(ticks) <= 0).any():
        raise LayoutError("the times do not grow from frame to frame; give each frame its own")
    return ticks


def _encode(
    part: Path,
    chunks: Iterator[np.ndarray],
    clock: _Clock,
    audio_from: Path | None,
    audio_start_s: float,
    crf: int,
    progress: Callable[[int], None] | None,
) -> None:
    import av

    suffix = part.suffix.lower()
    first = next(chunks)
    # Matroska would move everything so that a copied packet's lead-in begins at 0.
    options = {"avoid_negative_ts": "disabled"} if suffix == ".mkv" else {}
    with av.open(str(part.absolute()), "w", options=options) as output:
        stream = _video_stream(output, suffix, first.shape[1:3], clock, crf)
        opened = nullcontext()
        if audio_from is not None and not is_images(audio_from):
            opened = open_sound(output, suffix, audio_from, audio_start_s)
        with opened as sound:
            written, end_s = 0, 0.0
            for frame in _one_by_one(chain([first], chunks), first.shape[1:]):
                picture = _video_frame(frame, stream.pix_fmt)
                picture.pts, picture.time_base = clock.start(written), clock.time_base
                _mux(output, stream.encode(picture), clock)
                written += 1
                end_s = float(clock.start(written) * clock.time_base)
                if sound is not None:
                    # Audio goes between the video packets, or players must seek to keep in step.
                    output.mux(list(sound.until(end_s)))
                if progress is not None:
                    progress(written)
            _mux(output, stream.encode(None), clock)
            if clock.ticks is not None and written != len(clock.ticks) - 1:
                raise LayoutError(f"{written} frames, but times for {len(clock.ticks) - 1}")
            if sound is not None:
                output.mux(list(sound.finish(end_s)))


def _one_by_one(chunks: Iterable[np.ndarray], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    for chunk in chunks:
        if check_frames(chunk, "the video to write").shape[1:] != shape:
            raise LayoutError(
                f"the frames change size from {list(shape[:2])} to {list(chunk.shape[1:3])}; all "
                "must be equal"
            )
        yield from chunk


def _mux(output: OutputContainer, packets: list[Any], clock: _Clock) -> None:
    for packet in packets:
        if clock.ticks is not None and packet.pts is not None:
            # The encoder forgets how long a frame is shown, which the last one needs.
            tick = round(packet.pts * packet.time_base / _VARYING_TICK)
            place = int(np.searchsorted(clock.ticks, tick))
            duration = int(clock.ticks[place + 1] - clock.ticks[place]) * _VARYING_TICK
            packet.duration = round(duration / packet.time_base)
        output.mux(packet)


def _video_stream(
    output: OutputContainer, suffix: str, size: tuple[int, ...], clock: _Clock, crf: int
) -> Any:
    import av

    codec = VIDEO_CODECS[suffix]
    if codec not in av.codecs_available:
        raise UnsupportedHostError(
            f"this PyAV has no encoder {codec}; install PyAV's own wheel: pip install --upgrade av"
        )
    odd = size[0] % 2 or size[1] % 2
    stream: Any = output.add_stream(codec, rate=clock.fps)
    stream.height, stream.width = size
    stream.pix_fmt = "yuv444p" if odd and codec == "libx264" else "yuv420p"
    # A bit rate of 0 makes VP9 obey the crf.
    stream.bit_rate = 0
    stream.options = {"crf": str(crf)}
    context = stream.codec_context
    context.time_base = clock.time_base
    # Untagged files are guessed to be BT.601 or BT.709 by their size, and colours shift.
    context.colorspace = context.color_primaries = context.color_trc = 1
    context.color_range = 1
    return stream


def _video_frame(frame: np.ndarray, pix_fmt: str) -> av.VideoFrame:
    import av

    return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
        format=pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG"
    )
