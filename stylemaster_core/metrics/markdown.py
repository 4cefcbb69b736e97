"""A report as Markdown for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .report import METRICS, Missing, Report, Score
from .scene import METHODS, RESULT

FORMAT_VERSION = 1


def to_json(report: Report, pictures: Sequence[str]) -> dict[str, Any]:
    """The whole report in values that JSON has; where there is no number, the reason.

    Args:
        report: from `evaluate`.
        pictures: for each row, the path of its contact sheet, relative to the report.
    """
    rows = [
        {
            "name": row.name,
            "style": str(row.style),
            "result": str(row.result),
            "content": None if row.content is None else str(row.content),
            "true_filter": None if row.true_filter is None else str(row.true_filter),
            "prompt": row.prompt,
            "picture": picture,
            "scores": {
                method: {metric: _plain(score) for metric, score in by_metric.items()}
                for method, by_metric in scores.items()
            },
        }
        for row, scores, picture in zip(report.rows, report.scores, pictures, strict=True)
    ]
    summary = {
        method: {
            metric: {"value": _plain(score), "rows": report.num_measured[method][metric]}
            for metric, score in by_metric.items()
        }
        for method, by_metric in report.summary.items()
    }
    settings = {"version": FORMAT_VERSION, "num_rows": len(rows), **report.settings}
    return {**settings, "summary": summary, "rows": rows}


def to_markdown(report: Report, pictures: Sequence[str]) -> str:
    """Tables of all numbers, what was not measured and why, and the pictures of every row.

    Args: as in `to_json`.
    """
    methods = [m for m in METHODS if any(m in scores for scores in report.scores)]
    lines = ["# Evaluation", "", _counts(report), "", *_table(report.summary, methods), ""]
    lines += ["Not measured:", "", *_reasons(report.summary, methods), ""]
    lines += [NOTES, "", "## Rows", ""]
    for row, scores, picture in zip(report.rows, report.scores, pictures, strict=True):
        present = [method for method in methods if method in scores]
        lines += [f"### {_escaped(row.name)}", ""]
        if row.prompt:
            lines += [f"Prompt: {_escaped(row.prompt)}", ""]
        lines += [f"![{_escaped(row.name)}]({picture})", "", *_table(scores, present), ""]
    return "\n".join(lines)


NOTES = """A dash stands for a number that was not measured. Colour alone proves no style: Reinhard,
a formula, is good at it. A content left unchanged has the best content and motion scores and no
style. Numbers are means over the rows that have one; P, retrieval and ArtFID are of all rows
together. Frames are compared at the result's size; style pictures are cut to it. ArtFID of few
rows is far too high, because FID is."""


def _counts(report: Report) -> str:
    settings = report.settings
    return (
        f"{len(report.rows)} rows, {settings['num_style_pictures']} style pictures; retrieval "
        f"among up to {settings['num_candidates']}; seed {settings['seed']}."
    )


def _table(scores: dict[str, dict[str, Score]], methods: Sequence[str]) -> list[str]:
    lines = [
        "| metric | better | " + " | ".join(methods) + " |",
        "|---|---|" + "---|" * len(methods),
    ]
    for metric, (label, better) in METRICS.items():
        cells = [scores[method].get(metric) for method in methods]
        if all(cell is None for cell in cells):
            continue
        lines.append(f"| {label} | {better} | " + " | ".join(map(_cell, cells)) + " |")
    return lines


def _reasons(scores: dict[str, dict[str, Score]], methods: Sequence[str]) -> list[str]:
    lines = []
    for metric, (label, _) in METRICS.items():
        score = scores[RESULT].get(metric)
        if isinstance(score, Missing):
            lines.append(f"- {label}: {score.reason}")
    absent = [method for method in METHODS if method not in methods]
    lines += [f"- {method}: no row has a clip for it" for method in absent]
    return lines or ["- nothing"]


def _cell(score: Score | None) -> str:
    return "-" if score is None or isinstance(score, Missing) else f"{score:.3f}"


def _plain(score: Score) -> float | dict[str, str]:
    return {"not_measured": score.reason} if isinstance(score, Missing) else score


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
