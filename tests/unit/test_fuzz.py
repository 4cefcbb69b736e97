"""The attacks find a fault that is there, repeat by their seed, and count."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzz import cuts, runner
from tests.fuzz.attack import Endpoint, Kind, require
from tests.fuzz.harm import BYTES, Harm, apply_harms
from tests.fuzz.runner import Budget, run, table


@pytest.fixture(autouse=True)
def database(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "DATABASE", tmp_path / "examples")


def kind(check, strategy=None, **options):
    endpoint = Endpoint(st.integers(0, 1000) if strategy is None else strategy, check)
    return Kind("k", {"e": endpoint}, long_cases=100, **options)


def test_cases_are_counted_and_repeat_by_their_seed(tmp_path):
    played: list[list[int]] = []

    def check(prepared: Path, case: int, folder: Path) -> str:
        require(not list(folder.iterdir()), "the folder is not empty")
        (folder / "x").write_text("")
        played[-1].append(case)
        return "even" if case % 2 == 0 else "odd"

    for number, seed in enumerate((3, 3, 4)):
        played.append([])
        (tally,) = run([kind(check)], Budget(None, seed), tmp_path / str(number), say=str)
        assert tally.cases == 100 and tally.faults == 0
        assert tally.outcomes["even"] == sum(case % 2 == 0 for case in played[-1])
    assert played[0] == played[1] != played[2]
    assert "| k | e | 100 |" in table([tally])


def test_a_fault_is_found_said_and_played_first_the_next_time(tmp_path):
    played, said = [], []

    def check(prepared: Path, case: int, folder: Path) -> str:
        played.append(case)
        return str([0][case > 700])

    (tally,) = run([kind(check)], Budget(None, 0), tmp_path / "a", say=said.append)
    assert tally.faults == 1 and "IndexError" in said[0] and "k/e" in said[0]
    assert played[-1] == 701, "the smallest case"
    played.clear()
    run([kind(check)], Budget(None, 5), tmp_path / "b", say=said.append)
    assert played[0] == 701


def test_small_batches_do_not_play_the_simplest_case_only(tmp_path):
    played: list[int] = []

    def check(prepared: Path, case: int, folder: Path) -> str:
        played.append(case)
        return "fine"

    (tally,) = run([kind(check, batch=1)], Budget(None, 0), tmp_path, say=str)
    assert tally.cases == len(played) == 100
    assert played.count(0) <= 3 and len(set(played)) > 50


def test_time_is_shared_and_others_are_left_out(tmp_path):
    check = kind(lambda prepared, case, folder: "fine")
    assert run([check], Budget(0.0, 0), tmp_path, say=str)[0].cases == 0
    assert run([check], Budget(None, 0), tmp_path, only=["other", "k/f"], say=str) == []
    assert len(run([check], Budget(None, 0), tmp_path, only=["k/e"], say=str)) == 1


def test_every_way_of_damage_changes_a_file(tmp_path):
    for how in BYTES:
        file = tmp_path / how
        file.write_bytes(b"0123456789" * 10)
        (tmp_path / "other").write_bytes(b"other")
        apply_harms([Harm(how, 0.0, 0.5, 3, None, 7)], file)
        assert not file.is_file() or file.read_bytes() != b"0123456789" * 10 or how == "swap"


@pytest.mark.parametrize("kind", cuts.FILES)
def test_cut_videos_are_refused_or_reported(tmp_path, kind):
    """At every tenth place of those that `make fuzz` tries, and at the last ones."""
    whole = cuts.write_whole(tmp_path, kind)
    places = [*range(1, cuts.PLACES, 10), *range(cuts.PLACES - 3, cuts.PLACES + 1)]
    outcomes = {cuts.play_cut(whole, place, tmp_path, kind) for place in places}
    assert "refused" in outcomes
    if kind in ("mkv", "webm"):
        assert "reported" in outcomes
    else:  # a cut between two packets, which depends on the encoder's threads, is reported
        assert outcomes <= {"refused", "reported"}


def test_values_of_json_are_changed(tmp_path):
    file = tmp_path / "a.json"
    for how, expected in (("value", '{"a": [1, "new"]}'), ("drop", '{"a": [1]}')):
        file.write_text('{"a": [1, 2]}')
        apply_harms([Harm(how, 0.0, 1.0, 1, "new", 0)], file)
        assert file.read_text() == expected
