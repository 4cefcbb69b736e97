"""Samples of a dataset: a clip or picture, its caption, and the picture of its style."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError
from ..file_names import refuse_outside
from ..writing import write_text
from .captions import (
    CAPTION_COLUMNS,
    caption_path,
    find_column,
    read_table,
    sidecar_caption,
    strip_style_words,
)
from .media_files import IMAGE_ENDINGS, VIDEO_ENDINGS, is_hidden

MEDIA_COLUMNS = ("media", "video", "image", "path", "file", "file_name")
SELF = "self"
TILE = "tile"


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        id: its name, unique in the dataset.
        media: video, animated or still image.
        caption: what it shows.
        style: picture whose style it has; None for its own picture (of a clip, a frame).
        repeat: make a clip of so many equal frames of the picture.
        tile: whether its gray tile belongs to it.
    """

    id: str
    media: Path
    caption: str
    style: Path | None = None
    repeat: int | None = None
    tile: bool = False

    @property
    def description(self) -> str:
        """What a cache compares to see whether it holds this sample; folders may move."""
        style = None if self.style is None else self.style.name
        facts = [self.id, self.media.name, self.caption, style, self.repeat, self.tile]
        return json.dumps(facts, ensure_ascii=False)


def read_samples(
    source: Path,
    *,
    caption: str | None = None,
    strip_style: bool = False,
    within: Sequence[Path] | None = None,
) -> list[Sample]:
    """Read a dataset.

    Args:
        source: a .jsonl or .csv table, one sample a row: a column of `MEDIA_COLUMNS`, one of
            `CAPTION_COLUMNS`, and, if wanted, `id`, `style` (a path or "self"), `repeat`, `control`
            ("tile"); paths are relative to the table. Or a folder of media, searched with its
            sub-folders, each with a .txt file of the same name.
        caption: for samples without one; by default that is an error.
        strip_style: take words about style out of the captions.
        within: folders outside of which no file may lie, links followed; None allows every file, as
            is right for a table that the user names, and wrong for one that a workflow names.

    Returns:
        At least one sample, in the table's order or sorted by path.

    Raises:
        ConfigError: for a missing or empty source, column or caption, an id that occurs twice, or a
            file outside of `within`.
    """
    if source.is_dir():
        samples = _from_folder(source, caption, within)
    else:
        samples = _from_table(source, caption)
    if within is not None:
        refuse_outside((p for s in samples for p in (s.media, s.style) if p is not None), within)
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample.id] = counts.get(sample.id, 0) + 1
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(
            f"{source}: {len(twice)} ids occur more than once ({', '.join(twice[:3])}, ...); give "
            "every row a different id (without a column id, the path is the id)"
        )
    if strip_style:
        samples = [replace(s, caption=strip_style_words(s.caption)) for s in samples]
    return samples


def find_pictures(source: Path, *, within: Sequence[Path] | None = None) -> list[Path]:
    """Paths of the pictures of a folder, with its sub-folders; or the one picture that is given.

    Args:
        source: folder or picture.
        within: as in `read_samples`.

    Raises:
        ConfigError: if there are none, or one lies outside of `within`.
    """
    pictures = [path for path in _media_of(source) if path.suffix.lower() in IMAGE_ENDINGS]
    if not pictures:
        raise ConfigError(f"{source} holds no pictures; the dataset is empty")
    if within is not None:
        refuse_outside(pictures, within)
    return pictures


def is_video(path: Path) -> bool:
    """Whether the name is that of a video file."""
    return path.suffix.lower() in VIDEO_ENDINGS


def write_samples(path: Path, samples: Iterable[Sample], *, overwrite: bool = False) -> None:
    """Write samples as a .jsonl table with paths relative to it.

    Raises:
        ConfigError: if the name is another, or the file exists.
    """
    if path.suffix.lower() != ".jsonl":
        raise ConfigError(f"a table of samples is written as .jsonl, got {path.name!r}")
    lines = []
    for sample in samples:
        row: dict[str, object] = {
            "id": sample.id,
            "media": _relative(sample.media, path.parent),
            "caption": sample.caption,
            "style": SELF if sample.style is None else _relative(sample.style, path.parent),
        }
        if sample.repeat is not None:
            row["repeat"] = sample.repeat
        if sample.tile:
            row["control"] = TILE
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines), overwrite=overwrite)


def _from_folder(folder: Path, caption: str | None, within: Sequence[Path] | None) -> list[Sample]:
    samples, without = [], []
    for media in _media_of(folder):
        name = media.relative_to(folder).as_posix()
        if within is not None:  # before it is read
            refuse_outside([caption_path(media)], within)
        words = sidecar_caption(media)
        if words is None:
            words = caption
        if words is None:
            without.append(name)
            continue
        samples.append(Sample(name, media, words))
    if without:
        raise ConfigError(
            f"{folder}: {len(without)} files have no caption ({', '.join(without[:3])}, ...); put "
            "a .txt file of the same name beside each, or give one caption for all"
        )
    if not samples:
        raise ConfigError(f"{folder} holds no videos or pictures; the dataset is empty")
    return samples


def _media_of(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ConfigError(f"there is no folder {source}; check the path")
    found = [
        path
        for path in source.rglob("*")
        if path.suffix.lower() in VIDEO_ENDINGS | IMAGE_ENDINGS
        and not is_hidden(path, source)
        and path.is_file()
    ]
    return sorted(found, key=lambda path: _natural(path.relative_to(source).as_posix()))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort clip_2 before clip_10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _from_table(table: Path, caption: str | None) -> list[Sample]:
    rows = read_table(table)
    return [_from_row(row, table, number, caption) for number, row in enumerate(rows, start=1)]


def _from_row(row: Mapping[str, str], table: Path, number: int, caption: str | None) -> Sample:
    fields = dict(row)
    media = fields[find_column(fields, MEDIA_COLUMNS, table)]
    if not media:
        raise ConfigError(f"{table}, row {number} names no video or picture: {fields}")
    if caption is None or any(name in fields for name in CAPTION_COLUMNS):
        caption = fields[find_column(fields, CAPTION_COLUMNS, table)] or caption or ""
    style = fields.get("style") or SELF
    repeat, control = fields.get("repeat"), fields.get("control")
    if control not in (None, "", TILE):
        raise ConfigError(f"{table}, row {number}: control is {control!r}; expected {TILE!r}")
    if repeat and not (repeat.isdecimal() and int(repeat) > 0):
        raise ConfigError(f"{table}, row {number}: repeat is {repeat!r}; expected a number")
    return Sample(
        id=fields.get("id") or Path(media).as_posix(),
        media=table.parent / media,
        caption=caption,
        style=None if style == SELF else table.parent / style,
        repeat=int(repeat) if repeat else None,
        tile=control == TILE,
    )


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive on Windows
        return path.resolve().as_posix()


def count_by_kind(samples: Sequence[Sample]) -> dict[str, int]:
    """How many videos and pictures there are, by their names."""
    videos = sum(is_video(sample.media) for sample in samples)
    return {"videos": videos, "pictures": len(samples) - videos}
