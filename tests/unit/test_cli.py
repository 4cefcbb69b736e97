"""The command line as a whole: what its help lists, and what it imports for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stylemaster_core import cli

REPOSITORY = Path(__file__).parents[2]


def test_help_lists_every_subcommand_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, summary in cli.SUBCOMMANDS.items():
        assert f"{name} {summary}" in text


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_subcommand_has_options_of_its_own(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: stylemaster {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["queue", "--help"]])
def test_help_imports_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from stylemaster_core.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print([m for m in ('torch', 'numpy', 'av', 'PIL') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_dry_run_of_the_queue_imports_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(
        '{"1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a"}}}'
    )
    (tmp_path / "p.txt").write_text("a red fox")
    code = (
        "import sys\n"
        "from stylemaster_core.cli import main\n"
        "main(sys.argv[1:])\n"
        "print([m for m in ('torch', 'numpy', 'av', 'PIL', 'aiohttp') if m in sys.modules])\n"
    )
    words = ["queue", "w.json", "--prompts", "p.txt", "--out", "out", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-2:] == ["1 jobs", "[]"]
