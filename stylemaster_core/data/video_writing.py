"""Writing videos through PyAV, with their sound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ..errors import ConfigError, LayoutError, UnsupportedHostError
from ..layouts import check_frames
from ..writing import written_beside
from .animations import is_images
from .containers import existing
from .picture_sequences import ANIMATIONS, square_pixels, write_pictures
from .sound import open_sound
from .timing import Timing, as_fps

if TYPE_CHECKING:
    import av
    from av.container import OutputContainer

VIDEO_CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9"}
# Whatever a video can be written as, beside numbered pictures.
WRITTEN_ENDINGS = (*VIDEO_CODECS, *ANIMATIONS)
Codec = Literal["h264", "vp9", "prores", "prores4444"]
_TRANSPARENT = ".webm, .mov (prores4444), .webp, .gif or frames/%05d.png"
# Every common rate divides it, and .mp4 and .mov keep it.
_VARYING_TICK = Fraction(1, 90000)


class _Encoder(NamedTuple):
    """An encoder of FFmpeg, its formats, and the endings that it is written in."""

    name: str
    pix_fmt: str
    alpha_pix_fmt: str | None
    endings: tuple[str, ...]
    options: Mapping[str, str] = {}


_ENCODERS: dict[str, _Encoder] = {
    "h264": _Encoder("libx264", "yuv420p", None, (".mp4", ".mov", ".mkv")),
    "vp9": _Encoder("libvpx-vp9", "yuv420p", "yuva420p", (".webm", ".mkv")),
    "prores": _Encoder("prores_ks", "yuv422p10le", None, (".mov",), {"profile": "hq"}),
    "prores4444": _Encoder(
        "prores_ks", "yuv444p10le", "yuva444p10le", (".mov",), {"profile": "4444"}
    ),
}


def write_video(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],
    *,
    fps: float | Fraction,
    times_s: np.ndarray | None = None,
    pixel_aspect: Fraction = Fraction(1),
    alpha: np.ndarray | None = None,
    tags: Mapping[str, str] | None = None,
    audio_from: str | Path | None = None,
    audio_start_s: float = 0.0,
    codec: Codec | None = None,
    crf: int = 16,
    quality: int = 90,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a video; the ending of `path` decides the container.

    H.264 in .mp4, .mov and .mkv, VP9 in .webm, 4:2:0, BT.709. H.264 cannot halve an odd side's
    colour, so odd sizes are written as 4:4:4, which keeps the size but which some players refuse.
    .gif and .webp are animations, frames/%05d.png numbered pictures in a new folder; one frame may
    be written as .png. The audio is copied where the container takes it, re-encoded where not, and
    ends with the video. Animations and pictures have no audio; numbered pictures have a constant
    rate, at which frames are repeated. They and VP9 have square pixels.

    Args:
        path: the new file.
        frames: uint8 [T, H, W, 3], or an iterable of such chunks.
        fps: frames per second.
        times_s: float64 [T + 1], where each frame begins and the last ends, as in `VideoClip`; None
            for a constant rate.
        pixel_aspect: width of a pixel by its height.
        alpha: uint8 [T, H, W] opacity of the frames; for VP9, ProRes 4444 and pictures; GIF knows
            only on and off.
        tags: `creation_time` and `timecode`, where the container has them.
        audio_from: a file whose first audio stream is added; one without audio adds nothing.
        audio_start_s: where in that file the frames begin, seconds.
        codec: another than the container's usual: prores (422 HQ) or prores4444 in .mov, vp9 in
            .mkv.
        crf: quality of x264 or VP9, 0 (largest) to 51.
        quality: of .webp, 1 to 100 (lossless).
        overwrite: replace an existing file.
        progress: called with the number of frames written so far.

    Raises:
        ConfigError: for an unknown ending, a number out of range, or an existing file.
        LayoutError: if the frames are not uint8 [T, H, W, 3] of one size, there are none, or
            `times_s` or `alpha` do not fit them.
        UnsupportedHostError: if this PyAV lacks the encoder.
        DiskError: if the disk does not take the file.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    clock = _Clock(as_fps(fps), None if times_s is None else _ticks(times_s))
    encoder = None if suffix == ".png" or suffix in ANIMATIONS else _encoder(suffix, codec, alpha)
    if not 0 <= crf <= 51:
        raise ConfigError(f"crf {crf}; expected 0 (largest file) to 51")
    if not 1 <= quality <= 100:
        raise ConfigError(f"quality {quality}; expected 1 to 100")
    chunks = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first = check_frames(next(chunks, np.empty((0, 0, 0, 3), np.uint8)), "the video to write")
    pictures = _with_alpha(_one_by_one(chain([first], chunks), first.shape[1:]), alpha)
    if encoder is None:
        timing = Timing(clock.fps, times_s)
        if codec is not None:
            raise ConfigError(f"codec {codec} is none of {suffix}; leave it out")
        return write_pictures(
            path,
            _squared(pictures, pixel_aspect),
            timing,
            quality=quality,
            overwrite=overwrite,
            progress=progress,
        )
    from av.error import FFmpegError

    if encoder.name != "libx264" and suffix not in (".mp4", ".mov"):
        # PyAV cannot tell Matroska the shape of pixels; H.264 carries it by itself.
        pictures, pixel_aspect = _squared(pictures, pixel_aspect), Fraction(1)
    audio_path = None if audio_from is None else existing(audio_from)
    plan = _Plan(encoder, clock, crf, pixel_aspect, tags or {}, audio_path, audio_start_s)
    with written_beside(path, overwrite=overwrite) as part:
        try:
            _encode(part, pictures, plan, progress)
        except FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise UnsupportedHostError(
                f"{path} could not be written ({error}); try another ending"
            ) from error


def _encoder(suffix: str, codec: str | None, alpha: np.ndarray | None) -> _Encoder:
    """The encoder of an ending; transparency chooses ProRes 4444 in .mov and VP9 in .mkv."""
    if suffix not in VIDEO_CODECS:
        raise ConfigError(f"no video is written as {suffix!r}; use {', '.join(WRITTEN_ENDINGS)}")
    if codec is None:
        codec = "vp9" if suffix == ".webm" else "h264"
        if alpha is not None:
            codec = {".mov": "prores4444", ".mkv": "vp9"}.get(suffix, codec)
    if codec not in _ENCODERS:
        raise ConfigError(f"codec {codec!r}; expected {', '.join(_ENCODERS)}")
    encoder = _ENCODERS[codec]
    if suffix not in encoder.endings:
        raise ConfigError(f"{codec} is written as {', '.join(encoder.endings)}; got {suffix}")
    if alpha is not None and encoder.alpha_pix_fmt is None:
        raise ConfigError(f"{codec} in {suffix} cannot be transparent; use {_TRANSPARENT}")
    return encoder


class _Plan(NamedTuple):
    """How a video is written."""

    encoder: _Encoder
    clock: _Clock
    crf: int
    pixel_aspect: Fraction
    tags: Mapping[str, str]
    audio_from: Path | None
    audio_start_s: float


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
    pictures: Iterator[np.ndarray],
    plan: _Plan,
    progress: Callable[[int], None] | None,
) -> None:
    import av

    suffix, clock = part.suffix.lower(), plan.clock
    first = next(pictures)
    # Matroska would move everything so that a copied packet's lead-in begins at 0.
    options = {"avoid_negative_ts": "disabled"} if suffix == ".mkv" else {}
    with av.open(str(part.absolute()), "w", options=options) as output:
        stream = _video_stream(output, first.shape, plan)
        opened = nullcontext()
        if plan.audio_from is not None and not is_images(plan.audio_from):
            opened = open_sound(output, suffix, plan.audio_from, plan.audio_start_s)
        with opened as sound:
            written, end_s = 0, 0.0
            for pixels in chain([first], pictures):
                picture = _video_frame(pixels, stream.pix_fmt)
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


def _squared(pictures: Iterator[np.ndarray], pixel_aspect: Fraction) -> Iterator[np.ndarray]:
    return (square_pixels(picture, pixel_aspect) for picture in pictures)


def _with_alpha(frames: Iterator[np.ndarray], alpha: np.ndarray | None) -> Iterator[np.ndarray]:
    """Frames with their opacity as a fourth channel."""
    if alpha is None:
        yield from frames
        return
    if alpha.ndim != 3 or alpha.dtype != np.uint8:
        raise LayoutError(f"alpha is {alpha.dtype} {list(alpha.shape)}; expected uint8 [T, H, W]")
    count = 0
    for count, frame in enumerate(frames, 1):
        if count > len(alpha):
            break
        if alpha.shape[1:] != frame.shape[:2]:
            raise LayoutError(
                f"the opacity is {list(alpha.shape[1:])}, the frames {list(frame.shape[:2])} pixels"
            )
        yield np.dstack([frame, alpha[count - 1]])
    if count != len(alpha):
        raise LayoutError(f"the opacity has {len(alpha)} frames, the video another number")


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


def _video_stream(output: OutputContainer, shape: tuple[int, ...], plan: _Plan) -> Any:
    import av

    encoder = plan.encoder
    if encoder.name not in av.codecs_available:
        raise UnsupportedHostError(
            f"this PyAV has no encoder {encoder.name}; install PyAV's own wheel: pip install "
            "--upgrade av"
        )
    height, width, channels = shape
    odd = height % 2 or width % 2
    stream: Any = output.add_stream(encoder.name, rate=plan.clock.fps)
    stream.height, stream.width = height, width
    stream.pix_fmt = encoder.alpha_pix_fmt if channels == 4 else encoder.pix_fmt
    if odd and encoder.name == "libx264":
        stream.pix_fmt = "yuv444p"
    stream.options = dict(encoder.options)
    if encoder.name != "prores_ks":
        # A bit rate of 0 makes VP9 obey the crf.
        stream.bit_rate = 0
        stream.options = {"crf": str(plan.crf)}
    if encoder.name == "libx264" and _has_avx512():
        # Its AVX-512 code makes other bytes of the same frames from time to time.
        stream.options["x264-params"] = "asm=avx2"
    context = stream.codec_context
    context.time_base = plan.clock.time_base
    if plan.pixel_aspect != 1:
        context.sample_aspect_ratio = plan.pixel_aspect
    # Untagged files are guessed to be BT.601 or BT.709 by their size, and colours shift.
    context.colorspace = context.color_primaries = context.color_trc = 1
    context.color_range = 1
    if channels == 4 and encoder.name == "libvpx-vp9":
        stream.metadata["alpha_mode"] = "1"
    if "creation_time" in plan.tags:
        output.metadata["creation_time"] = plan.tags["creation_time"]
    if "timecode" in plan.tags:
        stream.metadata["timecode"] = plan.tags["timecode"]
    return stream


def _has_avx512() -> bool:
    import torch

    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _video_frame(pixels: np.ndarray, pix_fmt: str) -> av.VideoFrame:
    import av

    pixel_format = "rgba" if pixels.shape[-1] == 4 else "rgb24"
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=pixel_format)
    return frame.reformat(format=pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG")
