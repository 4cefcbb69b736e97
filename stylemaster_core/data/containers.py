"""Opening video and sound files through PyAV: their frames, times, and what they announce."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
        pixel_aspect: width of a pixel by its height, before the frames are turned.
        tags: `creation_time` and `timecode`, if the file has them.
    """

    num_frames: int
    num_packets: int
    timing: Timing
    rates: tuple[Fraction, ...]
    tick_s: float = 0.01
    has_audio: bool = False
    missing_s: float = 0.0
    pixel_aspect: Fraction = Fraction(1)
    tags: Mapping[str, str] = field(default_factory=dict)


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
        LayoutError: if there is none, or none that can be decoded.
    """
    from av.stream import Disposition

    for stream in container.streams.video:
        if Disposition.attached_pic in stream.disposition:
            continue
        if stream.codec_context is None:
            raise LayoutError(
                f"{path} does not say how its video is coded, or in a way that FFmpeg does not "
                "know; it may be damaged or cut short"
            )
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
        if len(times) == len(starts) > 0 and _has_times(container):
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
            pixel_aspect=_pixel_aspect(stream),
            tags=_tags(container, stream),
        )


def decode_frames(
    path: Path, convert: Callable[[av.VideoFrame, Any], np.ndarray]
) -> Iterator[TimedFrame]:
    """Decode a video's frames one by one.

    Args:
        path: a video.
        convert: called with each frame and its decoder; makes uint8 [H, W, C] of it.

    Raises:
        LayoutError: if the file is damaged or has no video.
    """
    with open_container(path) as container:
        stream = video_stream(container, path)
        stream.thread_type = "AUTO"
        decoder, timed = _alpha_decoder(stream), _has_times(container)
        for frame in _frames(container, stream, decoder):
            tick = stream.time_base if decoder else frame.time_base or stream.time_base
            duration = getattr(frame, "duration", 0)  # not in PyAV 14
            yield TimedFrame(
                convert(frame, decoder or stream.codec_context),
                float(frame.pts * tick) if timed and frame.pts is not None and tick else None,
                float(duration * tick) if duration and tick else None,
            )


def _has_times(container: InputContainer) -> bool:
    """Whether frames have times; AVI knows a rate only, and FFmpeg's guesses are out of order."""
    return container.format.name != "avi"


def _frames(container: InputContainer, stream: Any, decoder: Any) -> Iterator[av.VideoFrame]:
    if decoder is None:
        yield from container.decode(stream)
        return
    for packet in container.demux(stream):
        yield from decoder.decode(packet if packet.size else None)


def _alpha_decoder(stream: Any) -> Any:
    """The decoder that knows WebM's transparency, which FFmpeg's own one drops; None for others."""
    import av

    names = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
    name = names.get(stream.codec_context.name)
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if tags.get("alpha_mode") != "1" or name not in av.codecs_available:
        return None
    return av.CodecContext.create(name, "r")


def _pixel_aspect(stream: Any) -> Fraction:
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    return aspect if Fraction(1, 10) <= aspect <= 10 else Fraction(1)


def _tags(container: InputContainer, stream: Any) -> dict[str, str]:
    """When it was recorded, and the timecode of its first frame."""
    places = [stream.metadata, container.metadata, *(data.metadata for data in container.streams)]
    tags = {}
    for name in ("creation_time", "timecode"):
        found = [text for place in places for key, text in place.items() if key.lower() == name]
        if found:
            tags[name] = found[0]
    return tags


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
