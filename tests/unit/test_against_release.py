"""The bench beside the released code: what it reads, refuses and writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import against_release
from stylemaster_core.errors import ConfigError


def report(ratio: float) -> dict:
    cases = [case.name for case in against_release.CASES]
    names = [name + end for name in cases for end in ("", ", in one batch")]
    row = {"release": 2.0, "ours": 2.0 * ratio, "ratio": ratio, "difference": 1e-6}
    return {
        "date": "2026-01-01",
        "machine": {"name": "a processor", "threads": 1, "load_average": 3.0, "torch": "2"},
        "setting": {"latents": (5, 30, 52), "blocks": 2},
        "flop_ratios": dict.fromkeys(cases, 0.97),
        "memory": dict.fromkeys(names, row),
        "seconds": dict.fromkeys(cases, row),
    }


def test_a_folder_without_the_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert against_release.main([str(tmp_path)]) == 2
    assert "holds no stylemaster-wan/diffsynth/models/wan_video_dit.py" in capsys.readouterr().err


@pytest.mark.parametrize("latents", ["5x30", "0x2x2", "1x3x4"])
def test_latents_that_cannot_be(tmp_path: Path, latents: str) -> None:
    assert against_release.main([str(tmp_path), "--latents", latents]) == 2


def test_its_module_is_read_alone(tmp_path: Path) -> None:
    folder = tmp_path / "stylemaster-wan" / "diffsynth" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('not the package')")
    code = "from .utils import hash_state_dict_keys\nclass WanModel: pass\n"
    (folder / "wan_video_dit.py").write_text(code)
    assert against_release.read_release(tmp_path).WanModel
    assert against_release.read_release(tmp_path / "stylemaster-wan").WanModel


def test_the_table_is_put_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "speed.md"
    path.write_text("before\n<!-- against the release -->\nold\n<!-- end -->\nafter\n")
    against_release.write_docs(path, against_release.table(report(0.5)))
    text = path.read_text()
    assert text.startswith("before\n<!--") and text.endswith("<!-- end -->\nafter\n")
    assert "| video to video | 0.9700 | 0.50 | 0.50 | 0.50 (2.0 s: 1.0 s) |" in text
    assert "old" not in text and "a load of 3.0" in text
    path.write_text("nothing")
    with pytest.raises(ConfigError, match="lacks the lines"):
        against_release.write_docs(path, "")
