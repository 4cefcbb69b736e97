"""`stylemaster data` as a user runs it, on small random models."""

import argparse
import json

import numpy as np
import pytest
import torch

from stylemaster_core.cli.data import add_parser
from stylemaster_core.data.cache import CachedDataset, shard_path
from stylemaster_core.data.demo_scene import demo_clip, demo_styles
from stylemaster_core.data.images import read_image, write_image
from stylemaster_core.data.pairs import read_pairs
from stylemaster_core.data.samples import read_samples
from stylemaster_core.data.videos import write_video
from stylemaster_core.errors import ConfigError, StyleMasterError
from stylemaster_core.models.small import write_small_models
from stylemaster_core.models.text_encoder import load_text_encoder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    small = write_small_models(tmp_path_factory.mktemp("models"))
    return [
        *("--vae", str(small.vae)),
        *("--text-encoder", str(small.text_encoder)),
        *("--image-encoder", str(small.image_encoder)),
    ]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for index in range(3):
        clip = demo_clip(9, 32, 48)[:, :, :: 1 if index % 2 else -1]
        write_video(folder / f"clip_{index}.mp4", clip, fps=16)
        (folder / f"clip_{index}.txt").write_text(f"a painting of boat {index}")
    (folder / "pictures").mkdir()
    for name, picture in demo_styles(64).items():
        write_image(folder / "pictures" / f"{name}.png", picture)
        (folder / "pictures" / f"{name}.txt").write_text(name)
    return folder


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(dest="command"))
    args = parser.parse_args(["data", *map(str, arguments)])
    return args.run(args)


def answer(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


SMALL = ("--size", "32x16", "--frames", "5", "--shard-size", "2")


def test_encode_folder_check_and_repair(media, models, tmp_path, capsys):
    out = tmp_path / "cache"
    command = ("encode", media, out, *SMALL, "--strip-style-words", *models)
    (media / "clip_1b.mp4").write_bytes(b"no video")
    (media / "clip_1b.txt").write_text("broken")
    report = answer(capsys, *command)
    (media / "clip_1b.mp4").unlink()
    assert report["encoded"] == 6 and report["skipped"] == 0 and report["complete"]
    assert [bad["id"] for bad in report["bad"]] == ["clip_1b.mp4"]
    data = CachedDataset(out, bucket=True)  # clips and pictures
    assert data.ids[:3] == ["clip_0.mp4", "clip_1.mp4", "clip_2.mp4"]
    assert data[0]["latents"].shape == (16, 2, 2, 4) and data[3]["latents"].shape == (16, 1, 2, 4)
    assert data[0]["patch_features"].shape == (257, 80)
    assert data[0]["image_embeds"].shape == data[0]["shuffled_embeds"].shape == (48,)
    assert len(data[0]["text"]) == len(["boat", "0", "</s>"])
    assert data[0]["latents"].dtype == torch.float16
    encoded = load_text_encoder(models[models.index("--text-encoder") + 1]).encode([""])[0]
    assert data.null_text is not None and data.null_text.dtype == torch.float16
    assert torch.equal(data.null_text, encoded[:1].half()) and not encoded[1:].any()
    assert run("check", out) == 0
    whole = shard_path(out, 0).read_bytes()
    shard_path(out, 0).write_bytes(whole[:-2] + b"??")
    capsys.readouterr()
    assert run("check", out, "--json") == 1
    assert "shard_00000" in json.loads(capsys.readouterr().out)["problems"][0]
    (media / "clip_1b.mp4").write_bytes(b"no video")
    report = answer(capsys, *command)
    (media / "clip_1b.mp4").unlink()
    (media / "clip_1b.txt").unlink()
    assert report["encoded"] == 2 and report["skipped"] == 5
    assert shard_path(out, 0).read_bytes() == whole


def test_still_and_tile_tables(media, models, tmp_path, capsys):
    still, tile = tmp_path / "still.jsonl", tmp_path / "tile.jsonl"
    assert (
        answer(capsys, "still", media / "pictures", "--out", still, "--frames", 5)["samples"] == 3
    )
    assert run("tile", still, "--out", tile) == 0
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob("*.mp4"))
    samples = read_samples(tile)
    assert all(sample.tile and sample.repeat == 5 for sample in samples)
    with pytest.raises(ConfigError, match="exists"):
        run("tile", still, "--out", tile)
    assert run("tile", still, "--out", tile, "--overwrite") == 0
    assert run("encode", tile, tmp_path / "cache", *SMALL, *models) == 0
    data = CachedDataset(tmp_path / "cache")
    assert data.shapes["latents"] == data.shapes["control_latents"] == (16, 2, 2, 4)
    picture = read_image(media / "pictures" / "neon.png")
    assert data.ids[1].endswith("neon.png") and picture.shape == (64, 64, 3)


def test_pairs_of_pictures_and_their_cache(media, models, tmp_path, capsys):
    pairs = tmp_path / "pairs"
    command = ("illusion", pairs, "--pictures", media / "pictures", "--size", 32, "--num", 6)
    assert answer(capsys, *command, "--process", "1/2")["kept"] == 3
    assert answer(capsys, *command) == {
        "folder": str(pairs),
        "kept": 3,
        "rejected": 0,
        "done_earlier": 3,
    }
    assert run("check", pairs) == 0
    assert run("encode", pairs, tmp_path / "cache", *models) == 0
    data = CachedDataset(tmp_path / "cache", kind="pairs")
    assert len(data) == 6 and data.shapes == {"first_embeds": (48,), "second_embeds": (48,)}
    assert len(set(data.groups)) == 3
    assert set(data.hashes) == {"image_encoder"}
    with pytest.raises(ConfigError, match="cache of pairs"):
        CachedDataset(tmp_path / "cache")
    second = read_pairs(pairs)[2].second
    write_image(second, np.zeros((32, 32, 3), np.uint8), overwrite=True)
    capsys.readouterr()
    assert run("check", pairs) == 1
    assert "000002_b.png" in capsys.readouterr().out
    assert run("encode", pairs, tmp_path / "again", *models) == 0
    assert len(CachedDataset(tmp_path / "again", kind="pairs")) == 5


BAD = {
    "no source of pairs": (["illusion", "{tmp}/p"], "--base"),
    "two sources": (["illusion", "{tmp}/p", "--base", "x", "--pictures", "y"], "one of the two"),
    "no such view": (
        ["illusion", "{tmp}/p", "--pictures", "{pictures}", "--views", "inside-out"],
        "inside-out",
    ),
    "size of pairs": (["illusion", "{tmp}/p", "--pictures", "{pictures}", "--size", "30"], "30"),
    "no pairs": (["illusion", "{tmp}/p", "--pictures", "{pictures}", "--num", "0"], "at least 1"),
    "no pictures": (["illusion", "{tmp}/p", "--pictures", "{tmp}"], "no pictures"),
    "pipeline": (["illusion", "{tmp}/p", "--base", "{tmp}"], "diffusers pipeline"),
    "still videos": (["still", "{media}", "--out", "{tmp}/t.jsonl"], "videos"),
    "still frames": (["still", "{pictures}", "--out", "{tmp}/t.jsonl", "--frames", "6"], "4n"),
    "table's name": (["tile", "{pictures}", "--out", "{tmp}/t.csv"], "jsonl"),
    "empty dataset": (["encode", "{tmp}", "{tmp}/c"], "empty"),
    "absent dataset": (["encode", "{tmp}/absent", "{tmp}/c"], "absent"),
    "size": (["encode", "{media}", "{tmp}/c", "--size", "30x16"], "30x16"),
    "frames": (["encode", "{media}", "{tmp}/c", "--frames", "6"], "4n"),
    "all bad": (
        ["encode", "{media}", "{tmp}/c", "--size", "16x16", "--frames", "81", "--fps", "0"],
        None,
    ),
    "no cache": (["check", "{tmp}"], "no manifest"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD)
def test_bad_input(media, models, tmp_path, arguments, said):
    places = {"tmp": tmp_path, "media": media, "pictures": media / "pictures"}
    arguments = [argument.format(**places) for argument in arguments]
    if arguments[0] == "encode":
        arguments += models
    if said is None:  # clips too short are left out, pictures are not
        assert run(*arguments) == 0
        assert len(CachedDataset(tmp_path / "c")) == 3
        return
    with pytest.raises(StyleMasterError, match=said):
        run(*arguments)
    assert not (tmp_path / "c").exists()


def test_nothing_can_be_encoded(media, models, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ConfigError, match=r"no sample.*a\.mp4"):
        run("encode", tmp_path, tmp_path / "cache", "--caption", "x", *SMALL, *models)


def test_min_score_needs_a_text_tower(tmp_path, models):
    with pytest.raises(StyleMasterError, match="clip-text"):
        run("illusion", tmp_path / "p", "--base", tmp_path, "--min-score", "0.2", *models)
