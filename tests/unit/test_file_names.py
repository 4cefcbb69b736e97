"""Files that name files: nothing outside of their folder is reached through them."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from stylemaster_core.data.images import write_image
from stylemaster_core.data.pairs import open_pair_folder, read_pairs
from stylemaster_core.data.samples import find_pictures, read_samples
from stylemaster_core.errors import ConfigError, WeightsError
from stylemaster_core.file_names import check_name, file_below, finder_below, refuse_outside
from stylemaster_core.queue.journal import read_journal
from stylemaster_core.training.checkpoint import latest_checkpoint
from stylemaster_core.training.stats import NAME, read_stats, sample_file


@pytest.fixture
def private(tmp_path):
    """A picture beside the folder that names are read in."""
    path = tmp_path / "private.png"
    write_image(path, np.zeros((8, 8, 3), np.uint8))
    return path


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "folder"
    place.mkdir()
    return place


def names_of(path: Path, folder: Path) -> list[object]:
    (folder / "link.png").symlink_to(path)
    return [str(path), f"../{path.name}", "link.png", "..\\private.png", None, 3, "", "a\0.png"]


def test_names_below_a_folder(folder):
    assert file_below(folder, "samples/a.png", folder / "x") == folder / "samples/a.png"
    assert check_name("./a\\b/") == ["a", "b"]
    link = folder.parent / "linked"
    link.symlink_to(folder)
    (folder / "a.png").write_bytes(b"")
    assert file_below(link, "a.png", folder / "x") == link / "a.png"


def test_a_pair_names_no_picture_outside_of_its_folder(folder, private):
    for name in names_of(private, folder):
        record = {"index": 0, "kept": True, "first": name, "second": "b.png"}
        (folder / "pairs.jsonl").write_text(json.dumps(record | {"view": {"name": "rotate90"}}))
        with pytest.raises(ConfigError, match="not below"):
            read_pairs(folder)
        (folder / "settings.json").write_text("{}")
        with pytest.raises(ConfigError, match="not below"):
            open_pair_folder(folder, {})


def test_stats_name_no_picture_outside_of_the_run(folder, private):
    for name in names_of(private, folder):
        with pytest.raises(ConfigError, match="not below"):
            sample_file(folder, {"step": 1, "sample": name})
    assert sample_file(folder, {"step": 1}) is None


def test_latest_names_a_checkpoint_of_its_folder(folder, tmp_path):
    elsewhere = tmp_path / "step-00000001"
    elsewhere.mkdir()
    (elsewhere / "state.json").write_text("{}")
    for name in (str(elsewhere), "../step-00000001", "..", "", "step-1", "step-00000001\nx"):
        (folder / "latest").write_text(name)
        with pytest.raises(WeightsError, match="expected the name of a checkpoint"):
            latest_checkpoint(folder)
    (folder / "latest").write_text("step-00000001\n")
    (folder / "step-00000001").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="not below"):
        latest_checkpoint(folder)


def test_a_journal_names_files_of_its_folder_alone(folder):
    for name in ("/etc/passwd", "../x.png", "sub/x.png", 3):
        record = {"event": "delivering", "job": "a", "files": [name]}
        (folder / "queue.jsonl").write_text(json.dumps(record) + "\n")
        with pytest.raises(ConfigError, match="line 1"):
            read_journal(folder)


def test_tables_and_captions_of_a_workflow_stay_inside(folder, private, tmp_path):
    (folder / "a.png").write_bytes(private.read_bytes())
    (folder / "a.txt").write_text("a cat")
    table = folder / "t.jsonl"
    for name in ("a\0.png", "a\ud800.png"):
        table.write_text(json.dumps({"file": name, "caption": "c"}) + "\n")
        with pytest.raises(ConfigError, match="cannot be the name"):
            read_samples(table, within=[folder])
    for row in (
        {"file": str(private), "caption": "c"},
        {"file": "a.png", "caption": "c", "style": "../private.png"},
    ):
        table.write_text(json.dumps(row) + "\n")
        assert len(read_samples(table)) == 1  # a table that the user names may point anywhere
        with pytest.raises(ConfigError, match="is not in"):
            read_samples(table, within=[folder])
        assert len(read_samples(table, within=[tmp_path])) == 1
    table.unlink()
    secret = tmp_path / "secret.txt"
    secret.write_text("a password")
    assert read_samples(folder, within=[folder])[0].caption == "a cat"
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(secret)
    with pytest.raises(ConfigError, match=r"a\.txt is not in .* link to elsewhere"):
        read_samples(folder, within=[folder])
    (folder / "b.png").symlink_to(private)
    with pytest.raises(ConfigError, match=r"b\.png is not in"):
        find_pictures(folder, within=[folder])


def test_a_folder_whose_name_begins_alike_is_outside(folder, tmp_path):
    beside = tmp_path / "folder2"
    beside.mkdir()
    with pytest.raises(ConfigError, match="is not in"):
        refuse_outside([beside / "a.png"], [folder])


LINES = b'{"step": 1, "loss": 0.5, "inner": 1}\n{"step": 2, "loss": 0.25, "sample": "samples/a"}\n'


@pytest.mark.parametrize("cut", range(1, len(LINES)))
def test_stats_cut_anywhere_are_read_to_the_cut(folder, cut):
    (folder / NAME).write_bytes(LINES[:cut])
    assert [line["step"] for line in read_stats(folder)] == [1, 2][: LINES[:cut].count(b"}")]


def test_half_a_line_that_ends_in_a_brace(folder):
    (folder / "queue.jsonl").write_bytes(b'{"event": "done", "job": "a", "values": {"b": 1}')
    assert read_journal(folder) == {}
    (folder / "queue.jsonl").write_bytes(b'{"event": "done", "job": "a {b}\n\0\0\0\n')
    assert read_journal(folder) == {}


@pytest.mark.parametrize(
    "line",
    [
        '{"loss": 0.5}',
        '{"step": "1"}',
        '{"step": 1, "loss": "low"}',
        '{"step": 1, "sample": 3}',
        '{"step": 1, "loss": []}',
        "[1]",
        '{"step": 1}}',
        "[" * 100_000 + "]" * 100_000,
    ],
    ids=str.__len__,
)
def test_stats_of_other_content_are_refused_with_their_line(folder, line):
    (folder / NAME).write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ConfigError, match=rf"{os.sep}{NAME}, line 2"):
        read_stats(folder)


@pytest.fixture
def work_folder(tmp_path, monkeypatch):
    from tests.unit.node_modules import node_module

    latest = types.ModuleType("comfy_api.latest")
    latest.io = types.SimpleNamespace(Custom=lambda name: None)
    monkeypatch.setitem(sys.modules, "comfy_api", types.ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    paths = types.SimpleNamespace(get_output_directory=lambda: str(tmp_path))
    with node_module("training_files", paths) as module:
        yield lambda kind, name: Path(module.work_folder(kind, name))


@pytest.mark.parametrize(
    ("kind", "mark"),
    [("runs", "checkpoints/latest"), ("caches", "manifest.json"), ("datasets", "pairs.jsonl")],
)
def test_a_work_folder_lies_in_no_other_and_holds_none(work_folder, kind, mark):
    good = work_folder(kind, "sub/good")
    (good / mark).parent.mkdir(parents=True)
    (good / mark).write_text("")
    assert work_folder(kind, "sub/good") == good
    assert work_folder(kind, "sub/other").parent == good.parent
    for name in ("sub/good/checkpoints", "sub/good/other/x"):
        with pytest.raises(ValueError, match="lies inside"):
            work_folder(kind, name)
    with pytest.raises(ValueError, match="is a folder that holds"):
        work_folder(kind, "sub")
    (good.parent / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        work_folder(kind, "sub/file")
    with pytest.raises(ValueError, match="leads through a file"):
        work_folder(kind, "sub/file/x")


def test_a_run_may_be_called_as_a_runs_files_are(work_folder):
    (work_folder("runs", "checkpoints") / "checkpoints").mkdir(parents=True)
    assert work_folder("runs", "tables").name == "tables"
    with pytest.raises(ValueError, match="lies inside"):
        work_folder("datasets", "tables/x")


def test_names_of_one_folder_lead_out_by_no_link(tmp_path):
    """Whatever the case of letters, which some file systems do not tell apart."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (folder / "Link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inside.png").symlink_to(folder / "b.png")
    find = finder_below(folder, folder / "pairs.jsonl")
    assert find("a.png") == folder / "a.png" and find("sub/a.png") == folder / "sub/a.png"
    assert find("inside.png") == folder / "inside.png"
    for name in ("Link.png", "../secret.png", "/a.png", "", None, 3, "a\0"):
        with pytest.raises(ConfigError, match="pairs.jsonl names a file that is not below"):
            find(name)
    assert finder_below(tmp_path / "none", folder)("a.png") == tmp_path / "none" / "a.png"
    looked_up = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stylemaster_core.file_names.os.path.islink", looked_up.append)
        find("a.png")
        assert not looked_up
        find("link.png")
        assert looked_up == [folder / "link.png"]
