"""All that is to be tried on a GPU, in pieces that go on where they stopped: `python -m bench.gpu`.

A piece that has its file under --out is not run again. The order gives the most in little time:
`right` (does the device compute what the CPU does), `tiny` (train the small model), `fast` (time a
generation at real size), `train` (time each trainer), `comfy` (the nodes in ComfyUI, where
COMFYUI_PATH names one). With `--toy --device cpu` every piece runs its real code in seconds, to
rehearse it where there is no GPU. `--bundle DIR` packs all of it for a machine without a network;
see `gpu_bundle`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stylemaster_core.errors import ConfigError, StyleMasterError
from stylemaster_core.pipelines.models import choose_device

from . import comfy, generate, train
from .gpu_bundle import write_gpu_bundle
from .gpu_right import check_device
from .runner import Report, machine_facts, write_json

ROOT = Path(__file__).parents[1]
UNFINISHED = 3  # exit status, as of the recipe
TOY = ["--frames", "1", "--size", "32x32", "--blocks", "1", "--repeat", "1"]
FAST = {
    "eager": [],
    "compiled": ["--compile", "--parts", "transformer,step,controlnet"],
    "float16": ["--dtype", "float16", "--parts", "transformer,step"],
}
TRAIN = {
    "eager": ["--steps", "3"],
    "compiled": ["--steps", "3", "--compile"],
    "checkpointed": ["--steps", "3", "--checkpointing", "1", "--kind", "clips"],
}


def right(args: argparse.Namespace) -> Report:
    """Whether the device computes what the CPU does."""
    checks = check_device(choose_device(args.device), seeds=1 if args.toy else 4)
    for row in checks:
        verdict = "ok" if row["holds"] else "DOES NOT HOLD"
        print(f"{row['check']:60} {row['value']:9.3g} {row['bound']:9.3g} {verdict} {row['note']}")
    return {"checks": checks, "failed": [row["check"] for row in checks if not row["holds"]]}


def fast(args: argparse.Namespace) -> Report:
    """Seconds, TFLOP/s and memory of a generation at real size."""
    return _benchmarks(args, FAST, generate, ["--parts", "transformer"])


def training(args: argparse.Namespace) -> Report:
    """Utilisation and memory of a step of each trainer."""
    return _benchmarks(args, TRAIN, train, ["--trainers", "style", "--kind", "images"])


def tiny(args: argparse.Namespace) -> Report:
    """Train the small model by its recipe for the GPU; `--tiny` passes options on to it."""
    out = args.out / "recipe"
    options = ["--profile", "gpu", "--out", str(out), "--minutes", str(args.minutes)]
    if args.toy:
        options = ["--profile", "smoke", "--out", str(out), "--until", "vae"]
        options += ["--set", "vae_steps=2"]
    command = [sys.executable, "-m", "recipes.tiny", *options, *args.tiny.split()]
    status = call(command)
    if status == UNFINISHED:
        return {"unfinished": True}
    stages = sorted(path.parent.name for path in out.glob("*/done.json"))
    failed = [] if status == 0 and stages else [f"exit status {status}"]
    return {"stages": stages, "failed": failed}


def comfyui(args: argparse.Namespace) -> Report:
    """The nodes on a server of ComfyUI, with the tests' small models: at all sizes the same."""
    if not (os.environ.get("COMFYUI_PATHS") or os.environ.get("COMFYUI_PATH")):
        return {"skipped": "no COMFYUI_PATH names a ComfyUI"}
    device = "cpu" if choose_device(args.device).type == "cpu" else "gpu"
    parsed = comfy.parse_arguments(["--parts", "server", "--server-device", device])
    try:
        report = comfy.benchmark(parsed)
    except comfy.ERRORS as error:
        return {"failed": [str(error)]}
    comfy.print_report(report)
    return {"report": report, "failed": []}


def call(command: list[str]) -> int:
    """Run a command in the repository; its exit status."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


PIECES: dict[str, Callable[[argparse.Namespace], Report]] = {
    "right": right,
    "tiny": tiny,
    "fast": fast,
    "train": training,
    "comfy": comfyui,
}


def _benchmarks(
    args: argparse.Namespace, variants: dict[str, list[str]], bench: Any, toy: list[str]
) -> Report:
    """Reports of a benchmark by variant; what fails is told, and the others go on."""
    reports: Report = {}
    failed = []
    for name, options in variants.items():
        if args.toy and name != "eager":
            continue
        chosen = [*TOY, *toy] if args.toy else options
        parsed = bench.parse_arguments(["--device", args.device, *chosen])
        try:
            reports[name] = bench.benchmark(parsed)
            bench.print_report(reports[name])
        except (StyleMasterError, RuntimeError) as error:
            failed.append(f"{name}: {error}")
            print(f"{name}: {error}", file=sys.stderr)
    return {"reports": reports, "failed": failed}


def run(args: argparse.Namespace) -> int:
    """Run the pieces that are not done; the exit status.

    Raises:
        ConfigError: for a piece that is unknown.
    """
    wanted = [name.strip() for name in args.only.split(",")]
    if not set(wanted) <= set(PIECES):
        raise ConfigError(f"--only {args.only}: choose from {', '.join(PIECES)}")
    if args.bundle:
        paths = write_gpu_bundle(args.bundle, args.has, python=args.has_python, recipe=args.recipe)
        print(f"wrote {len(paths)} archives to {args.bundle}")
        return 0
    device = choose_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    started, failed = time.monotonic(), False
    for name in wanted:
        path = args.out / f"{name}.json"
        if path.exists():
            print(f"{name}: done before, see {path}")
            continue
        if time.monotonic() - started > 60 * args.minutes:
            print("the time is over; call again to go on")
            return UNFINISHED
        print(f"== {name}: {PIECES[name].__doc__}", flush=True)
        began = time.monotonic()
        report = PIECES[name](args)
        if report.get("unfinished"):
            print(f"{name}: more to do; call again to go on")
            return UNFINISHED
        if not any(report.values()):
            report["failed"] = ["it reported nothing"]
        if "skipped" in report:
            print(f"{name}: skipped: {report['skipped']}")
            continue
        facts = {"seconds": round(time.monotonic() - began, 1), "toy": args.toy}
        write_json(path, {"machine": machine_facts(device), **facts, **report})
        for words in report["failed"]:
            print(f"{name}: FAILED: {words}", file=sys.stderr)
            failed = True
    return 1 if failed else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="default: %(default)s")
    parser.add_argument("--only", default=",".join(PIECES), help="default: all (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--minutes", type=float, default=8, help="no piece begins after them")
    parser.add_argument("--tiny", default="", help="options of the recipe, such as '--art DIR'")
    parser.add_argument("--toy", action="store_true", help="real code at sizes of seconds")
    group = parser.add_argument_group("for a machine without a network")
    group.add_argument("--bundle", type=Path, metavar="DIR", help="only write archives")
    group.add_argument(
        "--has", type=Path, metavar="FILE", help="what `pip list --format=freeze` prints there"
    )
    group.add_argument("--has-python", default="3.12", metavar="X.Y", help="its Python")
    group.add_argument(
        "--recipe",
        type=Path,
        metavar="DIR",
        help="folder of the small model's recipe, whose latents go with it",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(parse_arguments(argv))
    except StyleMasterError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    sys.exit(main())
