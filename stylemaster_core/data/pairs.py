"""Folders of pairs: two pictures made of the same pixels, so of exactly the same style."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, LayoutError
from ..file_names import finder_below
from ..writing import remove_leftovers
from .images import read_image, write_image
from .jsonl import append_jsonl, locked, read_json, read_jsonl, write_json
from .views import View

logger = logging.getLogger("stylemaster")

RECORDS = "pairs.jsonl"
SETTINGS = "settings.json"


class NewPair(NamedTuple):
    """A pair before it is written."""

    canvas: np.ndarray  # uint8 [H, W, 3], the first picture
    view: View  # makes the second of it
    fields: dict[str, Any]  # what else the record says: prompts, scores, source
    kept: bool = True  # False: only the record is written


class Pair(NamedTuple):
    """A pair on the disk."""

    index: int
    first: Path
    second: Path
    view: View
    record: dict[str, Any]

    @property
    def group(self) -> str:
        """Pairs of one group have similar styles: the named style, or the source picture."""
        return str(self.record.get("style") or self.record.get("source") or self.index)


def open_pair_folder(
    folder: Path, settings: Mapping[str, Any], *, overwrite: bool = False
) -> set[int]:
    """Prepare a folder for pairs of these settings; several processes may do so at once.

    Returns:
        Numbers of the pairs that are finished, rejected ones included.

    Raises:
        ConfigError: if the folder holds something else, or pairs of other settings, and
            `overwrite` is false. Pairs of the same settings are never thrown away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        remove_leftovers(folder)
        if (folder / SETTINGS).is_file():
            before = read_json(folder / SETTINGS)
            differing = sorted(
                key for key in {*before, *settings} if before.get(key) != settings.get(key)
            )
            if differing and not overwrite:
                said = ", ".join(
                    f"{key} {before.get(key)!r} against {settings.get(key)!r}" for key in differing
                )
                raise ConfigError(
                    f"{folder} holds pairs of other settings ({said}); give another folder, or "
                    "ask for them to be overwritten"
                )
            if not differing:
                return _finished(folder)
            (folder / RECORDS).unlink(missing_ok=True)
            for picture in folder.glob("[0-9]*_[ab].png"):
                picture.unlink()
        elif any(path.name != ".lock" for path in folder.iterdir()):
            raise ConfigError(f"{folder} holds other files; give an empty or new folder for pairs")
        write_json(folder / SETTINGS, dict(settings))
    return set()


def make_pairs(
    folder: Path,
    num_pairs: int,
    make: Callable[[int], NewPair],
    finished: set[int],
    *,
    process: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, Any]]:
    """Make and write the pairs that are missing, one by one.

    Args:
        folder: from `open_pair_folder`.
        num_pairs: of all processes together.
        make: makes the pair of a number; must depend on nothing else. LayoutError, as for a damaged
            picture, leaves the pair out and is recorded.
        finished: from `open_pair_folder`.
        process: (number, count): pair i belongs to process i % count.

    Yields:
        The record of each pair once it is on the disk.
    """
    number, count = check_process(process)
    for index in range(number, num_pairs, count):
        if index in finished:
            continue
        try:
            pair = make(index)
        except LayoutError as error:
            logger.warning("left out pair %d: %s", index, error)
            record = {"index": index, "kept": False, "error": str(error)}
            append_jsonl(folder / RECORDS, record)
            yield record
            continue
        names = {"first": f"{index:06d}_a.png", "second": f"{index:06d}_b.png"}
        if pair.kept:
            # Without a record, a file of that name is what a killed process left.
            write_image(folder / names["first"], pair.canvas, overwrite=True)
            write_image(
                folder / names["second"], pair.view.apply_image(pair.canvas), overwrite=True
            )
        record = {"index": index, "kept": pair.kept, **names, "view": asdict(pair.view)}
        record |= pair.fields
        append_jsonl(folder / RECORDS, record)
        yield record


def check_process(process: tuple[int, int]) -> tuple[int, int]:
    """Check that a process number fits the count, and return both.

    Raises:
        ConfigError: if not.
    """
    number, count = process
    if count < 1 or not 0 <= number < count:
        raise ConfigError(f"process {number} of {count}; expected 0 to count - 1, e.g. 0/4 to 3/4")
    return number, count


def read_pairs(folder: Path) -> list[Pair]:
    """Read the pairs of a folder, rejected ones left out, by number.

    Raises:
        ConfigError: if it is no such folder, or no pair was kept.
    """
    if not (folder / RECORDS).is_file():
        raise ConfigError(f"{folder} holds no {RECORDS}; make illusion pairs there")
    pairs: dict[int, Pair] = {}
    rejected = 0
    find = finder_below(folder, folder / RECORDS)
    for record in read_jsonl(folder / RECORDS, _number_problem, missing_ok=True):
        try:
            if record["kept"]:
                index, view = record["index"], View(**record["view"])
                first, second = find(record.get("first")), find(record.get("second"))
                pairs[index] = Pair(index, first, second, view, record)
            else:
                rejected += 1
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{folder / RECORDS} holds no pair: {record} ({error!r})") from error
    if not pairs:
        raise ConfigError(f"{folder} holds no pair ({rejected} were left out); see {RECORDS}")
    return [pairs[index] for index in sorted(pairs)]


def check_pair(pair: Pair) -> str | None:
    """Say what is wrong with a pair; None if its pictures are rearrangements of each other."""
    try:
        first, second = read_image(pair.first), read_image(pair.second)
        seen = pair.view.apply_image(first)
    except LayoutError as error:
        return str(error)
    if not np.array_equal(seen, second):
        return f"{pair.second} is not the {pair.view.name} view of {pair.first.name}"
    return None


def _finished(folder: Path) -> set[int]:
    finished = set()
    find = finder_below(folder, folder / RECORDS)
    for record in read_jsonl(folder / RECORDS, _number_problem, missing_ok=True):
        if not record.get("kept") or all(
            find(record.get(key)).is_file() for key in ("first", "second")
        ):
            finished.add(record["index"])
    return finished


def _number_problem(record: dict[str, Any]) -> str | None:
    return None if type(record.get("index")) is int else "no pair, it has no index"
