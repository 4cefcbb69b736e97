"""`python -m bench.train`: its report, its options, and what it counts."""

import dataclasses
import json
import platform
from pathlib import Path

import pytest
import torch

from bench.train import count_flop, create, create_batch, main, rows_of, step_of
from bench.workloads import REFERENCE, Setting
from bench.workloads import count_flop as count_forward
from stylemaster_core.training.config import RunConfig

SMALLEST = ["--device", "cpu", "--frames", "5", "--size", "32x16", "--blocks", "1", "--repeat", "1"]
SMALL = Setting(frames=5, width=32, height=16, blocks=2)


def test_report(tmp_path, capsys):
    out = tmp_path / "report.json"
    options = ["--trainers", "motion,global-projection", "--steps", "2", "--out", str(out)]
    assert main([*SMALLEST, *options]) == 0
    report = json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    rows = report["trainers"]
    assert [(r["trainer"], r["kind"]) for r in rows] == [
        ("motion", "clips"),
        ("global-projection", "pairs"),
    ]
    best = report["matmul"][0]["tflop_per_s"]
    for row in rows:
        assert row["status"] == "measured" and row["trained_parameters"] > 0
        assert row["samples_per_s"] == pytest.approx(row["batch"] * 2 / row["seconds"])
        assert row["tflop_per_s"] == pytest.approx(row["tflop_per_sample"] * row["samples_per_s"])
        assert row["utilisation"] == pytest.approx(row["tflop_per_s"] / best)
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 1e8
    assert rows[0]["goal_on_h200"] == 0.5 and rows[1]["goal_on_h200"] is None
    assert rows[0]["frozen_parameters"] > 50e6, "a block of real width"
    assert report["reduced"] and report["reference"]["tokens"] == 32760
    printed = capsys.readouterr().out
    assert "REDUCED SETTING" in printed and "goal on H200" in printed
    for private in (platform.node(), str(Path.home())):
        assert not private or private not in out.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainers", "style,sound"], "choose from"),
        (["--kind", "films"], "choose from"),
        (["--trainers", "motion", "--kind", "images"], "--kind clips"),
        (["--frames", "1"], "5 or more"),
        (["--dtype", "float16"], "float32 or bfloat16"),
        (["--batch", "0"], "at least 1"),
        (["--checkpointing", "-1"], "and 0"),
        (["--steps", "0"], "at least 1"),
        (["--size", "40x48"], "multiples of 16"),
        (["--out", "no/such/folder/x.json"], "does not exist"),
    ],
)
def test_options_that_cannot_work(options, message, capsys):
    assert main([*SMALLEST, *options]) == 2
    assert message in capsys.readouterr().err


def test_rows():
    assert rows_of(["motion", "global-projection"], ["images", "clips"]) == [
        ("motion", "clips"),
        ("global-projection", "pairs"),
    ]
    assert rows_of(["style"], ["images", "clips"]) == [("style", "images"), ("style", "clips")]


def test_flop_of_a_linear_model():
    """The projection: two layers, of which only the second's input needs a gradient."""
    width, hidden, pictures = 1024, 2048, 3  # a pair and one of another style
    one = 2 * width * hidden * pictures
    dot = count_flop("global-projection", SMALL, 4) - 4 * (2 * one + one + 2 * one)
    assert 0 < dot < 4 * one / 50, "what is left are the products of the loss"


@pytest.mark.parametrize(("name", "expected"), [("style", 2.65), ("motion", 2.71)])
def test_frozen_parts_are_counted_as_they_run(name, expected):
    """With every weight trained a step costs three forward passes; with frozen ones, two and the
    share of attention (0.70), which has no weights: the style branch saves most of the first block.
    """
    forward = count_forward("transformer", "plain pass", REFERENCE)
    assert count_flop(name, REFERENCE, 1) / forward == pytest.approx(expected, abs=0.02)
    assert count_flop(name, SMALL, 3) == 3 * count_flop(name, SMALL, 1)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for every in (0, 1):
        torch.manual_seed(0)
        run = RunConfig(checkpoint_blocks=every)
        setting = dataclasses.replace(SMALL, blocks=1)
        trainer = create("motion", setting, "cpu", run)
        batch = create_batch(trainer, setting, 1)
        trainer(batch).mean().backward()
        gradients.append([p.grad for p in trainer.trained().values()])
    torch.testing.assert_close(*gradients)


def test_a_step_trains():
    trainer = create("global-projection", SMALL, "cpu", RunConfig())
    batch = create_batch(trainer, SMALL, 4)
    before = {name: p.detach().clone() for name, p in trainer.trained().items()}
    with torch.no_grad():  # as the clock calls it
        step_of(trainer, batch, torch.device("cpu"), 1)()
    assert not any(torch.equal(p, before[name]) for name, p in trainer.trained().items())
