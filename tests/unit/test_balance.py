"""`python -m bench.balance`: what it measures, at the smallest size."""

import json

import numpy as np
import pytest
import torch

from bench.balance import (
    MEASURES,
    OFF,
    PREDICTED,
    change,
    main,
    spread,
)


def test_spread_tells_styles_from_prompts():
    styles = torch.tensor([0.5, 1.5]).view(1, 2, 1).expand(3, 2, 4)
    found = spread(styles)
    assert found["std_over_styles"] > 0.5 and found["std_over_prompts"] == 0
    found = spread(styles.transpose(0, 1))
    assert found["std_over_prompts"] > 0.5 and found["std_over_styles"] == 0
    assert found["mean"] == 1.0 and found["mean_of_layers"] == [1.0] * 4


def test_change_says_when_it_goes_the_papers_way():
    on = {name: np.linspace(0.5, 1, 16) for name in MEASURES}
    nearer = {name: values * (1.1 if name == "similarity" else 0.9) for name, values in on.items()}
    found = change(on, nearer, control=True)
    assert [c["as_in_paper"] for c in found.values()] == [True] * 5
    assert found["colour"]["low"] < found["colour"]["mean"] == pytest.approx(-0.075)
    found = change(nearer, on, control=False)
    assert "luma_to_content" not in found
    assert [c["as_in_paper"] for c in found.values()] == [False] * 4


def test_change_that_may_be_chance_is_not_called_one():
    noise = np.random.default_rng(1).standard_normal(16)
    on = {name: np.zeros(16) for name in MEASURES}
    found = change(on, {name: noise - noise.mean() + 0.01 for name in on}, control=True)
    assert [c["as_in_paper"] for c in found.values()] == [None] * 5


def test_report(tmp_path):
    out = tmp_path / "report.json"
    assert main(["--num", "2", "--steps", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert len(report["scales"]["mean_of_layers"]) == 6
    assert 0 <= report["scales"]["lowest"] <= report["scales"]["highest"] <= 2
    for name in ("with_control", "without_control"):
        found = report[name]
        assert found["no style"]["luma_to_no_style"] == pytest.approx(1)
        switched = found["switched_off"]["colour"]
        assert switched["mean"] == pytest.approx(found[OFF]["colour"] - found[PREDICTED]["colour"])
        assert switched["low"] <= switched["mean"] <= switched["high"]


def test_options_that_cannot_work(tmp_path, capsys):
    assert main(["--num", "1"]) == 2
    assert "at least two styles" in capsys.readouterr().err
    assert main(["--weights", str(tmp_path)]) == 2
    assert "stylecrafter_adapter.safetensors" in capsys.readouterr().err
