"""Opening video and sound files through PyAV: their frames, times, and what they announce."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LayoutError
from .timing import TimedFrame, Timing, timing_of

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

# FFmpeg would follow playlists, scripts and picture sequences too, which name other files.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,nut,ivf,"
    "yuv4mpegpipe,h264,hevc,av1,obu,dv,gif,apng,wav,w64,mp3,aac,flac,aiff,caf,ac3,eac3"
)
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC


@dataclass(frozen=True)
class VideoFacts:
    """What the packets of a video say, before anything is decoded.

    Attributes:
        num_frames: as the container counts them; a damaged file may hold fewer.
        num_packets: of the video that are there.
        timing: of the frames, by the packets.
        rates: frame rates that the file names, the most trusted first.
        tick_s: to what the file rounds its times, seconds.
        has_audio: whether there is sound.
        missing_s: seconds that the file announces and does not hold.
    """

    num_frames: int
    num_packets: int
    timing: Timing
    rates: tuple[Fraction, ...]
    tick_s: float = 0.01
    has_audio: bool = False
    missing_s: float = 0.0


def existing(path: str | Path) -> Path:
    """Check that there is something to read.

    Raises:
        LayoutError: if there is nothing, or an empty file.
    """
    path = Path(path)
    if not path.exists():
        raise LayoutError(f"there is no file or folder {path}; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise LayoutError(f"the file {path} is empty (0 bytes); give another video")
    return path


@contextmanager
def open_container(path: Path) -> Iterator[InputContainer]:
    """Open a file of a known container; nothing that it names is followed.

    Raises:
        LayoutError: if it cannot be read, now or inside the block.
    """
    import av
    from av.error import FFmpegError

    try:
        # An absolute path, or FFmpeg takes what precedes a colon for a protocol.
        with av.open(str(path.absolute()), options=_OPEN_OPTIONS) as container:
            yield container
    except FFmpegError as error:
        raise LayoutError(
            f"{path} cannot be read as a video ({error}); it may be damaged or of another kind"
        ) from error


def video_stream(container: InputContainer, path: Path) -> Any:
    """The first video stream that is no cover picture.

    Raises:
        LayoutError: if there is none.
    """
    for stream in container.streams.video:
        if not int(stream.disposition) & _ATTACHED_PICTURE:
            return stream
    raise LayoutError(f"{path} has no video stream; give a video")


def container_facts(path: Path) -> VideoFacts:
    """Go through the packets of a video without decoding them.

    Raises:
        LayoutError: if the file cannot be read, or has no video.
    """
    with open_container(path) as container:
        stream = video_stream(container, path)
        rates = _rates(stream, path)
        starts: list[int | None] = []
        last = (-1, 0)
        ends: dict[int, float] = {}
        for packet in container.demux():
            if not packet.size or packet.pts is None and packet.stream_index != stream.index:
                continue
            if packet.pts is not None:
                end_s = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                ends[packet.stream_index] = max(ends.get(packet.stream_index, end_s), end_s)
            if packet.stream_index == stream.index and not packet.is_discard:
                starts.append(packet.pts)
                last = max(last, (-1 if packet.pts is None else packet.pts, packet.duration or 0))
        tick = stream.time_base or Fraction(1, 1000)
        times = sorted(float(pts * tick) for pts in starts if pts is not None)
        if len(times) == len(starts) > 0:
            shown_s = float(last[1] * tick)
            if stream.duration and stream.frames == len(starts):
                # Packets of .mp4 last from one decoding to the next, which is another order.
                shown_s = float((stream.duration + (stream.start_time or 0)) * tick) - times[-1]
            others_s = max((end for i, end in ends.items() if i != stream.index), default=0.0)
            last_s = _last_duration_s(times, shown_s, others_s)
            timing = timing_of(times, last_s, rates, float(tick))
        else:
            timing = Timing(rates[0])
        return VideoFacts(
            num_frames=stream.frames or len(starts),
            num_packets=len(starts),
            timing=timing,
            rates=rates,
            tick_s=float(tick),
            has_audio=bool(container.streams.audio),
            missing_s=_missing_s(container, stream, ends, 1 / float(rates[0])),
        )


def decode_frames(
    path: Path, convert: Callable[[av.VideoFrame], np.ndarray], *, start_frame: int = 0
) -> Iterator[TimedFrame]:
    """Decode a video's frames one by one.

    Args:
        path: a video.
        convert: called with each frame; makes uint8 [H, W, C] of it.
        start_frame: how many frames to leave out at the beginning (they are decoded all the same).

    Raises:
        LayoutError: if the file is damaged or has no video.
    """
    with open_container(path) as container:
        stream = video_stream(container, path)
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index < start_frame:
                continue
            tick = frame.time_base or stream.time_base
            duration = getattr(frame, "duration", 0)  # not in PyAV 14
            yield TimedFrame(
                convert(frame),
                None if frame.pts is None or tick is None else float(frame.pts * tick),
                float(duration * tick) if duration and tick else None,
            )


def _rates(stream: Any, path: Path) -> tuple[Fraction, ...]:
    rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
    known = tuple(Fraction(rate) for rate in rates if rate)
    if not known:
        raise LayoutError(f"{path} does not say its frame rate; convert it to .mp4 first")
    return known


def _last_duration_s(starts_s: list[float], shown_s: float, others_s: float) -> float | None:
    """How long the last frame is shown: while there is sound, but not longer than others."""
    longest_s = float(np.diff(starts_s).max()) if len(starts_s) > 1 else 0.0
    duration_s = max(shown_s, min(others_s - starts_s[-1], longest_s))
    return duration_s if duration_s > 0 else None


def _missing_s(
    container: InputContainer, stream: Any, ends: dict[int, float], frame_s: float
) -> float:
    """How much of what the file announces is not there: the end of a file that was cut."""
    end_s = ends.get(stream.index, 0.0)
    for name, text in stream.metadata.items():
        # Matroska's statistics, exact for each stream.
        if name.upper().startswith("DURATION") and (announced_s := _clock_s(text)):
            missing_s = announced_s - end_s
            return missing_s if missing_s > frame_s / 2 else 0.0
    if not any(name in container.format.name for name in ("matroska", "mp4")):
        return 0.0  # others' duration is a guess by the bit rate
    missing_s = (container.duration or 0) / 1e6 - max(ends.values(), default=0.0)
    return missing_s if missing_s > max(0.1, 2 * frame_s) else 0.0


def _clock_s(text: str) -> float | None:
    """Seconds of HH:MM:SS.fraction."""
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None
