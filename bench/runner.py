"""What the benchmarks share: options of their output, facts of the machine, the way they end."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylemaster_core.errors import ConfigError, StyleMasterError
from stylemaster_core.writing import write_text

Report = dict[str, Any]


def add_output(parser: argparse.ArgumentParser) -> None:
    """Options --out and --overwrite."""
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def check_output(args: argparse.Namespace) -> None:
    """Find out before the long work that the numbers could not be written.

    Raises:
        ConfigError: for a file that exists, or a folder that does not.
    """
    if args.out is None:
        return
    if args.out.exists() and not args.overwrite:
        raise ConfigError(f"{args.out} exists; choose another name, or pass --overwrite")
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {args.out} does not exist; make it first")


def psnr(frames: np.ndarray, others: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 frames, dB; 138 where they are equal."""
    error = np.square(frames.astype(np.float64) - others).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def run_benchmark(
    name: str,
    benchmark: Callable[[argparse.Namespace], Report],
    show: Callable[[Report], None],
    args: argparse.Namespace,
    errors: tuple[type[Exception], ...] = (StyleMasterError,),
) -> int:
    """Run a benchmark, show its report and write it where asked; the exit code."""
    try:
        report = benchmark(args)
    except errors as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 2
    show(report)
    if args.out is not None:
        write_json(args.out, report)
    return 0


def machine_facts(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.is_file() else []
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        # What else was running: well above 0 before the start, the numbers are of a shared machine.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{x: importlib.metadata.version(x) for x in ("diffusers", "transformers")},
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write beside the target, then rename: nothing half-written stays."""
    write_text(path, json.dumps(report, indent=2) + "\n", overwrite=True)
