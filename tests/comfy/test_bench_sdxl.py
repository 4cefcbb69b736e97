"""`python -m bench.sdxl`: what it finds on a small UNet, and options that cannot work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.sdxl import layer_widths, main, unet_config
from stylemaster_core.models.sdxl_file import SDXL
from stylemaster_core.weights.shapes import StyleCrafterSdxlSizes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def report(comfy_checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "report.json"
    command = [sys.executable, "-m", "bench.sdxl", "--comfyui", str(comfy_checkout.path)]
    command += ["--width", "32", "--layers", "1", "--size", "64", "--steps", "1", "--repeat", "1"]
    command += ["--parts", "speed,native memory,ours memory", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for private in (str(ROOT), str(Path.home()), str(comfy_checkout.path), str(out.parent)):
        assert private not in out.read_text()
    return json.loads(out.read_text())


def test_speed(report):
    speed = report["speed"]
    for name in ("native", "ours"):
        assert speed[name]["rows_per_model_call"] == [3]
        assert min(speed[name]["cpu_seconds"]) > 0
    # 16 tokens, for products with K and with V, in one of three branches, in each layer.
    widths = layer_widths(unet_config(32, 1))
    tokens = [16 if width == 64 else 4 for width in widths]
    added = sum(4 * 16 * w * n for w, n in zip(widths, tokens, strict=True))
    found = (speed["ours"]["tflop_per_step"] - speed["native"]["tflop_per_step"]) * 1e12
    assert found == pytest.approx(added)
    assert report["setting"]["cross_attentions"] == len(widths) == 7


def test_memory(report):
    for name in ("native_memory", "ours_memory"):
        assert report[name]["peak_bytes"] >= report[name]["before_bytes"] > 1e8
    assert abs(report["peak_bytes_more"]) < report["goals"]["peak_bytes_more"]


def test_whole_sdxl_is_counted(report):
    whole = report["whole_sdxl_1024"]
    assert 1 < whole["ratio"] < 1.001
    assert whole["tflop_per_step"] == pytest.approx(3 * 6.76, rel=0.01)


def test_layers_of_the_real_unet():
    depths = SDXL["unet"]["transformer_layers_per_block"]
    real = unet_config(320, depths[-1]) | {
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    }
    assert layer_widths(real) == StyleCrafterSdxlSizes().layer_widths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "40"], "multiple of 32"),
        (["--layers", "0"], "at least 1"),
        (["--parts", "sound"], "choose from"),
        (["--out", "no/such/folder/x.json"], "does not exist"),
        (["--comfyui", os.devnull], "comfyui_version.py"),
    ],
)
def test_options_that_cannot_work(options, message, capsys, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATHS", "")  # put back afterwards
    assert main(options) == 2
    assert message in capsys.readouterr().err
