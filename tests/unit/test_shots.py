"""Cuts: found in pictures, read from lists."""

import builtins
from fractions import Fraction

import numpy as np
import pytest

from stylemaster_core.data.demo_scene import demo_clip
from stylemaster_core.data.shots import CutFinder, read_cuts
from stylemaster_core.errors import ConfigError, LayoutError, UnsupportedHostError


def looks(num_frames):
    clip = demo_clip(num_frames, 48, 64)
    return [clip, 255 - clip, clip[:, :, ::-1], np.roll(clip, 1, axis=3)]


def test_cuts_are_found_where_they_are():
    pytest.importorskip("scenedetect")
    lengths = [20, 17, 31, 12]
    film = np.concatenate([look[:n] for look, n in zip(looks(31), lengths, strict=True)])
    finder = CutFinder(Fraction(24))
    assert np.array_equal(np.stack(list(finder.watch(film))), film)
    assert finder.cuts == [20, 37, 68]


def test_a_moving_shot_has_no_cut():
    pytest.importorskip("scenedetect")
    finder = CutFinder(Fraction(24))
    list(finder.watch(demo_clip(60, 48, 64)))
    assert finder.cuts == []


def test_without_the_library_the_refusal_says_how_to_get_it(monkeypatch):
    inner = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("scenedetect"):
            raise ImportError(name)
        return inner(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedHostError, match=r"pip install 'stylemaster\[shots\]'.*one shot"):
        CutFinder(Fraction(24))


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("frame\n0\n30\n75\n", [30, 75]),
        ("shot,Frame\n1,75\n2,30\n", [30, 75]),
        ("time\n0\n1.25\n00:00:03\n1:00.5\n", [30, 72, 1452]),
        ("frame\n", []),
    ],
)
def test_csv(tmp_path, text, cuts):
    assert read_cuts(write(tmp_path, "shots.csv", text), fps=Fraction(24)) == cuts


def test_times_of_frames_that_vary(tmp_path):
    times_s = np.array([0, 0.1, 0.5, 0.6, 1.0, 1.1])
    path = write(tmp_path, "shots.csv", "time\n0.5\n0.98\n")
    assert read_cuts(path, fps=Fraction(5), times_s=times_s) == [2, 4]


EDL = """TITLE: a film
FCM: NON-DROP FRAME

001  AX       V     C        00:00:00:00 00:00:02:00 01:00:00:00 01:00:02:00
* FROM CLIP NAME: one.mov
002  AX       A     C        00:00:00:00 00:00:04:00 01:00:01:00 01:00:05:00
003  BX       V     C        00:00:10:00 00:00:10:00 01:00:02:00 01:00:02:00
003  BX       V     D    012 00:00:10:00 00:00:12:00 01:00:02:00 01:00:04:00
004  CX       B     W001 010 00:00:00:00 00:00:01:00 01:00:04:12 01:00:05:12
"""


def test_edl(tmp_path):
    assert read_cuts(write(tmp_path, "a.edl", EDL), fps=Fraction(24)) == [48, 108]


def test_edl_that_drops_frames(tmp_path):
    text = (
        "001  AX  V  C  00:00:00;00 00:01:00;02 00:00:00;00 00:01:00;02\n"
        "002  AX  V  C  00:00:00;00 00:00:01;00 00:01:00;02 00:01:01;02\n"
    )
    assert read_cuts(write(tmp_path, "a.edl", text), fps=Fraction(30000, 1001)) == [1800]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "frame\n0\nten\n", "line 3: 'ten' is no frame"),
        ("a.csv", "frame\n-4\n", "line 2"),
        ("a.csv", "time\nnan\n", "line 2"),
        ("a.csv", "start,end\n0,4\n", "expected one of them to be `frame`"),
        ("a.csv", "", "`frame`"),
        ("a.edl", "001  AX  V  C  00:00:00:00 00:00:02:00\n", "line 1: no event"),
        ("a.edl", EDL.replace("01:00:04:12", "01:00:04:24"), "no timecode at 24 frames"),
        ("a.edl", "TITLE: nothing\n", "no event with pictures"),
    ],
)
def test_lists_that_mean_nothing_are_refused(tmp_path, name, text, reason):
    with pytest.raises(LayoutError, match=reason):
        read_cuts(write(tmp_path, name, text), fps=Fraction(24))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(LayoutError, match="cannot be read"):
        read_cuts(tmp_path / "none.csv", fps=Fraction(24))
    with pytest.raises(ConfigError, match=r"\.csv or an \.edl"):
        read_cuts(write(tmp_path, "shots.txt", ""), fps=Fraction(24))
