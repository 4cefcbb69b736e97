"""`stylemaster evaluate --gates`: all gates of stylemaster-tiny as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stylemaster_core.data.images import write_image
from stylemaster_core.data.jsonl import write_json
from stylemaster_core.errors import ConfigError, StyleMasterError, WeightsError
from stylemaster_core.metrics.baselines import reinhard
from stylemaster_core.metrics.perceptual import clip_embedder
from stylemaster_core.metrics.report import METRICS
from stylemaster_core.metrics.scene import REINHARD, RESULT, TRUE_FILTER, UNCHANGED
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.pictures import contact_sheet
from stylemaster_core.pipelines.stylize import StylizeConfig
from stylemaster_core.pipelines.tiny import FOLDER, SETTINGS, tiny_files
from stylemaster_core.writing import publish_all

from . import gates
from .gates import Gate, Studio
from .held_out import SEED, Clips, Scores, draw_held_out, measure

NUM_STYLES = 64
STYLE_OFF, UNTRAINED = "style guidance 0", "untrained weights"
SHOWN_STYLES = 10
SHEET_SIDE_PX = 132


def all_clips(studio: Studio) -> dict[str, Clips]:
    """Results, baselines and negative controls for the whole held-out set, by method."""
    held_out = studio.held_out
    pairs = zip(held_out.contents, held_out.references, strict=True)
    clips: dict[str, Clips] = {
        RESULT: studio.make(studio.tokens),
        STYLE_OFF: studio.make(studio.tokens, style_scale=0.0),
        UNCHANGED: held_out.contents,
        REINHARD: [reinhard(content, reference[0]) for content, reference in pairs],
        TRUE_FILTER: held_out.true_filter,
    }
    with gates.untrained_models(studio.models) as untrained:
        other = Studio(untrained, held_out, studio.config, studio.on_clip)
        clips[UNTRAINED] = other.make(other.tokens)
    return clips


def num_clips(num: int) -> int:
    """How many clips are generated for a held-out set of `num`."""
    return 3 * num + 10 * min(num, gates.NUM_FEW)


def quality_gates(
    studio: Studio, clips: Mapping[str, Clips], scores: Mapping[str, Scores]
) -> Iterator[Gate]:
    """The gates on what is generated, one after another."""
    styled, off, untrained = scores[RESULT], scores[STYLE_OFF], scores[UNTRAINED]
    results = clips[RESULT]
    yield gates.nearer_gate(styled, off, untrained)
    yield gates.retrieval_gate(styled, off, untrained)
    yield gates.reinhard_gate(styled, scores[REINHARD], off, untrained)
    yield gates.content_gate(styled, untrained)
    yield gates.steadiness_gate(results, studio.held_out)
    yield gates.motion_gate(studio)
    yield gates.selection_gate(studio)
    yield gates.blend_gate(studio, results)
    yield gates.mask_gate(studio, results)


def run(
    weights: Path, num: int, on_gate: Callable[[Gate], None] = lambda gate: None
) -> tuple[list[Gate], dict[str, dict[str, float]], np.ndarray]:
    """Measure everything.

    Args:
        weights: folder laid out as the shipped one.
        num: of held-out styles; 64 for the gates.
        on_gate: called with each gate as soon as it is measured.

    Returns:
        All gates, the metrics of each method, and a contact sheet.

    Raises:
        WeightsError: for missing or damaged files.
    """
    files = tiny_files(weights)
    models = Models(files, device="cpu", keep_loaded=True)
    held_out = draw_held_out(num, clip_embedder(load_image_encoder(weights / "judge")))
    config = StylizeConfig("video-to-video", **SETTINGS, motion_scale=0.0)
    passed = []

    def note(gate: Gate) -> None:
        passed.append(gate)
        on_gate(gate)

    with models.vae() as vae, models.image_encoder() as encoder:
        note(gates.vae_gate(vae, held_out))
        note(gates.texture_gate(encoder))
    with tqdm(total=num_clips(num), desc="clips", unit="clip", disable=None) as bar:
        studio = Studio(models, held_out, config, bar.update)
        clips = all_clips(studio)
        scores = {name: measure(of_method, held_out) for name, of_method in clips.items()}
        for gate in quality_gates(studio, clips, scores):
            note(gate)
    note(gates.cost_gate(files, config))
    summary = {name: of_method.summary() for name, of_method in scores.items()}
    return passed, summary, _sheet(clips, held_out.references)


def _sheet(clips: Mapping[str, Clips], references: Clips) -> np.ndarray:
    shown = slice(0, SHOWN_STYLES)
    rows = [("style picture", [reference[0] for reference in references[shown]])]
    rows += [
        (name, [clip[len(clip) // 2] for clip in of_method[shown]])
        for name, of_method in clips.items()
    ]
    return contact_sheet(rows, SHEET_SIDE_PX)


HEADER = "| gate | measured | bound | passed | negative controls, which must not pass |\n" + (
    "|---|---|---|---|---|"
)


def table_row(gate: Gate) -> str:
    """A line of the Markdown table."""
    verdict = "yes" if gate.passed else "**NO**"
    if gate.leaks:
        verdict += f" (but so does: {', '.join(gate.leaks)})"
    controls = "; ".join(f"{name}: {_numbers(values)}" for name, values in gate.controls.items())
    cells = gate.name, _numbers(gate.measured), gate.bound, verdict, controls
    return f"| {' | '.join(cells)} |"


def _numbers(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)


def to_markdown(
    found: Sequence[Gate], summary: Mapping[str, Mapping[str, float]], settings: Mapping[str, Any]
) -> str:
    """The whole report."""
    lines = ["# Gates of stylemaster-tiny", "", HEADER, *map(table_row, found), ""]
    lines += ["## Beside the baselines", "", "| metric | " + " | ".join(summary) + " |"]
    lines.append("|---|" + "---|" * len(summary))
    for metric in next(iter(summary.values())):
        values = " | ".join(f"{of_method[metric]:.3f}" for of_method in summary.values())
        lines.append(f"| {METRICS[metric][0]} | {values} |")
    lines += ["", "![held-out styles](sheet.png)", ""]
    lines.append(", ".join(f"{name} {value}" for name, value in settings.items()) + ".")
    return "\n".join(lines) + "\n"


def to_json(
    found: Sequence[Gate], summary: Mapping[str, Mapping[str, float]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The same for programs."""
    listed = [
        {
            "name": gate.name,
            "bound": gate.bound,
            "measured": gate.measured,
            "passed": gate.passed,
            "controls": gate.controls,
            "controls_that_pass": gate.leaks,
        }
        for gate in found
    ]
    return {"version": 1, "settings": dict(settings), "gates": listed, "summary": summary}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the report; 1 if a gate or a control says no."""
    parser = argparse.ArgumentParser(prog="stylemaster evaluate --gates", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--num", type=int, default=NUM_STYLES, help="held-out styles")
    parser.add_argument("--weights", type=Path, default=FOLDER, help="folder of the small model")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    args = parser.parse_args(argv)
    try:
        return _report(args)
    except StyleMasterError as error:
        sys.stderr.write(f"stylemaster: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stylemaster: interrupted, nothing was written\n")
        return 130


def _report(args: argparse.Namespace) -> int:
    out: Path = args.out
    if args.num < 3:
        raise ConfigError(f"--num {args.num}; expected at least 3 styles, for the gates 64")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not args.overwrite):
        raise ConfigError(f"{out} is there already; choose another --out, or pass --overwrite")
    if not (args.weights / "judge").is_dir():
        raise WeightsError(f"{args.weights} has no folder judge, the encoder that names styles")
    began = time.monotonic()
    sys.stdout.write(HEADER + "\n")
    found, summary, sheet = run(args.weights, args.num, lambda gate: tqdm.write(table_row(gate)))
    settings = {"styles": args.num, "seed": SEED, "seconds": round(time.monotonic() - began)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".gates.") as scratch:
        part = Path(scratch)
        write_image(part / "sheet.png", sheet)
        write_json(part / "gates.json", to_json(found, summary, settings | SETTINGS))
        report = to_markdown(found, summary, settings | SETTINGS)
        (part / "gates.md").write_text(report, encoding="utf-8")
        publish_all(part, out, overwrite=args.overwrite)
    missed = sum(not gate.passed or bool(gate.leaks) for gate in found)
    verdict = f"{missed} of {len(found)} gates are not passed" if missed else "all gates are passed"
    sys.stdout.write(f"\n{verdict}; wrote {out / 'gates.md'}, gates.json and sheet.png\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
