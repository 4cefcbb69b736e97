"""The sheet of a style grid: which result stands where, under which label."""

from __future__ import annotations

import numpy as np
import pytest

from stylemaster_core import LayoutError
from stylemaster_core.pipelines.pictures import LABEL_PX, contact_sheet, grid_rows
from tests.unit.node_modules import node_module

SIDE = 80


def frame(level: int, height: int = 40, width: int = 40) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def cell(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top = row * (SIDE + LABEL_PX)
    return sheet[top : top + SIDE + LABEL_PX, column * SIDE : (column + 1) * SIDE]


def test_single_frames_stand_by_style_and_strength():
    results = [[frame(40 * n)] for n in range(6)]
    rows = grid_rows(["oil", "ink"], [0.5, 1.0, 1.5], results)
    assert [labels for labels, _ in rows] == [
        ["oil, 0.5", "oil, 1", "oil, 1.5"],
        ["ink, 0.5", "ink, 1", "ink, 1.5"],
    ]
    sheet = contact_sheet(rows, SIDE)
    assert sheet.shape == (2 * (SIDE + LABEL_PX), 3 * SIDE, 3)
    for number in range(6):
        part = cell(sheet, *divmod(number, 3))
        assert (part[LABEL_PX + SIDE // 2, SIDE // 2] == 40 * number).all()
        assert part[:LABEL_PX].min() < 100, "each has a label of its own"


def test_clips_have_a_row_each():
    results = [[frame(n), frame(n + 1)] for n in range(4)]
    rows = grid_rows(["a", "b"], [0.0, 1.0], results)
    assert [label for label, _ in rows] == ["a, 0", "a, 1", "b, 0", "b, 1"]
    assert contact_sheet(rows, SIDE).shape[1] == 2 * SIDE


def test_results_that_do_not_fit_are_refused():
    with pytest.raises(LayoutError, match="3 results came for 2 styles at 2 strengths"):
        grid_rows(["a", "b"], [0.0, 1.0], [[frame(1)]] * 3)


@pytest.mark.parametrize("name", ["x" * 90, "x" * 100_000, "W", ""])
def test_a_long_label_leaves_the_next_cell_alone(name):
    pictures = [frame(255, SIDE, SIDE)] * 2
    sheet = contact_sheet([([f"{name}, 0.5", ""], pictures)], SIDE)
    assert cell(sheet, 0, 1).min() == 255
    assert cell(sheet, 0, 0).min() < 100


@pytest.fixture(scope="module")
def lists():
    with node_module("number_lists") as module:
        yield module


def test_strengths_are_read(lists):
    assert lists.strength_list(" 0.5, 1 ,, 4,0", most=4) == [0.5, 1.0, 4.0, 0.0]
    for text, word in {
        "": "0 were given",
        " , ": "0 were given",
        "1, 2, 3": "3 were given",
        "1; 2": "no number from 0 to 4",
        "-1": "no number from 0 to 4",
        "nan": "no number from 0 to 4",
        "inf": "no number from 0 to 4",
        "4.1": "no number from 0 to 4",
        "1, 1.0": "named twice",
    }.items():
        with pytest.raises(lists.ConfigError, match=word):
            lists.strength_list(text, most=2)
