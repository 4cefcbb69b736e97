"""Checkpoints: a folder per step, written beside and renamed, and a pointer to the latest.

Killing the process at any moment leaves either the checkpoint or none, never a part of one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..file_names import file_below
from ..reading import reading
from ..weights.files import read_keys, read_state_dict, write_state_dict
from ..writing import remove_leftovers as remove_hidden
from ..writing import write_text

logger = logging.getLogger("stylemaster")

FORMAT = "stylemaster-checkpoint-1"
LATEST = "latest"
STATE = "state.json"
SHARDED = "sharded"  # folder of accelerate's own files, where weights are spread over processes
_FOLDER = re.compile(r"step-(\d{8})")
_STATE_TYPES = {"step": int, "trainer": str, "hashes": dict, "num_processes": int} | {
    "optimizer": dict
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that a run needs to go on as if it had not stopped.

    Attributes:
        step: optimiser steps done.
        trainer: its name.
        config: resolved, as JSON values.
        hashes: of the models that encoded the data, and of the files that training started from.
        num_processes: of the run; with `config` they give the samples of a step.
        weights: trained weights, float32; empty where they are spread over processes.
        optimizer: `state_dict()` of the optimiser.
        average: moving average of the weights, or None.
    """

    step: int
    trainer: str
    config: dict[str, Any]
    hashes: dict[str, str]
    num_processes: int
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Tensor] | None = None


def write_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    keep: int,
    shards: Path | None = None,
) -> Path:
    """Write a checkpoint, point to it, and remove those before it but `keep - 1`.

    Args:
        folder: of all checkpoints; made if missing.
        checkpoint: to write.
        keep: how many to keep, this one included.
        shards: folder of accelerate's own files, which moves into the checkpoint.

    Returns:
        The checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{checkpoint.step:08d}"
    part = folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
    part.mkdir()
    try:
        tensors, plain = _split(checkpoint.optimizer)
        if shards is not None:
            os.rename(shards, part / SHARDED)
        else:
            write_state_dict(part / "weights.safetensors", checkpoint.weights)
            write_state_dict(part / "optimizer.safetensors", tensors)
        if checkpoint.average is not None:
            write_state_dict(part / "average.safetensors", checkpoint.average)
        _write_json(part / "config.json", checkpoint.config)
        state = {
            "files": {f.name: f.stat().st_size for f in sorted(part.iterdir()) if f.is_file()},
            "format": FORMAT,
            "step": checkpoint.step,
            "trainer": checkpoint.trainer,
            "hashes": checkpoint.hashes,
            "num_processes": checkpoint.num_processes,
            "optimizer": plain,
        }
        _write_json(part / STATE, state)
        place(part, folder / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    point_to(folder, name)
    remove_old(folder, keep)
    return folder / name


def place(part: Path, target: Path) -> None:
    """Rename a finished folder into its place; an earlier one of the same step makes way."""
    if target.exists():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        os.rename(target, old)
        os.rename(part, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(part, target)


def point_to(folder: Path, name: str) -> None:
    """Let `latest` name a checkpoint."""
    write_text(folder / LATEST, name + "\n", overwrite=True)


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; the one that `latest` names stays."""
    latest = latest_checkpoint(folder)
    found = sorted(path for path in folder.iterdir() if _FOLDER.fullmatch(path.name))
    for path in found[:-keep]:
        if path != latest:
            # Renamed first: a half-removed folder must not look like a checkpoint.
            gone = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left unfinished."""
    if folder.is_dir():
        remove_hidden(folder)
        for path in folder.glob(".*.tmp"):
            logger.info("removing what an interrupted run left: %s", path)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """Folder of the latest checkpoint, or None if there is none.

    Raises:
        WeightsError: if the pointer names none, or one that is not there.
        ConfigError: if it is a link that leads out of the folder.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        # Killed between the first checkpoint and its pointer, or the pointer was deleted.
        names = [p.name for p in folder.glob("step-*") if _FOLDER.fullmatch(p.name)]
        return file_below(folder, max(names), folder) if names else None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not _FOLDER.fullmatch(name):
        raise WeightsError(
            f"{pointer} holds {name!r:.80}; expected the name of a checkpoint such as "
            f"step-00001000: write that of one that exists into it, or remove {folder}"
        )
    path = file_below(folder, name, pointer)
    if not (path / STATE).is_file():
        raise WeightsError(
            f"{pointer} names {path.name}, and there is no such checkpoint; write the name of one "
            f"that exists into it, or remove {folder} to start anew"
        )
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """The config that a checkpoint was trained with, as JSON values.

    Raises:
        WeightsError: if it is damaged.
    """
    return _read_json(path / "config.json")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path.parent} is no readable checkpoint: {error}; use another"
        ) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        WeightsError: if it is damaged or of another format.
    """
    with reading(path, "a checkpoint", advice="use another checkpoint"):
        return _read_checkpoint(path)


def _read_checkpoint(path: Path) -> Checkpoint:
    state, config = _read_json(path / STATE), read_settings(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise WeightsError(f"{path} is no checkpoint of this version ({FORMAT}); use another")
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: its config.json is no JSON object; use another checkpoint")
    wrong = [key for key, kind in _STATE_TYPES.items() if type(state.get(key)) is not kind]
    if wrong:
        raise WeightsError(f"{path}: {', '.join(wrong)} of its {STATE} cannot be; use another")
    for name, size in state.get("files", {}).items():
        file = file_below(path, name, path / STATE)
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise WeightsError(
                f"{file} {'is missing' if found is None else f'has {found:,} bytes'}, and {size:,} "
                "bytes were written; use another checkpoint: going on without would be another run"
            )

    def tensors(name: str) -> dict[str, Tensor]:
        return read_state_dict(path / f"{name}.safetensors").tensors

    sharded = is_sharded(path)
    if state["step"] and not sharded and not read_keys(path / "optimizer.safetensors"):
        raise WeightsError(
            f"{path} holds no state of the optimiser; use another checkpoint: going on without "
            "would be another run"
        )
    return Checkpoint(
        step=state["step"],
        trainer=state["trainer"],
        config=config,
        hashes=state["hashes"],
        num_processes=state["num_processes"],
        weights={} if sharded else tensors("weights"),
        optimizer={} if sharded else _join(tensors("optimizer"), state),
        average=tensors("average") if (path / "average.safetensors").is_file() else None,
    )


def is_sharded(path: Path) -> bool:
    """Whether the weights of a checkpoint are in accelerate's own files."""
    return (path / SHARDED).is_dir()


def _split(optimizer: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors by name and plain JSON values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    _part(optimizer.get("state", {}), (), tensors, plain)
    return tensors, {"state": plain, "param_groups": optimizer.get("param_groups", [])}


def _part(
    values: Mapping[Any, Any],
    path: tuple[str, ...],
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
) -> None:
    """Part tensors and plain values; 8-bit states are one level deeper than others."""
    for key, value in values.items():
        own = (*path, str(key))
        if isinstance(value, Tensor):
            tensors[".".join(own)] = value
        elif isinstance(value, dict):
            _part(value, own, tensors, plain.setdefault(own[-1], {}))
        else:
            plain[own[-1]] = value


def _join(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    plain = state["optimizer"]
    joined: dict[int, dict[str, Any]] = {int(i): v for i, v in plain["state"].items()}
    for name, value in tensors.items():
        index, *path, key = name.split(".")
        place = joined.setdefault(int(index), {})
        for part in path:
            place = place.setdefault(part, {})
        place[key] = value
    return {"state": joined, "param_groups": plain["param_groups"]}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory."""
    return {key: torch.clone(value.detach()).cpu() for key, value in tensors.items()}
