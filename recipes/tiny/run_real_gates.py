"""`stylemaster evaluate --gates --art --photos --clips`: the gates on real pictures.

The report holds a contact sheet of the user's own pictures; nothing of them leaves its folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stylemaster_core.data.images import write_image
from stylemaster_core.data.jsonl import read_json, write_json
from stylemaster_core.errors import ConfigError, StyleMasterError
from stylemaster_core.metrics.baselines import lab_to_rgb, rgb_to_lab
from stylemaster_core.metrics.scene import REINHARD, RESULT, UNCHANGED
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.pictures import contact_sheet
from stylemaster_core.pipelines.stylize import StylizeConfig
from stylemaster_core.pipelines.tiny import FOLDER, SETTINGS, SIDE_PX, tiny_files
from stylemaster_core.writing import publish_all

from . import judges, real_gates
from .gates import Gate
from .held_out import SEED, Clips
from .real_gates import Bounds, RealStudio
from .real_set import (
    NUM_WORKS,
    RealJudges,
    RealSet,
    draw_real_set,
    measure_real,
    recoloured,
    stylized,
)
from .run_gates import HEADER, table_row, to_json
from .teacher import Teacher

NUM_PAIRS, VAE_SIDE_PX = 64, 192
MAGENTA = "Magenta per frame"
EARLIER = Path(__file__).parents[2] / "bench" / "results" / "tiny_real_290524c.json"
EASED = {"tiny": 1.0, "tiny-stylecrafter": 0.9}
# No motion adapter, unless asked for; of StyleCrafter's LoRA what any video gets.
MOTION_SCALES = {"tiny": 0.0, "tiny-stylecrafter": None}
SHOWN, SHEET_SIDE_PX = 12, 176


def run(
    real: RealSet,
    at_192_px: RealSet,
    weights: Path,
    model: str,
    *,
    seed: int = SEED,
    on_gate: Callable[[Gate], None] = lambda gate: None,
) -> tuple[list[Gate], dict[str, dict[str, float]], np.ndarray]:
    """Measure everything.

    Args:
        real: what to measure with.
        at_192_px: what the VAE is measured with, at whatever size the rest is.
        weights: folder laid out as the shipped one.
        model: tiny or tiny-stylecrafter, for which nine tenths of the bounds are asked.
        seed: of the first result's noise.
        on_gate: called with each gate as soon as it is measured.

    Returns:
        All gates, the figures of each method, and a contact sheet.
    """
    files = tiny_files(weights, stylecrafter=model == "tiny-stylecrafter")
    models = Models(files, device="cpu", keep_loaded=True)
    config = default_config(model, seed)
    bounds, works = Bounds().eased(EASED[model]), len(real.references)
    judged = RealJudges(real, Teacher(), judges.GramJudge())
    found: list[Gate] = []

    def note(gate: Gate) -> None:
        found.append(gate)
        on_gate(gate)

    with models.vae() as vae:
        note(real_gates.vae_gate(vae, at_192_px, bounds))
    total = len(real) + NUM_SWEPT * min(real_gates.NUM_FEW, len(real))
    with tqdm(total=total, desc="clips", unit="clip", disable=None) as bar:
        studio = RealStudio(models, real, config, bar.update)
        clips: dict[str, Clips] = {
            RESULT: studio.make(),
            UNCHANGED: real.contents,
            REINHARD: recoloured(real),
            MAGENTA: stylized(judged.teacher, real),
        }
        scores = {name: measure_real(of_method, judged) for name, of_method in clips.items()}
        styled, content, results = scores[RESULT], scores[UNCHANGED], clips[RESULT]
        note(real_gates.style_gate(styled, content, bounds, works))
        note(real_gates.colour_gate(styled, scores[REINHARD], content, bounds, works))
        note(real_gates.texture_gate(styled, content, bounds, works))
        note(real_gates.content_gate(styled, bounds))
        note(real_gates.seam_gate(results, styled, bounds, judges.seam))
        gray = measure_real([in_gray(clip) for clip in results], judged)
        note(real_gates.chroma_gate(styled, gray, bounds))
        moving = real.moving
        if len(moving) > 1:
            mixed = real_gates.mixed_frames(results, moving)
            note(real_gates.flicker_gate(styled, measure_real(mixed, judged, moving), bounds))
        few = studio.few

        def distance(**settings: float) -> float:
            return measure_real(studio.make(few, **settings), judged, few).style_distance

        made = measure_real([results[i] for i in few], judged, few).style_distance
        strengths = {s: made if s == 1 else distance(strength=s) for s in real_gates.STRENGTHS}
        note(real_gates.falling_gate("strength", strengths))
        guidances = {g: distance(style_scale=g) for g in real_gates.GUIDANCES}
        note(real_gates.falling_gate("style guidance", guidances))
    return found, {name: s.summary() for name, s in scores.items()}, _sheet(clips, real)


def default_config(model: str, seed: int) -> StylizeConfig:
    """What a user gets without asking."""
    return StylizeConfig("video-to-video", **SETTINGS, motion_scale=MOTION_SCALES[model], seed=seed)


NUM_SWEPT = len(real_gates.STRENGTHS) - 1 + len(real_gates.GUIDANCES)


def in_gray(clip: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] without its chroma."""
    lab = rgb_to_lab(clip)
    lab[..., 1:] = 0
    return lab_to_rgb(lab)


def _sheet(clips: Mapping[str, Clips], real: RealSet) -> np.ndarray:
    rows = [("style picture", [real.references[i] for i in real.own[:SHOWN]])]
    rows += [(name, [c[len(c) // 2] for c in made[:SHOWN]]) for name, made in clips.items()]
    return contact_sheet(rows, SHEET_SIDE_PX)


def to_markdown(
    found: Sequence[Gate],
    summary: Mapping[str, Mapping[str, float]],
    settings: Mapping[str, Any],
) -> str:
    """The whole report."""
    lines = ["# Gates of stylemaster-tiny on real pictures", "", HEADER, *map(table_row, found)]
    lines += ["", "## Beside the baselines", "", "| figure | " + " | ".join(summary) + " |"]
    lines.append("|---|" + "---|" * len(summary))
    for figure in next(iter(summary.values())):
        values = " | ".join(f"{of_method[figure]:.3f}" for of_method in summary.values())
        lines.append(f"| {figure} | {values} |")
    lines += ["", "![held-out works](sheet.png)", ""]
    lines.append(", ".join(f"{name} {value}" for name, value in settings.items()) + ".")
    return "\n".join(lines) + "\n"


def earlier_summary(settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of the first weights, where they were taken in the same way."""
    if not EARLIER.is_file():
        return {}
    content = read_json(EARLIER)
    same = all(
        content["settings"].get(k) == settings[k] for k in ("pairs", "works", "side", "model")
    )
    return {"tiny of commit 290524c": content["summary"][RESULT]} if same else {}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="stylemaster evaluate --gates", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--art", type=Path, required=True, help="paintings: folder, or tars")
    parser.add_argument("--photos", type=Path, required=True, help="photographs")
    parser.add_argument("--clips", type=Path, required=True, help="folder of videos")
    parser.add_argument("--num", type=int, default=NUM_PAIRS, help="pairs of style and content")
    parser.add_argument("--works", type=int, default=NUM_WORKS, help="held-out style pictures")
    parser.add_argument("--side", type=int, default=SIDE_PX, help="short side of the contents, px")
    parser.add_argument("--weights", type=Path, default=FOLDER, help="folder of the small model")
    parser.add_argument("--model", choices=EASED, default="tiny")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the report; 1 if a gate or a control says no."""
    try:
        return _report(parse(argv))
    except StyleMasterError as error:
        sys.stderr.write(f"stylemaster: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stylemaster: interrupted, nothing was written\n")
        return 130


def _report(args: argparse.Namespace) -> int:
    out: Path = args.out
    for name, value, least in (("num", args.num, 8), ("works", args.works, 4)):
        if value < least:
            raise ConfigError(f"--{name} {value}; expected at least {least}")
    if args.side < 64 or args.side % 16:
        raise ConfigError(f"--side {args.side}; expected a multiple of 16 from 64 on")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not args.overwrite):
        raise ConfigError(f"{out} is there already; choose another --out, or pass --overwrite")
    began = time.monotonic()
    real, at_192_px = (
        draw_real_set(args.art, args.photos, args.clips, args.num, side=side, works=args.works)
        for side in (args.side, VAE_SIDE_PX)
    )
    sys.stdout.write(HEADER + "\n")
    found, summary, sheet = run(
        real, at_192_px, args.weights, args.model, on_gate=lambda g: tqdm.write(table_row(g))
    )
    settings = {
        "model": args.model,
        "pairs": args.num,
        "works": args.works,
        "side": args.side,
        "seed": SEED,
        "judges": judges.judges_versions(),
        "seconds": round(time.monotonic() - began),
    }
    summary |= earlier_summary(settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".gates.") as scratch:
        part = Path(scratch)
        write_image(part / "sheet.png", sheet)
        write_json(part / "gates.json", to_json(found, summary, settings | SETTINGS))
        (part / "gates.md").write_text(
            to_markdown(found, summary, settings | SETTINGS), encoding="utf-8"
        )
        publish_all(part, out, overwrite=args.overwrite)
    missed = sum(not gate.passed or bool(gate.leaks) for gate in found)
    verdict = f"{missed} of {len(found)} gates are not passed" if missed else "all gates are passed"
    sys.stdout.write(f"\n{verdict}; wrote {out / 'gates.md'}, gates.json and sheet.png\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
