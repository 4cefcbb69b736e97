"""The jobs of a batch: a workflow with the inputs of one video, style and prompt set."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import logging
import re
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..data.media_files import IMAGE_ENDINGS, MOVING_ENDINGS, media_files
from ..errors import ConfigError
from .workflow import ROLES, Target, Workflow, find_role, find_target, parse_value, seed_targets

logger = logging.getLogger("stylemaster")

UPLOAD_FOLDER = "stylemaster_queue"
_PREFIX = "filename_prefix"
_MAX_NAME_PART = 60
_MAX_SLUG = 40


@dataclass(frozen=True)
class InputFile:
    """A file to upload; its name on the server is made of its content."""

    path: Path
    upload_name: str


@dataclass(frozen=True)
class Row:
    """What one job gets; None leaves the workflow's own value."""

    video: Path | None = None
    style: Path | None = None
    prompt: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # "NODE.input" -> value


@dataclass(frozen=True)
class Job:
    """One run of the workflow.

    Attributes:
        id: hash of the workflow, the content of the input files and all settings.
        name: first part of the results' file names.
        workflow: with every value set; files are named as they are asked to be uploaded. The
            jobs of a batch share the nodes that are alike in all of them.
        targets: the inputs that were set.
        uploads: those that hold an uploaded file.
        values: what was set, "NODE.input" -> value, paths as given; for people to read.
    """

    id: str
    name: str
    workflow: Workflow
    targets: tuple[Target, ...]
    uploads: Mapping[Target, InputFile]
    values: Mapping[str, Any]

    def prompt(self, names: Mapping[str, str]) -> Workflow:
        """Return the workflow for one server.

        Args:
            names: upload name -> what that server calls the file.
        """
        return _with(
            self.workflow, {target: names[f.upload_name] for target, f in self.uploads.items()}
        )

    def with_other_prefix(self) -> Job | None:
        """Return the same job under another filename prefix; None where no node has one.

        A server that has a result in its cache does not make it again for the same inputs.
        """
        suffix = f"_{secrets.token_hex(3)}"
        values = {
            Target(node, _PREFIX): f"{body['inputs'][_PREFIX]}{suffix}"
            for node, body in self.workflow.items()
            if isinstance(body["inputs"].get(_PREFIX), str)
        }
        return replace(self, workflow=_with(self.workflow, values)) if values else None


def cross_product(
    videos: Path | None = None, styles: Path | None = None, prompts: Path | None = None
) -> list[Row]:
    """Return a row for each video with each style with each prompt.

    Args:
        videos: a folder of videos, or one video; None leaves the workflow's own.
        styles: a folder of images, or one image.
        prompts: a text file with a prompt a line; empty lines and lines with # are skipped.

    Raises:
        ConfigError: if a folder or file is missing or holds nothing fitting.
    """
    return [
        Row(video, style, prompt)
        for video, style, prompt in product(
            _files_in(videos, MOVING_ENDINGS, "video") if videos else [None],
            _files_in(styles, IMAGE_ENDINGS, "image") if styles else [None],
            _read_prompts(prompts) if prompts else [None],
        )
    ]


def read_csv(path: Path, videos: Path | None = None, styles: Path | None = None) -> list[Row]:
    """Return a row for each line of a table.

    Args:
        path: CSV with a header; columns `video`, `style`, `prompt` and `NODE.input`. An empty
            cell leaves the workflow's own value.
        videos: folder that the video column is relative to; default: the table's.
        styles: folder that the style column is relative to; default: the table's.

    Raises:
        ConfigError: if the table or a file in it is missing, or a line is too long or too short.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = list(csv.DictReader(stream, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"Cannot read the table {path}: {error}.") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=2):
        if None in line or None in line.values():
            raise ConfigError(f"{path}, line {number}: not as many cells as the header has.")
        cells = {column.strip(): cell.strip() for column, cell in line.items()}
        bad = [column for column in cells if column not in ROLES and "." not in column]
        if bad:
            raise ConfigError(
                f"{path}: unknown columns {', '.join(map(repr, bad))}; "
                "expected video, style, prompt or NODE.input."
            )
        rows.append(
            Row(
                _cell_file(cells.get("video"), videos or path.parent, path, number),
                _cell_file(cells.get("style"), styles or path.parent, path, number),
                cells.get("prompt") or None,
                {key: parse_value(cell) for key, cell in cells.items() if "." in key and cell},
            )
        )
    if not rows:
        raise ConfigError(f"The table {path} has no line below its header.")
    return rows


def make_jobs(
    workflow: Workflow,
    rows: Iterable[Row],
    *,
    settings: Mapping[str, Any] | None = None,
    role_keys: Mapping[str, str] | None = None,
    seed: int | None = None,
    default_name: str = "result",
) -> list[Job]:
    """Make the jobs of a batch; equal ones are made once.

    Args:
        workflow: from `load_workflow`; not changed.
        rows: from `cross_product` or `read_csv`.
        settings: "NODE.input" -> value, for every job; a row's own settings come after.
        role_keys: role -> "NODE.input", where the convention of `find_role` does not do.
        seed: for every seed of the workflow; None keeps them.
        default_name: name of a job without video, style and prompt.

    Raises:
        ConfigError: if an input is not found or ambiguous, or a file cannot be read.
    """
    base = copy.deepcopy(workflow)
    role_keys = role_keys or {}
    common: dict[Target, Any] = {}
    if seed is not None:
        common.update(dict.fromkeys(seed_targets(base), seed))
    common.update({find_target(base, key): value for key, value in (settings or {}).items()})
    rows = list(rows)
    roles = {
        role: find_role(base, role, role_keys.get(role))
        for role in ROLES
        if role in role_keys or any(getattr(row, role) is not None for row in rows)
    }
    _check_distinct(roles)
    hashes: dict[Path, InputFile] = {}
    jobs: dict[str, Job] = {}
    for row in rows:
        job = _make_job(base, row, common, roles, hashes, default_name)
        if job.id in jobs:
            logger.warning("A job is listed twice and runs once: %s (%s)", job.name, job.id)
        jobs.setdefault(job.id, job)
    return list(jobs.values())


def _make_job(
    base: Workflow,
    row: Row,
    common: Mapping[Target, Any],
    roles: Mapping[str, Target],
    hashes: dict[Path, InputFile],
    default_name: str,
) -> Job:
    values = dict(common)
    values.update({find_target(base, key): value for key, value in row.settings.items()})
    uploads: dict[Target, InputFile] = {}
    for role, path in (("video", row.video), ("style", row.style)):
        if path is not None:
            if path not in hashes:
                hashes[path] = _input_file(path)
            uploads[roles[role]] = hashes[path]
            values[roles[role]] = str(path)
    if row.prompt is not None:
        values[roles["prompt"]] = row.prompt
    names = {t: f"{UPLOAD_FOLDER}/{file.upload_name}" for t, file in uploads.items()}
    workflow = _with(base, values | names)
    return Job(
        id=_hash_of(workflow),
        name=_name_of(row) or _name_part(default_name),
        workflow=workflow,
        targets=tuple(values),
        uploads=uploads,
        values={str(target): value for target, value in values.items()},
    )


def _with(workflow: Workflow, values: Mapping[Target, Any]) -> Workflow:
    """Return a workflow with inputs set; only the nodes that change are copied."""
    changed = dict(workflow)
    for (node, name), value in values.items():
        if changed[node] is workflow[node]:
            changed[node] = {**workflow[node], "inputs": dict(workflow[node]["inputs"])}
        changed[node]["inputs"][name] = value
    return changed


def _hash_of(workflow: Workflow) -> str:
    # Titles and the like do not change a result; an upload's name stands for its content.
    bare = {
        node: {"class_type": body["class_type"], "inputs": body["inputs"]}
        for node, body in workflow.items()
    }
    text = json.dumps(bare, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _input_file(path: Path) -> InputFile:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise ConfigError(f"Cannot read the input {path}: {error.strerror}.") from error
    return InputFile(path, f"{digest.hexdigest()[:24]}{path.suffix.lower()}")


def _name_of(row: Row) -> str:
    parts = [_name_part(path.stem) for path in (row.video, row.style) if path is not None]
    slug = re.sub(r"\W+", "-", (row.prompt or "").lower())[:_MAX_SLUG].strip("-")
    return "__".join([*parts, slug] if slug else parts)


def _name_part(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)[:_MAX_NAME_PART].strip(".") or "_"


def _check_distinct(roles: Mapping[str, Target]) -> None:
    for target in set(roles.values()):
        same = [role for role, other in roles.items() if other == target]
        if len(same) > 1:
            raise ConfigError(
                f"{' and '.join(same)} both go to {target}. Name different inputs with --map."
            )


def _files_in(folder: Path, endings: Collection[str], what: str) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder} with {what} files.")
    files = media_files(folder, endings, what=what)
    if not files:
        known = ", ".join(sorted(endings))
        raise ConfigError(f"No {what} in {folder}; expected files named {known}.")
    return files


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the prompts {path}: {error}.") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise ConfigError(f"No prompt in {path}; expected one a line.")
    return prompts


def _cell_file(cell: str | None, folder: Path, table: Path, line: int) -> Path | None:
    if not cell:
        return None
    path = folder / cell
    if not path.is_file():
        raise ConfigError(f"{table}, line {line}: there is no file {path}.")
    return path
