"""Which files of a folder count: hidden ones, as drives of Macs hold, and folders do not."""

import logging

import numpy as np
import pytest

from stylemaster_core.data.images import write_image
from stylemaster_core.data.media_files import IMAGE_ENDINGS, MOVING_ENDINGS, media_files
from stylemaster_core.data.samples import find_pictures, read_samples
from stylemaster_core.data.videos import probe_video, read_video, write_video
from stylemaster_core.errors import LayoutError
from stylemaster_core.queue.jobs import cross_product

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)


@pytest.fixture
def mac_folder(tmp_path):
    """Three videos, a picture of each, and what a Mac's drive holds beside them."""
    folder = tmp_path / "clips"
    for name in ("a.mp4", "b.MOV", "c.mts"):
        write_video(tmp_path / "x.mp4", FRAMES, fps=8, overwrite=True)
        folder.mkdir(exist_ok=True)
        (tmp_path / "x.mp4").rename(folder / name)
        (folder / f"._{name}").write_bytes(b"\0\5\26\7")
    for name in ("2.png", "10.png"):
        write_image(folder / name, FRAMES[0])
        (folder / f"._{name}").write_bytes(b"\0\5\26\7")
    (folder / "folder.mp4").mkdir()
    (folder / "folder.png").mkdir()
    (folder / ".hidden").mkdir()
    write_image(folder / ".hidden" / "x.png", FRAMES[0])
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    return folder


def test_hidden_files_and_folders_are_skipped_and_said(mac_folder, caplog):
    caplog.set_level(logging.INFO, "stylemaster")
    rows = cross_product(mac_folder, mac_folder)
    assert [row.video.name for row in rows[::2]] == ["a.mp4", "b.MOV", "c.mts"]
    assert [row.style.name for row in rows[:2]] == ["10.png", "2.png"]
    said = caplog.text
    assert "._a.mp4 (hidden)" in said and "folder.mp4 (a folder)" in said
    assert "notes.txt (no video)" in said and ".DS_Store" not in said


def test_a_folder_of_frames(mac_folder):
    assert probe_video(mac_folder).num_frames == 2
    np.testing.assert_array_equal(read_video(mac_folder).frames[1], FRAMES[0])
    for path in media_files(mac_folder, IMAGE_ENDINGS):
        path.unlink()
    with pytest.raises(LayoutError, match="holds no images"):
        probe_video(mac_folder)


def test_datasets(mac_folder):
    assert [path.name for path in find_pictures(mac_folder)] == ["2.png", "10.png"]
    samples = read_samples(mac_folder, caption="x")
    assert sorted(s.id for s in samples) == ["10.png", "2.png", "a.mp4", "b.MOV", "c.mts"]


def test_what_is_taken_is_what_is_read(mac_folder):
    for path in media_files(mac_folder, MOVING_ENDINGS):
        assert probe_video(path).num_frames == 2


@pytest.mark.parametrize("name", ["take:1.mp4", "12:30:00.mp4", "file:x.webm", "concat:a|b.mkv"])
def test_names_with_a_colon(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(name, FRAMES, fps=8)
    assert read_video(name).frames.shape == FRAMES.shape
    write_video("copy.mp4", FRAMES, fps=8, audio_from=name)
    (row,) = cross_product(tmp_path / name)
    assert row.video.name == name
