"""Numbers written as text: strengths of blocks, and guidance that changes during the sampling."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal, get_args

from ..stylemaster_core.errors import ConfigError

BlockRange = Literal["all", "early", "middle", "late", "list"]
_BLOCKS = re.compile(r"(\d+)(?:-(\d+))?$")
_FINEST = 1000  # parts of the sampling that a schedule may tell apart


def block_scales(choice: str, text: str, num_blocks: int) -> list[float] | None:
    """Strength of each block.

    Args:
        choice: `early`, `middle` and `late` are thirds of the blocks; the others get 0.
        text: for `list`: "0-9:1.0, 10-29:0.5"; blocks that it does not name get 0.
        num_blocks: of the model.

    Returns:
        One number a block; None for `all`.

    Raises:
        ConfigError: for an unknown choice or a text that does not fit.
    """
    if choice == "all":
        return None
    if choice == "list":
        return _listed_scales(text, num_blocks)
    thirds = [number for number in get_args(BlockRange) if number not in ("all", "list")]
    if choice not in thirds:
        raise ConfigError(f"blocks {choice!r}; expected one of {get_args(BlockRange)}")
    return [float(3 * block // num_blocks == thirds.index(choice)) for block in range(num_blocks)]


def _listed_scales(text: str, num_blocks: int) -> list[float]:
    scales: dict[int, float] = {}
    for key, value in _pairs(text, "blocks", "0-9:1.0, 10-29:0.5"):
        match = _BLOCKS.match(key)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < num_blocks or value < 0:
            raise ConfigError(
                f"blocks {key!r} with weight {value}; expected a block or a range within 0 to "
                f"{num_blocks - 1}, and a weight that is not negative"
            )
        for block in range(first, last + 1):
            if block in scales:
                raise ConfigError(f"block {block} is named twice in {text!r}; name it once")
            scales[block] = value
    return [scales.get(block, 0.0) for block in range(num_blocks)]


def strength_list(text: str, *, most: int) -> list[float]:
    """Strengths of a style: "0.5, 1, 1.5".

    Raises:
        ConfigError: for a text that cannot be read, a number below 0 or above 4, or one that is
            named twice; for none, or more than `most`.
    """
    strengths: list[float] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            strength = float(part)
        except ValueError:
            strength = math.nan
        if not 0 <= strength <= 4:
            raise ConfigError(
                f"strengths: {part!r:.40} is no number from 0 to 4; write them as in 0.5, 1, 1.5"
            )
        if strength in strengths:
            raise ConfigError(f"strengths: {part} is named twice in {text!r:.80}; name it once")
        strengths.append(strength)
    if not 0 < len(strengths) <= most:
        raise ConfigError(
            f"strengths: {len(strengths)} were given; give 1 to {most}, as in 0.5, 1, 1.5"
        )
    return strengths


def guidance_schedule(text: str, constant: float) -> list[float]:
    """Guidance over the sampling.

    Args:
        text: "0:8, 0.5:4": 8 from the start, 4 from half of the way on; empty for the constant.
        constant: used where the text is empty.

    Returns:
        Numbers that divide the sampling evenly, as many as the text needs.

    Raises:
        ConfigError: for a text that cannot be read.
    """
    if not text.strip():
        return [constant]
    points: list[tuple[Fraction, float]] = []
    for key, value in _pairs(text, "schedule", "0:8, 0.5:4"):
        try:
            start = Fraction(key).limit_denominator(_FINEST)
        except (ValueError, ZeroDivisionError):
            raise ConfigError(
                f"schedule: {key!r} is no number; expected a part of the sampling, 0 to 1, as in "
                "0:8, 0.5:4"
            ) from None
        points.append((start, value))
    starts = [start for start, _ in points]
    if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1:
        raise ConfigError(
            f"the schedule {text!r} must begin at 0 and rise, below 1, as in 0:8, 0.5:4"
        )
    count = math.lcm(*(start.denominator for start in starts))
    if count > _FINEST:
        raise ConfigError(
            f"the schedule {text!r} is too fine; give parts of the sampling with up to 3 decimals"
        )
    return [
        [value for start, value in points if start <= Fraction(step, count)][-1]
        for step in range(count)
    ]


def _pairs(text: str, what: str, example: str) -> Iterator[tuple[str, float]]:
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, colon, value = part.partition(":")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not colon or not math.isfinite(number):
            raise ConfigError(f"{what}: {part!r} cannot be read; write it as in {example}")
        yield key.strip(), number
    if not text.strip(" ,"):
        raise ConfigError(f"{what}: nothing was given; write it as in {example}")
