"""The recipe of the small model: every stage at the smoke profile, and files that load.

It runs as on a CPU without fast bfloat16, whatever this one has: what trains there trains anywhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
MASKED = """
import sys
from recipes.tiny.command import main
from stylemaster_core import dtypes
dtypes.cpu_flags = tuple
sys.exit(main())
"""


def recipe(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MASKED, "--profile", "smoke", "--out", str(out), *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    # Two calls, the first of which has too little time: the second goes on where it stopped.
    first = recipe(out, "--minutes", "0.2")
    assert first.returncode == 3, first.stderr
    assert not (out / "motion" / "done.json").exists()
    second = recipe(out, "--ship", str(out / "shipped"))
    assert second.returncode == 0, second.stderr[-3000:]
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_stage_improves_held_out(run: Path, stage: str) -> None:
    report = json.loads((run / stage / "done.json").read_text())
    if stage in ("samples", "pictures"):
        assert "metric" not in report
    elif stage in HIGHER_IS_BETTER:
        assert report["after"] > report["before"], report
    else:
        assert report["after"] < report["before"], report


def test_a_cpu_that_only_emulates_bfloat16_trains_in_float32(run: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the recipe trains on the GPU")
    for stage in ("global-projection", "joint", "stylecrafter-video"):
        config = json.loads((run / stage / "config.json").read_text())
        assert config["run"]["precision"] == "float32"


def test_shipped_files_load(run: Path) -> None:
    files = tiny_files(run / "shipped")
    models = Models(files, device="cpu")
    with models.vae() as vae:
        assert vae.decode(torch.zeros(1, 16, 2, 8, 8)).shape == (1, 3, 5, 64, 64)
    with models.transformer() as transformer:
        assert transformer.style_attention is not None
    with models.controlnet() as controlnet:
        assert len(controlnet.control_blocks) == 3
