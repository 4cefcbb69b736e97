"""What a generation needs at least, measured, and refused with the options that make it fit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stylemaster_core.errors import ConfigError
from stylemaster_core.pipelines import estimate
from stylemaster_core.pipelines.estimate import Needs, check_memory, estimate_needs

MEASURE = """
import torch
from pathlib import Path
from stylemaster_core.layouts import video_to_frames
from stylemaster_core.models.vae import load_vae
from stylemaster_core.pipelines.tiny import tiny_files
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {x.split(":")[0]: int(x.split()[1]) << 10 for x in lines if x[:4] in ("VmHW", "VmRS")}
vae = load_vae(tiny_files().vae)
video_to_frames(vae.decode(torch.zeros(1, 16, 1, 4, 4)))
latents = torch.zeros(1, 16, 9, 64, 64)
Path("/proc/self/clear_refs").write_text("5")
before = peak()["VmRSS"]
frames = video_to_frames(vae.decode(latents))
print(peak()["VmHWM"] - before, *frames.shape[:3])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux measures peaks")
def test_the_estimate_is_near_what_is_measured_and_not_above_it():
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured, *size = map(int, done.stdout.split())
    assert size == [33, 512, 512]
    needs = estimate_needs((33, 512, 512), None, gpu=False, video=True)
    assert 0.5 * measured < needs.main < 1.1 * measured


def test_inputs_and_places_count():
    alone = estimate_needs((81, 480, 832), None, gpu=False, video=True)
    restyled = estimate_needs((81, 480, 832), (81, 1080, 1920), gpu=False, video=True)
    assert restyled.main - alone.main == 3 * 81 * 1080 * 1920
    on_gpu = estimate_needs((81, 480, 832), None, gpu=True, video=True)
    assert on_gpu.gpu + on_gpu.main == alone.main and alone.gpu == 0
    assert estimate_needs((1, 64, 64), None, gpu=False, video=False).disk == 64 * 64 * 3


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    monkeypatch.setattr(estimate, "free_main_memory", lambda: 2 * 10**9)
    size, device = (300, 1088, 1920), torch.device("cpu")
    check_memory(Needs(2 * 10**9, 0, 0), device, size, option="--max-frames")
    needs = estimate_needs(size, size, gpu=False, video=True)
    with pytest.raises(ConfigError) as caught:
        check_memory(needs, device, size, option="--max-frames")
    message = str(caught.value)
    assert "300 frames of 1920 x 1088 need at least 18.9 GB of main memory" in message
    assert "2.0 GB are free; pass --max-frames 31 or --size 624x352" in message
    smaller = estimate_needs((31, 1088, 1920), (31, 1088, 1920), gpu=False, video=True)
    assert smaller.main < 2.1e9
    with pytest.raises(ConfigError, match="--size") as caught:
        check_memory(needs, device, size, option=None)
    assert "frames" not in str(caught.value).split("pass")[1]


def test_free_memory_is_a_number_of_this_machine():
    assert 10**7 < estimate.free_main_memory() < 10**14
