"""Servers that misbehave, and a queue that is killed: everything is delivered, and once."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from stylemaster_core.data.jsonl import read_jsonl
from tests.bad_comfy import BadComfy, cases
from tests.fake_comfy import FakeComfy
from tests.fuzz.attack import Endpoint, Kind, require
from tests.queue_batch import Batches, files_in, until_idle

MAX_BYTES = 300_000_000
PATIENT_S = 30.0  # none is lost in between, so that nothing is done twice
# When to kill; several kills follow each other.
MOMENTS = st.lists(st.floats(0.0, 0.5), min_size=1, max_size=3)
JOB_S = st.sampled_from([0.0, 0.005, 0.05])


@functools.cache
def _batches(_: Path | None = None) -> Batches:
    return Batches()


@contextmanager
def _up(*fakes: FakeComfy) -> Iterator[tuple[FakeComfy, ...]]:
    try:
        yield fakes
    finally:
        for fake in fakes:
            fake.die()


def _play_server(_: Any, case: str, folder: Path) -> str:
    """A server does one thing wrong, beside a good one."""
    texts = [f"p{number}" for number in range(6)]
    with _up(BadComfy(case), FakeComfy(job_s=0.03)) as fakes:
        report = _batches().run(folder, fakes, texts, deadline_s=40.0)
    require(not report["was_killed"], "the batch hangs")
    require(report["error"] is None, f"the batch ends in\n{report['error']}")
    require(report["statuses"] == ["done"] * len(texts), f"failed: {report.get('errors')}")
    _require_files(folder, texts)
    require(report["peak_bytes"] <= MAX_BYTES, f"it took {report['peak_bytes']} bytes of memory")
    return "delivered"


def _play_kills(count: int, drawn: tuple[list[float], float], folder: Path) -> str:
    """The queue is killed some times, and then left alone."""
    moments, job_s = drawn
    texts = [f"p{number}" for number in range(8)]
    killed = 0
    with _up(*(FakeComfy(job_s=job_s) for _ in range(count))) as fakes:
        for moment in [*moments, None]:
            report = _batches().run(folder, fakes, texts, kill_after_s=moment, timeout_s=PATIENT_S)
            require(report["error"] is None, f"the batch ends in\n{report['error']}")
            require(moment is not None or not report["was_killed"], "the batch hangs")
            killed += report["was_killed"]
            until_idle(fakes)
        done = sorted(text for fake in fakes for text in fake.finished)
        require(done == texts, f"jobs were done that often: {Counter(done)}")
    _require_files(folder, texts)
    records = read_jsonl(folder / "out" / "queue.jsonl", lambda record: None)
    ends = Counter(record["job"] for record in records if record["event"] == "done")
    require(set(ends.values()) == {1}, "a job is done twice in the journal")
    return f"whole after {killed} kills"


def _require_files(folder: Path, texts: list[str]) -> None:
    wanted = {f"style__{text}_1.png": f"{text}|style".encode() for text in texts}
    require(files_in(folder) == wanted, f"there is {sorted(files_in(folder))}")
    left = list((folder / "out").glob(".stylemaster-*"))
    require(not left, f"left over: {left}")


def _endpoint(name: str) -> Endpoint:
    own = [case for case in cases() if case.startswith(f"{name}/")]
    return Endpoint(st.sampled_from(own), _play_server, _batches)


SERVERS = Kind(
    "servers",
    {name: _endpoint(name) for name in dict.fromkeys(case.partition("/")[0] for case in cases())},
    long_cases=320,
    shrink=False,
)
QUEUE = Kind(
    "queue kills",
    {
        f"{count} servers": Endpoint(
            st.tuples(MOMENTS, JOB_S), _play_kills, lambda _, count=count: count
        )
        for count in (1, 2, 3)
    },
    long_cases=60,
    batch=6,
    shrink=False,
    limit_s=120.0,
)
