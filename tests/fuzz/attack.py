"""What is attacked: kinds of misfortune, and the endpoints that each of them strikes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis.strategies import SearchStrategy

# Called with what `prepare` returned, a drawn case and an empty folder of its own. Returns in a
# word what came of it, such as "refused" or "accepted"; an exception is a fault.
Check = Callable[[Any, Any, Path], str]


class FaultError(AssertionError):
    """Something did not hold that has to."""


@dataclass(frozen=True)
class Endpoint:
    """Something that a misfortune strikes.

    Attributes:
        cases: what is drawn; it must describe the whole case, so that a seed repeats it.
        check: plays a case.
        prepare: makes what the checks share, in an empty folder that stays; once in a run.
    """

    cases: SearchStrategy[Any]
    check: Check
    prepare: Callable[[Path], Any] = lambda folder: folder


@dataclass(frozen=True)
class Kind:
    """A kind of misfortune.

    Attributes:
        name: of the kind, one word.
        endpoints: by name; each gets the same number of cases.
        long_cases: how many the long setting plays, of all endpoints together.
        batch: cases of an endpoint between two looks at the clock.
        shrink: whether a smaller case is looked for when one fails; not where a case takes seconds.
        limit_s: how long a case may take before it counts as a hang.
    """

    name: str
    endpoints: Mapping[str, Endpoint]
    long_cases: int
    batch: int = 20
    shrink: bool = True
    limit_s: float = 60.0


def require(holds: object, message: str) -> None:
    """Raise a FaultError unless something holds.

    Raises:
        FaultError: if not.
    """
    if not holds:
        raise FaultError(message)
