"""A report as JSON for programs, and that JSON as Markdown for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .report import METRICS, Missing, Report, Score
from .scene import RESULT

FORMAT_VERSION = 2
NUM_EXTREMES = 10
# What rows are ordered by, until somebody chooses: the first that was measured.
_ORDER = ("csd", "gabor", "colour")


def to_json(
    report: Report, pictures: Sequence[str] | None = None, problems: Sequence[str] = ()
) -> dict[str, Any]:
    """The whole report in values that JSON has; where there is no number, the reason.

    Args:
        report: from `evaluate`.
        pictures: for each row, the path of its contact sheet, relative to the report; None without.
        problems: what could not be made or measured.
    """
    rows = [
        {
            "name": row.name,
            "style": str(row.style),
            "result": str(row.result),
            "content": None if row.content is None else str(row.content),
            "true_filter": None if row.true_filter is None else str(row.true_filter),
            "prompt": row.prompt,
            "picture": None if pictures is None else pictures[number],
            "scores": {
                method: {metric: _plain(score) for metric, score in by_metric.items()}
                for method, by_metric in scores.items()
            },
        }
        for number, (row, scores) in enumerate(zip(report.rows, report.scores, strict=True))
    ]
    summary = {
        method: {
            metric: {
                "value": _plain(score),
                "rows": report.num_measured[method][metric],
                "interval": report.intervals[method].get(metric),
            }
            for metric, score in by_metric.items()
        }
        for method, by_metric in report.summary.items()
    }
    settings = {"version": FORMAT_VERSION, "num_rows": len(rows), **report.settings}
    return {**settings, "problems": list(problems), "summary": summary, "rows": rows}


def to_markdown(content: dict[str, Any]) -> str:
    """Tables of all numbers, what was not measured and why, and the pictures of every row.

    Where the rows have no pictures, only the best and the worst of them are listed.

    Args:
        content: from `to_json`; it may have a `title` and, `about` what was judged, a sentence.
    """
    lines = [
        f"# {_escaped(content.get('title', 'Evaluation'))}",
        "",
        counts(content),
        "",
        *_summary_table(content),
        "",
    ]
    lines += [*_list("Could not be made or measured", content["problems"])]
    lines += [*_list("Not measured", not_measured(content)), NOTES, ""]
    if content["rows"][0]["picture"] is None:
        return "\n".join(lines + _extremes(content))
    lines += ["## Rows", ""]
    for row in content["rows"]:
        lines += [f"### {_escaped(row['name'])}", ""]
        if row["prompt"]:
            lines += [f"Prompt: {_escaped(row['prompt'])}", ""]
        lines += [f"![{_escaped(row['name'])}]({row['picture']})", ""]
        cells = {m: {k: cell(v) for k, v in s.items()} for m, s in row["scores"].items()}
        lines += [*_table(cells), ""]
    return "\n".join(lines)


NOTES = """A dash stands for a number that was not measured. Colour alone proves no style: Reinhard,
a formula, is good at it. A content left unchanged has the best content and motion scores and no
style. Numbers are means over the rows that have one, with 95 % bootstrap intervals over rows;
rows that share a picture resemble each other, so that few pictures give too narrow ones. ArtFID is
of all rows together. Frames are compared at the result's size; style pictures are cut to it. ArtFID
of few rows is far too high, because FID is."""


def counts(content: dict[str, Any]) -> str:
    """What and how much was measured, and how."""
    about = f"{content['about']} " if content.get("about") else ""
    pictures = f"{content['num_style_pictures']} style pictures"
    return (
        f"{about}{len(content['rows'])} rows, {pictures}; retrieval among up to "
        f"{content['num_candidates']}; seed {content['seed']}."
    )


def shown_methods(content: dict[str, Any]) -> list[str]:
    """The methods that some row has a clip for."""
    present = {method for row in content["rows"] for method in row["scores"]}
    return [method for method in content["summary"] if method in present]


def not_measured(content: dict[str, Any]) -> list[str]:
    """Each metric of the results, and each method, that has no number, with why."""
    summary, shown = content["summary"], shown_methods(content)
    main = RESULT if RESULT in shown else shown[0]
    lines = [
        f"{METRICS[metric][0]}: {found['value']['not_measured']}"
        for metric, found in summary[main].items()
        if isinstance(found["value"], dict)
    ]
    return lines + [f"{m}: no row has a clip for it" for m in summary if m not in shown]


def ordering(content: dict[str, Any]) -> tuple[str, str]:
    """(method, metric) by which rows are ordered."""
    method = content.get("order", RESULT)
    metric = next(
        (m for m in _ORDER if not isinstance(content["summary"][method][m]["value"], dict)),
        _ORDER[-1],
    )
    return method, metric


def extremes(content: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The best and the worst ten rows by `ordering`, best and worst first."""
    method, metric = ordering(content)
    rows = [
        r for r in content["rows"] if isinstance(r["scores"].get(method, {}).get(metric), float)
    ]
    rows.sort(key=lambda row: row["scores"][method][metric], reverse=METRICS[metric][1] == "higher")
    return rows[:NUM_EXTREMES], rows[::-1][:NUM_EXTREMES]


def cell(score: Any, interval: Sequence[float] | None = None) -> str:
    """A number as tables show it, with its interval; a dash where there is none."""
    if not isinstance(score, float):
        return "-"
    return f"{score:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")


def _extremes(content: dict[str, Any]) -> list[str]:
    method, metric = ordering(content)
    lines = []
    for label, rows in zip(("best", "worst"), extremes(content), strict=True):
        lines += [f"## The {label} {len(rows)} of {method} by {METRICS[metric][0]}", ""]
        lines += [f"| row | {METRICS[metric][0]} | prompt |", "|---|---|---|"]
        for row in rows:
            number = cell(row["scores"][method][metric])
            lines.append(f"| {_escaped(row['name'])} | {number} | {_escaped(row['prompt'])} |")
        lines.append("")
    return lines


def _summary_table(content: dict[str, Any]) -> list[str]:
    return _table(
        {
            method: {
                k: cell(v["value"], v["interval"]) for k, v in content["summary"][method].items()
            }
            for method in shown_methods(content)
        }
    )


def _table(cells: dict[str, dict[str, str]]) -> list[str]:
    lines = [
        "| metric | better | " + " | ".join(map(_escaped, cells)) + " |",
        "|---|---|" + "---|" * len(cells),
    ]
    for metric, (label, better) in METRICS.items():
        row = [by_metric.get(metric) for by_metric in cells.values()]
        if any(text not in (None, "-") for text in row):
            lines.append(f"| {label} | {better} | " + " | ".join(t or "-" for t in row) + " |")
    return lines


def _list(heading: str, items: Sequence[str]) -> list[str]:
    return [f"{heading}:", "", *(f"- {_escaped(item)}" for item in items or ["nothing"]), ""]


def _plain(score: Score) -> float | dict[str, str]:
    return {"not_measured": score.reason} if isinstance(score, Missing) else score


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
