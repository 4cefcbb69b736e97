"""Two reports on the same pairs: which is better, pair by pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.jsonl import read_json
from ..errors import ConfigError
from .intervals import mean_interval
from .markdown import FORMAT_VERSION
from .report import METRICS
from .scene import RESULT

DIFFERENCE, BETTER = "B - A", "share in which B is better"


def compare_runs(run_a: Path, run_b: Path, *, seed: int = 0) -> dict[str, Any]:
    """A report, as `to_json` makes them, with the columns A, B and their difference.

    Its numbers are of the pairs that both have; an interval of a difference that does not hold 0
    says more than two intervals of the runs, since the pairs are the same.

    Args:
        run_a: folder with a report.json.
        run_b: another.
        seed: of the intervals.

    Raises:
        ConfigError: if one has no report, or they have no pair in common.
    """
    reports = [_read(run) for run in (run_a, run_b)]
    rows_a, rows_b = ({row["name"]: row for row in report["rows"]} for report in reports)
    names = [name for name in rows_a if name in rows_b]
    if not names:
        raise ConfigError(f"{run_a} and {run_b} have no pair in common; compare runs of one suite")
    problems = [f"{name}: only in {run_a}" for name in rows_a if name not in rows_b]
    problems += [f"{name}: only in {run_b}" for name in rows_b if name not in rows_a]
    for setting in ("max_frames", "num_candidates", "num_style_pictures"):
        if reports[0][setting] != reports[1][setting]:
            problems.append(
                f"{setting} is {reports[0][setting]} in A and {reports[1][setting]} in B; what "
                "depends on it cannot be compared"
            )
    labels = [f"A: {run_a.resolve().name}", f"B: {run_b.resolve().name}"]
    rows = [_row(rows_a[name], rows_b[name], labels) for name in names]
    return {
        "title": f"{labels[0]} beside {labels[1]}",
        "about": f"The {len(rows)} pairs that both have; {DIFFERENCE} is of each pair on its own.",
        "order": DIFFERENCE,
        "version": FORMAT_VERSION,
        "num_rows": len(rows),
        "seed": seed,
        **{k: reports[0][k] for k in ("max_frames", "num_candidates", "num_style_pictures")},
        "problems": problems,
        "summary": {
            column: {metric: _summary(rows, column, metric, seed) for metric in METRICS}
            for column in (*labels, DIFFERENCE, BETTER)
        },
        "rows": rows,
    }


def _read(run: Path) -> dict[str, Any]:
    report = read_json(run / "report.json")
    if not isinstance(report, dict) or report.get("version") != FORMAT_VERSION:
        raise ConfigError(
            f"{run / 'report.json'} is no report of version {FORMAT_VERSION}; make it anew by "
            "`stylemaster evaluate`"
        )
    return report


def _row(a: dict[str, Any], b: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    scores = [row["scores"][RESULT] for row in (a, b)]
    difference: dict[str, float] = {}
    better: dict[str, float] = {}
    for metric, (_, direction) in METRICS.items():
        numbers = [s[metric] for s in scores if isinstance(s.get(metric), float)]
        if len(numbers) < 2:
            continue
        difference[metric] = change = numbers[1] - numbers[0]
        if direction in ("higher", "lower"):
            gain = change if direction == "higher" else -change
            better[metric] = 0.5 if gain == 0 else float(gain > 0)
    columns = dict(zip((*labels, DIFFERENCE, BETTER), (*scores, difference, better), strict=True))
    return {
        "name": a["name"],
        "style": a["style"],
        "prompt": a["prompt"],
        "picture": None,
        "results": {label: row["result"] for label, row in zip(labels, (a, b), strict=True)},
        "scores": columns,
    }


def _summary(rows: list[dict[str, Any]], column: str, metric: str, seed: int) -> dict[str, Any]:
    values = [row["scores"][column].get(metric) for row in rows]
    numbers = [value for value in values if isinstance(value, float)]
    if not numbers:
        reason = next((v for v in values if v is not None), {"not_measured": "of no pair"})
        return {"value": reason, "rows": 0, "interval": None}
    mean = sum(numbers) / len(numbers)
    return {"value": mean, "rows": len(numbers), "interval": mean_interval(numbers, seed=seed)}
