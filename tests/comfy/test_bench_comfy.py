"""`python -m bench.comfy`: what it finds on small models, and options that cannot work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.comfy import main, measure_server, write_server_models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def report(comfy_checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "report.json"
    command = [sys.executable, "-m", "bench.comfy", "--comfyui", str(comfy_checkout.path)]
    command += ["--width", "256", "--blocks", "2", "--frames", "5", "--size", "64x48"]
    command += ["--steps", "2", "--repeat", "2", "--parts", "speed,costs", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "ratio of FLOP" in done.stdout and "ControlNet calls" in done.stdout
    for private in (str(ROOT), str(Path.home()), str(comfy_checkout.path), str(out.parent)):
        assert private not in out.read_text()
    return json.loads(out.read_text())


def test_speed(report):
    speed = report["speed"]
    assert report["setting"]["tokens"] == 24
    # Per block: 16 tokens of width 256, for products with K and with V, in each of three branches.
    added = (speed["ours"]["tflop_per_step"] - speed["native"]["tflop_per_step"]) * 1e12
    assert added == pytest.approx(2 * 3 * 4 * 16 * 256 * report["setting"]["tokens"])
    assert 1 < speed["flop_ratio"] < report["goal_seconds_ratio"]
    for name in ("native", "ours"):
        assert speed[name]["rows_per_model_call"] == [3]
        assert len(speed[name]["seconds"]) == len(speed[name]["cpu_seconds"]) == 4
        assert min(speed[name]["seconds"]) > 0
    assert speed["dtype"] == "float32"


def test_style_is_made_once_and_the_adapter_let_go(report):
    found = report["costs"]["apply_style"]
    values = 2 * (2 * 16 * 256 + 256)  # K, V and "no style" of two blocks, in bfloat16
    assert found["kept_bytes"] == 2 * values + 4 * 16 * 4096
    assert found["projections_freed"]


def test_control_and_interrupt(report):
    control, interrupt = report["costs"]["control"], report["costs"]["interrupt"]
    assert control["rows_per_network_call"] == [1] * control["steps"]
    assert interrupt["steps_begun_after_request"] == 0


def test_server(comfy_server, comfy_models):
    write_server_models(comfy_models)
    found = measure_server(comfy_server)
    assert set(found["rerun_nodes"]) == {"sampler", "decode", "crop", "preview"}
    assert {"style encoder", "apply style", "control"} <= set(found["cached_nodes"])
    assert found["interrupt"]["steps_done_at_end"] < found["interrupt"]["steps_asked_for"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "4"], "4n+1"),
        (["--size", "40x48"], "multiples of 16"),
        (["--size", "wide"], "WxH"),
        (["--repeat", "0"], "at least 1"),
        (["--parts", "sound"], "choose from"),
        (["--out", "no/such/folder/x.json"], "does not exist"),
        (["--comfyui", os.devnull], "comfyui_version.py"),
    ],
)
def test_options_that_cannot_work(options, message, capsys, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATHS", "")  # put back afterwards
    assert main(options) == 2
    assert message in capsys.readouterr().err


def test_an_existing_file_is_kept(tmp_path, capsys):
    out = tmp_path / "report.json"
    out.write_text("kept")
    assert main(["--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err and out.read_text() == "kept"
