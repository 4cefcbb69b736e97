"""Processes killed at any moment: what is there is whole, and a rerun ends as if nothing was."""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from stylemaster_core.data.cache import CachedDataset, check_cache
from stylemaster_core.data.cache_writer import CachePlan, Entry, write_cache
from stylemaster_core.data.pairs import NewPair, make_pairs, open_pair_folder, read_pairs
from stylemaster_core.data.views import View
from stylemaster_core.training import loop
from stylemaster_core.training.checkpoint import latest_checkpoint, read_checkpoint
from stylemaster_core.training.loop import train
from stylemaster_core.training.stats import read_stats
from stylemaster_core.weights.files import read_state_dict, write_state_dict
from tests.fuzz.attack import Endpoint, Kind, require
from tests.unit import test_training_loop as training

# When to kill, as parts of an undisturbed run's time; several kills follow each other.
MOMENTS = st.lists(st.floats(0.0, 1.1), min_size=1, max_size=2)
STEPS = 6
HANG_S = 120.0


def _in_child(work: Callable[[], object], kill_after: float | None, how: int) -> bool:
    """Run something in a forked process of a group of its own; whether it was killed."""
    child = os.fork()
    if child == 0:
        _be_child(work)
    began, killed = time.monotonic(), False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        passed = time.monotonic() - began
        if kill_after is not None and not killed and passed >= kill_after:
            killed = _signal(child, how)
        if passed > HANG_S:
            _signal(child, signal.SIGKILL)
            os.waitpid(child, 0)
            require(False, "the process hangs")
        time.sleep(0.001)
    failed = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
    require(not failed, "the process failed by itself; see its traceback above")
    require(killed or os.WIFEXITED(status), f"the process died of signal {status & 127}")
    return killed


def _be_child(work: Callable[[], object]) -> None:
    code = 1
    try:
        os.setsid()
        work()
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(code)


def _signal(child: int, how: int) -> bool:
    try:
        os.killpg(child, how)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(child, how)
    return True


class _Prepared:
    """An undisturbed run: what it made, and how long it took."""

    def __init__(
        self, folder: Path, work: Callable[[Path], object], result: Callable[[Path], object]
    ) -> None:
        _import_all()
        began = time.monotonic()
        _in_child(lambda: work(folder), None, 0)
        self.seconds = time.monotonic() - began
        self.result = result(folder)


def _import_all() -> None:
    """What the children would import, each anew, in seconds."""
    for name in ("accelerate", "torch._dynamo", "tqdm", "torch.utils.tensorboard"):
        importlib.import_module(name)


def _endpoint(
    work: Callable[[Path], object],
    whole: Callable[[Path], object],
    result: Callable[[Path], object],
    how: int = signal.SIGKILL,
) -> Endpoint:
    """Kill `work`, look whether what is there is `whole`, and run it again.

    Args:
        work: writes into the folder, and goes on with what is there.
        whole: reads all that is there; called after each kill.
        result: what was made, to be compared with an undisturbed run's.
        how: the signal.
    """

    def check(prepared: _Prepared, moments: list[float], folder: Path) -> str:
        kills = 0
        for moment in moments:
            after = moment * prepared.seconds
            kills += _in_child(lambda: work(folder), after, how)
            whole(folder)
        _in_child(lambda: work(folder), None, 0)
        whole(folder)
        left = [p for p in folder.rglob(".*") if ".part" in p.name or p.suffix == ".tmp"]
        require(not left, f"left over: {left}")
        require(result(folder) == prepared.result, "the result differs from an undisturbed run's")
        return f"killed {kills}x" if kills else "too late"

    return Endpoint(MOMENTS, check, lambda folder: _Prepared(folder, work, result))


@functools.cache
def _world() -> Any:
    return training.WORLD.dataset(8), training.base_weights()


def _train(workers: int, steps: int = STEPS, save_every: int = 2) -> Callable[[Path], object]:
    def work(folder: Path) -> None:
        torch.set_num_threads(1)
        data, base = _world()
        config = training.with_run(
            num_steps=steps,
            save_every=save_every,
            validate_every=0,
            num_workers=workers,
            accumulation=1,
        )
        train(training.style_trainer(config, base=base), data, folder, resume=True)

    return work


READER_STEPS = 10  # more than the readers read ahead
# A step in whose middle a reader is struck, and by what.
STRIKES = st.tuples(st.integers(1, 4), st.sampled_from([signal.SIGKILL, signal.SIGTERM]))


def _with_struck_reader(step: int, how: int) -> Callable[[Path], None]:
    """A training of which a reader alone gets a signal: it ends as it says it does, or goes on."""

    def work(folder: Path) -> None:
        check = loop._Loop._check_finite

        def struck(self: Any, now: int, *arguments: Any) -> None:
            if now == step:
                os.kill(multiprocessing.active_children()[0].pid or 0, how)
                time.sleep(0.3)  # what becomes of it is told now, if it is told in a step
            check(self, now, *arguments)

        loop._Loop._check_finite = struck  # of this process alone
        try:
            _train(2, READER_STEPS, save_every=1000)(folder)
        except loop.WorkerLostError as error:
            require(how == signal.SIGKILL, f"readers do not ignore signal {how}: {error}")
        else:
            require(how == signal.SIGTERM, "a lost reader is not missed")

    return work


def _strike_reader(prepared: _Prepared, drawn: tuple[int, int], folder: Path) -> str:
    _in_child(lambda: _with_struck_reader(*drawn)(folder), None, 0)
    _whole_run(folder)
    latest = latest_checkpoint(folder / "checkpoints")
    last = read_stats(folder)[-1]["step"]
    require(latest and read_checkpoint(latest).step == last, f"{latest}, not {last}")
    require(last >= drawn[0], "the step in which the reader was struck is lost")
    _in_child(lambda: _train(2, READER_STEPS, save_every=1000)(folder), None, 0)
    require(_trained(folder) == prepared.result, "the result differs from an undisturbed run's")
    return "stopped at a whole step" if last < READER_STEPS else "went on"


def _whole_run(folder: Path) -> None:
    lines = [line["step"] for line in read_stats(folder) if "loss" in line]
    require(lines == list(range(1, len(lines) + 1)), f"the lines of stats.jsonl are {lines}")
    for path in (folder / "checkpoints").glob("step-*"):
        read_checkpoint(path)
    latest_checkpoint(folder / "checkpoints")


def _trained(folder: Path) -> object:
    """The trained weights, bit for bit, and every step's loss."""
    losses = [(line["step"], line["loss"]) for line in read_stats(folder) if "loss" in line]
    return _weights(folder / "style_adapter.safetensors"), losses


def _weights(path: Path) -> object:
    # Not the file's bytes: safetensors writes the header's texts in no fixed order.
    file = read_state_dict(path)
    return {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in file.tensors.items()}


def _encode(folder: Path) -> None:
    def encode(item: int, loaded: int) -> dict[str, torch.Tensor]:
        time.sleep(0.004)
        return {"first_embeds": torch.full((64,), item), "second_embeds": torch.ones(64)}

    items = [(Entry(str(i), f"{i}.png", str(i)), i) for i in range(12)]
    write_cache(folder, CachePlan("pairs", items, lambda item: item, encode, {"vae": "0"}, {}, 2))


def _whole_cache(folder: Path) -> None:
    if (folder / "manifest.json").is_file():
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["complete"]:
            require(not check_cache(folder), "the cache has problems")
            require(len(CachedDataset(folder, kind="pairs")) == 12, "samples are missing")


def _make_pairs(folder: Path) -> None:
    done = open_pair_folder(folder, {"size": 8})
    canvas = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for _ in make_pairs(folder, 12, lambda i: NewPair(canvas, View("flip_vertical"), {}), done):
        time.sleep(0.002)


def _whole_pairs(folder: Path) -> None:
    if (folder / "pairs.jsonl").is_file() and (folder / "pairs.jsonl").stat().st_size > 80:
        for pair in read_pairs(folder):
            require(pair.first.is_file() and pair.second.is_file(), f"pair {pair.index} is no pair")


def _save(folder: Path) -> None:
    tensors = {str(i): torch.full((1000,), float(i)) for i in range(50)}
    for _ in range(5):
        write_state_dict(folder / "w.safetensors", tensors, overwrite=True)


def _whole_file(folder: Path) -> None:
    if (folder / "w.safetensors").is_file():
        require(len(read_state_dict(folder / "w.safetensors").tensors) == 50, "half a file")


def _files(folder: Path) -> object:
    """Content of all files but those that say in which order things were made."""
    names = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".jsonl"]
    return {p.name: p.read_bytes() for p in names if p.name != ".lock"}


KIND = Kind(
    "kills",
    {
        "cache": _endpoint(_encode, _whole_cache, _files),
        "illusion pairs": _endpoint(_make_pairs, _whole_pairs, _files),
        "weight file": _endpoint(_save, _whole_file, _files),
        "training, SIGKILL": _endpoint(_train(0), _whole_run, _trained),
        "training, SIGTERM": _endpoint(_train(0), _whole_run, _trained, signal.SIGTERM),
        "training, 2 readers, SIGKILL": _endpoint(_train(2), _whole_run, _trained),
        "training, 2 readers, SIGTERM": _endpoint(_train(2), _whole_run, _trained, signal.SIGTERM),
        "training readers": Endpoint(
            STRIKES,
            _strike_reader,
            lambda folder: _Prepared(folder, _train(2, READER_STEPS, save_every=1000), _trained),
        ),
    },
    long_cases=56,
    batch=1,
    shrink=False,
    limit_s=300,
)
