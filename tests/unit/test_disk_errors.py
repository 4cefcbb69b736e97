"""A full or read-only disk ends every command in one line: file, reason, and what is kept."""

import errno
import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from stylemaster_core import writing
from stylemaster_core.cli import main
from stylemaster_core.data.images import write_image
from stylemaster_core.errors import WeightsError

COMMANDS = {
    "encode": (("data", "encode", "clips", "cache"), "what is finished stays"),
    "illusion": (("data", "illusion", "pairs", "--pictures", "a"), "what is finished stays"),
    "still": (("data", "still", "a", "--out", "still.jsonl"), "nothing was written"),
    "queue": (("queue", "flow.json", "--out", "results"), "results that are done stay"),
    "convert": (("weights", "convert", "a.ckpt"), "files that are whole stay"),
    "train": (("train", "style", "--data", "cache", "--out", "run"), "--resume goes on"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_an_error_of_the_system_is_one_line(name, is_wrapped, capsys, monkeypatch):
    def fail(args):
        error = OSError(errno.EROFS, os.strerror(errno.EROFS), "/disk/file")
        if is_wrapped:
            raise WeightsError(f"/disk/file cannot be written: {error.strerror}") from error
        raise error

    command, kept = COMMANDS[name]
    module = importlib.import_module(f"stylemaster_core.cli.{command[0]}")
    monkeypatch.setattr(module, "run", fail)
    assert main(command) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("stylemaster: /disk/file")
    assert "Read-only file system" in message and f"; {kept}" in message


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that nobody can write to")
@pytest.mark.parametrize("name", ["encode", "illusion", "still", "queue"])
def test_a_place_that_takes_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("clips", "a"):
        Path(folder).mkdir()
        for number in range(2):
            write_image(Path(folder) / f"{number}.png", np.zeros((40, 40, 3), np.uint8))
            Path(folder, f"{number}.txt").write_text("a square")
    Path("flow.json").write_text('{"1": {"class_type": "LoadImage", "inputs": {"image": "a"}}}')
    commands = {
        "encode": ("data", "encode", "clips", "/proc/cache", "--model", "small-random"),
        "illusion": ("data", "illusion", "/proc/pairs", "--pictures", "a"),
        "still": ("data", "still", "a", "--out", "/proc/still.jsonl", "--caption", "x"),
        "queue": ("queue", "flow.json", "--out", "/proc/results", "--server", "http://127.0.0.1:1"),
    }
    assert main(commands[name]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and "/proc/" in message
    assert "No such file" in message and f"; {COMMANDS[name][1]}" in message


def test_a_disk_that_fills_up_while_pairs_are_made_keeps_those_that_are_done(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    write_image(tmp_path / "a" / "0.png", pixels)
    command = ["data", "illusion", str(tmp_path / "pairs"), "--pictures", str(tmp_path / "a")]
    command += ["--num", "3", "--size", "64"]
    publish = writing.publish

    def full(part, path, **options):
        if path.name == "000002_b.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(part, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "publish", full)
        assert main(command) == 2
    message = capsys.readouterr().err
    assert "000002_b.png cannot be written: No space left on device" in message
    assert "the same command goes on from there" in message
    assert main(command) == 0
    assert len((tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()) == 3
