"""The recipe of the small model: every stage at the smoke profile, and files that load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.tiny import tiny_files

REPOSITORY = Path(__file__).parents[2]
STAGES = (
    "vae",
    "encoder",
    "judge",
    "samples",
    "global-projection",
    "joint",
    "style",
    "control",
    "motion",
    "pictures",
    "stylecrafter",
    "stylecrafter-scales",
    "stylecrafter-video",
)
HIGHER_IS_BETTER = {"encoder", "judge"}
LIMIT_S = 600


def recipe(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.tiny", "--profile", "smoke", "--out", str(out), *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    out = tmp_path_factory.mktemp("tiny")
    began = time.monotonic()
    # Two calls, the first of which has no time: the second goes on where it stopped.
    first = recipe(out, "--minutes", "0.5")
    assert first.returncode == 3, first.stderr
    assert not (out / "motion" / "done.json").exists()
    second = recipe(out, "--ship", str(out / "shipped"))
    assert second.returncode == 0, second.stderr[-3000:]
    return out, time.monotonic() - began


def test_smoke_takes_less_than_ten_minutes(run: tuple[Path, float]) -> None:
    assert run[1] < LIMIT_S


@pytest.mark.parametrize("stage", STAGES)
def test_stage_improves_held_out(run: tuple[Path, float], stage: str) -> None:
    report = json.loads((run[0] / stage / "done.json").read_text())
    if stage in ("samples", "pictures"):
        assert "metric" not in report
    elif stage in HIGHER_IS_BETTER:
        assert report["after"] > report["before"], report
    else:
        assert report["after"] < report["before"], report


def test_shipped_files_load(run: tuple[Path, float]) -> None:
    files = tiny_files(run[0] / "shipped")
    models = Models(files, device="cpu")
    with models.vae() as vae:
        assert vae.decode(torch.zeros(1, 16, 2, 8, 8)).shape == (1, 3, 5, 64, 64)
    with models.transformer() as transformer:
        assert transformer.style_attention is not None
    with models.controlnet() as controlnet:
        assert len(controlnet.control_blocks) == 3
