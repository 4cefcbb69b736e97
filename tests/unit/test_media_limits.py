"""What a file needs is known before it is decoded; only pictures and videos are opened."""

import logging
import types

import numpy as np
import pytest
from PIL import Image

from stylemaster_core.cli import main
from stylemaster_core.data import memory
from stylemaster_core.data.images import read_image
from stylemaster_core.data.videos import probe_video, read_video, write_video
from stylemaster_core.errors import LayoutError

FRAMES = np.random.default_rng(0).integers(0, 256, (8, 96, 128, 3), dtype=np.uint8)


def write_gif(path, frames=FRAMES):
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "folder"])
def test_what_cannot_fit_is_refused_before_it_is_decoded(tmp_path, monkeypatch, caplog, name):
    path = tmp_path / name
    if name == "folder":
        write_video(path / "%d.png", FRAMES, fps=10)
    else:
        write_video(path, FRAMES, fps=10)
    monkeypatch.setattr(memory, "_MUCH_BYTES", 1000)
    with caplog.at_level(logging.INFO, "stylemaster"):
        read_video(path)
    assert "8 frames of 128 x 96" in caplog.text
    monkeypatch.setattr(memory, "free_main_memory", lambda: 3 * FRAMES[0].nbytes)
    converted = []
    monkeypatch.setattr(np, "empty", lambda *args: converted.append(args))
    with pytest.raises(LayoutError, match="read at most 3 frames"):
        read_video(path)
    assert not converted
    monkeypatch.undo()
    assert len(read_video(path, max_frames=3).frames) == 3


def test_an_animation_is_decoded_as_far_as_it_is_read(tmp_path, monkeypatch):
    from stylemaster_core.data import animations

    path = tmp_path / "a.gif"
    write_gif(path)
    converted = []
    to_rgb = animations.to_rgb
    monkeypatch.setattr(animations, "to_rgb", lambda x: converted.append(1) or to_rgb(x))
    assert len(read_video(path, max_frames=2).frames) == 2
    assert len(converted) == 2
    assert probe_video(path).num_frames == 8 and len(converted) == 3


def test_an_animation_that_was_cut_is_reported(tmp_path, caplog):
    whole = tmp_path / "a.gif"
    write_gif(whole)
    data, cut = whole.read_bytes(), tmp_path / "cut.gif"
    for size in range(20, len(data) - 1, len(data) // 12):
        cut.write_bytes(data[:size])
        caplog.clear()
        try:
            clip = read_video(cut)
        except LayoutError as error:
            assert "cut.gif" in str(error)
        else:
            assert len(clip.frames) <= len(FRAMES) and "may be cut short" in caplog.text


def test_only_the_meant_formats_are_opened(tmp_path):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_bytes(script)
    for read in (read_image, read_video, probe_video):
        with pytest.raises(LayoutError, match="not an image"):
            read(tmp_path / "a.png")
    write_video(tmp_path / "real.mp4", FRAMES, fps=10)
    names = {
        "concat": f"ffconcat version 1.0\nfile '{tmp_path / 'real.mp4'}'\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path / 'real.mp4'}\n"
        "#EXT-X-ENDLIST\n",
    }
    for name, text in names.items():
        path = tmp_path / f"{name}.mp4"
        path.write_text(text)
        for read in (read_video, probe_video):
            with pytest.raises(LayoutError, match="cannot be read as a video"):
                read(path)


def test_a_cover_picture_is_no_video(tmp_path):
    import av

    path = tmp_path / "album.m4a"
    Image.fromarray(FRAMES[0]).save(tmp_path / "cover.png")
    with av.open(str(path), "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=44100, layout="mono")
        with av.open(str(tmp_path / "cover.png")) as picture:
            cover = output.add_stream_from_template(picture.streams.video[0])
            cover.disposition = 1024
            packet = next(picture.demux(video=0))
            packet.stream, packet.pts, packet.dts = cover, 0, 0
            output.mux(packet)
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate = 44100
        output.mux(sound.encode(silence))
        output.mux(sound.encode(None))
    with pytest.raises(LayoutError, match="no video stream"):
        read_video(path)


def test_names_with_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("12:30:00.mp4", FRAMES, fps=10)
    assert len(read_video("12:30:00.mp4").frames) == 8


@pytest.mark.parametrize("command", ["encode-style", "inspect-style"])
def test_a_picture_that_cannot_fit_is_refused_before_it_is_decoded(
    tmp_path, monkeypatch, capsys, command
):
    path = tmp_path / "large.png"
    Image.new("RGB", (6000, 4000)).save(path)
    monkeypatch.setattr(memory, "free_main_memory", lambda: 10**8)
    monkeypatch.setattr(Image.Image, "convert", lambda *args: pytest.fail("it is decoded"))
    if command == "encode-style":
        options = [str(tmp_path / "s.safetensors"), "--style", str(path)]
    else:
        options = [str(path), str(tmp_path / "out.png")]
    assert main([command, *options, "--model", "small-random"]) == 2
    said = capsys.readouterr().err
    assert "6000 x 4000 takes 0.3 GB of main memory" in said and "scale it down" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.png"]


def test_a_demo_that_cannot_fit_is_refused_before_it_is_drawn(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--frames", "10000000"]) == 2
    said = capsys.readouterr().err
    assert "10000000 frames need at least" in said
    fitting = int(said.split("--frames ")[1].split()[0])
    assert 1 <= fitting < 10000000
    assert main(["demo", "--out", str(out), "--frames", "0"]) == 2
    assert "expected 1 or more" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    assert main(["demo", "--out", str(out)]) == 2
    assert "pass fewer --frames, or another --out" in capsys.readouterr().err
    assert not out.exists()
