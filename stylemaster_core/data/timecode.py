"""Timecodes (SMPTE ST 12-1) and dates that go from a video to what is made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

_TIMECODE = re.compile(r"(\d\d):(\d\d):(\d\d)([:;.])(\d\d)")


def tags_at(
    tags: Mapping[str, str], start_frame: int, source_fps: Fraction, fps: Fraction
) -> dict[str, str]:
    """The tags of a video that begins at a frame of another.

    Args:
        tags: of the source: `creation_time`, `timecode`; others are left as they are.
        start_frame: where it begins.
        source_fps: frames per second of the source.
        fps: of the new video; a timecode counts frames, so at another rate there is none.
    """
    found = dict(tags)
    timecode = found.pop("timecode", None)
    if timecode is not None and source_fps == fps:
        later = later_timecode(timecode, start_frame, fps)
        found |= {} if later is None else {"timecode": later}
    return found


def later_timecode(timecode: str, frames: int, fps: Fraction) -> str | None:
    """The timecode some frames later; None if it is none of this rate.

    Source: SMPTE ST 12-1: drop-frame skips the first 2 (at 60 a second, 4) numbers of every minute
    but each tenth.
    """
    counted = _counted(timecode, fps)
    if counted is None:
        return None
    count, mark, dropped = counted
    rate = round(fps)
    count += frames
    per_ten = 600 * rate - 9 * dropped
    count %= 144 * per_ten  # a day
    tens, rest = divmod(count, per_ten)
    skipped = 0 if rest < 60 * rate else 1 + (rest - 60 * rate) // (60 * rate - dropped)
    count += dropped * (9 * tens + skipped)
    seconds, number = divmod(count, rate)
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{clock}{mark}{number:02}"


def frames_of_timecode(timecode: str, fps: Fraction) -> int | None:
    """How many frames after 00:00:00:00 a timecode is; None if it is none of this rate."""
    counted = _counted(timecode, fps)
    return None if counted is None else counted[0]


def _counted(timecode: str, fps: Fraction) -> tuple[int, str, int] | None:
    """Frames since midnight, the mark before the last number, and how many numbers it drops."""
    match = _TIMECODE.fullmatch(timecode)
    rate = round(fps)
    if match is None or rate < 1 or int(match[5]) >= rate:
        return None
    hours, minutes, seconds, number = (int(match[group]) for group in (1, 2, 3, 5))
    dropped = round(rate / 15) if match[4] != ":" and rate % 30 == 0 else 0
    minutes += 60 * hours
    count = (minutes * 60 + seconds) * rate + number - dropped * (minutes - minutes // 10)
    return count, match[4], dropped
