"""Ways to damage a file: cut, changed, swapped, filled with other values."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

BYTES = ("cut", "flip", "zero", "insert", "repeat", "empty", "remove", "folder", "swap", "page")
STRUCTURE = ("value", "drop", "nest", "dtype", "nan")
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 1.5, 2**31, 2**70, float("nan"), float("inf"), "", "x", "../../x", "\0",
    [], {}, [[]], {"": None}, ["a", 1], "9" * 5000,
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8")
DEEP = "[" * 50_000 + "]" * 50_000


@dataclass(frozen=True)
class Harm:
    """One damage.

    Attributes:
        how: of `BYTES` or `STRUCTURE`.
        file: which file of a folder, 0..1.
        place: where in it, 0..1.
        amount: bytes.
        value: what is put in.
        seed: of random bytes.
    """

    how: str
    file: float
    place: float
    amount: int
    value: Any
    seed: int


def harms(*ways: str) -> st.SearchStrategy[list[Harm]]:
    """One damage, sometimes two."""
    unit = st.floats(0, 1, allow_nan=False)
    one = st.builds(
        Harm,
        st.sampled_from(ways or (*BYTES, *STRUCTURE)),
        unit,
        unit,
        st.integers(1, 64) | st.sampled_from([512, 4096, 70_000]),
        st.sampled_from(ODD_VALUES) | st.sampled_from(DTYPES),
        st.integers(0, 1 << 16),
    )
    return st.lists(one, min_size=1, max_size=2)


def apply_harms(harm: list[Harm], target: Path) -> None:
    """Damage a file, or files of a folder."""
    for one in harm:
        files = (
            [target] if target.is_file() else sorted(f for f in target.rglob("*") if f.is_file())
        )
        if files:
            _apply(one, files[min(int(one.file * len(files)), len(files) - 1)], files)


def _apply(harm: Harm, file: Path, files: list[Path]) -> None:
    data = file.read_bytes()
    if harm.how in STRUCTURE:
        changed = _structure(harm, data)
        # Of what is no JSON the bytes are changed instead.
        file.write_bytes(_bytes("flip", harm, data) if changed is None else changed)
    elif harm.how == "remove":
        file.unlink()
    elif harm.how == "folder":
        file.unlink()
        file.mkdir()
    elif harm.how == "swap":
        file.write_bytes(files[harm.seed % len(files)].read_bytes())
    else:
        file.write_bytes(_bytes(harm.how, harm, data))


def _bytes(how: str, harm: Harm, data: bytes) -> bytes:
    draw = random.Random(harm.seed)
    at = int(harm.place * len(data))
    end = at + harm.amount
    if how == "empty":
        return b""
    if how == "page":
        return b"<!doctype html><title>404</title>"
    if how == "cut":
        return data[:at]
    if how == "zero":
        return data[:at] + bytes(len(data[at:end])) + data[end:]
    if how == "insert":
        return data[:at] + draw.randbytes(harm.amount) + data[at:]
    if how == "repeat":
        return data[:end] + data[at:]
    return data[:at] + draw.randbytes(len(data[at:end])) + data[end:]


def _structure(harm: Harm, data: bytes) -> bytes | None:
    """Change a JSON value, of a file, of a line of it, or of the header of a safetensors file."""
    if len(data) > 9 and data[8:9] == b"{":
        size = int.from_bytes(data[:8], "little")
        header = _json(harm, data[8 : 8 + size], data[8 + size :])
        if header is None:
            return None
        body = _nan(data[8 + size :], harm) if harm.how == "nan" else data[8 + size :]
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + body
    whole = _json(harm, data)
    if whole is not None:
        return whole
    lines = data.split(b"\n")
    at = min(int(harm.place * len(lines)), len(lines) - 1)
    line = _json(harm, lines[at])
    return None if line is None else b"\n".join([*lines[:at], line, *lines[at + 1 :]])


def _nan(body: bytes, harm: Harm) -> bytes:
    """Not a number, of 4 or 2 bytes, in the place of some; aligned, as the tensors are."""
    at = int(harm.place * max(len(body) - 8, 0)) // 8 * 8
    number = b"\x00\x00\xc0\x7f" * 2 if harm.seed % 2 else b"\xc0\x7f" * 4
    return body[:at] + number[: len(body) - at] + body[at + 8 :]


def _json(harm: Harm, text: bytes, body: bytes = b"") -> bytes | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    places = list(_places(content))
    if harm.how == "nan" and body or not places:
        return text
    if harm.how == "dtype":
        places = [(node, key) for node, key in places if key == "dtype"] or places
    node, key = places[min(int(harm.place * len(places)), len(places) - 1)]
    if harm.how == "drop":
        del node[key]
    elif harm.how == "nest":
        node[key] = "NESTED"
        return json.dumps(content).replace('"NESTED"', DEEP).encode()
    else:
        node[key] = harm.value
    return json.dumps(content).encode("utf-8", errors="surrogatepass")


def _places(content: Any) -> Any:
    """(container, key) of every value below."""
    items: list[Any] = []
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))
    for key, value in items:
        yield content, key
        yield from _places(value)
