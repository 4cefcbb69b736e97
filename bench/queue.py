"""Measure `stylemaster queue` on servers without a model: their idle time between two jobs.

    python -m bench.queue --out bench/results/queue_cpu.json

Each scenario starts its servers as processes of their own and a batch in another one. What is
measured is measured by the servers: when a job begins and when it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.queue_inside import WORKFLOW
from bench.runner import Report, add_output, check_output, machine_facts, run_benchmark

ROOT = Path(__file__).parents[1]
_INSIDE = [sys.executable, "-m", "bench.queue_inside"]


class Scenario(NamedTuple):
    """Jobs on servers."""

    name: str
    servers: int
    jobs: int
    job_s: float
    has_socket: bool = True


SCENARIOS = (
    Scenario("instant jobs", 2, 200, 0.0),
    Scenario("instant jobs, no websocket", 2, 200, 0.0, has_socket=False),
    Scenario("jobs of .5 s", 2, 60, 0.5),
    Scenario("jobs of .5 s, no websocket", 2, 60, 0.5, has_socket=False),
    Scenario("jobs of .5 s on 8 servers", 8, 160, 0.5),
    Scenario("10,000 jobs", 2, 10_000, 0.0),
)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextmanager
def _servers(scenario: Scenario) -> Iterator[list[str]]:
    socket = "socket" if scenario.has_socket else "none"
    words = [*_INSIDE, "serve", str(scenario.job_s), socket]
    started = [
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environment())
        for _ in range(scenario.servers)
    ]
    try:
        ports = [process.stdout.readline().strip() for process in started if process.stdout]
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(scenario: Scenario) -> Report:
    """Run a scenario; times in seconds."""
    with _servers(scenario) as urls, tempfile.TemporaryDirectory() as folder:
        words = [*_INSIDE, "batch", *urls, str(scenario.jobs), folder]
        done = subprocess.run(
            words, capture_output=True, text=True, check=True, cwd=ROOT, env=_environment()
        )
        spans = [json.load(urllib.request.urlopen(f"{url}/bench")) for url in urls]
    gaps = sorted(after[0] - before[1] for server in spans for before, after in pairwise(server))
    busy = [
        sum(end - begin for begin, end in server) / (server[-1][1] - server[0][0])
        for server in spans
    ]
    batch = json.loads(done.stdout)
    return {
        **scenario._asdict(),
        **batch,
        "jobs_by_server": [len(server) for server in spans],
        "idle_seconds": {
            "median": statistics.median(gaps),
            "mean": statistics.fmean(gaps),
            "90 %": gaps[int(0.9 * len(gaps))],
            "99 %": gaps[int(0.99 * len(gaps))],
            "largest": gaps[-1],
        },
        "busy": busy if scenario.job_s else None,
    }


def command_line(repeat: int = 5) -> dict[str, float]:
    """Seconds of `queue --help` and of `queue --dry-run` with 100 jobs, the best of some runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "w.json").write_text(json.dumps(WORKFLOW))
        (folder / "p.txt").write_text("\n".join(f"prompt {number}" for number in range(100)))
        runs = {
            "queue --help": ["--help"],
            "queue --dry-run": ["w.json", "--prompts", "p.txt", "--out", "out", "--dry-run"],
        }
        environment = _environment()
        return {
            key: min(_seconds(words, folder, environment) for _ in range(repeat))
            for key, words in runs.items()
        }


def _seconds(words: list[str], folder: Path, environment: dict[str, str]) -> float:
    command = [sys.executable, "-m", "stylemaster_core", "queue", *words]
    begun = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=environment)
    return time.monotonic() - begun


def _benchmark(args: argparse.Namespace) -> Report:
    check_output(args)
    machine = machine_facts(torch.device("cpu"))
    chosen = [s for s in SCENARIOS if not args.only or s.name in args.only]
    return {
        "command": f"python -m bench.queue {' '.join(sys.argv[1:])}".strip(),
        "machine": machine,
        "scenarios": [measure(scenario) for scenario in chosen],
        "command_line_seconds": command_line(),
    }


def _show(report: dict[str, Any]) -> None:
    for row in report["scenarios"]:
        idle = row["idle_seconds"]
        words = f"{row['name']}: {row['done']} done in {row['seconds']:.1f} s, idle between two "
        words += f"jobs {1000 * idle['median']:.1f} ms (90 %: {1000 * idle['90 %']:.1f})"
        if row["busy"]:
            words += f", busy {min(row['busy']):.1%}"
        memory = [size for size in row["resident_bytes_after_each_tenth"] if size]
        if memory:
            words += f", {memory[0] / 1e6:.1f} to {memory[-1] / 1e6:.1f} MB"
        print(words)
    for name, seconds in report["command_line_seconds"].items():
        print(f"{name}: {seconds:.2f} s")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.queue", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="SCENARIO")
    add_output(parser)
    return run_benchmark("bench.queue", _benchmark, _show, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
