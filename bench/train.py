"""Time a training step of each trainer with random weights: `python -m bench.train`.

Sizes are the real ones, on a CPU a reduced setting, which the report says. Batches are synthetic
and lie on the device: reading data, checkpoints and validation are not in the numbers. FLOP of
forward and backward are counted on meta tensors; what is frozen counts with what the backward pass
runs through it, and blocks that are computed again (--checkpointing) count once.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from stylemaster_core.dtypes import choose_precision
from stylemaster_core.errors import ConfigError
from stylemaster_core.pipelines.models import choose_device
from stylemaster_core.training.config import FlowConfig, RunConfig, TrainConfig
from stylemaster_core.training.global_projection import create_projection_trainer
from stylemaster_core.training.gray_tile_controlnet import create_control_trainer
from stylemaster_core.training.motion_adapter import create_motion_trainer
from stylemaster_core.training.optimizer import create_optimizer
from stylemaster_core.training.samples import collate, draw_sample, generator_of
from stylemaster_core.training.style_modulation import create_style_trainer
from stylemaster_core.training.synthetic import SyntheticWorld
from stylemaster_core.training.trainer import Trainer
from stylemaster_core.weights.shapes import WanSizes, expected_base_shapes

from .generate import (
    Yardstick,
    check_options,
    describe,
    dtype_name,
    read_setting,
    timings,
)
from .runner import add_output, machine_facts, run_benchmark
from .workloads import REFERENCE, TEXT_LENGTH, TEXT_WIDTH, Setting

TRAINERS = ("style", "motion", "control", "global-projection")
KINDS = ("images", "clips")
# Share of the dense bf16 rate that an H200 is to reach at the reference: aims, not results.
GOALS = {"images": 0.45, "clips": 0.50}
BATCHES = {"images": 16, "clips": 1, "pairs": 256}


def rows_of(trainers: list[str], kinds: list[str]) -> list[tuple[str, str]]:
    """(trainer, kind) of each row: motion has no images, and the projection learns from pairs."""
    rows: list[tuple[str, str]] = []
    for trainer in trainers:
        if trainer == "global-projection":
            rows.append((trainer, "pairs"))
        else:
            rows += [(trainer, x) for x in kinds if (trainer, x) != ("motion", "images")]
    return rows


def create(name: str, setting: Setting, device: str | torch.device, run: RunConfig) -> Trainer:
    """A trainer with random weights."""
    config = TrainConfig(name, run, flow=FlowConfig(text_length=TEXT_LENGTH))  # type: ignore[arg-type]
    features = {key: tuple(value.shape) for key, value in _sample(name, setting, 0).items()}
    on_meta = torch.device(device).type == "meta"
    dtype = torch.bfloat16 if run.precision == "bfloat16" else torch.float32
    with torch.device("meta") if on_meta else nullcontext():
        if name == "global-projection":
            return create_projection_trainer(config, features).to(device)
        shapes = expected_base_shapes(WanSizes(num_blocks=setting.blocks))
        weights = {
            key: torch.ones(shape, device=device, dtype=dtype)
            if ".norm" in key
            else torch.randn(shape, device=device, dtype=dtype) * 0.02
            for key, shape in shapes.items()
        }
        null_text = torch.zeros(1, TEXT_WIDTH)
        if name == "motion":
            return create_motion_trainer(config, weights, null_text=null_text).to(device)
        make: Any = create_style_trainer if name == "style" else create_control_trainer
        return make(config, weights, features, null_text=null_text).to(device)


def _world(setting: Setting) -> SyntheticWorld:
    return SyntheticWorld(
        size=setting.latents,
        text_length=TEXT_LENGTH,
        text_width=TEXT_WIDTH,
        patches=257,
        patch_width=1280,
        embed_width=1024,
    )


def _sample(name: str, setting: Setting, index: int) -> dict[str, Tensor]:
    world = _world(setting)
    return world.pair(index) if name == "global-projection" else world.sample(index)


def create_batch(trainer: Trainer, setting: Setting, batch_size: int) -> dict[str, Tensor]:
    """A batch as the training loop makes it, on the CPU."""
    world = _world(setting)
    pairs = trainer.name == "global-projection"
    data = world.pairs(max(batch_size, 2)) if pairs else world.dataset(batch_size)
    drawn = [
        draw_sample(data, i, trainer.draws, generator_of("bench", i), None)
        for i in range(batch_size)
    ]
    return collate(drawn).tensors


def count_flop(name: str, setting: Setting, batch_size: int) -> int:
    """FLOP of the forward and backward pass of a batch; the optimiser is not counted."""
    trainer = create(name, setting, "meta", RunConfig())
    one = create_batch(trainer, setting, 1)
    # Only its shapes matter, so that the batch is never made.
    batch = {
        key: torch.empty((batch_size, *value.shape[1:]), dtype=value.dtype, device="meta")
        for key, value in one.items()
    }
    with _values_unchecked(), FlopCounterMode(display=False) as counter:
        trainer(batch).mean().backward()
    return counter.get_total_flops()


def _values_unchecked() -> Any:
    """No search for NaN: a meta tensor cannot be looked at."""
    return patch("torch.isfinite", lambda tensor: torch.ones((), dtype=torch.bool))


def step_of(
    trainer: Trainer, batch: dict[str, Tensor], device: torch.device, num_steps: int
) -> Callable[[], None]:
    """Optimiser steps as the training loop takes them."""
    config = trainer.config
    parameters = list(trainer.trained().values())
    optimizer = create_optimizer(parameters, config.optimizer)
    mixed = config.run.precision == "bfloat16"

    @torch.enable_grad()
    def run() -> None:
        for _ in range(num_steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                losses = trainer(batch).float()
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

    return run


def measure(
    name: str,
    kind: str,
    setting: Setting,
    device: torch.device,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One row of the report."""
    used = dataclasses.replace(setting, frames=1) if kind == "images" else setting
    batch_size = args.batch or (BATCHES[kind] if device.type != "cpu" or kind == "pairs" else 1)
    run = RunConfig(
        batch_size=batch_size,
        precision="bfloat16" if dtype == torch.bfloat16 else "float32",
        checkpoint_blocks=args.checkpointing,
        compile_blocks=args.compile,
    )
    flop = args.steps * count_flop(name, used, batch_size)
    result: dict[str, Any] = {
        "trainer": name,
        "kind": kind,
        "batch": batch_size,
        "frames": None if kind == "pairs" else used.frames,
        "tokens_per_sample": 0 if kind == "pairs" else used.tokens,
        "tflop_per_sample": flop / args.steps / batch_size / 1e12,
        "goal_on_h200": GOALS.get(kind),
    }
    try:
        trainer = create(name, used, device, run)
        batch = {k: v.to(device) for k, v in create_batch(trainer, used, batch_size).items()}
        result["trained_parameters"] = sum(p.numel() for p in trainer.trained().values())
        result["frozen_parameters"] = sum(
            p.numel() for p in trainer.parameters() if not p.requires_grad
        )
        result |= timings(step_of(trainer, batch, device, args.steps), device, args)
    except torch.cuda.OutOfMemoryError:
        result["status"] = "out of memory"
    if result["status"] == "measured":
        result["samples_per_s"] = batch_size * args.steps / result["seconds"]
        result["tflop_per_s"] = flop / result["seconds"] / 1e12
    return result


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for.

    Raises:
        StyleMasterError: for options that cannot work.
    """
    check_options(args)
    trainers = _chosen(args.trainers, TRAINERS, "trainers")
    kinds = _chosen(args.kind, KINDS, "kinds")
    rows = rows_of(trainers, kinds)
    if not rows:
        raise ConfigError(
            "the motion adapter learns from still clips; measure it with --kind clips"
        )
    if (args.batch is not None and args.batch < 1) or args.checkpointing < 0:
        raise ConfigError(
            f"--batch {args.batch}, --checkpointing {args.checkpointing}: at least 1, and 0"
        )
    device = choose_device(args.device)
    if args.dtype == "float16":
        raise ConfigError("training runs in float32 or bfloat16; choose one of them")
    half = choose_precision(args.dtype, device) == "bfloat16"
    dtype = torch.bfloat16 if half else torch.float32
    setting = read_setting(args, device)
    if any(row == ("motion", "clips") for row in rows) and setting.frames < 5:
        raise ConfigError(f"--frames {setting.frames}: the motion adapter needs clips, 5 or more")
    machine = machine_facts(device)
    torch.manual_seed(0)
    yardstick = Yardstick(device)
    results = []
    yardstick.measure(dtype)
    with tqdm(rows, unit="row") as bar:
        for name, kind in bar:
            bar.set_description(f"{name}, {kind}")
            results.append(measure(name, kind, setting, device, dtype, args))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            yardstick.measure(dtype)
    for row in results:
        if row["status"] == "measured":
            row["utilisation"] = row["tflop_per_s"] * 1e12 / yardstick.best[dtype_name(dtype)]
    options = ("steps", "repeat", "compile", "checkpointing")
    return {
        "format": "stylemaster-bench-train-1",
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "setting": describe(setting)
        | {"dtype": dtype_name(dtype)}
        | {key: getattr(args, key) for key in options},
        "reduced": setting != REFERENCE,
        "reference": describe(REFERENCE),
        "goals": "of the dense rate in bf16 on an H200 at the reference; aims, never results",
        "peak_memory_kind": "allocated on the device during the row"
        if device.type == "cuda"
        else "resident memory of the process, highest up to then",
        "matmul": yardstick.report(),
        "trainers": results,
    }


def _chosen(text: str, known: tuple[str, ...], what: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if not set(names) <= set(known):
        raise ConfigError(f"the {what} {text!r}: choose from {', '.join(known)}")
    return names


def print_report(report: dict[str, Any]) -> None:
    machine, setting = report["machine"], report["setting"]
    print(f"\n{machine['name']} ({machine['device']}), torch {machine['torch']}")
    print(
        f"{'REDUCED SETTING' if report['reduced'] else 'REAL SIZE'}: clips of {setting['frames']} "
        f"frames, {setting['width']} x {setting['height']}, {setting['blocks']} blocks of real "
        f"width, {setting['dtype']}, random weights, synthetic batches"
    )
    heads = ("batch", "samples/s", "TFLOP/s", "of matmul", "peak GiB", "goal on H200")
    print(f"{'':28} {heads[0]:>6}" + "".join(f" {head:>12}" for head in heads[1:]))
    for row in report["trainers"]:
        name = f"{row['trainer']}, {row['kind']}"
        goal = "-" if row["goal_on_h200"] is None else f"{row['goal_on_h200']:.0%}"
        if row["status"] != "measured":
            print(f"{name:28} {row['batch']:6} {row['status']}")
            continue
        peak = row["peak_memory_bytes"]
        memory = "?" if peak is None else f"{peak / 2**30:.2f}"
        print(
            f"{name:28} {row['batch']:6} {row['samples_per_s']:12.4f} {row['tflop_per_s']:12.3f} "
            f"{row['utilisation']:12.0%} {memory:>12} {goal:>12}"
        )
    print(f"peak memory: {report['peak_memory_kind']}")
    print(f"goals: {report['goals']}")
    for rate in report["matmul"]:
        size = rate["size"]
        print(f"matmul {size}^3 in {rate['dtype']}: {rate['tflop_per_s']:.3f} TFLOP/s")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--trainers", default=",".join(TRAINERS), help="default: %(default)s")
    parser.add_argument("--kind", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--frames", type=int, help="of clips; default: 81, on a CPU 5")
    parser.add_argument("--size", metavar="WxH", help="default: 832x480, on a CPU 416x240")
    parser.add_argument("--blocks", type=int, help="default: 30 (all), on a CPU 2")
    parser.add_argument(
        "--batch", type=int, help="default: 16 images, 1 clip, 256 pairs; on a CPU 1 image"
    )
    parser.add_argument("--steps", type=int, default=1, help="optimiser steps of a timed run")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs after the first")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument(
        "--checkpointing", type=int, default=0, metavar="N", help="recompute every n-th block"
    )
    add_output(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_benchmark("bench.train", benchmark, print_report, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
