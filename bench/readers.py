"""CPU time of every reader of files, of this tree and of another: python -m bench.readers.

Files are made in a temporary folder. A process for each tree reads them in turn, a fraction of a
second at a time; what is reported is the median of the turns, in microseconds a call.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylemaster_core.data.cache_writer import CachePlan, Entry, write_cache
from stylemaster_core.data.images import write_image
from stylemaster_core.data.pairs import NewPair, make_pairs, open_pair_folder
from stylemaster_core.data.videos import write_video
from stylemaster_core.data.views import View
from stylemaster_core.models.small import write_small_models
from stylemaster_core.models.style_tokens import Style, save_style
from stylemaster_core.queue.journal import Journal
from stylemaster_core.weights.files import write_state_dict
from stylemaster_core.weights.manifest import MANIFEST_PATH

from .runner import add_output, check_output, machine_facts, run_benchmark

ROOT = Path(__file__).resolve().parent.parent
INSIDE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from stylemaster_core.data.cache import CachedDataset
from stylemaster_core.data.captions import read_table
from stylemaster_core.data.images import read_image
from stylemaster_core.data.pairs import read_pairs
from stylemaster_core.data.videos import read_video
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.style_tokens import load_style
from stylemaster_core.models.vae import load_vae
from stylemaster_core.queue.journal import read_journal
from stylemaster_core.training.stats import read_stats
from stylemaster_core.weights.files import read_keys, read_state_dict
from stylemaster_core.weights.manifest import load_manifest
torch.set_num_threads(1)
folder = Path(sys.argv[2])
def cache(path):
    data = CachedDataset(path, kind="pairs")
    return [data[index] for index in range(len(data))]
readers = {
    "read_keys": (read_keys, "w.safetensors"),
    "read_state_dict, safetensors": (read_state_dict, "w.safetensors"),
    "read_state_dict, zip": (read_state_dict, "w.ckpt"),
    "load_style": (load_style, "s.safetensors"),
    "load_vae": (load_vae, "small/vae_small.safetensors"),
    "load_image_encoder": (load_image_encoder, "small/image_encoder_small"),
    "load_manifest": (load_manifest, "weights_manifest.json"),
    "cache": (cache, "cache"),
    "read_pairs": (read_pairs, "pairs"),
    "read_stats": (read_stats, "run"),
    "read_journal": (read_journal, "results"),
    "read_table, jsonl": (read_table, "t.jsonl"),
    "read_table, csv": (read_table, "t.csv"),
    "read_image, png": (read_image, "p.png"),
    "read_image, jpg": (read_image, "p.jpg"),
    "read_image, webp": (read_image, "p.webp"),
    "read_video": (read_video, "v.mp4"),
}
def spend(read, path, seconds):
    began, calls = time.process_time(), 0
    while (spent := time.process_time() - began) < seconds or not calls:
        read(path)
        calls += 1
    return spent / calls
for line in sys.stdin:
    order = json.loads(line)
    name = order["name"]
    if name is None:
        print(json.dumps(list(readers)), flush=True)
        continue
    read, where = readers[name]
    print(json.dumps(spend(read, folder / where, order["seconds"])), flush=True)
"""


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, to compare")
    parser.add_argument("--runs", type=int, default=5, help="of each tree, interleaved")
    parser.add_argument("--seconds", type=float, default=0.5, help="of CPU, of each run")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="readers whose names begin so")
    add_output(parser)
    return run_benchmark("bench.readers", _benchmark, _show, parser.parse_args())


def _benchmark(args: argparse.Namespace) -> dict[str, Any]:
    check_output(args)
    trees = {"this": ROOT} | ({"against": args.against} if args.against else {})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _make_files(folder)
        workers = {name: _Worker(tree, folder) for name, tree in trees.items()}
        first = next(iter(workers.values()))
        names = [n for n in first.ask(None) if not args.only or n.startswith(tuple(args.only))]
        rows = {name: _compare(workers, name, args.runs, args.seconds) for name in names}
        for worker in workers.values():
            worker.end()
    return {
        "what": f"CPU time a call in microseconds; medians of {args.runs} runs, interleaved",
        "machine": machine_facts(torch.device("cpu")),
        "readers": rows,
    }


class _Worker:
    """A process that reads with the code of one tree."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", INSIDE, str(tree), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, name: str | None, seconds: float = 0.0) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"name": name, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


def _compare(
    workers: dict[str, _Worker], name: str, runs: int, seconds: float
) -> dict[str, float | None]:
    found: dict[str, list[float]] = {tree: [] for tree in workers}
    for number in range(runs + 1):
        # Whoever is second finds the machine as the first left it: they take turns.
        for tree in sorted(workers, reverse=bool(number % 2)):
            spent = workers[tree].ask(name, seconds if number else 0.0)
            found[tree] += [spent] if number else []  # the first call imports what it needs
    row = {tree: round(1e6 * statistics.median(times), 2) for tree, times in found.items()}
    ratio = round(row["this"] / row["against"], 4) if "against" in row else None
    return {**row, "ratio": ratio}


def _make_files(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"blocks.{i}.weight": torch.randn(16, 16, generator=generator) for i in range(300)}
    write_state_dict(folder / "w.safetensors", tensors, {"format": "x"})
    torch.save(tensors, folder / "w.ckpt")
    style = torch.randn(1, 16, 64, generator=generator)
    save_style(folder / "s.safetensors", Style(style, {"adapter": "a"}))
    write_small_models(folder / "small")
    shutil.copy(MANIFEST_PATH, folder)
    _make_data(folder)
    _write_journal(folder / "results")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    picture = pixels.repeat(16, 0).repeat(16, 1)
    for ending in ("png", "jpg", "webp"):
        write_image(folder / f"p.{ending}", picture)
    frames = np.stack([np.roll(picture, 5 * index, axis=1) for index in range(24)])
    write_video(folder / "v.mp4", frames, fps=24)


def _make_data(folder: Path) -> None:
    embeds = {"first_embeds": torch.ones(64), "second_embeds": torch.ones(64)}
    items = [(Entry(str(i), f"{i}.png", str(i)), i) for i in range(50)]
    plan = CachePlan("pairs", items, lambda i: i, lambda item, _: embeds, {"vae": "0"}, {}, 10)
    write_cache(folder / "cache", plan)
    done = open_pair_folder(folder / "pairs", {"size": 8})
    canvas = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    pair = NewPair(canvas, View("rotate90"), {"source": "a.png"})
    list(make_pairs(folder / "pairs", 200, lambda index: pair, done))
    stats = [{"step": i, "loss": 1 / i, "lr": 1e-3, "seconds": 0.1} for i in range(1, 1001)]
    table = [{"file": f"{i}.png", "caption": f"picture {i}"} for i in range(500)]
    for name, rows in (("run/stats", stats), ("t", table)):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = "".join(f'{row["file"]},"{row["caption"]}"\n' for row in table)
    (folder / "t.csv").write_text("file,caption\n" + lines, encoding="utf-8")


def _write_journal(folder: Path) -> None:
    """As a batch does: three records a job."""
    journal = Journal(folder)
    for number in range(200):
        job, files = f"clip_{number:03d}__style", [f"clip_{number:03d}__style_1.mp4"]
        where = {"server": "http://127.0.0.1:8188", "prompt_id": f"{number:032x}"}
        journal.write("submitted", job, **where)
        journal.write("delivering", job, files=files, hashes=[f"{number:064x}"], **where)
        journal.write("done", job, files=files, seconds=12.5)
    journal.close()


def _show(report: dict[str, Any]) -> None:
    for name, row in report["readers"].items():
        sys.stdout.write(f"{name}: {row}\n")


if __name__ == "__main__":
    sys.exit(main())
