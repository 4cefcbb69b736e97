"""Hostile names, as a workflow or a file can hold them: nothing outside is reached or made."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from stylemaster_core.data.pairs import read_pairs
from stylemaster_core.data.samples import read_samples
from stylemaster_core.queue.journal import read_journal
from stylemaster_core.training.checkpoint import latest_checkpoint
from stylemaster_core.training.stats import read_stats, sample_file
from tests.fuzz.attack import Endpoint, Kind, require
from tests.unit.node_modules import node_module
from tests.unit.test_node_paths import FolderPaths

PARTS = (
    "..", ".", "...", "", " ", "sub", "a", "a.safetensors", "file.safetensors", "out", "loop", "~",
    "C:", "c:a", "con", "nul.txt", "$HOME", "%PATH%", "\0", "\n", "\x1b[31m", "\ud800", "\udcff",
    "\u202e", "x" * 255, "ä" * 128, "x" * 256, "*", "?", "[a]", "-rf", "--help", ":stream", "a:b",
    "\u2215", "\uff0e\uff0e", "private", "private.png", "etc", "passwd", "tables", "checkpoints",
)  # fmt: skip


def _joined(parts: list[str], separators: list[str], start: str) -> str:
    words = [start]
    for part, separator in zip(parts, separators, strict=False):
        words += [part, separator]
    return "".join(words + parts[len(separators) :])


TEXTS = st.builds(
    _joined,
    st.lists(st.sampled_from(PARTS) | st.text(max_size=8), min_size=1, max_size=6),
    st.lists(st.sampled_from(["/", "\\", "//", "/./", "/../", "\\..\\"]), max_size=5),
    st.sampled_from(["", "", "", "/", "\\", "\\\\", "C:\\", "../", "./", "file://"]),
)
DEEP = st.integers(2, 3000).map(lambda n: "a/" * n + "b")
NAMES = st.one_of(TEXTS, TEXTS, TEXTS, DEEP, st.text(max_size=300))


class World(NamedTuple):
    """`inside`, which names are meant to stay in, with links out of it; and all that is there."""

    folder: Path
    inside: Path
    content: set[str]


def _world(folder: Path) -> World:
    outside, inside = folder / "outside", folder / "inside"
    for place in (outside, inside / "sub"):
        place.mkdir(parents=True)
    (outside / "private.png").write_bytes(b"private")
    for name in ("a.safetensors", "file.safetensors", "sub/a"):
        (inside / name).write_bytes(b"x")
    (inside / "out").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "private.png").symlink_to(outside / "private.png")
    return World(folder, inside, _content(folder))


def _content(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


Play = Callable[[Any, str, Path], "Path | None"]


def _endpoint(play: Play, prepare: Callable[[], Any] = lambda: None) -> Endpoint:
    """Expects our own error or a path inside, and nothing new outside."""

    def check(prepared: tuple[World, Any], name: str, _folder: Path) -> str:
        world, shared = prepared
        try:
            found = play(shared, name, world.inside)
            outcome = "inside" if found else "no file"
        except Exception as error:
            # The nodes' modules have the pack's errors under another name.
            if type(error).__name__ not in ("ConfigError", "WeightsError"):
                raise
            found, outcome = None, "refused"
        if found is not None:
            real = Path(os.path.realpath(found))
            require(world.inside in (real, *real.parents), f"{name!r} gave {real}, outside")
        new = _content(world.folder) - world.content
        for path in sorted(new, reverse=True):
            place = world.folder / path
            place.rmdir() if place.is_dir() else place.unlink()
        stray = [path for path in new if not path.startswith("inside")]
        require(not stray, f"{name!r} made {stray}")
        return outcome

    return Endpoint(NAMES, check, prepare=lambda folder: (_world(folder), prepare()))


class _Pack(NamedTuple):
    folder_paths: FolderPaths
    modules: dict[str, Any]


@functools.cache
def _pack() -> _Pack:
    """Modules of the nodes that need no ComfyUI, with stand-ins for what they import of it."""
    latest: Any = types.ModuleType("comfy_api.latest")
    latest.io = types.SimpleNamespace(Custom=lambda name: None)
    sys.modules.setdefault("comfy_api", types.ModuleType("comfy_api"))
    sys.modules.setdefault("comfy_api.latest", latest)
    folder_paths = FolderPaths(Path())
    with node_module("paths", folder_paths) as paths:
        files = importlib.import_module(paths.__name__.replace("paths", "training_files"))
        return _Pack(folder_paths, {"paths": paths, "training_files": files})


def _node(module: str, call: Play) -> Endpoint:
    def play(pack: _Pack, name: str, inside: Path) -> Path | None:
        root = str(inside)
        pack.folder_paths.folder_names_and_paths = {
            key: ([root], {".safetensors"}) for key in ("stylemaster", "stylemaster_styles")
        }
        pack.folder_paths.get_output_directory = lambda: root
        pack.folder_paths.get_input_directory = lambda: root
        return call(pack.modules[module], name, inside)

    return _endpoint(play, _pack)


def _written(module: Any, name: str, inside: Path) -> Path:
    """Save Style: the path, once something was written there."""
    path = module.new_style_file(name)
    path.with_name(f"{path.name}.12345678.tmp").write_bytes(b"")
    path.write_bytes(b"")
    return path


def _made(kind: str) -> Callable[[Any, str, Path], Path]:
    def call(module: Any, name: str, inside: Path) -> Path:
        path = module.work_folder(kind, name)
        path.mkdir(parents=True, exist_ok=True)
        return path

    return call


def _trained(module: Any, name: str, inside: Path) -> Path:
    path = module.new_model_file("stylemaster", name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.1234567.part").write_bytes(b"")
    return path


def _file(play: Callable[[str, Path], Path | None]) -> Endpoint:
    return _endpoint(lambda shared, name, inside: play(name, inside))


def _record(inside: Path, file: str, record: dict[str, Any]) -> None:
    (inside / file).write_text(json.dumps(record) + "\n", encoding="utf-8")


def _sample(name: str, inside: Path) -> Path | None:
    _record(inside, "stats.jsonl", {"step": 1, "sample": name})
    return sample_file(inside, read_stats(inside)[0])


def _pair(key: str) -> Callable[[str, Path], Path | None]:
    def play(name: str, inside: Path) -> Path | None:
        record = {"index": 0, "kept": True, "first": "a", "second": "a", key: name}
        _record(inside, "pairs.jsonl", record | {"view": {"name": "identity"}})
        return getattr(read_pairs(inside)[0], key)

    return play


def _latest(name: str, inside: Path) -> Path | None:
    (inside / "latest").write_bytes(name.encode("utf-8", errors="surrogatepass"))
    return latest_checkpoint(inside)


def _journal(name: str, inside: Path) -> Path | None:
    _record(inside, "queue.jsonl", {"event": "done", "job": "j", "files": [name]})
    return inside / read_journal(inside)["j"]["files"][0]


def _table(column: str) -> Callable[[str, Path], Path | None]:
    def play(name: str, inside: Path) -> Path | None:
        row = {"file": "sub/a", "caption": "c", column: name}
        _record(inside, "t.jsonl", row)
        (sample,) = read_samples(inside / "t.jsonl", within=[inside])
        return sample.media if column == "file" else sample.style

    return play


KIND = Kind(
    "names",
    {
        "model_file": _node("paths", lambda m, name, _: m.model_file(name, "stylemaster")),
        "input_path": _node("training_files", lambda m, name, _: m.input_path(name)),
        "Save Style": _node("paths", _written),
        "run folder": _node("training_files", _made("runs")),
        "cache folder": _node("training_files", _made("caches")),
        "dataset folder": _node("training_files", _made("datasets")),
        "trained file": _node("training_files", _trained),
        "stats.jsonl sample": _file(_sample),
        "pairs.jsonl first": _file(_pair("first")),
        "pairs.jsonl second": _file(_pair("second")),
        "checkpoints latest": _file(_latest),
        "journal files": _file(_journal),
        "table media": _file(_table("file")),
        "table style": _file(_table("style")),
    },
    long_cases=1400,
    batch=25,
)
