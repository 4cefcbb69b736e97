"""Every format that is read: how to make a good file of it, and its reader. One entry each."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from stylemaster_core.data.cache import CachedDataset
from stylemaster_core.data.captions import read_table
from stylemaster_core.data.images import read_image, write_image
from stylemaster_core.data.pairs import NewPair, make_pairs, open_pair_folder, read_pairs
from stylemaster_core.data.views import View
from stylemaster_core.metrics.perceptual import load_csd
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.small import draw_weights
from stylemaster_core.models.style_tokens import Style, load_style, save_style
from stylemaster_core.models.text_encoder import load_text_encoder
from stylemaster_core.models.vae import load_vae
from stylemaster_core.pipelines.models import ModelFiles, Models
from stylemaster_core.queue.journal import read_journal
from stylemaster_core.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from stylemaster_core.training.config import PRESETS, config_to_dict, read_config
from stylemaster_core.training.stats import Stats, read_stats
from stylemaster_core.weights.files import read_keys, read_state_dict, write_state_dict
from stylemaster_core.weights.manifest import MANIFEST_PATH, load_manifest
from stylemaster_core.weights.shapes import WanSizes, expected_base_shapes
from tests.fuzz.harm import BYTES, STRUCTURE


class Format(NamedTuple):
    """A format.

    Attributes:
        make: writes a good file or folder below the given folder, and returns it.
        read: its reader.
        ways: of damage; both kinds by default.
        checked: whether the reader promises that all numbers are finite.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    ways: tuple[str, ...] = (*BYTES, *STRUCTURE)
    checked: bool = False


def _weights(folder: Path, name: str = "w.safetensors") -> Path:
    tensors = {"a.weight": torch.randn(4, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    path = folder / name
    if name.endswith(".safetensors"):
        return write_state_dict(path, tensors, {"note": "x"})
    torch.save(tensors, path, _use_new_zipfile_serialization=name != "old.pt")
    return path


def _style(folder: Path) -> Path:
    return save_style(folder / "s.safetensors", Style(torch.randn(1, 3, 4), {"adapter": "a"}))


@functools.cache
def _small() -> Any:
    """Tiny models, kept for the whole run."""
    import tempfile

    from stylemaster_core.models.small import write_small_models

    return write_small_models(tempfile.mkdtemp(prefix="fuzz-small-"))


def _transformer(folder: Path) -> Path:
    sizes = WanSizes(width=128, ffn_width=8, num_blocks=1, text_width=8, freq_width=8)
    return write_state_dict(folder / "t.safetensors", draw_weights(expected_base_shapes(sizes), 0))


def _borrowed(name: str) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        models = Models(ModelFiles(**{name: path}), device="cpu", dtype="float32")
        with getattr(models, name)() as model:
            return model

    return read


def _copied(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return getattr(_small(), name)

    return make


def _csd(folder: Path) -> Path:
    weights = read_state_dict(_small().image_encoder / "model.safetensors").tensors
    tensors = {f"backbone.{k}": v for k, v in weights.items() if not k.startswith("visual_")}
    style = torch.ones(weights["visual_projection.weight"].shape).T.contiguous()
    return write_state_dict(folder / "csd.safetensors", tensors | {"last_layer_style": style})


def _cache(folder: Path) -> Path:
    from stylemaster_core.data.cache_writer import CachePlan, Entry, write_cache

    def encode(item: int, loaded: int) -> dict[str, torch.Tensor]:
        return {"first_embeds": torch.randn(4), "second_embeds": torch.randn(4)}

    items = [(Entry(str(i), f"{i}.png", str(i)), i) for i in range(3)]
    plan = CachePlan("pairs", items, lambda item: item, encode, {"vae": "0"}, {"size": 1}, 2)
    write_cache(folder / "cache", plan)
    return folder / "cache"


def _read_cache(path: Path) -> Any:
    data = CachedDataset(path, kind="pairs")
    return [data[index] for index in range(len(data))]


def _pairs(folder: Path) -> Path:
    place = folder / "pairs"
    done = open_pair_folder(place, {"size": 8})
    canvas = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    pair = NewPair(canvas, View("rotate90"), {"source": "a.png"})
    list(make_pairs(place, 3, lambda index: pair, done))
    return place


def _read_pair_folder(path: Path) -> Any:
    open_pair_folder(path, {"size": 8})
    return [pair.view for pair in read_pairs(path)]


def _run(folder: Path) -> Path:
    place = folder / "run"
    place.mkdir()
    stats = Stats(place, tensorboard=False)
    for step in range(1, 5):
        stats.write(step, {"loss": 1 / step, "lr": 1e-3, "sample": f"samples/{step}.png"})
    return place


def _checkpoint(folder: Path) -> Path:
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}
    write_checkpoint(
        folder / "checkpoints",
        Checkpoint(
            3, "style", config_to_dict(PRESETS["style-images"]), {"vae": "0"}, 1,
            {"a": torch.ones(2)}, {"state": state, "param_groups": [{"lr": 1e-3, "params": [0]}]},
            {"a": torch.ones(2)},
        ),
        keep=1,
    )  # fmt: skip
    return folder / "checkpoints"


def _read_latest(path: Path) -> Any:
    latest = latest_checkpoint(path)
    return None if latest is None else read_checkpoint(latest).weights


def _text(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return make


def _picture(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        generator = np.random.default_rng(0)
        write_image(folder / name, generator.integers(0, 255, (24, 32, 3)).astype(np.uint8))
        return folder / name

    return make


def _journal(folder: Path) -> Path:
    place = folder / "results"
    place.mkdir()
    records = [
        {"event": "submitted", "job": "a", "server": "http://x", "prompt_id": "1"},
        {"event": "done", "job": "a", "files": ["a_1.png"], "values": {"seed": 1}},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (place / "queue.jsonl").write_text(lines)
    return place


TABLE = '{"file": "a.png", "caption": "a cat"}\n{"file": "b.png", "caption": "a dog"}\n'
WORDS = '{"kind": "hashed_words", "width": 8, "seed": 0}'

FORMATS: dict[str, Format] = {
    "weights .safetensors": Format(_weights, read_state_dict),
    "weights .ckpt": Format(lambda folder: _weights(folder, "w.ckpt"), read_state_dict, BYTES),
    "weights, old pickle": Format(
        lambda folder: _weights(folder, "old.pt"), read_state_dict, BYTES
    ),
    "header .safetensors": Format(_weights, read_keys),
    "style .safetensors": Format(_style, load_style, checked=True),
    "text encoder .json": Format(_text("words.json", WORDS), load_text_encoder),
    "weights manifest": Format(_text("m.json", MANIFEST_PATH.read_text("utf-8")), load_manifest),
    "cache": Format(_cache, _read_cache),
    "pairs": Format(_pairs, _read_pair_folder),
    "stats.jsonl": Format(_run, read_stats),
    "checkpoint": Format(_checkpoint, _read_latest),
    "config .json": Format(
        _text("c.json", json.dumps(config_to_dict(PRESETS["motion"]))), read_config
    ),
    "table .jsonl": Format(_text("t.jsonl", TABLE), read_table),
    "table .csv": Format(_text("t.csv", 'file,caption\na.png,"a, b"\nb.png,c\n'), read_table),
    "journal": Format(_journal, read_journal),
    "picture .png": Format(_picture("p.png"), read_image, BYTES),
    "picture .jpg": Format(_picture("p.jpg"), read_image, BYTES),
    "picture .webp": Format(_picture("p.webp"), read_image, BYTES),
    # What takes longest, last: a short run ends before it.
    "transformer": Format(_transformer, _borrowed("transformer"), checked=True),
    "VAE": Format(_copied("vae"), load_vae),
    "motion adapter": Format(_copied("motion_adapter"), read_state_dict),
    "image encoder folder": Format(_copied("image_encoder"), load_image_encoder),
    "CSD": Format(_csd, load_csd),
}

# All that open what may be a pickle.
CHECKPOINT_READERS: dict[str, Callable[[Path], Any]] = {
    "read_state_dict": read_state_dict,
    "read_keys": read_keys,
    "load_style": load_style,
    "load_vae": load_vae,
    "load_image_encoder": load_image_encoder,
    "load_text_encoder": load_text_encoder,
    "transformer": _borrowed("transformer"),
    "controlnet": _borrowed("controlnet"),
}
