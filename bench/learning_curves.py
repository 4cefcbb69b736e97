"""Held-out loss of each trainer and its ablations: `python -m bench.learning_curves`.

From a base of small random weights on procedurally made data, of which it is known what explains
it. An ablation gives the trainer a condition that belongs to another sample, or freezes what would
learn. On one CPU thread it takes about a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from stylemaster_core.errors import ConfigError, StyleMasterError
from stylemaster_core.training.base_model import create_base_trainer
from stylemaster_core.training.config import (
    BaseConfig,
    FlowConfig,
    MotionConfig,
    OptimizerConfig,
    ProjectionConfig,
    RunConfig,
    StyleConfig,
    TrainConfig,
)
from stylemaster_core.training.global_projection import create_projection_trainer
from stylemaster_core.training.gray_tile_controlnet import create_control_trainer
from stylemaster_core.training.loop import train
from stylemaster_core.training.motion_adapter import create_motion_trainer
from stylemaster_core.training.samples import MemoryDataset
from stylemaster_core.training.stats import read_stats
from stylemaster_core.training.style_modulation import create_style_trainer
from stylemaster_core.training.synthetic import SyntheticWorld
from stylemaster_core.training.trainer import Trainer

from .runner import write_json

COMMAND = "OMP_NUM_THREADS=1 python -m bench.learning_curves"
WORLD = SyntheticWorld(size=(4, 4, 4))
PAIR_WORLD = SyntheticWorld(embed_width=32)
BASE = BaseConfig(width=64, ffn_width=128, num_blocks=2, text_width=10)
FLOW = FlowConfig(text_length=5, timesteps="logit_normal", weighting="none", shift=2.0)
STYLE = StyleConfig(selection="all", global_tokens=2, num_layers=1, num_heads=2)
STYLE_FEATURES = ("patch_features", "image_embeds", "shuffled_embeds")
SAMPLES, HELD_OUT, PAIRS, POINTS = 256, 24, 64, 10

Curve = list[tuple[int, float]]  # (step, held-out loss)
Curves = dict[str, Curve]


def config_of(trainer: Any, steps: int, lr: float = 5e-3, **sections: Any) -> TrainConfig:
    run = RunConfig(
        num_steps=steps,
        batch_size=16,
        save_every=10_000,
        validate_every=max(1, steps // POINTS),
        validation_draws=4,
    )
    optimizer = OptimizerConfig(lr=lr, warmup_steps=10, schedule="cosine")
    return TrainConfig(trainer, run, optimizer, **({"flow": FLOW, "style": STYLE} | sections))


def curve_of(trainer: Trainer, data: MemoryDataset, validation: MemoryDataset) -> Curve:
    with tempfile.TemporaryDirectory() as folder:
        train(trainer, data, folder, validation=validation, cpu=True)
        lines = read_stats(Path(folder))
    return [(x["step"], x["validation_loss"]) for x in lines if "validation_loss" in x]


def of_another(dataset: MemoryDataset, *keys: str) -> MemoryDataset:
    """The samples with some tensors taken from their neighbours."""
    samples = list(dataset.samples)
    moved = [sample | {k: samples[i - 1][k] for k in keys} for i, sample in enumerate(samples)]
    return MemoryDataset(moved, ids=dataset.ids)


def clips(count: int, name: str = "train", *, still: bool = False) -> MemoryDataset:
    """Clips of no style."""
    return WORLD.dataset(count, name, style=False, still=still)


def features() -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in WORLD.sample("x").items()}


def base_trainer(steps: int) -> Trainer:
    config = config_of("base", steps, base=BASE, flow=dataclasses.replace(FLOW, drop_text=0.0))
    return create_base_trainer(config, num_heads=2, null_text=WORLD.null_text)


def base_curves(steps: int) -> Curves:
    data, validation = clips(SAMPLES), clips(HELD_OUT, "held out")
    return {
        "trained": curve_of(base_trainer(steps), data, validation),
        "text of another sample": curve_of(
            base_trainer(steps), of_another(data, "text"), validation
        ),
    }


def style_curves(base: dict[str, torch.Tensor], steps: int) -> Curves:
    data, validation = WORLD.dataset(SAMPLES), WORLD.dataset(HELD_OUT, "held out")

    def run(dataset: MemoryDataset, frozen: bool = False) -> Curve:
        trainer = create_style_trainer(
            config_of("style", steps, 1e-2), base, features(), num_heads=2,
            null_text=WORLD.null_text,
        )  # fmt: skip
        if frozen:
            # Only the biases of v_img learn: a constant shift, the same for every style.
            for key, parameter in trainer.named_parameters():
                parameter.requires_grad_(key.endswith("v_img.bias"))
        return curve_of(trainer, dataset, validation)

    return {
        "trained": run(data),
        "style of another sample": run(of_another(data, *STYLE_FEATURES)),
        "all frozen but the biases of v_img": run(data, frozen=True),
    }


def control_curves(base: dict[str, torch.Tensor], steps: int) -> Curves:
    data, validation = clips(SAMPLES), clips(HELD_OUT, "held out")

    def run(dataset: MemoryDataset, frozen: bool = False) -> Curve:
        trainer = create_control_trainer(
            config_of("control", steps), base, features(), num_heads=2, null_text=WORLD.null_text
        )
        if frozen:
            trainer.controlnet.zero_convs.requires_grad_(False)
        return curve_of(trainer, dataset, validation)

    return {
        "trained": run(data),
        "control of another sample": run(of_another(data, "control_latents")),
        "zero convolutions frozen": run(data, frozen=True),
    }


def motion_curves(base: dict[str, torch.Tensor], steps: int) -> Curves:
    validation = clips(HELD_OUT, "held out", still=True)

    def run(still: bool) -> Curve:
        config = config_of(
            "motion", steps, 1e-2, motion=MotionConfig(rank=8),
            flow=dataclasses.replace(FLOW, drop_text=0.0),
        )  # fmt: skip
        trainer = create_motion_trainer(config, base, num_heads=2, null_text=WORLD.null_text)
        return curve_of(trainer, clips(SAMPLES, still=still), validation)

    return {"trained": run(True), "moving clips": run(False)}


def projection_curves(loss: Any, steps: int) -> Curves:
    data, validation = PAIR_WORLD.pairs(2 * SAMPLES), PAIR_WORLD.pairs(PAIRS, "held out")
    widths = {key: tuple(value.shape) for key, value in data[0].items()}
    projection = ProjectionConfig(loss=loss, num_negatives=8, hidden_width=64)

    def run(dataset: MemoryDataset) -> Curve:
        config = config_of("global-projection", steps, 3e-3, projection=projection)
        return curve_of(create_projection_trainer(config, widths), dataset, validation)

    return {"trained": run(data), "pair of another": run(of_another(data, "second_embeds"))}


def all_curves(steps: int, base_steps: int) -> dict[str, Curves]:
    """Curves of each trainer; the base that the others start from has `base_steps` of training."""
    result = {"base": base_curves(steps)}
    trainer = base_trainer(base_steps)
    curve = curve_of(trainer, clips(2 * SAMPLES), clips(HELD_OUT, "held out"))
    result["base, from which the others start"] = {"trained": curve}
    base = trainer.outputs()[0].tensors
    runs: dict[str, Callable[[], Curves]] = {
        "style": lambda: style_curves(base, steps),
        "control": lambda: control_curves(base, steps),
        "motion": lambda: motion_curves(base, steps),
        "global projection, triplet": lambda: projection_curves("triplet", steps),
        "global projection, InfoNCE": lambda: projection_curves("infonce", steps),
    }
    for name, run in runs.items():
        result[name] = run()
        print_curves(name, result[name])
    return result


def print_curves(name: str, curves: Curves) -> None:
    print(name)
    for label, curve in curves.items():
        print(f"  {label:36} {curve[0][1]:8.4f} -> {curve[-1][1]:8.4f} at step {curve[-1][0]}")


COLOURS = ("#0050a0", "#d05010", "#808080")
PANEL, MARGIN = (460, 300), 48


def draw(curves: dict[str, Curves]) -> Image.Image:
    """A panel for each trainer."""
    columns = 2
    rows = -(-len(curves) // columns)
    image = Image.new("RGB", (columns * PANEL[0], rows * PANEL[1]), "white")
    for number, (name, own) in enumerate(curves.items()):
        image.paste(
            draw_panel(name, own), (number % columns * PANEL[0], number // columns * PANEL[1])
        )
    return image


def draw_panel(name: str, curves: Curves) -> Image.Image:
    image = Image.new("RGB", PANEL, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    values = np.array([loss for curve in curves.values() for _, loss in curve])
    last = max(step for curve in curves.values() for step, _ in curve)
    low, high = values.min(), values.max()
    width, height = PANEL[0] - 2 * MARGIN, PANEL[1] - 2 * MARGIN - 14 * len(curves)

    def place(step: float, loss: float) -> tuple[float, float]:
        up = (loss - low) / max(high - low, 1e-12)
        return MARGIN + step / last * width, MARGIN + (1 - up) * height

    pen.text((MARGIN, 8), f"{name}: held-out loss", fill="black", font=font)
    pen.rectangle((MARGIN, MARGIN, MARGIN + width, MARGIN + height), outline="#c0c0c0")
    for loss in (low, high):
        pen.text((6, place(0, loss)[1] - 7), f"{loss:.3f}", fill="black", font=font)
    bottom = MARGIN + height + 4
    pen.text((MARGIN, bottom), "0", fill="black", font=font)
    pen.text((MARGIN + width - 50, bottom), f"step {last}", fill="black", font=font)
    for number, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        pen.line([place(*point) for point in curve], fill=colour, width=2)
        y = bottom + 18 + 14 * number
        pen.line((MARGIN, y + 7, MARGIN + 20, y + 7), fill=colour, width=3)
        pen.text((MARGIN + 26, y), label, fill="black", font=font)
    return image


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.learning_curves", description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--base-steps", type=int, default=500, help="of the base they start from")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/learning_curves.json"), metavar="FILE.json",
        help="the numbers; the drawing lies beside it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args(argv)
    drawing = args.out.with_suffix(".png")
    try:
        if args.steps < 1 or args.base_steps < 1:
            raise ConfigError("--steps and --base-steps must be at least 1")
        if not args.out.absolute().parent.is_dir():
            raise ConfigError(f"the folder of {args.out} does not exist; make it first")
        for path in (args.out, drawing):
            if path.exists() and not args.overwrite:
                raise ConfigError(f"{path} exists; choose another name, or pass --overwrite")
        curves = all_curves(args.steps, args.base_steps)
    except StyleMasterError as error:
        sys.stderr.write(f"bench.learning_curves: {error}\n")
        return 2
    report = {
        "format": "stylemaster-learning-curves-1",
        "date": datetime.date.today().isoformat(),
        "command": f"{COMMAND} --steps {args.steps} --base-steps {args.base_steps}",
        "torch": torch.__version__,
        "data": "stylemaster_core.training.synthetic.SyntheticWorld",
        "values": "(step, mean loss of held-out samples at fixed noise and noise levels)",
        "curves": curves,
    }
    beside = drawing.with_name(f".{drawing.name}")
    draw(curves).save(beside, format="PNG")
    beside.replace(drawing)
    write_json(args.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
