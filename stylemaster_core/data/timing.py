"""When frames are shown: frame rates, times that vary, and resampling in time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError

# What images without a rate of their own play at; Wan's training videos have 16 frames a second.
IMAGES_FPS = Fraction(16)
# Browsers play animations that name no time at 10 frames a second.
UNTIMED_FPS = Fraction(10)
# Rates that recorders mean when they come near them.
COMMON_FPS = (
    *(Fraction(rate) for rate in (8, 10, 12, 15, 16, 20, 24, 25, 30, 48, 50, 60, 100, 120)),
    *(Fraction(rate * 1000, 1001) for rate in (24, 30, 60)),
)


class TimedFrame(NamedTuple):
    """A decoded frame and when it is shown."""

    pixels: np.ndarray  # uint8 [H, W, 3], or [H, W, 4] with its opacity
    start_s: float | None  # by the file's clock; None where the file does not say
    duration_s: float | None  # None where the file does not say


class Timing(NamedTuple):
    """When the frames of a video are shown.

    Attributes:
        fps: frames per second; the average where the rate varies.
        times_s: float64 [T + 1], where each frame begins and the last ends, seconds from the first
            frame; None where the rate is constant.
    """

    fps: Fraction
    times_s: np.ndarray | None = None


def as_fps(fps: float | Fraction) -> Fraction:
    """Turn a frame rate into an exact fraction (23.976... becomes 24000/1001).

    Raises:
        ConfigError: if it is not between 0.01 and 1000.
    """
    if not 0.01 <= fps <= 1000:
        raise ConfigError(f"{fps} frames per second; expected 0.01 to 1000")
    return Fraction(fps).limit_denominator(1001)


def timing_of(
    starts_s: list[float], last_duration_s: float | None, rates: Iterable[Fraction], tick_s: float
) -> Timing:
    """Find out whether frames come at a constant rate.

    Args:
        starts_s: when each frame begins, in order, by any clock.
        last_duration_s: how long the last one is shown; None if unknown.
        rates: the rates that the file names; at least one.
        tick_s: to what the file rounds its times; a rate is constant if no frame is off by more.
    """
    rates = list(rates)
    starts = np.asarray(starts_s, np.float64)
    starts = starts - starts[0]
    if len(starts) == 1:
        usual_s = 1 / float(rates[0])
        duration_s = last_duration_s or usual_s
        if abs(duration_s - usual_s) < usual_s:
            return Timing(rates[0])
        return Timing(as_fps(1 / duration_s))
    if (np.diff(starts) <= 0).any():
        return Timing(rates[0])  # no times of frames in order
    last_s = last_duration_s or float(np.median(np.diff(starts)))
    fitted = Fraction((len(starts) - 1) / starts[-1]).limit_denominator(1001)
    rates += [_common(fitted, 0.01), fitted]
    index = np.arange(len(starts))
    # Matroska rounds rates, too.
    for fps in (_common(rate, 1e-5) for rate in rates if rate > 0):
        even = np.abs(starts - index / float(fps)).max() <= max(tick_s, 1e-3) * 1.01
        if even and abs(last_s - 1 / fps) <= max(1 / fps, 2 * tick_s):
            return Timing(fps)
    times_s = np.append(starts, starts[-1] + last_s)
    return Timing(Fraction(len(starts) / times_s[-1]).limit_denominator(100000), times_s)


def steady_fps(times_s: np.ndarray) -> Fraction:
    """The constant rate that shows frames of varying times best: that of most of them.

    Args:
        times_s: float64 [T + 1], as in `Timing`.
    """
    return _common(as_fps(1 / max(usual_gap_s(Timing(IMAGES_FPS, times_s)), 1 / 120)), 0.03)


def _common(fps: Fraction, tolerance: float) -> Fraction:
    """The common rate next to this one, if there is one so near."""
    nearest = min(COMMON_FPS, key=lambda common: abs(common / fps - 1))
    return nearest if abs(nearest / fps - 1) < tolerance else fps


def usual_gap_s(timing: Timing) -> float:
    """How long most of the frames are shown, seconds."""
    if timing.times_s is None:
        return 1 / float(timing.fps)
    gaps_s = np.diff(timing.times_s)
    usual_s = np.median(gaps_s)
    return float(gaps_s[np.abs(gaps_s - usual_s) <= usual_s / 4].mean())


def pick_at_rate(timing: Timing, num_frames: int, fps: Fraction) -> np.ndarray:
    """Which frame is shown at the time of each frame of a constant rate, from first to last.

    Where frames are half of the shorter of both durations late or early, they still count.

    Args:
        timing: of the frames.
        num_frames: how many there are.
        fps: frames per second of the constant rate.

    Returns:
        int64 indices below `num_frames`, at least one; frames are repeated or left out.
    """
    times_s = timing.times_s
    if times_s is None:
        times_s = np.arange(num_frames + 1) / float(timing.fps)
    step_s, late_s = 1 / float(fps), _late_s(fps, usual_gap_s(timing))
    count = max(int(np.ceil((times_s[-1] - late_s) / step_s)), 1)
    return np.searchsorted(times_s[1:-1], np.arange(count) * step_s + late_s, side="right")


def at_rate(
    frames: Iterable[TimedFrame], fps: Fraction, *, gap_s: float, duration_s: float = 0.0
) -> Iterator[TimedFrame]:
    """Repeat and leave out frames as `pick_at_rate` does, while they are being read.

    Args:
        frames: in order; those without a time follow the one before by its duration.
        fps: frames per second.
        gap_s: how long most of the frames are shown.
        duration_s: how long the last one is shown at least, seconds from the first.
    """
    step_s, late_s = 1 / float(fps), _late_s(fps, gap_s)
    written = 0
    for frame, end_s, is_last in _with_ends(frames):
        end_s = max(end_s, duration_s) if is_last else end_s
        while written * step_s + late_s < end_s or (is_last and not written):
            yield TimedFrame(frame.pixels, written * step_s, step_s)
            written += 1


def _late_s(fps: Fraction, gap_s: float) -> float:
    # A little more than half, against rounding.
    return 0.50001 * min(1 / float(fps), gap_s)


def _with_ends(frames: Iterable[TimedFrame]) -> Iterator[tuple[TimedFrame, float, bool]]:
    """Each frame, where it ends in seconds from the first, and whether it is the last."""
    origin_s, usual_s = 0.0, 1 / float(IMAGES_FPS)
    held: tuple[TimedFrame, float] | None = None
    for frame in frames:
        if held is None:
            origin_s = frame.start_s or 0.0
            held = frame, 0.0
            continue
        before, before_s = held
        usual_s = before.duration_s or usual_s
        start_s = before_s + usual_s if frame.start_s is None else frame.start_s - origin_s
        usual_s = start_s - before_s
        yield before, start_s, False
        held = frame, start_s
    if held is not None:
        frame, start_s = held
        yield frame, start_s + (frame.duration_s or usual_s), True
