"""Files appear whole or not at all, over nothing, and a disk that fails is told in one line."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from stylemaster_core import writing
from stylemaster_core.data.images import read_image, write_image
from stylemaster_core.data.videos import write_video
from stylemaster_core.errors import ConfigError, DiskError, StyleMasterError, WeightsError
from stylemaster_core.weights.files import read_state_dict, write_state_dict
from stylemaster_core.writing import (
    append_line,
    check_place,
    check_space,
    publish,
    publish_all,
    remove_leftovers,
    write_or_rescue,
    write_text,
    written_beside,
)

resource = pytest.importorskip("resource", reason="Windows limits no file sizes")
NOISE = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)


@contextmanager
def small_disk(size=4000):
    """Files grow to some bytes; the system then refuses, as a full disk does.

    No fixture: what pytest writes before and after a test may go to a file, too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


WRITERS = {
    "picture.png": lambda path: write_image(path, NOISE[0], overwrite=True),
    "video.mp4": lambda path: write_video(path, NOISE, fps=16, overwrite=True),
    "video.webm": lambda path: write_video(path, NOISE, fps=16, overwrite=True),
    "one.png": lambda path: write_video(path, NOISE[:1], fps=16, overwrite=True),
    "table.jsonl": lambda path: write_text(path, "x" * 9000, overwrite=True),
    "weights.safetensors": lambda path: write_state_dict(
        path, {"x": torch.rand(9000)}, overwrite=True
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path, name):
    path = tmp_path / name
    path.write_text("precious")
    said = rf"{name} cannot be written: .*[Ff]ile too"
    with pytest.raises((DiskError, WeightsError), match=said) as caught, small_disk():
        WRITERS[name](path)
    assert isinstance(caught.value, DiskError) or isinstance(caught.value.__cause__, DiskError)
    assert path.read_text() == "precious"
    assert names(tmp_path) == [name]


def test_two_writers_of_one_name_never_both_succeed(tmp_path):
    def save(number):
        try:
            write_state_dict(path, {"x": torch.full((4,), float(number))})
        except WeightsError as error:
            assert "exists already" in str(error) or "appeared" in str(error)
            return None
        return number

    with ThreadPoolExecutor(4) as pool:
        for attempt in range(20):
            path = tmp_path / f"{attempt}.safetensors"
            saved = [n for n in pool.map(save, range(4)) if n is not None]
            assert len(saved) == 1
            assert read_state_dict(path).tensors["x"][0] == saved[0]
    assert len(names(tmp_path)) == 20


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch, links):
    if not links:  # as on FAT
        monkeypatch.setattr(writing.os, "link", _refuse(errno.EPERM))
    path = tmp_path / "out.txt"
    with pytest.raises(ConfigError, match="appeared"), written_beside(path) as part:
        part.write_text("ours")
        path.write_text("theirs")
    assert path.read_text() == "theirs"
    assert names(tmp_path) == ["out.txt"]
    write_text(tmp_path / "new.txt", "ours")
    assert (tmp_path / "new.txt").read_text() == "ours"
    assert names(tmp_path) == ["new.txt", "out.txt"]


def test_files_of_a_folder_are_moved_over_nothing(tmp_path):
    part, out = tmp_path / "part", tmp_path / "new" / "out"
    part.mkdir()
    for name in ("a", "b"):
        (part / name).write_text("ours")
    publish_all(part, out, overwrite=False)
    assert names(out) == ["a", "b"] and names(part) == []
    (part / "a").write_text("ours, later")
    with pytest.raises(ConfigError, match="left as it is"):
        publish_all(part, out, overwrite=False)
    assert (out / "a").read_text() == "ours"
    publish_all(part, out, overwrite=True)
    assert (out / "a").read_text() == "ours, later"


def test_a_link_to_nowhere_is_no_free_name(tmp_path):
    (tmp_path / "out.txt").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(ConfigError, match="exists already"):
        write_text(tmp_path / "out.txt", "ours")
    assert not (tmp_path / "elsewhere.txt").exists()


def test_a_failed_publish_without_links_leaves_no_empty_file(tmp_path, monkeypatch):
    part, path = tmp_path / "part", tmp_path / "out"
    part.write_text("ours")
    monkeypatch.setattr(writing.os, "link", _refuse(errno.EPERM))
    monkeypatch.setattr(writing.os, "replace", _refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        publish(part, path, overwrite=False)
    assert names(tmp_path) == ["part"]


def _refuse(code):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    return refuse


def test_errors_about_other_files_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="input"), written_beside(tmp_path / "out.txt"):
        (tmp_path / "input.txt").read_text()
    assert names(tmp_path) == []


def test_a_place_is_checked_before_the_work(tmp_path):
    check_place(tmp_path / "new" / "folder" / "out.mp4")
    assert names(tmp_path / "new" / "folder") == []
    (tmp_path / "movie.mp4").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        check_place(tmp_path / "movie.mp4", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="exists already"):
        check_place(tmp_path / "file")
    check_place(tmp_path / "file", overwrite=True)
    with pytest.raises(DiskError, match="out.mp4 cannot be written: Not a directory"):
        check_place(tmp_path / "file" / "out.mp4")
    with pytest.raises(DiskError, match="too long; choose a shorter name"):
        check_place(tmp_path / ("x" * 300 + ".mp4"))
    with pytest.raises(ConfigError, match="cannot be the name"):
        check_place(tmp_path / "a\0b.mp4")
    check_place(tmp_path / ("映" * 80 + ".mp4"))
    assert names(tmp_path) == ["file", "movie.mp4", "new"]


def test_a_folder_without_the_right_to_write_is_refused(tmp_path):
    folder = Path("/proc/self/fd") if os.getuid() == 0 else tmp_path / "closed"
    if os.getuid() != 0:
        folder.mkdir(mode=0o500)
    with pytest.raises(DiskError, match=r"out\.png cannot be written"):
        check_place(folder / "out.png")


def test_a_disk_that_is_too_small_is_refused(tmp_path):
    check_space(tmp_path / "new" / "out.mp4", 1000, "the result", "shorten it")
    with pytest.raises(DiskError, match=r"the result takes about 1000000000.0 GB.*; shorten it"):
        check_space(tmp_path / "new" / "out.mp4", 10**18, "the result", "shorten it")
    assert [writing._in_words(n) for n in (10, 2_500_000, 10**10)] == [
        "0.0 kB",
        "2.5 MB",
        "10.0 GB",
    ]


def test_a_result_that_its_place_does_not_take_is_kept_elsewhere(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    (tmp_path / "taken.png").write_text("precious")
    for name, words in (("taken.png", "exists already"), ("x" * 300 + ".png", "too long")):
        path = tmp_path / name

        def write(place):
            write_image(place, NOISE[0])

        if len(name) > 255:
            with pytest.raises(DiskError, match="Nor could it be kept elsewhere"):
                write_or_rescue(path, write)
            continue
        with pytest.raises(StyleMasterError, match=words) as caught:
            write_or_rescue(path, write)
        (rescued,) = kept.glob("stylemaster-*/*.png")
        assert str(rescued) in str(caught.value)
        np.testing.assert_array_equal(read_image(rescued), NOISE[0])
        assert path.read_text() == "precious"
    assert len(list(kept.iterdir())) == 1


def test_a_line_is_appended_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    append_line(path, b"one")
    path.write_bytes(path.read_bytes() + b'{"half')
    append_line(path, b"two")
    assert path.read_bytes() == b'one\n{"half\ntwo\n'
    before = path.read_bytes()
    with (
        pytest.raises(DiskError, match="lines.jsonl cannot be written"),
        small_disk(len(before) + 5),
    ):
        append_line(path, b"three and more")
    assert path.read_bytes() == before


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_stays(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from stylemaster_core.writing import part_path; "
        "part_path(Path(sys.argv[1])).write_text('half'); os.kill(os.getpid(), 9)"
    )
    for name in ("out.mp4", "other.mp4"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=False)
    ours = writing.part_path(tmp_path / "out.mp4")
    ours.write_text("being written")
    users_own = tmp_path / ".out.my.part.mp4"
    users_own.write_text("precious")
    assert len(names(tmp_path)) == 4
    write_text(tmp_path / "out.mp4", "whole")
    left = set(names(tmp_path)) - {"out.mp4", ours.name, users_own.name}
    assert len(left) == 1 and left.pop().startswith(".other.")
    assert [path.name.startswith(".other.") for path in remove_leftovers(tmp_path)] == [True]
    assert set(names(tmp_path)) == {"out.mp4", ours.name, users_own.name}
