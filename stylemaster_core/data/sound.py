"""Sound that goes with frames: copied or encoded anew, in place by its timestamps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ..errors import LayoutError
from .containers import open_container

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer

logger = logging.getLogger("stylemaster")

# Sound that players accept inside each container without re-encoding.
KEPT_AUDIO = {
    ".mp4": frozenset({"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"}),
    ".mov": frozenset({"aac", "mp3", "ac3", "eac3", "alac"}),
    ".mkv": frozenset({"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac", "vorbis", "pcm_s16le"}),
    ".webm": frozenset({"opus", "vorbis"}),
}
# What sound is encoded as. QuickTime's PCM knows no gaps: it is written anew, without loss.
_ENCODERS = {".mp4": "aac", ".mov": "aac", ".mkv": "aac", ".webm": "libopus"}
_LOSSLESS = {".mov": frozenset({"pcm_s16le", "pcm_s24le"})}
# Containers round times to milliseconds: smaller steps between frames of sound are no gaps.
_JITTER_S = 0.01


class Sound(NamedTuple):
    """Sound in memory."""

    samples: np.ndarray  # float32 [1 or 2 channels, samples], -1..1
    sample_rate: int


class SoundTrack(Protocol):
    """What fills the sound stream of a file that is being written."""

    def until(self, end_s: float) -> Iterator[Any]:
        """Packets that begin before a time."""
        ...

    def finish(self, end_s: float) -> Iterator[Any]:
        """What is left until the end of the pictures."""
        ...


def read_sound(
    path: str | Path, *, start_s: float = 0.0, end_s: float | None = None
) -> Sound | None:
    """Read the sound of a video.

    Args:
        path: a video.
        start_s: where it begins, seconds from the first picture.
        end_s: where it ends, likewise; None for all of it. Silence fills what the file lacks.

    Returns:
        One or two channels at the file's rate; None if there is no sound.

    Raises:
        LayoutError: if the file cannot be read.
    """
    with open_container(Path(path)) as source:
        if not source.streams.audio:
            return None
        stream = source.streams.audio[0]
        rate = stream.codec_context.sample_rate
        wanted = None if end_s is None else round((end_s - start_s) * rate)
        blocks, count = [], 0
        for block in _steady_blocks(source, stream, start_s):
            blocks.append(block)
            count += block.shape[1]
            if wanted is not None and count >= wanted:
                break
    channels = len(blocks[0]) if blocks else 1
    blocks.append(np.zeros((channels, max((wanted or 0) - count, 0)), np.float32))
    return Sound(np.concatenate(blocks, axis=1)[:, :wanted], rate)


@contextmanager
def open_sound(
    output: OutputContainer, suffix: str, path: Path, start_s: float
) -> Iterator[SoundTrack | None]:
    """Add a sound stream to `output` and open what fills it; None if `path` has no sound.

    Args:
        output: the file that is being written.
        suffix: its ending.
        path: a video or sound file.
        start_s: where in it the pictures begin, seconds from its first picture.
    """
    with open_container(path) as source:
        if not source.streams.audio:
            logger.info("%s has no audio; the video is written without", path)
            yield None
            return
        stream = source.streams.audio[0]
        name = stream.codec_context.name
        # WebM has no times before the start, which hide the rest of a packet that is cut.
        if name in KEPT_AUDIO[suffix] and (start_s == 0 or suffix != ".webm"):
            yield _Copied(source, stream, output.add_stream_from_template(stream), start_s)
            return
        if name in _LOSSLESS.get(suffix, ()):
            yield _Encoded(source, stream, output, name, start_s)
            return
        logger.info("audio of %s (%s) is encoded anew", path, name)
        yield _Encoded(source, stream, output, _ENCODERS[suffix], start_s)


class _Copied:
    """Packets as they are, moved in time."""

    def __init__(self, source: InputContainer, stream: Any, copy: Any, start_s: float) -> None:
        self._packets = _moved_packets(source, stream, copy, start_s)
        self._next = next(self._packets, None)

    def until(self, end_s: float) -> Iterator[Any]:
        while self._next is not None and self._next[0] < end_s:
            yield self._next[1]
            self._next = next(self._packets, None)

    finish = until


def _moved_packets(
    source: InputContainer, stream: Any, copy: Any, start_s: float
) -> Iterator[tuple[float, Any]]:
    offset = round((start_s + _first_picture_s(source)) / stream.time_base)
    for packet in source.demux(stream):
        # The packet before the start stays: codecs need it to wind up. The container hides it.
        if packet.pts is None or packet.pts + (packet.duration or 0) < offset:
            continue
        packet.pts -= offset
        packet.dts = packet.pts if packet.dts is None else packet.dts - offset
        seconds = float(packet.pts * packet.time_base)
        packet.stream = copy
        yield seconds, packet


class _Encoded:
    """Decoded sound, cut and filled with silence to the sample, on its way through an encoder."""

    def __init__(
        self,
        source: InputContainer,
        stream: Any,
        output: OutputContainer,
        name: str,
        start_s: float,
    ) -> None:
        import av

        self._rate = stream.codec_context.sample_rate
        encoder: Any = output.add_stream(name, rate=_encoder_rate(name, self._rate))
        self._encoder, context = encoder, encoder.codec_context
        self._layout = "mono" if stream.codec_context.channels == 1 else "stereo"
        context.layout = self._layout
        self._resampler = av.AudioResampler(context.format, self._layout, context.sample_rate)
        self._blocks = _steady_blocks(source, stream, start_s)
        self._rest = np.zeros((0, 0), np.float32)
        self._taken = 0
        self._written = 0

    def until(self, end_s: float) -> Iterator[Any]:
        while (left := round(end_s * self._rate) - self._taken) > 0:
            if not self._rest.shape[1]:
                block = next(self._blocks, None)
                if block is None:
                    return
                self._rest = block
            block, self._rest = self._rest[:, :left], self._rest[:, left:]
            yield from self._encode(block)

    def finish(self, end_s: float) -> Iterator[Any]:
        yield from self.until(end_s)
        yield from self._push(None)
        yield from self._encoder.encode(None)

    def _encode(self, block: np.ndarray) -> Iterator[Any]:
        import av

        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(block), format="fltp", layout=self._layout
        )
        frame.sample_rate = self._rate
        frame.pts, frame.time_base = self._taken, Fraction(1, self._rate)
        self._taken += block.shape[1]
        yield from self._push(frame)

    def _push(self, frame: Any) -> Iterator[Any]:
        rate = self._encoder.codec_context.sample_rate
        for resampled in self._resampler.resample(frame):
            resampled.pts, resampled.time_base = self._written, Fraction(1, rate)
            self._written += resampled.samples
            yield from self._encoder.encode(resampled)


def _encoder_rate(name: str, rate: int) -> int:
    """The rate that an encoder takes: the same, or the next above, or 48 kHz."""
    import av

    rates = av.Codec(name, "w").audio_rates
    if not rates or rate in rates:
        return rate
    return min((known for known in rates if known > rate), default=48000)


def _first_picture_s(source: InputContainer) -> float:
    """Time of the first picture, from which everything counts; sound may begin before it."""
    for stream in source.streams.video:
        return float((stream.start_time or 0) * (stream.time_base or 0))
    return (source.start_time or 0) / 1e6


def _steady_blocks(source: InputContainer, stream: Any, start_s: float) -> Iterator[np.ndarray]:
    """Decode sound without gaps from the start on: float32 [1 or 2 channels, samples].

    Where the timestamps leave a gap there is silence, where they overlap something is cut.
    """
    rate = stream.codec_context.sample_rate
    done = 0
    for begin, block in _placed_blocks(source, stream, start_s + _first_picture_s(source)):
        while begin > done:
            silence = np.zeros((len(block), min(begin - done, rate)), np.float32)
            done += silence.shape[1]
            yield silence
        block = block[:, done - begin :]
        if block.shape[1]:
            done += block.shape[1]
            yield block


def _placed_blocks(
    source: InputContainer, stream: Any, origin_s: float
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode sound: the place of each block in samples from `origin_s`, and its samples."""
    import av

    context = stream.codec_context
    rate = context.sample_rate
    resampler = av.AudioResampler("fltp", "mono" if context.channels == 1 else "stereo", rate)
    clock: int | None = None  # where the next block begins if there is no gap
    for frame in source.decode(stream):
        if frame.sample_rate != rate:
            raise LayoutError(
                f"the sound changes from {rate} to {frame.sample_rate} samples a second; convert it"
            )
        time_s = frame.time
        begin = (clock or 0) if time_s is None else round((time_s - origin_s) * rate)
        if clock is not None and abs(begin - clock) <= _JITTER_S * rate:
            begin = clock
        for piece in resampler.resample(frame):
            yield begin, piece.to_ndarray()
            begin += piece.samples
        clock = begin
