"""Captions: where they stand, and how words about style are taken out of them."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from ..errors import ConfigError, LayoutError
from ..reading import reading
from .jsonl import read_jsonl

CAPTION_COLUMNS = ("caption", "prompt", "text")
# The order counts: "photo" is found before "photograph", as in StyleCrafter.
_KIND = (
    "(?:painting|drawing|mural|artwork|view|portrait|photo|photograph|watercolor|illustration"
    "|picture|digital art)"
)
_WORDS = r"(?:a )?(?:\w+ )*"
_LEADING = re.compile(rf"^{_WORDS}{_KIND} of ")
_ANYWHERE = re.compile(rf"in {_WORDS}{_KIND} ?")
_DASHED = re.compile(r"^(?:painting|photograph|digital art|black and white photograph) - ")


def strip_style_words(caption: str) -> str:
    """Take phrases about style out of a caption: "a painting of a cat" becomes "a cat".

    Three rules, minding case: kinds of picture at the start ("a ... painting of "), anywhere
    ("in a ... painting "), and before a dash at the start ("photograph - "). The second is greedy:
    "a dog in a street with a view" becomes "a dog ".

    Source: StyleCrafter's training data (its SDXL version); deviation: none, spaces included.
    """
    caption = _LEADING.sub("", caption)
    caption = _ANYWHERE.sub("", caption)
    return _DASHED.sub("", caption)


def caption_path(media: Path) -> Path:
    """Where the caption of a picture or clip is: `cat.txt` beside `cat.png`."""
    return media.with_suffix(".txt")


def sidecar_caption(media: Path) -> str | None:
    """Caption in the text file beside a picture or clip (`cat.png`, `cat.txt`), None without."""
    path = caption_path(media)
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise LayoutError(f"the caption {path} is no UTF-8 text ({error}); convert it") from error


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of a .csv file with a header, or of a .jsonl file with an object a line.

    Raises:
        ConfigError: if the file is missing, empty, damaged or of another kind.
    """
    if not path.is_file():
        raise ConfigError(f"there is no table {path}; give a .csv or .jsonl file")
    with reading(path, "a table", error=ConfigError, advice="mend it"):
        return _read_rows(path)


def _read_rows(path: Path) -> list[dict[str, str]]:
    if path.suffix.lower() == ".jsonl":
        rows = [
            {key: str(value) for key, value in record.items() if value is not None}
            for record in read_jsonl(path)
        ]
    elif path.suffix.lower() == ".csv":
        rows = _read_csv(path)
    else:
        raise ConfigError(f"{path} is no table; expected .csv or .jsonl")
    if not rows:
        raise ConfigError(f"the table {path} has no rows; the dataset is empty")
    return rows


def _read_csv(path: Path) -> list[dict[str, str]]:
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            for row in reader:
                if None in row or None in row.values():
                    raise ConfigError(
                        f"{path}, line {reader.line_num} has another number of fields than the "
                        "header; put captions that hold commas in double quotes"
                    )
                rows.append({key.strip(): value.strip() for key, value in row.items()})
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as CSV in UTF-8 ({error}); save it so") from error
    return rows


def find_column(row: dict[str, str], names: tuple[str, ...], path: Path) -> str:
    """Return which of `names` is a column of `row`.

    Raises:
        ConfigError: if none is, or more than one.
    """
    found = [name for name in names if name in row]
    if len(found) != 1:
        raise ConfigError(
            f"{path} has the columns {', '.join(row)}; expected exactly one of {', '.join(names)}"
        )
    return found[0]
