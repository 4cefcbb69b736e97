"""Reading and writing videos through PyAV, and animations and folders of images through Pillow."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageSequence

from ..errors import ConfigError, LayoutError, UnsupportedHostError
from ..layouts import check_frames
from ..writing import written_beside
from .images import read_image, to_rgb, write_image

if TYPE_CHECKING:
    import av
    from av.container import InputContainer, OutputContainer

logger = logging.getLogger("stylemaster")

# What images without a rate of their own play at; Wan's training videos have 16 frames a second.
IMAGES_FPS = Fraction(16)
IMAGE_ENDINGS = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
)
VIDEO_CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9"}
# Audio that players accept inside each container without re-encoding.
KEPT_AUDIO = {
    ".mp4": frozenset({"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"}),
    ".mov": frozenset({"aac", "mp3", "ac3", "eac3", "alac", "pcm_s16le", "pcm_s24le"}),
    ".mkv": frozenset({"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac", "vorbis", "pcm_s16le"}),
    ".webm": frozenset({"opus", "vorbis"}),
}


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, without its pixels.

    Attributes:
        num_frames: as the container counts them; a damaged file may hold fewer.
        height: upright, pixels.
        width: upright, pixels.
        fps: frames per second; the average where the rate varies.
        has_audio: whether `audio_from` of `write_video` would find something.
    """

    num_frames: int
    height: int
    width: int
    fps: Fraction
    has_audio: bool

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return float(self.num_frames / self.fps)


@dataclass(frozen=True)
class VideoClip:
    """A video in memory.

    Attributes:
        frames: uint8 [T, H, W, 3], upright.
        fps: frames per second; the average where the rate varies.
        audio_from: the file whose audio belongs to the frames, for `write_video`; None without.
        start_s: where in that file the frames begin, seconds.
    """

    frames: np.ndarray
    fps: Fraction
    audio_from: Path | None = None
    start_s: float = 0.0


def as_fps(fps: float | Fraction) -> Fraction:
    """Turn a frame rate into an exact fraction (23.976... becomes 24000/1001).

    Raises:
        ConfigError: if it is not between 0.01 and 1000.
    """
    if not 0.01 <= fps <= 1000:
        raise ConfigError(f"{fps} frames per second; expected 0.01 to 1000")
    return Fraction(fps).limit_denominator(1001)


def probe_video(path: str | Path) -> VideoInfo:
    """Look at a video, an animated or still image, or a folder of images.

    Raises:
        LayoutError: if there is nothing that can be decoded.
    """
    path = _existing(path)
    if _is_images(path):
        frames, num_frames, fps = _open_images(path)
        height, width, _ = next(frames).shape
        return VideoInfo(num_frames, height, width, fps, has_audio=False)
    with _open_video(path) as container:
        stream = container.streams.video[0]
        fps, has_audio = _stream_fps(stream, path), bool(container.streams.audio)
        num_frames = stream.frames
        first = next(container.decode(stream), None)
        if first is None:
            raise LayoutError(f"{path} has a video stream without frames; give another video")
        height, width, _ = _upright(first, path).shape
    if not num_frames:
        with _open_video(path) as container:
            num_frames = sum(packet.size > 0 for packet in container.demux(video=0))
    return VideoInfo(num_frames, height, width, fps, has_audio)


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
    if chunk_frames < 1 or start_frame < 0 or (max_frames is not None and max_frames < 1):
        raise ConfigError(
            f"chunk_frames {chunk_frames}, start_frame {start_frame}, max_frames {max_frames}; "
            "expected at least 1, 0 and 1"
        )
    path = _existing(path)
    stop = None if max_frames is None else start_frame + max_frames
    frames = islice(_of_one_size(_decoded(path), path), start_frame, stop)
    empty = True
    while chunk := list(islice(frames, chunk_frames)):
        empty = False
        yield np.stack(chunk)
    if empty:
        raise LayoutError(
            f"{path} has no frame from frame {start_frame} on; choose an earlier start or "
            "another video"
        )


def read_video(
    path: str | Path, *, start_frame: int = 0, max_frames: int | None = None
) -> VideoClip:
    """Read a video into memory; arguments and errors as in `iter_video`."""
    info = probe_video(path)
    chunks = list(iter_video(path, start_frame=start_frame, max_frames=max_frames))
    frames = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    wanted = max(info.num_frames - start_frame, 0)
    wanted = wanted if max_frames is None else min(wanted, max_frames)
    if len(frames) < wanted:
        logger.warning(
            "%s announces %d frames, only %d could be read; the file may be cut short",
            path,
            wanted,
            len(frames),
        )
    audio_from = Path(path) if info.has_audio else None
    return VideoClip(frames, info.fps, audio_from, float(start_frame / info.fps))


def write_video(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],
    *,
    fps: float | Fraction,
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
        audio_from: a file whose first audio stream is added; one without audio adds nothing.
        audio_start_s: where in that file the frames begin, seconds.
        crf: quality of x264 or VP9, 0 (largest) to 51.
        overwrite: replace an existing file.
        progress: called with the number of frames written so far.

    Raises:
        ConfigError: for an unknown ending, a number out of range, or an existing file.
        LayoutError: if the frames are not uint8 [T, H, W, 3] of one size, or there are none.
        UnsupportedHostError: if this PyAV lacks the encoder.
        DiskError: if the disk does not take the file.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    fps = as_fps(fps)
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

    with written_beside(path, overwrite=overwrite) as part:
        try:
            _encode(part, chain([first], chunks), fps, audio_from, audio_start_s, crf, progress)
        except FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise UnsupportedHostError(
                f"{path} could not be written ({error}); try another ending"
            ) from error


def _encode(
    part: Path,
    chunks: Iterable[np.ndarray],
    fps: Fraction,
    audio_from: str | Path | None,
    audio_start_s: float,
    crf: int,
    progress: Callable[[int], None] | None,
) -> None:
    import av

    suffix = part.suffix.lower()
    chunks = iter(chunks)
    first = next(chunks)
    with av.open(str(part), "w") as output:
        stream = _video_stream(output, suffix, first.shape[1:3], fps, crf)
        with _open_audio(output, suffix, audio_from, audio_start_s) as audio:
            pending = next(audio.packets, None)
            written = 0
            for chunk in chain([first], chunks):
                if check_frames(chunk, "the video to write").shape[1:] != first.shape[1:]:
                    raise LayoutError(
                        f"the frames change size from {list(first.shape[1:3])} to "
                        f"{list(chunk.shape[1:3])}; all must be equal"
                    )
                for frame in chunk:
                    output.mux(stream.encode(_video_frame(frame, stream.pix_fmt, written, fps)))
                    written += 1
                    # Audio goes between the video packets, or players must seek to keep in step.
                    while pending is not None and pending[0] < written / fps:
                        output.mux(pending[1])
                        pending = next(audio.packets, None)
                    if progress is not None:
                        progress(written)
            output.mux(stream.encode(None))
            output.mux(audio.flush())


def _video_stream(
    output: OutputContainer, suffix: str, size: tuple[int, ...], fps: Fraction, crf: int
) -> Any:
    import av

    codec = VIDEO_CODECS[suffix]
    if codec not in av.codecs_available:
        raise UnsupportedHostError(
            f"this PyAV has no encoder {codec}; install PyAV's own wheel: pip install --upgrade av"
        )
    odd = size[0] % 2 or size[1] % 2
    stream: Any = output.add_stream(codec, rate=fps)
    stream.height, stream.width = size
    stream.pix_fmt = "yuv444p" if odd and codec == "libx264" else "yuv420p"
    # A bit rate of 0 makes VP9 obey the crf.
    stream.bit_rate = 0
    stream.options = {"crf": str(crf)}
    context = stream.codec_context
    context.time_base = 1 / fps
    # Untagged files are guessed to be BT.601 or BT.709 by their size, and colours shift.
    context.colorspace = context.color_primaries = context.color_trc = 1
    context.color_range = 1
    return stream


def _video_frame(frame: np.ndarray, pix_fmt: str, index: int, fps: Fraction) -> av.VideoFrame:
    import av

    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
        format=pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG"
    )
    picture.pts = index
    picture.time_base = 1 / fps
    return picture


class _Audio(NamedTuple):
    """Audio on its way into a file: (seconds, packets to mux) in order, and what ends it."""

    packets: Iterator[tuple[float, Any]] = iter(())
    flush: Callable[[], list[Any]] = list


@contextmanager
def _open_audio(
    output: OutputContainer, suffix: str, audio_from: str | Path | None, start_s: float
) -> Iterator[_Audio]:
    """Add an audio stream to `output` and open what fills it."""
    path = None if audio_from is None else _existing(audio_from)
    if path is None or _is_images(path):
        yield _Audio()
        return
    import av
    from av.error import FFmpegError

    try:
        source = av.open(str(path))
    except FFmpegError as error:
        raise LayoutError(f"the audio of {path} cannot be read ({error}); try without") from error
    with source:
        if not source.streams.audio:
            logger.info("%s has no audio; the video is written without", path)
            yield _Audio()
            return
        stream = source.streams.audio[0]
        if stream.codec_context.name in KEPT_AUDIO[suffix]:
            copy = output.add_stream_from_template(stream)
            yield _Audio(_copied_audio(source, stream, copy, start_s))
            return
        logger.info("audio of %s (%s) is encoded anew", path, stream.codec_context.name)
        codec = "libopus" if suffix == ".webm" else "aac"
        rate = 48000 if codec == "libopus" else stream.codec_context.sample_rate
        encoder: Any = output.add_stream(codec, rate=rate)
        packets = _encoded_audio(source, stream, encoder, start_s)
        yield _Audio(packets, lambda: encoder.encode(None))


def _copied_audio(
    source: InputContainer, stream: Any, copy: Any, start_s: float
) -> Iterator[tuple[float, Any]]:
    offset = round((start_s + _first_picture_s(source)) / stream.time_base)
    for packet in source.demux(stream):
        # The packet before the start stays: codecs need it to wind up.
        if packet.pts is None or packet.pts + (packet.duration or 0) < offset:
            continue
        packet.pts -= offset
        packet.dts = packet.pts if packet.dts is None else packet.dts - offset
        seconds = float(packet.pts * packet.time_base)
        packet.stream = copy
        yield seconds, packet


def _first_picture_s(source: InputContainer) -> float:
    """Time of the first picture, from which the result counts; audio may begin before it."""
    for stream in source.streams.video:
        return float((stream.start_time or 0) * (stream.time_base or 0))
    return (source.start_time or 0) / 1e6


def _encoded_audio(
    source: InputContainer, stream: Any, encoder: Any, start_s: float
) -> Iterator[tuple[float, Any]]:
    import av

    context = encoder.codec_context
    context.layout = "mono" if stream.codec_context.channels == 1 else "stereo"
    resampler = av.AudioResampler(context.format, context.layout, context.sample_rate)
    offset_s = start_s + _first_picture_s(source)
    samples = 0
    frames = (frame for frame in source.decode(stream) if (frame.time or 0) >= offset_s)
    for frame in frames:
        for resampled in resampler.resample(frame):
            resampled.pts, resampled.time_base = samples, Fraction(1, context.sample_rate)
            samples += resampled.samples
            yield samples / context.sample_rate, encoder.encode(resampled)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise LayoutError(f"there is no file or folder {path}; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise LayoutError(f"the file {path} is empty (0 bytes); give another video")
    return path


def _is_images(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in IMAGE_ENDINGS


def _decoded(path: Path) -> Iterator[np.ndarray]:
    """Decode upright frames, uint8 [H, W, 3], one by one."""
    if _is_images(path):
        yield from _open_images(path)[0]
        return
    with _open_video(path) as container:
        stream = container.streams.video[0]
        _stream_fps(stream, path)
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield _upright(frame, path)


@contextmanager
def _open_video(path: Path) -> Iterator[InputContainer]:
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise LayoutError(f"{path} has no video stream; give a video")
            yield container
    except FFmpegError as error:
        raise LayoutError(
            f"{path} cannot be read as a video ({error}); it may be damaged or of another kind"
        ) from error


def _stream_fps(stream: Any, path: Path) -> Fraction:
    fps = stream.average_rate or stream.guessed_rate or stream.base_rate
    if not fps:
        raise LayoutError(f"{path} does not say its frame rate; convert it to .mp4 first")
    return Fraction(fps)


def _upright(frame: av.VideoFrame, path: Path) -> np.ndarray:
    if frame.rotation % 90:
        raise LayoutError(f"{path} is turned by {frame.rotation} degrees; only quarters are known")
    # rot90 turns counterclockwise, as PyAV counts.
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _of_one_size(frames: Iterator[np.ndarray], path: Path) -> Iterator[np.ndarray]:
    size = None
    for frame in frames:
        size = size or frame.shape
        if frame.shape != size:
            raise LayoutError(
                f"the frames of {path} change size from {list(size[:2])} to "
                f"{list(frame.shape[:2])}; bring them to one size"
            )
        yield frame


def _open_images(path: Path) -> tuple[Iterator[np.ndarray], int, Fraction]:
    """Open a folder of images, or an animated or still image: its frames, their number, fps."""
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS]
        if not files:
            raise LayoutError(f"the folder {path} holds no images; give PNG or JPEG files")
        files.sort(key=_natural_order)
        return (read_image(file) for file in files), len(files), IMAGES_FPS
    first = read_image(path)
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) == 1:
                return iter([first]), 1, IMAGES_FPS
            frames, durations_ms = [], []
            for frame in ImageSequence.Iterator(image):
                frames.append(to_rgb(frame))
                durations_ms.append(float(frame.info.get("duration", 0)))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise LayoutError(f"the animation {path} cannot be read ({error})") from error
    total_ms = sum(durations_ms)
    # Browsers play animations that name no time at 10 frames a second.
    fps = as_fps(1000 * len(frames) / total_ms) if total_ms else Fraction(10)
    return iter(frames), len(frames), fps


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort frame_2 before frame_10."""
    parts = re.findall(r"\d+|\D+", path.name.lower())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
