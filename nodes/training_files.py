"""Where the training nodes write: work folders in ComfyUI's output, trained files in its models."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import folder_paths
from comfy_api.latest import io

from ..stylemaster_core.errors import ConfigError, WeightsError
from ..stylemaster_core.writing import written_beside
from .paths import STYLES_SUBFOLDER, find_inside, new_inside

DatasetSocket: Any = io.Custom("STYLE_DATASET")  # Dataset
CacheSocket: Any = io.Custom("STYLE_CACHE")  # Cache

WorkKind = Literal["datasets", "caches", "runs"]
TABLES_SUBFOLDER = "tables"  # of datasets: what Dataset writes
# Files and folders by which a work folder is known.
_MARKS: dict[WorkKind, tuple[str, ...]] = {
    "datasets": ("pairs.jsonl", "settings.json"),
    "caches": ("manifest.json", "shards.jsonl"),
    "runs": ("checkpoints", "stats.jsonl"),
}


@dataclass(frozen=True)
class Dataset:
    """Samples or pairs on the disk."""

    source: Path  # a table of samples, or a folder of pairs
    count: int


@dataclass(frozen=True)
class Cache:
    """Encoded samples or pairs, and the models that the trainers need of those that made them."""

    path: Path
    vae: Path
    text_encoder: Path


def input_path(name: str) -> Path:
    """An existing file or folder of ComfyUI's input folder.

    Raises:
        ConfigError: if there is none of that name, or it leads out.
    """
    root = folder_paths.get_input_directory()
    path = find_inside(name, [root])
    if path is None:
        raise ConfigError(f"there is no {name!r} in {root}; put the pictures or videos there")
    return path


def work_folder(kind: WorkKind, name: str) -> Path:
    """The folder `stylemaster/<kind>/<name>` of ComfyUI's output; it need not exist.

    Raises:
        ConfigError: if the name leads out of it, or the folder lies inside another one of its kind,
            holds one, or is a file.
    """
    root = work_root(kind)
    path = new_inside(root, name)
    inside = path.relative_to(root)
    if os.path.lexists(path) and not path.is_dir():
        raise ConfigError(f"{name!r} is a file in {root}; choose another name")
    taken = [folder for folder in inside.parents if folder.name and _holds(root / folder, kind)]
    if kind == "datasets" and inside.parts[0] == TABLES_SUBFOLDER:
        taken.append(Path(TABLES_SUBFOLDER))
    if taken:
        raise ConfigError(
            f"{name!r} lies inside {root / taken[0]}, which holds files of its own; choose a name "
            "outside of it"
        )
    if not _holds(path, kind):
        for folder, _, _ in os.walk(path):
            if _holds(Path(folder), kind):
                raise ConfigError(f"{name!r} is a folder that holds {folder}; choose another name")
    return path


def work_root(kind: WorkKind) -> Path:
    """The folder `stylemaster/<kind>` of ComfyUI's output."""
    return Path(os.path.realpath(folder_paths.get_output_directory()), "stylemaster", kind)


def _holds(folder: Path, kind: WorkKind) -> bool:
    """Whether a folder is itself a run, a cache or a set of pairs."""
    return any((folder / name).exists() for name in _MARKS[kind])


def new_model_file(category: str, name: str) -> Path:
    """The path of a trained file in a model folder; it may exist.

    Raises:
        ConfigError: if the name leads out of it, or to where no loader looks.
    """
    ending = ".safetensors"
    root = Path(os.path.realpath(folder_paths.get_folder_paths(category)[0]))
    path = new_inside(root, name if name.endswith(ending) else name + ending)
    if path.relative_to(root).parts[0] == STYLES_SUBFOLDER:
        raise ConfigError(f"{name!r} is where saved styles are; choose another folder")
    return path


def place_model(trained: Path, target: Path) -> None:
    """Copy a trained file into the model folder, whole or not at all, over nothing.

    Raises:
        WeightsError: if a file of that name is there.
    """
    refuse_existing(target)
    with written_beside(target) as part:
        shutil.copyfile(trained, part)


def refuse_existing(target: Path) -> None:
    """Raise a WeightsError if a file of that name is there."""
    if target.exists():
        raise WeightsError(
            f"{target} exists and is not overwritten; choose another file_name, or move that file"
        )


def encoder_names(category: str) -> list[str]:
    """Encoders that the command line loads: files, folders with config.json, descriptions."""
    names = list(folder_paths.get_filename_list(category))
    for folder in map(Path, folder_paths.get_folder_paths(category)):
        if folder.is_dir():
            names += [path.parent.name for path in folder.glob("*/config.json")]
            names += [path.name for path in folder.glob("*.json")]
    return sorted(dict.fromkeys(names))


def encoder_path(category: str, name: str) -> Path:
    """File or folder of an encoder.

    Raises:
        ConfigError: if the name leads out of the model folders.
        WeightsError: if there is none.
    """
    folders = folder_paths.get_folder_paths(category)
    path = find_inside(name, folders)
    if path is None:
        raise WeightsError(f"there is no {name!r} in {', '.join(folders)}")
    return path
