"""The cache: what it holds, and that nothing bad goes unnoticed."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stylemaster_core.data.cache import CachedDataset, check_cache, hash_models, shard_path
from stylemaster_core.data.cache_writer import CachePlan, Entry, write_cache
from stylemaster_core.data.clips import ClipConfig, choose_size, load_clip, pick_frames
from stylemaster_core.data.content_shuffle import content_shuffle
from stylemaster_core.data.demo_scene import demo_clip, demo_styles
from stylemaster_core.data.encode import (
    EncodeConfig,
    Encoders,
    encode_sample,
    load_pixels,
    sample_bytes,
)
from stylemaster_core.data.gray_tile import cover_resize_frames, gray_tile
from stylemaster_core.data.images import clip_pixels, read_image, write_image
from stylemaster_core.data.samples import Sample
from stylemaster_core.data.videos import read_video, write_video
from stylemaster_core.errors import ConfigError, LayoutError, WeightsError
from stylemaster_core.layouts import frames_to_video
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.small import write_small_models
from stylemaster_core.models.text_encoder import load_text_encoder
from stylemaster_core.models.vae import load_vae
from stylemaster_core.writing import part_path

CONFIG = EncodeConfig(ClipConfig(sizes=((16, 32),), num_frames=5), dtype="float32")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "bay.mp4", demo_clip(9, 36, 64), fps=16)
    write_video(folder / "short.mp4", demo_clip(4, 36, 64), fps=16)
    for name, picture in demo_styles(64).items():
        write_image(folder / f"{name}.png", picture)
    write_image(folder / "tall.png", demo_clip(1, 60, 30)[0])
    (folder / "damaged.mp4").write_bytes((folder / "bay.mp4").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    small = write_small_models(tmp_path_factory.mktemp("models"))
    return {
        "vae": small.vae,
        "text_encoder": small.text_encoder,
        "image_encoder": small.image_encoder,
    }


@pytest.fixture(scope="module")
def encoders(files):
    return Encoders(
        load_vae(files["vae"]),
        load_text_encoder(files["text_encoder"]),
        load_image_encoder(files["image_encoder"]),
    )


# ---------------------------------------------------------------- clips


def test_frames_are_picked_at_the_rate(tmp_path):
    assert pick_frames(5, Fraction(30), 15) == [0, 2, 4, 6, 8]
    assert pick_frames(5, Fraction(24), 16) == [0, 2, 3, 5, 6]
    assert pick_frames(5, Fraction(8), 16) == [0, 1, 1, 2, 2]
    assert pick_frames(3, Fraction(30), None) == [0, 1, 2]
    levels = np.arange(40, dtype=np.uint8) * 6
    frames = np.broadcast_to(levels[:, None, None, None], (40, 32, 32, 3)).copy()
    write_video(tmp_path / "ramp.mp4", frames, fps=48, crf=1)
    config = ClipConfig(sizes=((16, 16),), num_frames=13, fps=16)
    clip = load_clip(Sample("a", tmp_path / "ramp.mp4", ""), config)
    assert clip.frames.shape == (13, 16, 16, 3)
    # Decoding across chunks: every third frame, none twice, none missing.
    assert np.abs(clip.frames.mean((1, 2, 3)) - levels[:37:3]).max() < 3
    assert clip.picture.shape == (32, 32, 3)
    assert abs(clip.picture.mean() - levels[18]) < 3  # the middle one


def test_sizes_are_covered_and_cut(media):
    sizes = ((32, 32), (16, 48), (48, 16))
    assert choose_size((480, 640), sizes) == (32, 32)
    assert choose_size((100, 500), sizes) == (16, 48)
    assert choose_size((500, 100, 3), sizes) == (48, 16)
    config = ClipConfig(sizes=sizes, num_frames=5)
    tall = load_clip(Sample("a", media / "tall.png", ""), config)
    assert tall.frames.shape == (1, 48, 16, 3)
    still = load_clip(Sample("a", media / "tall.png", "", repeat=5), config)
    assert still.frames.shape[0] == 5
    assert (still.frames == tall.frames).all()
    assert np.array_equal(still.picture, read_image(media / "tall.png"))


def test_short_and_damaged_clips(media):
    config = ClipConfig(sizes=((16, 32),), num_frames=9)
    with pytest.raises(LayoutError, match=r"short.mp4 has 4 frames at 16.*9 are wanted"):
        load_clip(Sample("a", media / "short.mp4", ""), config)
    trimmed = load_clip(Sample("a", media / "short.mp4", ""), replace(config, short="trim"))
    assert trimmed.frames.shape == (1, 16, 32, 3)
    with pytest.raises(LayoutError, match=r"damaged.mp4"):
        load_clip(Sample("a", media / "damaged.mp4", ""), config)
    for bad in ({"num_frames": 8}, {"sizes": ()}, {"sizes": ((20, 32),)}, {"fps": -1.0}):
        with pytest.raises(ConfigError):
            ClipConfig(**bad)


# ---------------------------------------------------------------- encoding


def test_a_sample_holds_what_the_encoders_say(media, encoders):
    sample = Sample("bay", media / "bay.mp4", "a boat, in a bay", media / "neon.png", tile=True)
    made = encode_sample(sample, load_pixels(sample, CONFIG), encoders, CONFIG)
    frames = cover_resize_frames(read_video(media / "bay.mp4").frames[:5], 16, 32)
    assert torch.equal(made["latents"], encoders.vae.encode(frames_to_video(frames))[0])
    tile = encoders.vae.encode(gray_tile(frames, 16, 32)[None])[0]
    assert torch.equal(made["control_latents"], tile)
    assert not torch.equal(tile, made["latents"])
    text = encoders.text_encoder.encode([sample.caption])[0]
    length = len(made["text"])
    assert length == len(["a", "boat", ",", "in", "a", "bay", "</s>"])
    assert torch.equal(made["text"], text[:length]) and not text[length:].any()
    style = read_image(media / "neon.png")
    shuffled = content_shuffle(style, seed=zlib.crc32(b"0 bay"))
    for name, picture in (("image_embeds", style), ("shuffled_embeds", shuffled)):
        expected = encoders.image_encoder.encode(clip_pixels(picture)[None])
        assert torch.allclose(made[name], expected.image_embeds[0], atol=1e-5)
        if name == "image_embeds":
            assert torch.allclose(made["patch_features"], expected.patch_features[0], atol=1e-5)
    assert not torch.allclose(made["image_embeds"], made["shuffled_embeds"])


def test_own_picture_dtype_and_finite(media, encoders):
    own = Sample("neon", media / "neon.png", "")
    other = replace(own, media=media / "mosaic.png", style=media / "neon.png")
    config = replace(CONFIG, dtype="bfloat16")
    first, second = (
        encode_sample(s, load_pixels(s, config), encoders, config) for s in (own, other)
    )
    assert torch.equal(first["image_embeds"], second["image_embeds"])
    assert not torch.equal(first["latents"], second["latents"])
    assert {value.dtype for value in first.values()} == {torch.bfloat16}
    assert len(first["text"]) == 1  # the end token of an empty caption
    assert "control_latents" not in first

    class Loud:
        def encode(self, prompts):
            return torch.full((1, 4, 8), 1e6)

    half = replace(CONFIG, dtype="float16")
    with pytest.raises(LayoutError, match="text hold"):
        encode_sample(own, load_pixels(own, half), encoders._replace(text_encoder=Loud()), half)


# ---------------------------------------------------------------- shards


class Counted:
    """Tensors made of an item's number, and how often they were made."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self.bad: set[int] = set()
        self.size: Callable[[int], tuple[int, ...]] = lambda item: (16, 1, 2, 4)

    def load(self, item):
        if item in self.bad:
            raise LayoutError(f"clip_{item}.mp4 is damaged")
        return item

    def encode(self, item, loaded):
        assert item == loaded
        self.calls[item] += 1
        generator = torch.Generator().manual_seed(item)
        return {
            "latents": torch.randn(self.size(item), generator=generator),
            "text": torch.randn(item % 3 + 1, 8, generator=generator),
        }


@pytest.fixture
def counted():
    return Counted()


def plan_of(counted, numbers=range(10), **changes):
    options = {
        "kind": "samples",
        "items": [(Entry(f"s{i}", f"clip_{i}.mp4", f"clip {i}"), i) for i in numbers],
        "load": counted.load,
        "encode": counted.encode,
        "hashes": {"vae": "aa", "text_encoder": "bb"},
        "settings": {"sizes": ((16, 32),), "seed": 0},
        "shard_size": 4,
    }
    return CachePlan(**(options | changes))


def test_written_and_read(counted, tmp_path):
    seen = []
    report = write_cache(tmp_path, plan_of(counted), on_sample=lambda *event: seen.append(event))
    assert report == (10, 0, [], True)
    assert seen == [(f"clip_{i}.mp4", None) for i in range(10)]
    data = CachedDataset(tmp_path)
    assert len(data) == 10 and data.ids == [f"s{i}" for i in range(10)]
    assert data.hashes == {"vae": "aa", "text_encoder": "bb"}
    assert data.shapes == {"latents": (16, 1, 2, 4), "text": (None, 8)}
    data.require("latents", "text")
    with pytest.raises(ConfigError, match="no control_latents.*with gray tiles"):
        data.require("latents", "control_latents")
    for i in (9, 0, 5):
        for key, value in counted.encode(i, i).items():
            assert torch.equal(data[i][key], value)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[3]["text"], data[3]["text"])
    assert check_cache(tmp_path) == []
    with pytest.raises(IndexError):
        data[10]


def test_features_of_the_empty_prompt(counted, tmp_path):
    made = []

    def null_text():
        made.append(torch.full((1, 8), 2.0))
        return made[-1]

    assert write_cache(tmp_path, plan_of(counted)).complete
    assert CachedDataset(tmp_path).null_text is None
    # A cache that was made without them gets them, and its samples are left alone.
    plan = plan_of(counted, null_text=null_text)
    assert write_cache(tmp_path, plan).encoded == 0
    assert write_cache(tmp_path, plan).encoded == 0 and len(made) == 1
    data = CachedDataset(tmp_path)
    assert torch.equal(data.null_text, made[0])
    assert torch.equal(pickle.loads(pickle.dumps(data)).null_text, made[0])
    assert check_cache(tmp_path) == []
    path = tmp_path / "null_text.safetensors"
    whole = path.read_bytes()
    for damage in (whole[:-1] + b"?", None):
        path.unlink() if damage is None else path.write_bytes(damage)
        problems = check_cache(tmp_path)
        assert len(problems) == 1 and "null_text" in problems[0]
        with pytest.raises(ConfigError, match=r"null_text.*encode.*again"):
            CachedDataset(tmp_path)
        write_cache(tmp_path, plan)
        assert path.read_bytes() == whole and check_cache(tmp_path) == []
    assert len(made) == 3
    # Other samples of the same models keep them, other models do not.
    write_cache(tmp_path, plan_of(counted, range(11), null_text=null_text), overwrite=True)
    assert len(made) == 3
    other = {"hashes": {"vae": "aa", "text_encoder": "cc"}}
    write_cache(tmp_path, plan_of(counted, **other, null_text=null_text), overwrite=True)
    assert len(made) == 4 and torch.equal(CachedDataset(tmp_path).null_text, made[0])


def test_two_processes_encode_the_empty_prompt_once(counted, tmp_path):
    made = []
    plan = plan_of(counted, null_text=lambda: made.append(0) or torch.ones(1, 8))
    for number in (1, 0):
        write_cache(tmp_path, plan, process=(number, 2))
    assert len(made) == 1 and torch.equal(CachedDataset(tmp_path).null_text, torch.ones(1, 8))


def test_processes_share_the_shards(counted, tmp_path):
    write_cache(tmp_path / "one", plan_of(counted))
    counted.calls.clear()
    plan = plan_of(counted)
    first = write_cache(tmp_path / "two", plan, process=(1, 2))
    assert first.encoded == 4 and not first.complete and set(counted.calls) == {4, 5, 6, 7}
    with pytest.raises(ConfigError, match="unfinished"):
        CachedDataset(tmp_path / "two")
    assert "unfinished" in check_cache(tmp_path / "two")[0]
    second = write_cache(tmp_path / "two", plan, process=(0, 2))
    assert second.encoded == 6 and second.complete
    assert max(counted.calls.values()) == 1
    one, two = CachedDataset(tmp_path / "one"), CachedDataset(tmp_path / "two")
    assert one.ids == two.ids
    for i in range(10):
        assert torch.equal(one[i]["latents"], two[i]["latents"])
    for index in range(3):
        same = (shard_path(tmp_path / name, index).read_bytes() for name in ("one", "two"))
        assert next(same) == next(same)
    with pytest.raises(ConfigError, match="process 2 of 2"):
        write_cache(tmp_path / "two", plan, process=(2, 2))


def test_the_shuffle_takes_seeds_of_64_bits():
    picture = demo_styles(64)["mosaic"]
    shuffled = [
        content_shuffle(picture, seed=seed) for seed in (7, 7 + 2**32, 7 + 2**63, 2**64 - 1)
    ]
    for number, first in enumerate(shuffled):
        assert not any(np.array_equal(first, second) for second in shuffled[number + 1 :])
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match="seed of the content shuffle"):
            content_shuffle(picture, seed=seed)


def test_killed_at_anys_after_a_kill(counted, tmp_path):
    class Killed(BaseException):
        pass

    def encode(item, loaded):
        if item == 6:
            raise Killed
        return counted.encode(item, loaded)

    with pytest.raises(Killed):
        write_cache(tmp_path, plan_of(counted, encode=encode))
    assert not list(tmp_path.glob("*.tmp")) and not shard_path(tmp_path, 1).exists()
    with (tmp_path / "shards.jsonl").open("a") as stream:
        # Of a process with other samples that had not noticed yet.
        stale = {"shard": 2, "fingerprint": "old", "samples": [], "bad": []}
        stream.write(json.dumps(stale) + '\n{"shard": 1, "fing')
    report = write_cache(tmp_path, plan_of(counted))
    assert report.encoded == 6 and report.skipped == 4 and report.complete
    assert [counted.calls[i] for i in range(10)] == [1] * 4 + [2] * 2 + [1] * 4
    assert len(CachedDataset(tmp_path)) == 10


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_shard_is_found_and_made_again(counted, tmp_path, damage):
    write_cache(tmp_path, plan_of(counted))
    path = shard_path(tmp_path, 1)
    whole = path.read_bytes()
    if damage == "flip":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(whole[:-1])
    else:
        path.unlink()
    problems = check_cache(tmp_path)
    assert len(problems) == 1 and "shard_00001" in problems[0]
    if damage != "flip":
        with pytest.raises(ConfigError, match="shard_00001"):
            CachedDataset(tmp_path)
    counted.calls.clear()
    report = write_cache(tmp_path, plan_of(counted))
    assert report.encoded == 4 and set(counted.calls) == {4, 5, 6, 7}
    assert path.read_bytes() == whole and check_cache(tmp_path) == []


def test_bad_samples_are_named_and_not_replaced(counted, tmp_path):
    counted.bad = {2, 8, 9}
    report = write_cache(tmp_path, plan_of(counted))
    assert report.encoded == 7 and report.complete
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert bad == report.bad
    assert [(b["id"], b["path"]) for b in bad] == [(f"s{i}", f"clip_{i}.mp4") for i in (2, 8, 9)]
    assert "clip_2.mp4 is damaged" in bad[0]["error"]
    data = CachedDataset(tmp_path)
    assert data.ids == [f"s{i}" for i in (0, 1, 3, 4, 5, 6, 7)]
    assert torch.equal(data[2]["latents"], counted.encode(3, 3)["latents"])
    # Bad ones are not tried again unless asked.
    counted.bad = set()
    assert write_cache(tmp_path, plan_of(counted)).encoded == 0
    report = write_cache(tmp_path, plan_of(counted), retry_bad=True)
    assert report.encoded == 6 and report.bad == []
    assert len(CachedDataset(tmp_path)) == 10
    assert not (tmp_path / "bad.jsonl").exists()


def test_all_bad_or_none_given(counted, tmp_path):
    counted.bad = set(range(10))
    write_cache(tmp_path, plan_of(counted))
    with pytest.raises(ConfigError, match="all were bad"):
        CachedDataset(tmp_path)
    with pytest.raises(ConfigError, match="empty"):
        write_cache(tmp_path / "none", plan_of(counted, numbers=[]))
    with pytest.raises(ConfigError, match="no manifest"):
        CachedDataset(tmp_path / "none")


WRITER = """
import sys, time, torch
from pathlib import Path
from stylemaster_core.data.cache_writer import CachePlan, Entry, write_cache

def encode(item, loaded):
    time.sleep(0.002)
    return {"latents": torch.full((16, 1, 64, 64), float(item))}

items = [(Entry(f"s{i}", f"clip_{i}.mp4", f"clip {i}"), i) for i in range(300)]
plan = CachePlan("samples", items, lambda item: item, encode, {}, {}, shard_size=3)
number, count = int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
write_cache(Path(sys.argv[1]), plan, process=(number, count))
"""


def test_killed_at_any_moment_by_two_processes_at_once(tmp_path):
    """SIGKILL while two processes write; what is there is whole, and the rest follows."""

    cache = tmp_path / "cache"

    def start_both():
        both = []
        for number in range(2):
            command = [sys.executable, "-c", WRITER, str(cache), str(number), "2"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            both.append(subprocess.Popen(command, text=True, **pipes))
        for process in both:
            process.stdout.readline()
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        return both

    def close(process):
        process.stdin.close()
        process.stdout.close()
        return process.wait(timeout=120)

    both = start_both()
    while not (cache / "shards.jsonl").exists():
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.2))
    for process in both:
        process.kill()
    assert [close(process) for process in both] == [-signal.SIGKILL] * 2
    assert 0 < len((cache / "shards.jsonl").read_text().splitlines()) < 100
    for path in cache.glob("shard_*.safetensors"):
        assert len(load_file(path)) == 3
    for name in ("shard_00099.safetensors", "manifest.json"):
        part = part_path(cache / name)
        owner = part.name.replace(f"-{os.getpid()}-", f"-{both[0].pid}-")
        part.with_name(owner).write_text("what a kill may leave")
    assert [close(process) for process in start_both()] == [0, 0]
    assert not [path.name for path in cache.iterdir() if ".part" in path.name]
    data = CachedDataset(cache)
    assert [data[i]["latents"].mean().item() for i in range(300)] == list(range(300))
    assert check_cache(cache) == []
    manifest = json.loads((cache / "manifest.json").read_text())
    assert [record["shard"] for record in manifest["shards"]] == list(range(100))


CHANGES = {
    "models": ({"hashes": {"vae": "cc", "text_encoder": "bb"}}, "another vae"),
    "settings": ({"settings": {"sizes": ((16, 32),), "seed": 1}}, "seed 0, now 1"),
    "shard size": ({"shard_size": 5}, "shard_size 4, now 5"),
    "kind": ({"kind": "pairs"}, "pairs"),
    "samples": ({"numbers": range(11)}, "10 samples, now 11"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_a_cache_of_something_else_is_not_mixed_or_overwritten(counted, tmp_path, change, said):
    write_cache(tmp_path, plan_of(counted))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=said):
        write_cache(tmp_path, plan_of(counted, **change))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    counted.calls.clear()
    report = write_cache(tmp_path, plan_of(counted, **change), overwrite=True)
    # Samples that were added cost their own shard only.
    assert report.encoded == (3 if "numbers" in change else 10)
    assert report.complete and check_cache(tmp_path) == []


def test_fewer_samples_leave_no_shard_behind(counted, tmp_path):
    write_cache(tmp_path, plan_of(counted))
    write_cache(tmp_path, plan_of(counted, numbers=range(4)), overwrite=True)
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == [
        "shard_00000.safetensors"
    ]
    assert len(CachedDataset(tmp_path)) == 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        write_cache(tmp_path / "other", plan_of(counted), overwrite=True)


def test_mixed_sizes(counted, tmp_path):
    counted.size = lambda item: (16, 1, 2, 4) if item < 7 else (16, 2, 4, 4)
    write_cache(tmp_path, plan_of(counted))
    with pytest.raises(ConfigError, match=r"\[16, 1, 2, 4\]: 7, \[16, 2, 4, 4\]: 3"):
        CachedDataset(tmp_path)
    data = CachedDataset(tmp_path, bucket=True)
    assert data.buckets == {(16, 1, 2, 4): list(range(7)), (16, 2, 4, 4): [7, 8, 9]}
    assert data.shapes["latents"] == (16, None, None, 4)
    with pytest.raises(ConfigError, match="pairs"):
        CachedDataset(tmp_path, kind="pairs")


def test_samples_that_hold_different_tensors(counted, tmp_path):
    def encode(item, loaded):
        tensors = counted.encode(item, loaded)
        return tensors | {"control_latents": tensors["latents"]} if item else tensors

    write_cache(tmp_path, plan_of(counted, encode=encode))
    with pytest.raises(ConfigError, match="control_latents"):
        CachedDataset(tmp_path)


def test_other_models(counted, files, tmp_path):
    hashes = hash_models(files)
    assert all(len(value) == 64 for value in hashes.values())
    write_cache(tmp_path / "cache", plan_of(counted, hashes=hashes))
    data = CachedDataset(tmp_path / "cache")
    data.check_encoders({"vae": files["vae"], "image_encoder": files["image_encoder"]})
    other = write_small_models(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="another image encoder"):
        data.check_encoders({"vae": files["vae"], "image_encoder": other.image_encoder})
    # A folder counts by its content, not by its place.
    shutil.copytree(files["image_encoder"], tmp_path / "moved")
    data.check_encoders({"image_encoder": tmp_path / "moved"})
    (tmp_path / "void").mkdir()
    with pytest.raises(WeightsError, match="void"):
        hash_models({"vae": tmp_path / "void"})


def test_too_little_disk(counted, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    write_cache(tmp_path / "small", plan_of(counted, bytes_of=lambda item: 100))
    with pytest.raises(ConfigError, match="free"):
        write_cache(tmp_path / "large", plan_of(counted, bytes_of=lambda item: 101))
    assert sum(counted.calls.values()) == 10
    clip, still = Sample("a", tmp_path / "a.mp4", ""), Sample("b", tmp_path / "b.png", "")
    config = EncodeConfig()
    assert sample_bytes(clip, config) == 16 * 21 * 60 * 104 * 2
    assert sample_bytes(still, replace(config, tile=True, dtype="float32")) == 16 * 60 * 104 * 8


def test_damaged_manifest(counted, tmp_path):
    write_cache(tmp_path, plan_of(counted))
    (tmp_path / "manifest.json").write_text('{"format": "stylemaster-cache-0"}')
    with pytest.raises(ConfigError, match="stylemaster-cache-1"):
        CachedDataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        CachedDataset(tmp_path)
