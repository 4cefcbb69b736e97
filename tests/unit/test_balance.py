"""`python -m bench.balance`: what it measures, at the smallest size."""

import json

import pytest
import torch

from bench.balance import OFF, PREDICTED, direction, main, spread


def test_spread_tells_styles_from_prompts():
    styles = torch.tensor([0.5, 1.5]).view(1, 2, 1).expand(3, 2, 4)
    found = spread(styles)
    assert found["std_over_styles"] > 0.5 and found["std_over_prompts"] == 0
    found = spread(styles.transpose(0, 1))
    assert found["std_over_prompts"] > 0.5 and found["std_over_styles"] == 0
    assert found["mean"] == 1.0 and found["mean_of_layers"] == [1.0] * 4


def test_direction_is_the_papers():
    on = {"colour": 0.2, "gabor": 1.0, "retrieval": 0.5, "luma_to_content": 0.9}
    on["luma_to_no_style"] = 0.9
    off = {key: value * (1.1 if key == "retrieval" else 0.9) for key, value in on.items()}
    found = direction(on, off, control=True)
    assert all(found["more_style"].values()) and all(found["less_text"].values())
    found = direction(off, on, control=False)
    assert not any(found["more_style"].values()) and found["less_text"] == {
        "luma_to_no_style": False
    }


def test_report(tmp_path):
    out = tmp_path / "report.json"
    assert main(["--num", "2", "--steps", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert len(report["scales"]["mean_of_layers"]) == 6
    assert 0 <= report["scales"]["lowest"] <= report["scales"]["highest"] <= 2
    for name in ("with_control", "without_control"):
        found = report[name]
        assert found["no style"]["luma_to_no_style"] == pytest.approx(1)
        change = found["switched_off"]["change"]["colour"]
        assert change == found[OFF]["colour"] - found[PREDICTED]["colour"]


def test_options_that_cannot_work(tmp_path, capsys):
    assert main(["--num", "1"]) == 2
    assert "at least two styles" in capsys.readouterr().err
    assert main(["--weights", str(tmp_path)]) == 2
    assert "stylecrafter_adapter.safetensors" in capsys.readouterr().err
