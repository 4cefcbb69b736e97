"""Writing a cache of encoded samples: by several processes, resumed, damaged shards made anew."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..weights.files import sha256_of, write_state_dict
from ..writing import remove_leftovers
from .cache import (
    FORMAT,
    MANIFEST,
    NULL_TEXT,
    CacheKind,
    null_text_path,
    null_text_problem,
    read_manifest,
    record_problem,
    shard_path,
    shard_problem,
    tensor_key,
)
from .jsonl import append_jsonl, locked, read_json, read_jsonl, write_json, write_jsonl
from .pairs import check_process

logger = logging.getLogger("stylemaster")

RECORDS = "shards.jsonl"
BAD = "bad.jsonl"

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class Entry(NamedTuple):
    """What a cache needs to know about one of its samples."""

    id: str
    path: str  # for messages
    description: str  # compared to see whether the cache holds this very sample
    group: str = ""  # samples of one group have similar styles


@dataclass(frozen=True)
class CachePlan(Generic[Item, Loaded]):
    """What goes into a cache, and how.

    Attributes:
        kind: what the samples are.
        items: (entry, item), in order.
        load: reads an item's files; runs ahead in threads. LayoutError or OSError: a bad sample.
        encode: makes tensors of what was loaded. LayoutError: a bad sample.
        hashes: SHA-256 of the model files, by the model's name.
        settings: plain JSON values that decide the tensors.
        shard_size: samples a shard.
        bytes_of: estimates the disk space that an item takes.
        null_text: makes the features of the empty prompt; None for a cache without.
    """

    kind: CacheKind
    items: Sequence[tuple[Entry, Item]]
    load: Callable[[Item], Loaded]
    encode: Callable[[Item, Loaded], dict[str, Tensor]]
    hashes: Mapping[str, str]
    settings: Mapping[str, Any]
    shard_size: int = 64
    bytes_of: Callable[[Item], int] = field(default=lambda item: 0)
    null_text: Callable[[], Tensor] | None = None

    @property
    def num_shards(self) -> int:
        return math.ceil(len(self.items) / self.shard_size)

    def shard(self, index: int) -> Sequence[tuple[Entry, Item]]:
        """The samples of a shard."""
        return self.items[index * self.shard_size : (index + 1) * self.shard_size]

    def fingerprint(self, index: int) -> str:
        """Hash of what a shard is to hold."""
        text = "\n".join(entry.description for entry, _ in self.shard(index))
        return hashlib.sha256(text.encode()).hexdigest()


class CacheReport(NamedTuple):
    """What became of a run of `write_cache`."""

    encoded: int  # samples, by this run
    skipped: int  # samples of this process that were there already
    bad: list[dict[str, str]]  # all that are known to be bad, of all processes
    complete: bool  # whether all processes are through


# Called with the sample's path, and what is wrong with it.
OnSample = Callable[[str, "str | None"], None]


def write_cache(
    folder: Path,
    plan: CachePlan[Any, Any],
    *,
    process: tuple[int, int] = (0, 1),
    workers: int = 2,
    overwrite: bool = False,
    retry_bad: bool = False,
    on_sample: OnSample | None = None,
) -> CacheReport:
    """Encode what is missing or damaged.

    Several processes, on one machine or on several with a common folder, may work at once; the last
    one to finish completes the manifest. A bad sample is left out and listed in `bad.jsonl`.

    Args:
        folder: of the cache; made if missing.
        plan: what to encode, the same in all processes.
        process: (number, count): shard i belongs to process i % count.
        workers: threads that read files ahead of the encoders.
        overwrite: replace what the folder holds of other models, settings or samples.
        retry_bad: encode shards with bad samples again.
        on_sample: called after each sample of this process.

    Raises:
        ConfigError: if there are no samples, or the folder holds something else and `overwrite` is
            false, or the disk is too small.
    """
    number, count = check_process(process)
    if not plan.items:
        raise ConfigError("there is nothing to encode; the dataset is empty")
    if plan.shard_size < 1 or workers < 1:
        raise ConfigError(f"shard size {plan.shard_size}, workers {workers}; expected at least 1")
    _open_folder(folder, plan, overwrite)
    records = _read_records(folder)
    report = on_sample or (lambda path, problem: None)
    todo: list[int] = []
    skipped = 0
    for index in range(number, plan.num_shards, count):
        if _is_finished(folder, records.get(index), plan.fingerprint(index), retry_bad):
            skipped += len(plan.shard(index))
            for entry, _ in plan.shard(index):
                report(entry.path, None)
        else:
            todo.append(index)
    _check_disk(folder, plan, todo)
    _write_null_text(folder, plan)
    encoded = _encode_shards(folder, plan, todo, workers, report)
    with locked(folder):
        bad, complete = _merge(folder, plan)
    return CacheReport(encoded, skipped, bad, complete)


def _open_folder(folder: Path, plan: CachePlan[Any, Any], overwrite: bool) -> None:
    """Write the manifest of an unfinished cache, or check the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _new_manifest(plan)
    with locked(folder):
        remove_leftovers(folder)
        if not (folder / MANIFEST).is_file():
            if any(path.name != ".lock" for path in folder.iterdir()):
                raise ConfigError(f"{folder} holds other files; give an empty or new folder")
            write_json(folder / MANIFEST, manifest)
            return
        before = read_json(folder / MANIFEST)
        if not isinstance(before, dict):
            raise ConfigError(f"{folder / MANIFEST} is no manifest; give another folder")
        if before.get("format") == FORMAT:
            before = read_manifest(folder)
        problems = _differences(before, manifest)
        if not problems:
            return
        if not overwrite:
            raise ConfigError(
                f"{folder} holds a cache that differs: {'; '.join(problems)}. Give another folder, "
                "or ask for what differs to be overwritten"
            )
        keep = set()
        if all(
            before.get(key) == manifest[key] for key in ("format", "kind", "hashes", "settings")
        ):
            keep = {(i, plan.fingerprint(i)) for i in range(plan.num_shards)}
        records = _read_records(folder)
        for index, record in records.items():
            if (index, record["fingerprint"]) not in keep:
                shard_path(folder, index).unlink(missing_ok=True)
        if not keep:
            null_text_path(folder).unlink(missing_ok=True)
        kept = [r for index, r in records.items() if (index, r["fingerprint"]) in keep]
        write_jsonl(folder / RECORDS, kept)
        write_json(folder / MANIFEST, manifest)


def _new_manifest(plan: CachePlan[Any, Any]) -> dict[str, Any]:
    prints = "".join(plan.fingerprint(index) for index in range(plan.num_shards))
    return {
        "format": FORMAT,
        "kind": plan.kind,
        "complete": False,
        "hashes": dict(plan.hashes),
        "settings": json.loads(json.dumps(dict(plan.settings))),
        "shard_size": plan.shard_size,
        "num_given": len(plan.items),
        "given_sha256": hashlib.sha256(prints.encode()).hexdigest(),
        "shards": [],
    }


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in ("format", "kind", "shard_size"):
        if before.get(key) != after[key]:
            problems.append(f"{key} {before.get(key)!r}, now {after[key]!r}")
    for key, value in after["hashes"].items():
        if before.get("hashes", {}).get(key) != value:
            problems.append(f"another {key.replace('_', ' ')} made it (the SHA-256 differ)")
    for key in sorted({*after["settings"], *before.get("settings", {})}):
        old, new = before.get("settings", {}).get(key), after["settings"].get(key)
        if old != new:
            problems.append(f"{key} {old!r}, now {new!r}")
    if before.get("given_sha256") != after["given_sha256"]:
        problems.append(f"{before.get('num_given')} samples, now {after['num_given']} or others")
    return problems


def _is_finished(
    folder: Path, record: Mapping[str, Any] | None, fingerprint: str, retry_bad: bool
) -> bool:
    if record is None or record["fingerprint"] != fingerprint:
        return False
    if retry_bad and record["bad"]:
        return False
    if problem := shard_problem(folder, record):
        logger.warning("%s; it is encoded again", problem)
        return False
    return True


def _check_disk(folder: Path, plan: CachePlan[Any, Any], todo: Iterable[int]) -> None:
    needed = sum(plan.bytes_of(item) for index in todo for _, item in plan.shard(index))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"about {needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free; "
            "make room, or use smaller clips or a shorter cache dtype"
        )


def _encode_shards(
    folder: Path, plan: CachePlan[Any, Any], todo: Sequence[int], workers: int, report: OnSample
) -> int:
    encoded = 0
    items = (pair for index in todo for pair in plan.shard(index))
    loaded = _ahead(items, plan.load, workers)
    for index in todo:
        tensors: dict[str, Tensor] = {}
        samples: list[dict[str, Any]] = []
        bad: list[dict[str, str]] = []
        for _ in plan.shard(index):
            entry, item, future = next(loaded)
            try:
                made = plan.encode(item, future.result())
            except (LayoutError, OSError) as error:
                logger.warning("left out %s: %s", entry.path, error)
                bad.append({"id": entry.id, "path": entry.path, "error": str(error)})
                report(entry.path, str(error))
                continue
            shapes = {key: list(value.shape) for key, value in made.items()}
            tensors |= {tensor_key(len(samples), key): value for key, value in made.items()}
            samples.append({"id": entry.id, "group": entry.group, "shapes": shapes})
            report(entry.path, None)
        _write_shard(folder, plan, index, tensors, samples, bad)
        encoded += len(samples)
    return encoded


def _ahead(
    items: Iterable[tuple[Entry, Item]], load: Callable[[Item], Loaded], workers: int
) -> Iterator[tuple[Entry, Item, Future[Loaded]]]:
    """Load items in threads, in order, and only a few ahead: clips are large."""
    waiting: deque[tuple[Entry, Item, Future[Loaded]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for entry, item in items:
            waiting.append((entry, item, pool.submit(load, item)))
            if len(waiting) > workers:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def _write_shard(
    folder: Path,
    plan: CachePlan[Any, Any],
    index: int,
    tensors: Mapping[str, Tensor],
    samples: list[dict[str, Any]],
    bad: list[dict[str, str]],
) -> None:
    path = shard_path(folder, index)
    record: dict[str, Any] = {
        "shard": index,
        "fingerprint": plan.fingerprint(index),
        "bytes": 0,
        "sha256": "",
        "samples": samples,
        "bad": bad,
    }
    if samples:
        # One entry: safetensors writes several in no fixed order, and equal shards would differ.
        header = {"format": FORMAT, "shard": index, "samples": [s["id"] for s in samples]}
        write_state_dict(path, tensors, {"stylemaster": json.dumps(header)}, overwrite=True)
        record |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    else:
        path.unlink(missing_ok=True)
    append_jsonl(folder / RECORDS, record)


def _write_null_text(folder: Path, plan: CachePlan[Any, Any]) -> None:
    """Encode the empty prompt, unless this or another process has done so."""
    if plan.null_text is None:
        return
    with locked(folder):
        manifest = read_manifest(folder)
        if null_text_problem(folder, manifest) is None:
            return
        tensors = {NULL_TEXT: plan.null_text()}
        write_state_dict(null_text_path(folder), tensors, {"format": FORMAT}, overwrite=True)


def _merge(folder: Path, plan: CachePlan[Any, Any]) -> tuple[list[dict[str, str]], bool]:
    """Bring the records of all processes into the manifest; say what is bad, and if all is done."""
    records = _read_records(folder)
    done = [
        records[index]
        for index in range(plan.num_shards)
        if index in records and records[index]["fingerprint"] == plan.fingerprint(index)
    ]
    bad = [sample for record in done for sample in record["bad"]]
    if bad:
        write_jsonl(folder / BAD, bad)
    else:
        (folder / BAD).unlink(missing_ok=True)
    complete = len(done) == plan.num_shards
    shards = [{k: v for k, v in record.items() if k != "bad"} for record in done]
    manifest = _new_manifest(plan) | {"complete": complete, "shards": shards}
    if plan.null_text is not None:
        manifest[NULL_TEXT] = {"sha256": sha256_of(null_text_path(folder))}
    write_json(folder / MANIFEST, manifest)
    return bad, complete


def _read_records(folder: Path) -> dict[int, dict[str, Any]]:
    records = read_jsonl(folder / RECORDS, record_problem, missing_ok=True)
    return {record["shard"]: {"bad": []} | record for record in records}
