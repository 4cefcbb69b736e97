"""Plays cases, endpoint after endpoint, until the time or the number is up, and counts."""

from __future__ import annotations

import faulthandler
import re
import shutil
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.fuzz.attack import Endpoint, Kind

DATABASE = Path(".hypothesis") / "examples"  # found cases; they are played first the next time
SHOWN_LINES = 12
Say = Callable[[str], Any]


class Budget(NamedTuple):
    """How much is played."""

    seconds: float | None  # of all kinds together; None for the long setting's numbers
    seed: int


@dataclass
class Tally:
    """What came of the cases of an endpoint."""

    kind: str
    endpoint: str
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: int = 0
    exhausted: bool = False  # there are no other cases

    @property
    def cases(self) -> int:
        """How many were played, faults included."""
        return sum(self.outcomes.values()) + self.faults


def run(
    kinds: Sequence[Kind], budget: Budget, scratch: Path, *, only: Sequence[str] = (), say: Say
) -> list[Tally]:
    """Play cases of all kinds.

    Args:
        kinds: what to play.
        budget: how much of it.
        scratch: an empty folder.
        only: names of kinds, or "kind/endpoint"; others are left out.
        say: is told of faults.
    """
    chosen = [(kind, _chosen(kind, only)) for kind in kinds]
    chosen = [(kind, names) for kind, names in chosen if names]
    tallies = []
    for number, (kind, names) in enumerate(chosen):
        share = None if budget.seconds is None else budget.seconds / len(chosen)
        folder = scratch / str(number)
        tallies += _run_kind(kind, names, budget.seed, share, folder, say)
    return tallies


def _chosen(kind: Kind, only: Sequence[str]) -> list[str]:
    return [
        name
        for name in kind.endpoints
        if not only or kind.name in only or f"{kind.name}/{name}" in only
    ]


def _run_kind(
    kind: Kind, names: list[str], seed: int, share: float | None, folder: Path, say: Say
) -> list[Tally]:
    deadline = None if share is None else time.monotonic() + share
    wanted = -(-kind.long_cases // len(kind.endpoints))
    tallies = {name: Tally(kind.name, name) for name in names}
    prepared: dict[str, Any] = {}
    for round_ in range(wanted):
        open_ = [
            name
            for name, tally in tallies.items()
            if tally.cases < wanted and not tally.faults and not tally.exhausted
        ]
        for name in open_:
            if deadline is not None and time.monotonic() > deadline:
                return list(tallies.values())
            if name not in prepared:
                place = folder / f"prepared-{len(prepared)}"
                place.mkdir(parents=True)
                prepared[name] = kind.endpoints[name].prepare(place)
            tally = tallies[name]
            count = min(kind.batch if deadline is None else _first_few(round_, kind), wanted)
            count = min(count, wanted - tally.cases)
            before = tally.cases
            batch_seed = zlib.crc32(f"{seed} {kind.name} {name} {round_}".encode())
            batch = Batch(batch_seed, count, is_first=round_ == 0)
            _play(kind, name, prepared[name], batch, folder / "case", tally, say)
            tally.exhausted = tally.cases == before
        if not open_:
            break
    return list(tallies.values())


def _first_few(round_: int, kind: Kind) -> int:
    """Small batches first, so that a short run reaches every endpoint."""
    return min(kind.batch, 4 << round_)


class Batch(NamedTuple):
    """Cases that are drawn together."""

    seed: int
    count: int
    is_first: bool  # of its endpoint


def _play(
    kind: Kind, name: str, prepared: Any, batch: Batch, place: Path, tally: Tally, say: Say
) -> None:
    """Play a batch of an endpoint; the first fault is said, as small as it can be made."""
    endpoint: Endpoint = kind.endpoints[name]
    # Hypothesis begins with the simplest case, whatever the seed: only the first batch plays it,
    # or small batches would play nothing else.
    failed, skip_one = False, not batch.is_first

    def case(drawn: Any) -> None:
        nonlocal failed, skip_one
        if skip_one:
            skip_one = False
            return
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        # A hang in native code can only be ended from outside; the stack says where it was.
        faulthandler.dump_traceback_later(kind.limit_s, exit=True)
        try:
            outcome = endpoint.check(prepared, drawn, place)
        except BaseException:
            failed = True
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        if not failed:  # cases of a search for a smaller one do not count
            tally.outcomes[outcome] += 1

    # By its name the database knows whose cases it has.
    case.__name__ = re.sub(r"\W", "_", f"{kind.name} {name}")
    phases = [Phase.generate, *([Phase.shrink] if kind.shrink else [])]
    settings = hypothesis.settings(
        max_examples=batch.count + skip_one,
        deadline=None,
        phases=[Phase.reuse, *phases] if batch.is_first else phases,
        database=DirectoryBasedExampleDatabase(DATABASE),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    # In this order: a seed takes the database away.
    play = settings(hypothesis.seed(batch.seed)(hypothesis.given(endpoint.cases)(case)))
    try:
        play()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001
        tally.faults += 1
        lines = "".join(traceback.format_exception(error)).splitlines()
        notes = "\n".join(getattr(error, "__notes__", ()))
        said = "\n".join(f"    {line}" for line in lines[-SHOWN_LINES:])
        say(f"FAULT {kind.name}/{name} (seed {batch.seed})\n{notes}\n{said}\n")


def table(tallies: Sequence[Tally]) -> str:
    """A Markdown table: cases and what came of them, by kind and endpoint."""
    lines = ["| kind | endpoint | cases | outcomes | faults |", "|---|---|---:|---|---:|"]
    for tally in tallies:
        outcomes = ", ".join(f"{count} {word}" for word, count in sorted(tally.outcomes.items()))
        lines.append(
            f"| {tally.kind} | {tally.endpoint} | {tally.cases} | {outcomes} | {tally.faults} |"
        )
    for kind in dict.fromkeys(tally.kind for tally in tallies):
        own = [tally for tally in tallies if tally.kind == kind]
        cases, faults = sum(t.cases for t in own), sum(t.faults for t in own)
        lines.append(f"| **{kind}** | all {len(own)} | **{cases}** | | **{faults}** |")
    return "\n".join(lines) + "\n"
