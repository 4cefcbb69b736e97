"""The command line as a user runs it: every task, small random weights, a video with audio."""

import errno
import json
import math
import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stylemaster_core import writing
from stylemaster_core.cli import main
from stylemaster_core.data.demo_scene import demo_clip, demo_styles
from stylemaster_core.data.images import read_image, write_image
from stylemaster_core.data.videos import probe_video, read_video, write_video
from stylemaster_core.errors import UnsupportedHostError
from stylemaster_core.models.small import write_small_models
from stylemaster_core.pipelines.stylize import draw_noise
from stylemaster_core.weights.files import write_state_dict

RATE = Fraction(24000, 1001)
NUM_FRAMES, HEIGHT, WIDTH = 6, 36, 52  # neither 4n + 1 frames nor multiples of 16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A video with audio, an image, and a style picture."""
    folder = tmp_path_factory.mktemp("inputs")
    write_with_audio(folder / "clip.mp4", demo_clip(NUM_FRAMES, HEIGHT, WIDTH))
    write_image(folder / "photo.png", demo_clip(1, HEIGHT, WIDTH)[0])
    write_image(folder / "style.png", demo_styles(96)["neon"])
    return folder


def write_with_audio(path, frames):
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=RATE)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        audio = container.add_stream("aac", rate=44100, layout="mono")
        for frame in frames:
            for packet in video.encode(av.VideoFrame.from_ndarray(frame)):
                container.mux(packet)
        samples = int(44100 * len(frames) / RATE)
        tone = np.sin(2 * np.pi * 440 * np.arange(samples) / 44100).astype(np.float32)[None] * 0.5
        block = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        block.sample_rate = 44100
        for stream in (video, audio):
            for packet in audio.encode(block) if stream is audio else ():
                container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small random weights, written once, as options of the command line."""
    small = write_small_models(tmp_path_factory.mktemp("models"))
    return [
        *("--transformer", str(small.stylemaster)),
        *("--controlnet", str(small.controlnet)),
        *("--vae", str(small.vae)),
        *("--text-encoder", str(small.text_encoder)),
        *("--image-encoder", str(small.image_encoder)),
    ]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def audio_packets(path):
    with av.open(str(path)) as container:
        return (
            [bytes(p) for p in container.demux(audio=0) if p.size]
            if container.streams.audio
            else []
        )


QUICK = ("--steps", "2", "--prompt", "a boat", "--json")


@pytest.mark.parametrize(
    "options", [(), ("--no-control", "--denoise", "0.5"), ("--denoise", "0.6")]
)
def test_video_to_video_keeps_what_the_input_is(inputs, files, tmp_path, capsys, options):
    output, source = tmp_path / "out.mp4", inputs / "clip.mp4"
    style = ("--style", inputs / "style.png")
    assert run("stylize", output, "--video", source, *style, *QUICK, *options, *files) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["task"] == "video-to-video"
    before, after = probe_video(source), probe_video(output)
    assert (after.num_frames, after.height, after.width) == (NUM_FRAMES, HEIGHT, WIDTH)
    assert after.fps == before.fps == RATE
    kept, given = audio_packets(output), audio_packets(source)
    # Copied, not re-encoded, and as long as the pictures last (1024 samples a packet).
    assert kept and kept == given[: len(kept)]
    assert len(kept) * 1024 / 44100 >= NUM_FRAMES / RATE


def test_text_to_video(inputs, files, tmp_path):
    output = tmp_path / "out.mp4"
    options = ("--frames", "7", "--size", "50x34", "--style", inputs / "style.png")
    assert run("stylize", output, *options, *QUICK, *files) == 0
    info = probe_video(output)
    assert (info.num_frames, info.height, info.width, info.fps) == (7, 34, 50, 16)
    assert not info.has_audio


def test_image_to_image_and_text_to_image(inputs, files, tmp_path):
    style = ("--style", inputs / "style.png")
    restyled, drawn = tmp_path / "restyled.png", tmp_path / "drawn.png"
    assert run("stylize", restyled, "--image", inputs / "photo.png", *style, *QUICK, *files) == 0
    assert run("stylize", drawn, "--size", "40x24", *style, *QUICK, *files) == 0
    assert read_image(restyled).shape == (HEIGHT, WIDTH, 3)
    assert read_image(drawn).shape == (24, 40, 3)


def test_seed_and_style_decide_the_result(inputs, files, tmp_path):
    write_image(tmp_path / "other.png", demo_styles(96)["woodcut"])
    pictures = {}
    for name, seed, style in (
        ("a", 1, inputs / "style.png"),
        ("again", 1, inputs / "style.png"),
        ("seed", 2, inputs / "style.png"),
        ("style", 1, tmp_path / "other.png"),
    ):
        output = tmp_path / f"{name}.png"
        options = ("--size", "32x32", "--seed", seed, "--style", style)
        assert run("stylize", output, *options, *QUICK, *files) == 0
        pictures[name] = read_image(output)
    assert np.array_equal(pictures["a"], pictures["again"])
    assert not np.array_equal(pictures["a"], pictures["seed"])
    assert not np.array_equal(pictures["a"], pictures["style"])


def test_the_same_noise_in_every_frame(inputs, files, tmp_path):
    videos = {}
    for name, words in (("plain", ()), ("off", ("--no-same-noise",)), ("on", ("--same-noise",))):
        output = tmp_path / f"{name}.mp4"
        options = ("--size", "32x32", "--frames", "9", "--style", inputs / "style.png")
        assert run("stylize", output, *options, *words, *QUICK, *files) == 0
        videos[name] = read_video(output).frames.astype(int)
    assert np.array_equal(videos["plain"], videos["off"])
    assert abs(videos["plain"] - videos["on"]).mean() > 1
    noise = draw_noise((1, 16, 3, 4, 4), 5, same=True)
    assert torch.equal(noise, noise[:, :, :1].expand_as(noise))
    assert torch.equal(noise[:, :, 0], draw_noise((1, 16, 3, 4, 4), 5)[:, :, 0])


def test_long_video_by_windows(inputs, files, tmp_path):
    source, output = tmp_path / "long.mp4", tmp_path / "out.mp4"
    write_video(source, demo_clip(21, 32, 32), fps=12)
    windows = ("--window", "13", "--window-overlap", "4")
    style = ("--style", inputs / "style.png")
    assert run("stylize", output, "--video", source, *style, *windows, *QUICK, *files) == 0
    assert probe_video(output).num_frames == 21


def test_release_file_converted_loaded_and_used(inputs, files, tmp_path):
    """stylemaster.ckpt and its converted adapter on its converted base give the same picture."""
    source = files[files.index("--transformer") + 1]
    assert run("weights", "convert", source, "--out", tmp_path, "--include-base") == 0
    adapter, base = tmp_path / "stylemaster_small_adapter.safetensors", tmp_path
    base = base / "stylemaster_small_base.safetensors"
    assert adapter.exists() and base.exists()
    options = ("--size", "32x32", "--style", inputs / "style.png", *QUICK)
    assert run("stylize", tmp_path / "whole.png", *options, *files) == 0
    split = [str(base) if value == source else value for value in files]
    assert run("stylize", tmp_path / "split.png", *options, *split, "--adapter", adapter) == 0
    whole, parts = read_image(tmp_path / "whole.png"), read_image(tmp_path / "split.png")
    assert np.array_equal(whole, parts)


def test_encode_use_and_inspect_a_style(inputs, files, tmp_path, capsys):
    saved, picture = tmp_path / "style.safetensors", tmp_path / "look.png"
    style = ("--style", inputs / "style.png", "--prompt", "a boat")
    assert run("encode-style", saved, *style, *files) == 0
    for name, chosen in (("direct", inputs / "style.png"), ("saved", saved)):
        output = tmp_path / f"{name}.png"
        assert run("stylize", output, "--size", "32x32", "--style", chosen, *QUICK, *files) == 0
    direct, reused = read_image(tmp_path / "direct.png"), read_image(tmp_path / "saved.png")
    assert np.array_equal(direct, reused)
    capsys.readouterr()
    inspect = ("inspect-style", inputs / "style.png", picture, "--keep", "20", "--no-cls")
    assert run(*inspect, "--prompt", "a boat", *files) == 0
    assert "20 of 256 patches" in capsys.readouterr().out
    lit = read_image(picture)
    assert lit.shape == (256, 1024, 3)
    assert lit[:, 512:768].mean() < lit[:, :256].mean() / 2  # most patches are dark


def test_blend_of_styles(inputs, files, tmp_path):
    write_image(tmp_path / "other.png", demo_styles(96)["mosaic"])
    both = ("--style", inputs / "style.png", "--style", tmp_path / "other.png")
    base = ("--size", "32x32", *QUICK, *files)
    results = {}
    for name, weights in (("even", (1, 1)), ("first", (1, 0)), ("alone", ())):
        chosen = both if weights else both[:2]
        options = [part for weight in weights for part in ("--style-weight", weight)]
        assert run("stylize", tmp_path / f"{name}.png", *chosen, *options, *base) == 0
        results[name] = read_image(tmp_path / f"{name}.png")
    assert np.array_equal(results["first"], results["alone"])
    assert not np.array_equal(results["even"], results["alone"])


def test_styles_by_mask_and_by_time(inputs, files, tmp_path):
    write_image(tmp_path / "other.png", demo_styles(96)["woodcut"])
    left = np.zeros((32, 32, 3), np.uint8)
    left[:, :16] = 255
    write_image(tmp_path / "left.png", left)
    write_image(tmp_path / "right.png", 255 - left)
    both = ("--style", inputs / "style.png", "--style", tmp_path / "other.png")
    masks = ("--style-mask", tmp_path / "left.png", "--style-mask", tmp_path / "right.png")
    base = ("--size", "32x32", "--frames", "9", *QUICK, *files)
    results = {}
    for name, options in (
        ("one", both[:2]),
        ("mixed", both),
        ("masked", (*both, *masks)),
        ("time", (*both, "--blend", "time")),
        ("weak", (*both[:2], "--style-strength", "0.3")),
        ("early", (*both[:2], "--style-range", "0:0.2")),
    ):
        assert run("stylize", tmp_path / f"{name}.mp4", *options, *base) == 0, name
        results[name] = read_video(tmp_path / f"{name}.mp4").frames
    arrays = list(results.values())
    for i, first in enumerate(arrays):
        assert all(not np.array_equal(first, second) for second in arrays[i + 1 :])


def test_text_encoder_is_loaded_once(inputs, files, tmp_path, monkeypatch):
    import stylemaster_core.models.text_encoder as text_encoder

    loads, load = [], text_encoder.load_text_encoder
    monkeypatch.setattr(
        text_encoder, "load_text_encoder", lambda *a, **k: (loads.append(1), load(*a, **k))[1]
    )
    options = ("--size", "32x32", "--negative-prompt", "blurry", *QUICK, *files)
    assert run("stylize", tmp_path / "out.png", "--style", inputs / "style.png", *options) == 0
    assert len(loads) == 1


BAD = {
    "missing video": (["--video", "absent.mp4"], "absent.mp4"),
    "no video": (["--video", "{style}"], None),  # a still image counts as one frame: fine
    "text file as video": (["--video", "{text}"], "notes.mp4"),
    "image to a video file": (["--image", "{style}"], "writes .png"),
    "task that contradicts": (["--task", "video-to-video"], "text-to-video"),
    "both inputs": (["--video", "{clip}", "--image", "{style}"], "not both"),
    "negative steps": (["--steps", "-1"], "at least 1"),
    "no steps": (["--steps", "0"], "at least 1"),
    "negative frames": (["--frames", "-5"], "at least 1"),
    "tiny size": (["--size", "8x8"], "16 x 16"),
    "shift of 0": (["--shift", "0"], "positive"),
    "nan scale": (["--text-scale", "nan"], "finite"),
    "style range": (["--style-range", "0.8:0.2"], "start <= end"),
    "range beyond 1": (["--style-range", "0.0:1.5"], "start <= end"),
    "denoise without input": (["--denoise", "0.5"], "starts from noise"),
    "nothing of the input left": (["--video", "{clip}", "--no-control"], "nothing of the input"),
    "frames of a given video": (["--video", "{clip}", "--frames", "9"], "leave it out"),
    "drop rate of 1": (["--drop-rate", "1"], "below 1"),
    "keep 0": (["--keep", "0"], "cannot keep 0"),
    "weights without styles": (["--style-weight", "1", "--style-weight", "2"], "2 weights"),
    "paper without its text tower": (["--selection", "paper"], "clip-text"),
    "style that is weights": (["--style", "{adapter}"], "no saved style"),
    "vae that is something else": (["--vae", "{adapter}"], "VAE"),
    "absent weights": (["--vae", "absent.safetensors"], "absent.safetensors"),
    "device": (["--device", "cuda:99"], "cuda:99"),
    "dtype": (["--dtype", "int8"], "int8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, inputs, files, tmp_path, capsys):
    options, message = BAD[name]
    (tmp_path / "notes.mp4").write_text("no pictures here")
    places = {
        "{clip}": inputs / "clip.mp4",
        "{style}": inputs / "style.png",
        "{text}": tmp_path / "notes.mp4",
        "{adapter}": files[files.index("--controlnet") + 1],
    }
    options = [str(places.get(option, option)) for option in options]
    if name == "style that is weights":
        weights = write_state_dict(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
        options[1] = str(weights)
    output = tmp_path / "out.mp4"
    style = ("--style", inputs / "style.png", "--size", "32x32", "--steps", "1")
    code = run("stylize", output, *style, "--prompt", "x", "--json", *files, *options)
    captured = capsys.readouterr()
    if message is None:
        assert code == 0
        return
    assert code == 2, captured.err
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "a.safetensors") == [
        "notes.mp4"
    ]


REFUSED = {
    "out.mp4 is a folder": ([], "is a folder"),
    "no right to write": (["{closed}/out.mp4"], "cannot be written"),
    "a file for a folder": (["{style}/out.mp4"], "cannot be written: Not a directory"),
    "unknown ending": (["{tmp}/out.xyz"], "out.xyz"),
    "no steps": (["--steps", "0"], "at least 1"),
    "style range": (["--style-range", "0.9:0.1"], "start <= end"),
    "control range": (["--video", "{clip}", "--control-range", "0.9:0.1"], "start <= end"),
    "denoise": (["--video", "{clip}", "--denoise", "0"], "denoise must be above 0"),
    "nan denoise": (["--video", "{clip}", "--denoise", "nan"], "denoise must be above 0"),
    "nan style scale": (["--style-scale", "nan"], "finite"),
    "nan strength": (["--style-strength", "nan"], "finite"),
    "nan control scale": (["--video", "{clip}", "--control-scale", "nan"], "finite"),
    "infinite shift": (["--shift", "inf"], "positive and finite"),
    "seed": (["--seed", str(2**64)], "expected"),
    "style seed": (["--style-seed", str(2**64)], "--style-seed"),
    "tile factor": (["--video", "{clip}", "--tile-factor", "0"], "tile factor"),
    "drop rate": (["--drop-rate", "1.5"], "below 1"),
    "speed of few steps": (["--speed", "fast", "--steps", "4"], "at least 8 steps"),
    "missing style": (["--style", "absent.png"], "absent.png"),
    "missing mask": (["--style-mask", "absent.png"], "absent.png"),
    "weights": (["--style-weight", "1", "--style-weight", "1"], "2 weights"),
    "start frame": (["--video", "{clip}", "--start-frame", "-1"], "at least 0 and 1"),
    "max frames": (["--video", "{clip}", "--max-frames", "0"], "at least 0 and 1"),
    "memory": (["--frames", "4000001", "--size", "4096x4096"], "pass --frames"),
    "memory of a video": (["--video", "{clip}", "--size", "900000x900000"], "pass --size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_known_is_refused_before_any_model_is_loaded(
    name, inputs, tmp_path, capsys, monkeypatch
):
    def load(*args):
        raise AssertionError("a model was asked for")

    monkeypatch.setattr("stylemaster_core.cli.stylize.open_models", load)
    options, message = REFUSED[name]
    places = {
        "{clip}": str(inputs / "clip.mp4"),
        "{style}": str(inputs / "style.png"),
        "{tmp}": str(tmp_path),
        "{closed}": "/proc",
    }
    for key, place in places.items():
        options = [option.replace(key, place) for option in options]
    if options[:1] and not options[0].startswith("--"):
        output = options.pop(0)
    else:
        output = tmp_path / "out.mp4"
    if name == "out.mp4 is a folder":
        output.mkdir()
    style = ("--style", inputs / "style.png", "--size", "32x32", "--overwrite")
    assert run("stylize", output, *style, *options) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_encoder_that_is_missing_is_known_before_any_model_is_loaded(
    inputs, tmp_path, capsys, monkeypatch
):
    def refuse(*args, **options):
        raise UnsupportedHostError("this PyAV has no encoder")

    monkeypatch.setattr("stylemaster_core.data.videos.write_video", refuse)
    options = ("--style", inputs / "style.png", "--video", inputs / "clip.mp4")
    assert run("stylize", tmp_path / "out.mp4", *options, "--models-dir", tmp_path) == 2
    assert "this PyAV has no encoder" in capsys.readouterr().err


def test_a_missing_folder_is_made_and_a_disk_that_fills_up_costs_no_result(
    inputs, files, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "new" / "folder" / "out.png"
    options = ("--size", "32x32", "--style", inputs / "style.png", *QUICK, *files)
    assert run("stylize", output, *options) == 0
    whole = read_image(output)
    output.unlink()
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    replace = writing.publish

    def full(part, path, **options):
        if path.is_relative_to(output.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(part, path, **options)

    monkeypatch.setattr(writing, "publish", full)
    capsys.readouterr()
    assert run("stylize", output, *options) == 2
    message = capsys.readouterr().err
    (rescued,) = kept.glob("stylemaster-*/out.png")
    assert f"{output} cannot be written: No space left on device" in message
    assert f"The result is kept: {rescued}" in message and "Traceback" not in message
    assert np.array_equal(read_image(rescued), whole)
    assert not list(output.parent.iterdir())


def test_existing_output_is_kept(inputs, files, tmp_path, capsys):
    output = tmp_path / "out.png"
    Image.new("RGB", (4, 4)).save(output)
    before = output.read_bytes()
    options = ("--size", "32x32", "--style", inputs / "style.png", *QUICK, *files)
    assert run("stylize", output, *options) == 2
    assert "--overwrite" in capsys.readouterr().err and output.read_bytes() == before
    assert run("stylize", output, *options, "--overwrite") == 0
    assert output.read_bytes() != before


def test_task_without_its_models(inputs, tmp_path, capsys):
    options = ("--size", "32x32", "--models-dir", tmp_path, *QUICK)
    assert run("stylize", tmp_path / "out.mp4", *options, "--style", inputs / "style.png") == 2
    message = capsys.readouterr().err
    assert "--transformer, --vae, --text-encoder" in message  # all of them at once
    assert "stylemaster weights download" in message


def test_missing_library_is_named(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    options = ("--size", "32x32", "--style", inputs / "style.png", "--model", "small-random")
    assert run("stylize", tmp_path / "out.png", *options) == 2
    message = capsys.readouterr().err
    assert "transformers" in message and "[cli]" in message and "Traceback" not in message


def test_reader_that_goes_away():
    command = f"{sys.executable} -m stylemaster_core weights list | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr


def test_info(capsys):
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"] in ("cpu", "cuda", "mps") and facts["packages"]["torch"]
    assert math.isfinite(len(facts["attention"])) and facts["attention"]


def test_results_in_other_formats(inputs, files, tmp_path):
    base = ("--prompt", "x", "--steps", "1", "--style", inputs / "style.png", "--json", *files)
    source, alpha = tmp_path / "in.mov", np.full((3, 32, 32), 255, np.uint8)
    alpha[:, :8] = 0
    times_s = np.array([0, 0.1, 0.7, 0.8])
    write_video(source, demo_clip(3, 32, 32), fps=10, times_s=times_s, alpha=alpha)
    options = ("--video", source, "--keep-alpha")
    assert run("stylize", tmp_path / "out.webm", *options, *base) == 0
    result = read_video(tmp_path / "out.webm", keep_alpha=True)
    assert result.times_s == pytest.approx(times_s, abs=2e-3)
    assert result.alpha[:, 2].max() < 20 and result.alpha[:, 20].min() > 235
    frames = tmp_path / "frames"
    assert run("stylize", frames / "%03d.png", "--video", source, "--fps", "10", *base) == 0
    assert len(list(frames.iterdir())) == 8
    text = ("--size", "32x32", "--frames", "5", "--fps", "24", *base)
    assert run("stylize", tmp_path / "out.mov", *text, "--codec", "prores") == 0
    assert probe_video(tmp_path / "out.mov").fps == 24
    picture = ("--task", "text-to-image", "--size", "32x32", "--quality", "80", *base)
    assert run("stylize", tmp_path / "out.jpg", *picture) == 0
    assert read_image(tmp_path / "out.jpg").shape == (32, 32, 3)
    assert run("stylize", tmp_path / "out.mp4", *options, *base) == 2  # H.264 has no opacity
    assert run("stylize", tmp_path / "out2.mov", *text, "--codec", "vp9") == 2
