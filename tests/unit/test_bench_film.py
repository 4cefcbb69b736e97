"""`python -m bench.film`: its films, what its numbers mean, and its report."""

import itertools
import json
import math

import numpy as np
import pytest

from bench import film
from bench.drawn_film import FPS, DrawnFilm, cuts_by_chance
from stylemaster_core.data.shots import CutFinder

TOY = ["--short-s", "3", "--long-s", "6", "--size", "48x32", "--small", "48x32", "--steps", "1"]
TOY += ["--window", "9", "--window-overlap", "4", "--kills", "1"]


def test_a_drawn_film_has_its_cuts_and_comes_round():
    drawn = DrawnFilm(30, 32, 48, cuts=(13,), period=15, seed=2)
    frames = list(drawn.frames())
    assert len(frames) == 30 and frames[0].shape == (32, 48, 3)
    changes = [np.abs(b.astype(int) - a).mean() for a, b in itertools.pairwise(frames)]
    assert np.argmax(changes) == 12
    assert np.array_equal(frames[13], frames[28])  # of the second shot, a period later
    again = DrawnFilm(30, 32, 48, cuts=(13,), period=15, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(frames, again.frames(), strict=True))


def test_every_third_shot_stays_where_the_one_before_was():
    frames = list(DrawnFilm(40, 32, 48, cuts=(10, 20, 30)).frames())
    means = [np.median(frames[i], (0, 1)) for i in (0, 10, 20, 30)]
    distances = [np.abs(a - b).max() for a, b in itertools.pairwise(means)]
    assert distances[1] < min(distances[0], distances[2]) / 2


def test_cuts_by_chance_leave_no_shot_too_short():
    cuts = cuts_by_chance(600 * FPS, 1)
    lengths = np.diff([0, *cuts, 600 * FPS])
    assert lengths.min() >= 2 * FPS and lengths.max() <= 22 * FPS and len(cuts) > 40
    assert cuts_by_chance(600 * FPS, 1) == cuts != cuts_by_chance(600 * FPS, 2)


def test_cuts_of_a_film_without_motion_are_found_to_the_frame():
    stills = [np.full((32, 48, 3), tone, np.uint8) for tone in (30, 90, 200)]
    finder = CutFinder(FPS)
    assert len(list(finder.watch(still for still in stills for _ in range(12)))) == 36
    assert finder.cuts == [12, 24]


def jumping(place):
    """A striped picture that is another one from a frame on."""
    x = np.arange(64)
    before, after = (np.sin(2 * math.pi * x / period) * 90 + 128 for period in (6, 9))
    rows = [before if index < place else after for index in range(24)]
    return noisy(np.stack(rows)[:, None, :, None])


def noisy(tones):
    """Clips are never quite still."""
    noise = np.random.default_rng(0).uniform(0, 2, (24, 32, 64, 3))
    return (tones + noise).astype(np.uint8)


@pytest.mark.parametrize(("borders", "seen"), [((12,), True), ((8,), False)])
def test_a_seam_is_seen_where_it_is_alone(borders, seen):
    clip = jumping(12)
    ratios = film.seam_ratios(clip, np.zeros_like(clip), borders, [0])
    assert (ratios["warp"] > 5) == (ratios["texture"] > 2) == seen


def test_frames_that_begin_a_latent_are_compared_with_their_like():
    """A clip that jumps at 1, 5, 9, ...: a seam at 13 is like the others, and not like the rest."""
    tones = np.cumsum([20 if index % 4 == 1 else 1 for index in range(24)])
    clip = noisy(tones[:, None, None, None])
    ratios = film.seam_ratios(clip, np.zeros_like(clip), (13,), [0])
    assert ratios["warp"] > 2 and ratios["warp_alike"] == pytest.approx(1, abs=0.02)


def test_parts_are_measured_one_by_one_into_one_report(tmp_path, monkeypatch, capsys):
    docs, out = tmp_path / "films.md", tmp_path / "film.json"
    docs.write_text(f"before\n{film.BEGIN}\nold\n{film.END}\nafter\n")
    monkeypatch.setattr(film, "DOCS", docs)
    words = [*TOY, "--out", str(out)]
    assert film.main([*words, "--only", "cuts", "seams"]) == 0
    seams = json.loads(out.read_text())["parts"]["seams"]
    assert seams["segments"] > 2 and seams["seams"]["drawn"]["warp"] < 3
    assert film.main([*words, "--only", "memory", "kills", "--write"]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == ["cuts", "seams", "memory", "kills"] and parts["seams"] == seams
    assert [run["frames"] for run in parts["memory"]["runs"]] == [18, 36]
    assert parts["kills"]["equal"] == parts["kills"]["films"] == len(parts["kills"]["kills"]) == 1
    text = docs.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| films equal bit for bit after 1 kills and --resume | 1 of 1 | all |" in text
    capsys.readouterr()
    out.write_text('{"format": "another"}')
    assert film.main(words) == 2
    assert "is no report of bench.film" in capsys.readouterr().err
