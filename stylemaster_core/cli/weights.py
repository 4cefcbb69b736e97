"""`stylemaster weights`: list, download, verify and convert weight files."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..weights.manifest import WeightEntry

_DTYPES = ("float32", "float16", "bfloat16")


def add_parser(subparsers: Any) -> None:
    """Add `weights` to the command line.

    Args:
        subparsers: what `ArgumentParser.add_subparsers()` returned.
    """
    parser = subparsers.add_parser("weights", description=__doc__)
    parser.set_defaults(run=run)
    parser.set_defaults(kept="files that are whole stay, and the same command goes on from there")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = actions.add_parser("list", help="which files there are and which are present")
    fetching = actions.add_parser("download", help="fetch files, resumed and verified")
    fetching.add_argument(
        "--endpoint", default="https://huggingface.co", help="the hub or a mirror of it"
    )
    fetching.add_argument(
        "--overwrite", action="store_true", help="replace a different file of the same name"
    )
    verifying = actions.add_parser("verify", help="compare files with their SHA-256")
    for action in (fetching, verifying):
        action.add_argument("ids", nargs="*", metavar="ID", help="see `stylemaster weights list`")
    for action in (listing, fetching, verifying):
        action.add_argument(
            "--for",
            dest="task",
            metavar="TASK",
            help="what a task needs, without alternatives: text-to-video, train, ...",
        )
        action.add_argument(
            "--models-dir",
            type=Path,
            help="default: $COMFYUI_PATH/models if COMFYUI_PATH is set, else ./models",
        )

    converting = actions.add_parser("convert", help="make safetensors of a released checkpoint")
    converting.add_argument("source", type=Path, help="stylemaster.ckpt, controlnet.ckpt, ...")
    converting.add_argument("--out", type=Path, help="folder to write to; default: the source's")
    converting.add_argument("--dtype", choices=_DTYPES, help="default: as stored")
    converting.add_argument(
        "--include-base", action="store_true", help="write the Wan base of the release, too"
    )
    converting.add_argument("--overwrite", action="store_true", help="replace existing files")
    converting.add_argument(
        "--skip-weight-check", action="store_true", help="do not look for NaN in the weights"
    )
    for action in (listing, fetching, verifying, converting):
        action.add_argument("--json", action="store_true", help="results as JSON, for scripts")


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster weights`.

    Args:
        args: parsed arguments.

    Returns:
        0; or 1 if `verify` found a file that is wrong or missing.

    Raises:
        StyleMasterError: if something could not be done.
    """
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "list": _list,
        "download": _download,
        "verify": _verify,
        "convert": _convert,
    }
    return actions[args.action](args)


def _list(args: argparse.Namespace) -> int:
    models_dir = _models_dir(args)
    rows: list[dict[str, Any]] = []
    for entry in _chosen([], args.task):
        path = models_dir / entry.folder / entry.file_name
        rows.append(
            {
                "id": entry.id,
                "present": path.exists(),
                "path": str(path),
                "size": entry.size,
                "approximate_size": entry.approximate_size,
                "licence": entry.licence,
                "source": f"https://huggingface.co/{entry.repository}",
                "file": entry.file,
                "needed_by": list(entry.needed_by),
                "alternative_to": entry.alternative_to,
                "purpose": entry.purpose,
                "note": entry.note,
            }
        )
    if args.json:
        _say(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        mark = "present" if row["present"] else "absent "
        _say(f"{mark}  {row['id']:<26} {_size_in_words(row):>9}  {row['purpose']}")
        _say(f"{'':9}{row['path']}  [{row['licence']}]")
    return 0


def _download(args: argparse.Namespace) -> int:
    from ..weights.download import download

    if not args.ids and not args.task:
        raise ConfigError(
            "Name files to download, or a task with --for (`stylemaster weights list` shows both)."
        )
    models_dir = _models_dir(args)
    rows: list[dict[str, Any]] = []
    for entry in _chosen(args.ids, args.task):
        with _bar(entry.file_name) as progress:
            result = download(
                entry,
                models_dir,
                endpoint=args.endpoint,
                overwrite=args.overwrite,
                progress=progress,
            )
        rows.append(
            {
                "id": entry.id,
                "path": str(result.path),
                "size": result.size,
                "sha256": result.sha256,
                "checked_against": result.checked_against,
                "was_present": result.was_present,
            }
        )
        if not args.json:
            done = "was there" if result.was_present else "downloaded"
            checked = {
                "manifest": "hash as in the list",
                "hub": "hash as the hub publishes it",
                "nothing": "no published hash to compare with",
            }[result.checked_against]
            _say(f"{done}: {result.path} (SHA-256 {result.sha256}, {checked})")
            if entry.converts_to and not result.was_present:
                _say(f"next: stylemaster weights convert {result.path}")
    if args.json:
        _say(json.dumps(rows, indent=2))
    return 0


def _verify(args: argparse.Namespace) -> int:
    models_dir = _models_dir(args)
    entries = _chosen(args.ids, args.task)
    rows = [_verify_one(entry, models_dir) for entry in entries]
    if args.json:
        _say(json.dumps(rows, indent=2))
    else:
        for row in rows:
            _say(f"{row['status']:<13} {row['id']:<26} {row['path']}")
    # Of a file and its alternatives one is enough, unless they were named.
    groups = [entry.id if args.ids else entry.alternative_to or entry.id for entry in entries]
    there = {g for g, row in zip(groups, rows, strict=True) if row["status"] != "missing"}
    is_different = any(row["status"] == "different" for row in rows)
    return int(is_different or bool(set(groups) - there))


def _verify_one(entry: WeightEntry, models_dir: Path) -> dict[str, Any]:
    from ..weights.download import noted_sha256
    from ..weights.files import sha256_of

    path = models_dir / entry.folder / entry.file_name
    row: dict[str, Any] = {"id": entry.id, "path": str(path), "sha256": None, "expected": None}
    if entry.file is None:
        return row | {"status": "not checked"}
    if not path.is_file():
        return row | {"status": "missing"}
    # A note made at download is the hub's word and outranks a hash that was read from a mirror.
    noted = noted_sha256(path)
    official = entry.sha256 if entry.sha256_source == "official" else None
    expected = official or noted or entry.sha256
    with _bar(entry.file_name) as progress:
        actual = sha256_of(path, progress)
    if expected is None:
        agrees = entry.size is None or entry.size == path.stat().st_size
        status = "no known hash" if agrees else "different"
    else:
        status = "ok" if actual == expected else "different"
    return row | {"status": status, "sha256": actual, "expected": expected}


def _convert(args: argparse.Namespace) -> int:
    import torch

    from ..weights.convert import convert
    from ..weights.files import read_state_dict
    from ..weights.state_dict import style_path_report

    with _bar(args.source.name) as progress:
        paths = convert(
            args.source,
            args.out or args.source.parent,
            overwrite=args.overwrite,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            include_base=args.include_base,
            skip_check=args.skip_weight_check,
            progress=progress,
        )
    rows: list[dict[str, Any]] = []
    for path in paths:
        tensors, metadata = read_state_dict(path)
        is_adapter = metadata["format"].startswith("stylemaster-adapter")
        report = style_path_report(tensors).message if is_adapter else None
        rows.append(
            {
                "path": str(path),
                "tensors": len(tensors),
                "metadata": metadata,
                "style_path": report,
            }
        )
    if args.json:
        _say(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        _say(f"wrote {row['path']}: {row['tensors']} tensors, {row['metadata']['format']}")
        if row["style_path"]:
            _say(f"  {row['style_path']}")
    return 0


def _chosen(ids: list[str], task: str | None) -> list[WeightEntry]:
    from ..weights.manifest import get_entry, load_manifest

    if ids and task:
        raise ConfigError("Give ids or --for, not both.")
    if ids:
        return [get_entry(entry_id) for entry_id in ids]
    entries = list(load_manifest().values())
    if task is None:
        return entries
    chosen = [
        entry for entry in entries if task in entry.needed_by and entry.alternative_to is None
    ]
    if not chosen:
        tasks = sorted({name for entry in entries for name in entry.needed_by})
        raise ConfigError(f"There is no task {task!r}. Tasks: {', '.join(tasks)}.")
    return chosen


def _models_dir(args: argparse.Namespace) -> Path:
    if args.models_dir is not None:
        return args.models_dir
    comfyui = os.environ.get("COMFYUI_PATH")
    return Path(comfyui) / "models" if comfyui else Path("models")


def _size_in_words(row: dict[str, Any]) -> str:
    if row["size"] is None:
        return row["approximate_size"] or "?"
    size = row["size"]
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr, fed with bytes done and bytes in all."""
    from tqdm import tqdm

    with tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1000, leave=False) as bar:

        def update(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
