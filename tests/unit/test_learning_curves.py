"""`python -m bench.learning_curves`: what it writes, and what the numbers in the repository say."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bench import learning_curves

RESULTS = Path(learning_curves.__file__).parent / "results" / "learning_curves.json"
MARGINS = {  # of the loss at the end: below its start, and below every ablation
    "base": (0.8, 0.95),
    "style": (0.85, 0.9),
    "control": (0.85, 0.9),
    "motion": (0.98, 0.985),
    "global projection, triplet": (0.8, 0.8),
    "global projection, InfoNCE": (0.8, 0.8),
}


def test_it_writes_numbers_and_a_drawing(tmp_path, capsys, monkeypatch):
    for name, few in {"SAMPLES": 16, "HELD_OUT": 3, "PAIRS": 9}.items():
        monkeypatch.setattr(learning_curves, name, few)
    out = tmp_path / "curves.json"
    assert learning_curves.main(["--steps", "1", "--base-steps", "1", "--out", str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.json", "curves.png"]
    report = json.loads(out.read_text())
    assert set(report["curves"]) == {*MARGINS, "base, from which the others start"}
    for curves in report["curves"].values():
        assert all([step for step, _ in curve] == [0, 1] for curve in curves.values())
        starts = [curve[0][1] for curve in curves.values()]
        assert starts == pytest.approx([starts[0]] * len(starts)), "all begin alike"
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (920, 1200) and len(set(image.convert("L").tobytes())) > 10
    assert learning_curves.main(["--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("name", MARGINS)
def test_the_numbers_in_the_repository(name):
    curves = json.loads(RESULTS.read_text())["curves"][name]
    trained, *ablations = curves.values()
    below_start, below_ablation = MARGINS[name]
    end = trained[-1][1]
    assert ablations and end < below_start * trained[0][1]
    assert all(end < below_ablation * curve[-1][1] for curve in ablations)
