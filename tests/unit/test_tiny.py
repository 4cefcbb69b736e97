"""The small model by its name, from the command line."""

from __future__ import annotations

import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from stylemaster_core import WeightsError
from stylemaster_core.cli import main
from stylemaster_core.data.demo_pictures import painted_styles, photograph_clip
from stylemaster_core.data.demo_scene import demo_clip, demo_styles
from stylemaster_core.data.images import read_image, write_image
from stylemaster_core.data.videos import read_video, write_video
from stylemaster_core.models.style_tokens import load_style
from stylemaster_core.pipelines import models as models_module
from stylemaster_core.pipelines import tiny
from stylemaster_core.pipelines.encode_style import encode_style
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.stylize import StylizeConfig, stylize
from stylemaster_core.pipelines.tiny import tiny_files, tiny_settings
from tests.standin_tiny import shipped_or_standin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shipped_or_standin(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def by_name(folder, monkeypatch):
    monkeypatch.setattr(tiny, "tiny_files", lambda: tiny_files(folder))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    write_video(place / "in.mp4", demo_clip(5, 48, 64), fps=16)
    write_image(place / "style.png", demo_styles(128)["mosaic"])
    return place


def run(*words) -> int:
    return main([str(word) for word in words])


def test_what_is_missing_is_named_and_how_to_make_it(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "vae.safetensors").unlink()
    (broken / "image_encoder" / "config.json").unlink()
    with pytest.raises(WeightsError) as error:
        tiny_files(broken)
    for words in ("vae.safetensors", "image_encoder/config.json", "make tiny", str(broken)):
        assert words in str(error.value)
    assert "controlnet" not in str(error.value)


def test_it_is_found_by_name_and_equals_the_pipeline(folder, by_name, inputs, tmp_path):
    options = ("--video", inputs / "in.mp4", "--style", inputs / "style.png", "--prompt", "a boat")
    saved = tmp_path / "style.safetensors"
    assert run("encode-style", saved, *options[2:], "--model", "tiny") == 0
    out = tmp_path / "out.mp4"
    assert run("stylize", out, *options[:2], "--style", saved, *options[4:], "--model", "tiny") == 0
    clip = read_video(inputs / "in.mp4").frames
    files = vars(tiny_files(folder)) | {"motion_adapter": None}
    models = Models(type(tiny_files(folder))(**files), device="cpu")
    style = encode_style(models, demo_styles(128)["mosaic"], "a boat").style
    torch.testing.assert_close(load_style(saved).tokens, style.tokens)
    config = StylizeConfig("video-to-video", prompt="a boat", **tiny_settings(clip))
    frames = stylize(models, style, config, frames=clip).frames
    written = tmp_path / "again.mp4"
    write_video(written, frames, fps=16)
    # Sums depend on where in memory the numbers lie, and the video's codec on each of them.
    difference = read_video(out).frames.astype(int) - read_video(written).frames
    assert abs(difference).mean() < 0.5


def test_options_take_the_place_of_its_files_and_settings(by_name, inputs, tmp_path, capsys):
    words = ("--video", inputs / "in.mp4", "--style", inputs / "style.png", "--steps", "1")
    options = (*words, "--model", "tiny", "--json")
    assert run("stylize", tmp_path / "a.mp4", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["height"], report["width"], report["frames"]) == (48, 64, 5)
    assert run("stylize", tmp_path / "b.mp4", *options, "--text-scale", "1") == 0
    assert run("stylize", tmp_path / "c.mp4", *options, "--motion-scale", "1") == 0
    videos = [read_video(tmp_path / f"{name}.mp4").frames.astype(int) for name in "abc"]
    assert all(abs(video - videos[0]).max() > 8 for video in videos[1:])
    assert run("stylize", tmp_path / "d.mp4", *options, "--vae", inputs / "style.png") == 2
    assert "style.png" in capsys.readouterr().err


def test_sizes_suit_it():
    assert tiny_settings(demo_clip(1, 48, 64))["size"] == (48, 64)
    assert tiny_settings(demo_clip(1, 90, 160))["size"] == (96, 160)
    assert tiny_settings(demo_clip(1, 540, 960))["size"] == (256, 448)
    assert tiny_settings(demo_clip(1, 960, 540))["size"] == (448, 256)
    assert "num_frames" not in tiny_settings(still=True)


def test_demo(by_name, tmp_path, capsys):
    out = tmp_path / "demo"
    assert run("demo", "--out", out, "--frames", "5", "--steps", "1") == 0
    said = capsys.readouterr().out
    for words in ("luma correlation", "--model tiny", "weights download", "make comfy"):
        assert words in said
    results = ["impasto", "ink_wash", "stained_glass"]
    assert all(f"\n{name} " in said for name in results)
    names = sorted(path.stem for path in out.iterdir() if path.suffix == ".mp4")
    assert names == sorted(["boat", "photograph", *results])
    assert read_video(out / "ink_wash.mp4").frames.shape == (5, 256, 256, 3)
    sheet = read_image(out / "contact_sheet.png")
    assert sheet.shape[1] == 5 * 260  # a picture and four frames
    assert run("demo", "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_the_photograph_moves_and_the_painted_styles_differ():
    clip = photograph_clip(3, 48, 64)
    assert clip.shape == (3, 48, 64, 3) and clip.dtype == np.uint8
    assert all(abs(a.astype(int) - b).mean() > 3 for a, b in itertools.pairwise(clip))
    styles = painted_styles(64)
    assert {picture.shape for picture in styles.values()} == {(64, 64, 3)}
    chroma = {name: np.ptp(picture.astype(int), -1).mean() for name, picture in styles.items()}
    assert chroma["ink_wash"] < 30 < min(chroma["impasto"], chroma["stained_glass"])
    assert all((painted_styles(64)[name] == picture).all() for name, picture in styles.items())


def test_demo_without_its_photograph_names_the_package(tmp_path, monkeypatch, capsys, by_name):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    assert run("demo", "--out", tmp_path / "demo") == 2
    assert "stylemaster[demo]" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_demo_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "tiny_files", lambda: tiny_files(tmp_path))
    assert run("demo", "--out", tmp_path / "demo") == 2
    assert "make tiny" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_garbage_is_collected_after_large_models_alone(monkeypatch):
    collected = []
    monkeypatch.setattr(models_module.gc, "collect", lambda: collected.append(1))
    models = Models(tiny_files(), device="cpu")
    for limit, times in ((models_module.GARBAGE_BYTES, 0), (0, 1)):
        monkeypatch.setattr(models_module, "GARBAGE_BYTES", limit)
        with models.vae():
            pass
        assert len(collected) == times
