"""The list of weight files: where each comes from, where it belongs and how it is checked."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import WeightsError
from ..reading import reading

MANIFEST_PATH = Path(__file__).parents[2] / "weights_manifest.json"


@dataclass(frozen=True)
class WeightEntry:
    """One file of the manifest."""

    id: str  # what the command line calls it
    purpose: str  # what it is for, in words
    repository: str  # "owner/name" on the hub
    file: str | None  # path inside the repository; None stands for the whole repository
    size: int | None  # bytes
    approximate_size: str | None  # in words, where the exact one is unknown
    sha256: str | None  # 64 hexadecimal digits
    sha256_source: Literal["official", "mirror"] | None  # where the hash was read
    licence: str
    folder: str  # sub-folder of ComfyUI's models folder
    save_as: str | None  # local name, where the hub's says too little
    needed_by: tuple[str, ...]  # tasks
    alternative_to: str | None  # id of the entry that serves the same end by default
    converts_to: tuple[str, ...]  # names that `stylemaster weights convert` makes of it
    gated: bool  # the licence must be accepted on the hub first
    note: str | None

    @property
    def file_name(self) -> str:
        """Name of the file in its target folder."""
        return self.save_as or Path(self.file or self.repository).name


def load_manifest(path: Path | None = None) -> dict[str, WeightEntry]:
    """Read the manifest.

    Args:
        path: another manifest; by default the one at the top of the repository.

    Returns:
        Entries by id, in the order of the file.

    Raises:
        WeightsError: if the file is missing or an entry lacks a field or has one too many.
    """
    path = path or MANIFEST_PATH
    if not path.is_file():
        raise WeightsError(
            f"The list of weight files is missing: {path}. It lies at the top of the repository; a "
            "package installed without the repository does not carry it. Run from a clone, install "
            "with `pip install -e .`, or copy weights_manifest.json to that path."
        )
    advice = "restore it from the repository; weights_manifest.schema.json describes its form"
    with reading(path, "a list of weight files", advice=advice):
        content = json.loads(path.read_bytes().decode())
        entries = [_entry(item) for item in content["files"]]
    by_id = {entry.id: entry for entry in entries}
    if len(by_id) != len(entries):
        raise WeightsError(f"{path} names an id twice. Every id must be unique.")
    return by_id


def get_entry(entry_id: str) -> WeightEntry:
    """One entry by its id.

    Raises:
        WeightsError: if there is no such id; the message lists all of them.
    """
    manifest = load_manifest()
    if entry_id not in manifest:
        raise WeightsError(
            f"There is no weight file with the id {entry_id!r}. Known ids: {', '.join(manifest)}."
        )
    return manifest[entry_id]


def how_to_get(file_name: str) -> str:
    """How a user gets a weight file, in one sentence or two.

    Args:
        file_name: name without folder.

    Returns:
        The command, the source and the target folder, or general advice for unknown files.
    """
    if not MANIFEST_PATH.is_file():
        return "Put the file into one of the model folders."
    entries = list(load_manifest().values())
    for entry in entries:
        if file_name in entry.converts_to:
            return (
                f"Get {entry.file_name} with `stylemaster weights download {entry.id}` or from "
                f"{_page(entry)}, then make {file_name} of it with `stylemaster weights convert`."
            )
    by_name = [e for e in entries if e.file and file_name in (e.file_name, Path(e.file).name)]
    # Several repositories call their file "model.safetensors": no guess is better than a wrong one.
    if len(by_name) == 1:
        entry = by_name[0]
        return (
            f"Get it with `stylemaster weights download {entry.id}` or from {_page(entry)} and put "
            f"it into models/{entry.folder}."
        )
    return (
        "It is not in the list of known files (`stylemaster weights list`): put it into one of the "
        "model folders yourself."
    )


def _page(entry: WeightEntry) -> str:
    return f"https://huggingface.co/{entry.repository}"


def _entry(item: dict[str, Any]) -> WeightEntry:
    expected = {field.name for field in fields(WeightEntry)}
    if expected != set(item):
        raise KeyError(f"fields that differ: {sorted(expected ^ set(item))}")
    item = dict(item, needed_by=tuple(item["needed_by"]), converts_to=tuple(item["converts_to"]))
    return WeightEntry(**item)
