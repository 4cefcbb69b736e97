"""Where the shots of a film begin: found in its pictures, or read from a list of an editor."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..errors import ConfigError, LayoutError, UnsupportedHostError
from .timecode import frames_of_timecode

DETECTED_PX = 256  # the longer side of what is looked at
SHORTEST_S = 0.5  # of a shot that is found
_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)")
# An event of CMX 3600: number, reel, track, kind of transition and its frames, four timecodes.
_TIME = r"(\d\d[:;]\d\d[:;]\d\d[:;.]\d\d)"
_EVENT = re.compile(
    rf"^(\d+)\s+\S+\s+(\S+)\s+(?:C|[DKW]\S*(?:\s+\S+)*?)\s+{_TIME}\s+{_TIME}\s+{_TIME}\s+{_TIME}"
)


class CutFinder:
    """Finds hard cuts in the frames that pass by.

    Attributes:
        cuts: the first frame of each shot but the first one, once all frames have passed.

    Source: PySceneDetect's AdaptiveDetector, with its thresholds.
    """

    def __init__(self, fps: Fraction) -> None:
        """Make the detector.

        Args:
            fps: frames per second.

        Raises:
            UnsupportedHostError: without PySceneDetect.
        """
        try:
            from scenedetect import FrameTimecode
            from scenedetect.detectors import AdaptiveDetector
        except ImportError as error:
            raise UnsupportedHostError(
                "cuts are found by PySceneDetect, which is not installed: pip install "
                "'stylemaster[shots]' (that is scenedetect-headless), or name the shots in a "
                "list, or say that the film is one shot"
            ) from error
        self.cuts: list[int] = []
        self._fps, self._time = float(fps), FrameTimecode
        self._detector = AdaptiveDetector(min_scene_len=max(round(SHORTEST_S * fps), 2))

    def watch(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Let frames, uint8 [H, W, 3], pass by."""
        for index, frame in enumerate(frames):
            every = -(-max(frame.shape[:2]) // DETECTED_PX)
            small = np.ascontiguousarray(frame[::every, ::every, 2::-1])
            found = self._detector.process_frame(self._time(index, self._fps), small)
            self.cuts += [time.frame_num for time in found]
            yield frame


def read_cuts(path: Path, *, fps: Fraction, times_s: np.ndarray | None = None) -> list[int]:
    """Read where shots begin.

    Args:
        path: a CMX 3600 list (.edl), whose times are those of the record side; or a .csv whose
            first line names a column `frame` (from 0) or `time` (seconds, or
            hours:minutes:seconds), one line a shot.
        fps: frames per second of the film.
        times_s: float64 [T + 1], where each frame begins, seconds; None for a constant rate.

    Returns:
        Frames, ascending, without 0.

    Raises:
        LayoutError: if the file is missing or holds something else, naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LayoutError(f"the list of shots {path} cannot be read: {error}") from error
    if path.suffix.lower() == ".edl":
        cuts = _cuts_of_edl(path, lines, fps)
    elif path.suffix.lower() == ".csv":
        cuts = _cuts_of_csv(path, lines, fps, times_s)
    else:
        raise ConfigError(f"a list of shots is a .csv or an .edl; got {path.name!r}")
    return sorted(set(cuts) - {0})


def _cuts_of_csv(
    path: Path, lines: list[str], fps: Fraction, times_s: np.ndarray | None
) -> list[int]:
    rows = csv.DictReader(lines)
    names = [name.strip().lower() for name in rows.fieldnames or ()]
    rows.fieldnames = names
    column = next((name for name in ("frame", "time") if name in names), None)
    if column is None:
        raise LayoutError(
            f"{path}: the first line names the columns {names}; expected one of them to be `frame` "
            "(from 0) or `time` (seconds, or hours:minutes:seconds)"
        )
    cuts = []
    for row in rows:
        text = (row[column] or "").strip()
        if column == "frame" and text.isdecimal():
            cuts.append(int(text))
        elif column == "time" and (clock := _CLOCK.fullmatch(text)):
            hours, minutes, seconds = (float(part or 0) for part in clock.groups())
            cuts.append(_frame_at(hours * 3600 + minutes * 60 + seconds, fps, times_s))
        else:
            raise LayoutError(f"{path}, line {rows.line_num}: {text!r} is no {column} of a shot")
    return cuts


def _frame_at(time_s: float, fps: Fraction, times_s: np.ndarray | None) -> int:
    if times_s is None or time_s >= times_s[-1]:
        return round(time_s * fps)
    return int(np.abs(times_s[:-1] - time_s).argmin())


def _cuts_of_edl(path: Path, lines: list[str], fps: Fraction) -> list[int]:
    starts = []
    for number, line in enumerate(lines, 1):
        event = _EVENT.match(line.strip())
        if event is None:
            if re.match(r"\d+\s+\S+\s+(V|B)", line.strip()):
                raise LayoutError(f"{path}, line {number}: no event of CMX 3600: {line.strip()!r}")
            continue
        if not event[2].startswith(("V", "B")):  # sound only
            continue
        start = frames_of_timecode(event[5], fps)
        if start is None:
            raise LayoutError(
                f"{path}, line {number}: {event[5]} is no timecode at {float(fps):g} frames "
                "a second"
            )
        starts.append(start)
    if not starts:
        raise LayoutError(f"{path} holds no event with pictures; expected a CMX 3600 list")
    return [start - min(starts) for start in starts]
