"""`--model tiny` in the train verbs: the small model is trained further by its name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from stylemaster_core.cli import main, small_model
from stylemaster_core.cli.train import TRAINERS
from stylemaster_core.data.demo_scene import demo_styles
from stylemaster_core.data.images import write_image
from stylemaster_core.pipelines import tiny
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.tiny import tiny_files
from tests.standin_tiny import write_standin


def run(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_standin(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(autouse=True)
def by_name(folder, monkeypatch):
    def named(*, stylecrafter=False):
        return tiny_files(folder, stylecrafter=stylecrafter)

    monkeypatch.setattr(tiny, "tiny_files", named)
    monkeypatch.setattr(small_model, "tiny_files", named)
    monkeypatch.setattr("stylemaster_core.cli.model_options.tiny_files", named)


@pytest.fixture(scope="module")
def caches(folder, tmp_path_factory):
    """As the documentation makes them: pictures, stills and pairs."""
    place = tmp_path_factory.mktemp("data")
    for name, picture in demo_styles(96).items():
        write_image(place / "pictures" / f"{name}.png", picture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "stylemaster_core.cli.model_options.tiny_files",
            lambda *, stylecrafter=False: tiny_files(folder, stylecrafter=stylecrafter),
        )
        stills = place / "stills.jsonl"
        pictures = (place / "pictures", "--caption", "a picture")
        assert run("data", "still", *pictures, "--out", stills, "--frames", "9") == 0
        small = ("--model", "tiny", "--size", "64x64")
        assert run("data", "encode", *pictures, place / "cache", *small, "--tile") == 0
        assert run("data", "encode", stills, place / "moving", *small, "--frames", "9") == 0
        pairs = (place / "pairs", "--num", "4", "--pictures", place / "pictures", "--size", "128")
        assert run("data", "illusion", *pairs) == 0
        assert run("data", "encode", place / "pairs", place / "encoded", "--model", "tiny") == 0
    return place


def cache_of(trainer, caches):
    kinds = {"global-projection": "encoded", "motion": "moving", "stylecrafter-video": "moving"}
    return caches / kinds.get(trainer, "cache")


# VideoCrafter has no small trained model.
@pytest.mark.parametrize("trainer", [t for t in TRAINERS if not t.startswith("videocrafter")])
def test_every_trainer_goes_on_from_it(trainer, caches, tmp_path):
    model = "tiny-stylecrafter" if trainer.startswith("stylecrafter") else "tiny"
    command = ("train", trainer, "--model", model, "--data", cache_of(trainer, caches))
    options = ("--out", tmp_path / "run", "--steps", 1, "--batch-size", 2, "--no-progress")
    quick = ("--set", "run.validate_every=0", "--set", "run.sample_every=0", "--cpu")
    if trainer == "stylecrafter-video":  # these data hold clips alone
        quick = (*quick, "--set", "stylecrafter.image_share=0")
    assert run(*command, *options, *quick) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert list((tmp_path / "run").glob("*.safetensors"))
    if trainer != "global-projection":
        assert config["flow"]["text_length"] == 24 and config["flow"]["shift"] == 3


def test_the_trained_part_takes_the_place_of_the_shipped(caches, tmp_path):
    command = ("train", "style", "--model", "tiny", "--data", caches / "cache")
    options = ("--out", tmp_path / "run", "--steps", 1, "--batch-size", 2, "--no-progress")
    assert run(*command, *options, "--set", "run.validate_every=0", "--cpu") == 0
    adapter = tmp_path / "run" / "style_adapter.safetensors"
    files = replace(tiny.tiny_files(), adapter=adapter)
    with Models(files, device="cpu").transformer() as model:
        assert model.style_attention is not None


def test_what_does_not_belong_together_is_refused(caches, tmp_path, capsys):
    command = ("--data", caches / "cache", "--out", tmp_path / "run")
    assert run("train", "style", "--model", "tiny-stylecrafter", *command) == 2
    assert "use --model tiny" in capsys.readouterr().err
    assert run("train", "stylecrafter", "--model", "tiny", *command) == 2
    assert "use --model tiny-stylecrafter" in capsys.readouterr().err
    assert run("train", "videocrafter-adapter", "--model", "tiny", *command) == 2
    assert "name the files of VideoCrafter" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_named_takes_its_place(caches, tmp_path, capsys):
    command = ("train", "style", "--model", "tiny", "--data", caches / "cache")
    assert run(*command, "--out", tmp_path / "run", "--base", tmp_path / "missing") == 2
    assert "--base" in capsys.readouterr().err
    assert run(*command, "--out", tmp_path / "run", "--dry-run") == 0
    assert "trainer style" in capsys.readouterr().out
