"""What tiny-stylecrafter's predicted scales do: `python -m bench.balance`.

First how they differ between held-out styles and prompts. Then pictures made with them and with all
scales at 0 (gain 1), with and without gray-tile control: how near they are to their style picture,
and how much they keep of the content, and of what the prompt gives without a style from the same
noise (the small model hardly heeds its prompt, so that this stands for the text). The paper's
ablation (StyleCrafter, sec. 4.3): without adaptive fusion more style and less text, of a model that
was trained without it. So was this adapter; its scale predictor was trained after it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from recipes.tiny.held_out import SEED, SIDE_PX, Clips, HeldOut, draw_held_out, measure
from recipes.tiny.restyle import BATCH, restyle
from stylemaster_core.errors import ConfigError
from stylemaster_core.metrics.content import luma_correlation
from stylemaster_core.metrics.perceptual import clip_embedder
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.pipelines.encode_style import encode_stylecrafter
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.stylize import StylizeConfig
from stylemaster_core.pipelines.tiny import FOLDER, SETTINGS, tiny_files

from .runner import add_output, check_output, machine_facts, run_benchmark

PREDICTED, OFF, NO_STYLE = "predicted scales", "gain 1", "no style"
# Of each clip, with the sign of the change that the paper reports: more style (similarity is the
# judge's, as CLIP-Style is CLIP's), then less text.
MEASURES = {"colour": -1, "gabor": -1, "similarity": 1, "luma_to_content": -1}
MEASURES |= {"luma_to_no_style": -1}
NUM_RESAMPLES = 10_000
# v2, ablation on images: CLIP-Text, CLIP-Style.
PAPER = {"full": (0.3028, 0.4836), "no adaptive fusion": (0.2807, 0.4925)}


def predicted_gains(models: Models, texts: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Gains of every prompt with every style: [prompts, styles, layers]."""
    with models.stylecrafter() as encoder, torch.no_grad():
        return torch.stack([encoder.gains(text, tokens) for text in texts]).float().cpu()


def spread(gains: Tensor) -> dict[str, Any]:
    """How gains [prompts, styles, layers] vary: mean over layers of standard deviations."""
    return {
        "mean": gains.mean().item(),
        "lowest": gains.min().item(),
        "highest": gains.max().item(),
        "mean_of_layers": gains.mean((0, 1)).tolist(),
        "std_over_styles": gains.std(1).mean().item(),
        "std_over_prompts": gains.std(0).mean().item(),
        "std_over_layers": gains.std(2).mean().item(),
    }


def make(
    models: Models, held_out: HeldOut, tokens: Tensor, gains: Tensor | None, config: StylizeConfig
) -> list[np.ndarray]:
    """One clip for each style; without gains they are all 1."""
    clips: list[np.ndarray] = []
    for start in range(0, len(tokens), BATCH):
        part = slice(start, start + BATCH)
        region = StyleRegion(tokens[part], gains=None if gains is None else gains[part])
        clips += restyle(
            models,
            held_out.contents[part],
            held_out.captions[part],
            [region],
            replace(config, seed=config.seed + start),
        )
    return clips


def scores(
    clips: Clips, plain: Clips, held_out: HeldOut
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """How near to the style, and to content and plain result: means, and each clip's numbers."""
    found = measure(clips, held_out)
    each = {
        "colour": found.colour.diagonal(),
        "gabor": found.gabor.diagonal(),
        "similarity": torch.cosine_similarity(found.embeddings, found.references).numpy(),
        "luma_to_content": _luma(clips, held_out.contents),
        "luma_to_no_style": _luma(clips, plain),
    }
    summary = found.summary()
    gates = {n: summary[n] for n in ("colour_p", "gabor_p", "retrieval", "difference_true")}
    return {name: float(values.mean()) for name, values in each.items()} | gates, each


def _luma(clips: Clips, others: Clips) -> np.ndarray:
    return np.array([luma_correlation(*pair) for pair in zip(clips, others, strict=True)])


def change(
    on: dict[str, np.ndarray], off: dict[str, np.ndarray], *, control: bool
) -> dict[str, dict[str, Any]]:
    """What switching the scales off changes, and whether that goes the paper's way.

    Returns:
        for each measure its mean change over the clips, a 95 % interval of it (bootstrap over the
        clips), and `as_in_paper`: None where the interval holds 0.
    """
    num = len(off["colour"])
    draws = np.random.default_rng(0).integers(num, size=(NUM_RESAMPLES, num))
    found: dict[str, dict[str, Any]] = {}
    for name, sign in MEASURES.items():
        if name == "luma_to_content" and not control:
            continue  # nothing of the content is known then
        differences = off[name] - on[name]
        low, high = np.quantile(differences[draws].mean(1), (0.025, 0.975)).tolist()
        known = low > 0 or high < 0
        found[name] = {
            "mean": float(differences.mean()),
            "low": low,
            "high": high,
            "as_in_paper": bool(sign * differences.mean() > 0) if known else None,
        }
    return found


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure.

    Raises:
        StyleMasterError: for options or files that cannot work.
    """
    check_output(args)
    if args.num < 2:
        raise ConfigError(f"--num {args.num}; at least two styles are needed")
    files = tiny_files(args.weights, stylecrafter=True)
    models = Models(files, device="cpu", keep_loaded=True)
    judge = clip_embedder(load_image_encoder(args.weights / "judge"))
    held_out = draw_held_out(args.num, judge, SEED)
    references = [reference[0] for reference in held_out.references]
    tokens = torch.cat([encode_stylecrafter(models, [picture]).tokens for picture in references])
    texts = [models.encode_text([caption]) for caption in held_out.captions]
    gains = predicted_gains(models, texts, tokens)
    own = gains.diagonal().T  # of each style with the prompt it is used with
    config = StylizeConfig("video-to-video", **(SETTINGS | {"num_steps": args.steps}))
    report: dict[str, Any] = {
        "format": "stylecrafter-balance-1",
        "command": "python -m bench.balance",
        "date": datetime.date.today().isoformat(),
        "machine": {key: machine_facts(torch.device("cpu"))[key] for key in ("name", "torch")},
        "setting": {"num": args.num, "steps": args.steps, "size": SIDE_PX, "seed": SEED},
        "adapter_sha256": hashlib.sha256(files.need("adapter", "This").read_bytes()).hexdigest(),
        "scales": spread(gains),
        "paper": {name: {"text": t, "style": s} for name, (t, s) in PAPER.items()},
    }
    variants: dict[str, tuple[Tensor | None, float | None]] = {
        NO_STYLE: (None, 0.0),
        PREDICTED: (own, None),
        OFF: (None, None),
    }
    with tqdm(total=2 * len(variants), disable=None) as bar:
        for name, scale in (("with_control", 1.0), ("without_control", 0.0)):
            clips = {}
            for variant, (given, style_scale) in variants.items():
                used = replace(config, control_scale=scale)
                if style_scale is not None:
                    used = replace(used, style_scale=style_scale)
                clips[variant] = make(models, held_out, tokens, given, used)
                bar.update()
            found = {v: scores(made, clips[NO_STYLE], held_out) for v, made in clips.items()}
            changes = change(found[PREDICTED][1], found[OFF][1], control=scale > 0)
            report[name] = {v: means for v, (means, _) in found.items()}
            report[name]["switched_off"] = changes
    return report


def print_report(report: dict[str, Any]) -> None:
    """The numbers as tables."""
    print("scales:", {k: v for k, v in report["scales"].items() if k != "mean_of_layers"})
    for name in ("with_control", "without_control"):
        found = report[name]
        print(f"\n{name.replace('_', ' ')}, {report['setting']}")
        for variant in (PREDICTED, OFF, NO_STYLE):
            values = "  ".join(f"{k} {v:.4f}" for k, v in found[variant].items())
            print(f"  {variant:17} {values}")
        print("  switched off:")
        for measure_name, c in found["switched_off"].items():
            interval = f"{c['mean']:+.5f} [{c['low']:+.5f}, {c['high']:+.5f}]"
            print(f"    {measure_name:17} {interval}  as in the paper: {c['as_in_paper']}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.balance", description=__doc__)
    parser.add_argument("--num", type=int, default=64, help="held-out styles")
    parser.add_argument("--steps", type=int, default=SETTINGS["num_steps"])
    parser.add_argument("--weights", type=Path, default=FOLDER, help="folder of the small model")
    add_output(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_benchmark("bench.balance", benchmark, print_report, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
