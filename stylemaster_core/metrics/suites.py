"""The papers' tests: which style pictures, prompts and contents are put together, and how often."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.captions import CAPTION_COLUMNS, find_column, read_table, sidecar_caption
from ..data.images import read_image
from ..data.media_files import IMAGE_ENDINGS, MOVING_ENDINGS, media_files
from ..data.segment_files import file_identity
from ..errors import ConfigError, LayoutError

if TYPE_CHECKING:
    from ..pipelines.stylize import Task

STYLES, PROMPTS = "style_set", "prompts.txt"
_WORD = re.compile(r"[^A-Za-z0-9]+")
Problem = Callable[[str], None]


@dataclass(frozen=True)
class Suite:
    """A test of a paper.

    Attributes:
        about: the paper's own, and how many pairs that had.
        task: what is generated.
        contents: folder of the data with what is restyled; None where only text is given.
        from_table: the data's one .csv names the pairs; else everything is put together with
            everything.
    """

    about: str
    task: Task
    contents: str | None = None
    from_table: bool = False

    @property
    def endings(self) -> frozenset[str]:
        """Of the contents' files."""
        return MOVING_ENDINGS if self.task == "video-to-video" else IMAGE_ENDINGS


SUITES = {
    "stylemaster-video": Suite(
        "StyleMaster, text to video: 192 pairs of 12 style pictures and 16 prompts",
        "text-to-video",
        from_table=True,
    ),
    "stylemaster-image": Suite(
        "StyleMaster, image style transfer: 96 pairs of a picture and a style picture",
        "image-to-image",
        contents="photos",
    ),
    "stylecrafter": Suite(
        "StyleCrafter, text to video: 20 style pictures with 12 prompts each", "text-to-video"
    ),
    "video-to-video": Suite(
        "videos restyled: every video in every style, with every prompt if there are some",
        "video-to-video",
        contents="clips",
    ),
}


@dataclass(frozen=True)
class Pair:
    """What one result is made of.

    Attributes:
        name: of its result's file; it follows from the pair's pictures and prompt alone, so that
            runs can be compared and changed data do not meet old results.
        number: in the data, from 1.
        style: picture.
        prompt: empty where there is none.
        content: what is restyled; None where only text is given.
    """

    name: str
    number: int
    style: Path
    prompt: str
    content: Path | None = None

    @property
    def prompt_name(self) -> str:
        """Of a file that all pairs of the same prompt share."""
        return f"{_slug(self.prompt)}-{_digest(self.prompt)}"


def read_pairs(suite: Suite, data: Path, on_problem: Problem) -> list[Pair]:
    """Read all pairs of a suite.

    Args:
        suite: one of `SUITES`.
        data: folder with `style_set/`, and a .csv, `prompts.txt`, or a folder of contents.
        on_problem: told of what cannot be used; the rest is.

    Raises:
        ConfigError: if nothing of it can be used.
    """
    if not data.is_dir():
        raise ConfigError(f"--data {data} is no folder; name one with {STYLES}/ in it")
    found = _from_table(suite, data, on_problem) if suite.from_table else _combined(suite, data)
    usable: dict[Path, str | None] = {}
    pairs: dict[str, Pair] = {}
    for number, (style, prompt, content) in enumerate(found, start=1):
        files = [style] if content is None else [style, content]
        for path in files:
            if path not in usable:
                usable[path] = _identity(path, on_problem, picture=path == style)
        identities = [usable[path] for path in files]
        if None in identities:
            on_problem(f"pair {number} is left out: it needs what was named before")
            continue
        what = prompt if content is None else content.stem
        digest = _digest(prompt, *map(str, identities))
        name = f"{_slug(style.stem)}--{_slug(what)}-{digest}"
        if name in pairs:
            on_problem(f"pair {number} is pair {pairs[name].number} again, and is left out")
            continue
        pairs[name] = Pair(name, number, style, prompt, content)
    if not pairs:
        raise ConfigError(f"no pair of {data} can be used; what is wrong with each was named")
    return list(pairs.values())


def spread(pairs: list[Pair], limit: int | None) -> list[Pair]:
    """The first `limit` pairs of an order in which styles, prompts and contents take turns.

    A smaller limit's pairs are among those of a greater one.

    Raises:
        ConfigError: for a limit below 1.
    """
    if limit is None:
        return pairs
    if limit < 1:
        raise ConfigError(f"--limit {limit}; expected at least 1")
    left, chosen = list(pairs), []
    styles: Counter[Path] = Counter()
    others: Counter[tuple[Path | None, str]] = Counter()
    while left and len(chosen) < limit:
        pair = min(left, key=lambda p: (styles[p.style], others[p.content, p.prompt], p.number))
        left.remove(pair)
        chosen.append(pair)
        styles[pair.style] += 1
        others[pair.content, pair.prompt] += 1
    return sorted(chosen, key=lambda pair: pair.number)


Found = list[tuple[Path, str, "Path | None"]]


def _from_table(suite: Suite, data: Path, on_problem: Problem) -> Found:
    tables = sorted(data.glob("*.csv"))
    if len(tables) != 1:
        named = ", ".join(table.name for table in tables) or "none"
        raise ConfigError(
            f"{data} holds {named}; expected one .csv with the columns style, caption"
        )
    rows = read_table(tables[0])
    if "style" not in rows[0]:
        raise ConfigError(
            f"{tables[0]} has the columns {', '.join(rows[0])}; expected style, and one of "
            f"{', '.join(CAPTION_COLUMNS)}"
        )
    caption = find_column(rows[0], CAPTION_COLUMNS, tables[0])
    if unknown := sorted(set(rows[0]) - {"style", caption}):
        on_problem(
            f"{tables[0].name}: the columns {', '.join(unknown)} are not known and not looked at; "
            f"expected style and {caption}"
        )
    return [(data / row["style"], row[caption], None) for row in rows]


def _combined(suite: Suite, data: Path) -> Found:
    styles = _files(data / STYLES, IMAGE_ENDINGS, "style pictures")
    prompts = _prompts(data / PROMPTS)
    if suite.contents is None:
        if not prompts:
            raise ConfigError(f"there is no {data / PROMPTS}; write one prompt a line into it")
        return [(style, prompt, None) for style in styles for prompt in prompts]
    contents = _files(data / suite.contents, suite.endings, "contents")
    return [
        (style, prompt, content)
        for content in contents
        for style in styles
        for prompt in prompts or [sidecar_caption(content) or ""]
    ]


def _prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text ({error}); save it so") from error
    return [line.strip() for line in lines if line.strip()]


def _files(folder: Path, endings: frozenset[str], what: str) -> list[Path]:
    found = media_files(folder, endings) if folder.is_dir() else []
    if not found:
        raise ConfigError(
            f"{folder} holds no {what}; put some there ({', '.join(sorted(endings))})"
        )
    return found


def _identity(path: Path, on_problem: Problem, *, picture: bool) -> str | None:
    """What tells a file from others; None, once it was named, for one that cannot be used."""
    try:
        if picture:
            read_image(path)
        return file_identity(path)
    except LayoutError as error:
        on_problem(str(error))
        return None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _slug(text: str) -> str:
    return _WORD.sub("-", text).strip("-")[:32].strip("-") or "x"
