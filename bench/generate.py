"""Time every part of a generation at real size with random weights: `python -m bench.generate`.

Each row of the table is measured at the printed setting. FLOP are counted on meta tensors, at that
setting and at the reference (81 frames of 832 x 480, all blocks). Where the two differ, the
reference's seconds are extrapolated by FLOP and kept apart from what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from stylemaster_core.dtypes import choose_dtype
from stylemaster_core.errors import ConfigError
from stylemaster_core.layouts import SIZE_MULTIPLE, latent_shape
from stylemaster_core.pipelines.models import choose_device
from stylemaster_core.sampling.schedules import in_range

from .runner import add_output, check_output, machine_facts, run_benchmark
from .workloads import (
    CPU_SETTING,
    PARTS,
    REFERENCE,
    TEXT_LENGTH,
    Setting,
    building,
    count_flop,
    flop_ratios,
    row_names,
)

CONTROL_END = 0.7  # part of the sampling in which the ControlNet acts
LONG_RUN_S = 10.0  # on a CPU, a first run of this length needs no second one
MATMUL_S = 0.25  # for the best of up to 10 products, before and after each part


def run_once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, until the device has finished."""
    started = time.perf_counter()
    with torch.no_grad():
        run()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - started


def peak_memory(device: torch.device) -> int | None:
    """Bytes since the last reset on CUDA, elsewhere of the process up to now; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Yardstick:
    """What the device reaches in one dense product: the best seen while the parts were measured.

    Once would do on an idle machine; on one that is shared a single moment tells little.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.size = 1024 if device.type == "cpu" else 8192
        self.best: dict[str, float] = {}  # FLOP/s by dtype

    def measure(self, dtype: torch.dtype) -> None:
        size = (self.size, self.size)
        a, b = (torch.randn(size, device=self.device, dtype=dtype) for _ in range(2))
        end = time.perf_counter() + MATMUL_S
        run_once(lambda: a @ b, self.device)
        seconds = run_once(lambda: a @ b, self.device)
        for _ in range(9):
            if time.perf_counter() > end:
                break
            seconds = min(seconds, run_once(lambda: a @ b, self.device))
        name = dtype_name(dtype)
        self.best[name] = max(self.best.get(name, 0.0), 2 * self.size**3 / seconds)

    def report(self) -> list[dict[str, Any]]:
        return [
            {"dtype": name, "size": self.size, "tflop_per_s": rate / 1e12}
            for name, rate in self.best.items()
        ]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def timings(
    run: Callable[[], object], device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        first = run_once(run, device)
        enough = device.type == "cpu" and first > LONG_RUN_S and not args.compile
        runs = [first] if enough else [run_once(run, device) for _ in range(args.repeat)]
    except torch.cuda.OutOfMemoryError:
        return {"status": "out of memory"}
    return {
        "status": "measured",
        "seconds": statistics.median(runs),
        "runs": runs,
        "first_run_seconds": first,  # with compilation, where it was asked for
        "peak_memory_bytes": peak_memory(device),
    }


def part_dtype(part: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the pipeline runs a part."""
    if part == "image":
        return torch.float32
    # UMT5 overflows in float16.
    return torch.bfloat16 if part == "text" and dtype == torch.float16 else dtype


def measure_part(
    part: str,
    setting: Setting,
    device: torch.device,
    dtype: torch.dtype,
    args: argparse.Namespace,
    bar: tqdm,
) -> list[dict[str, Any]]:
    bar.set_description(f"{part}: counting FLOP")
    names = row_names(part, setting)
    flop, reference = (
        {name: count_flop(part, name, size) for name in names} for size in (setting, REFERENCE)
    )
    bar.set_description(f"{part}: drawing random weights")
    try:
        with building(device, dtype):
            rows = PARTS[part](setting, args.compile)
    except torch.cuda.OutOfMemoryError:
        rows = dict.fromkeys(names)
    results = []
    for name, run in rows.items():
        bar.set_description(f"{part}: {name}")
        result: dict[str, Any] = {
            "part": part,
            "name": name,
            "dtype": dtype_name(dtype),
            "tflop": flop[name] / 1e12,
            "reference_tflop": reference[name] / 1e12,
        }
        result |= {"status": "out of memory"} if run is None else timings(run, device, args)
        if result["status"] == "measured":
            seconds = result["seconds"]
            result["tflop_per_s"] = result["tflop"] / seconds
            if flop[name] != reference[name]:
                factor = reference[name] / flop[name]
                result["extrapolated_reference_seconds"] = seconds * factor
        results.append(result)
        bar.update()
    return results


def generation_seconds(seconds: dict[str, float], steps: int) -> dict[str, float] | None:
    """Sum of the parts of whole generations; None if a part is missing.

    The style projector, reading and writing of videos and loading of weights are not in it.
    """
    num_controlled = sum(in_range(step, steps, 0.0, CONTROL_END) for step in range(steps))
    once = [f"text: UMT5, {TEXT_LENGTH} tokens", "transformer: text K, V", "image: CLIP, one image"]
    try:
        # Two prompts; the style picture, and the shuffled one.
        text_to_video = sum(2 * seconds[name] for name in once)
        text_to_video += seconds["transformer: style K, V"] + seconds["vae: decode"]
        text_to_video += steps * seconds["step: three branches, one by one"]
        control = num_controlled * seconds["controlnet: one evaluation"]
        video_to_video = text_to_video + seconds["vae: encode"] + control
    except KeyError:
        return None
    return {"text_to_video": text_to_video, "video_to_video": video_to_video}


def generations(rows: list[dict[str, Any]], setting: Setting, steps: int) -> dict[str, Any]:
    """Whole generations: from measured parts, and extrapolated to the reference."""
    measured, extrapolated = {}, {}
    for row in rows:
        if row["status"] == "measured":
            name = f"{row['part']}: {row['name']}"
            measured[name] = row["seconds"]
            extrapolated[name] = row.get("extrapolated_reference_seconds", row["seconds"])
    # With blocks left out, a sum of measured parts would be no generation.
    whole = setting.blocks == REFERENCE.blocks
    same = setting == REFERENCE
    return {
        "generation": generation_seconds(measured, steps) if whole else None,
        "extrapolated_generation": None if same else generation_seconds(extrapolated, steps),
    }


def describe(setting: Setting) -> dict[str, Any]:
    latents = list(setting.latents)
    return dataclasses.asdict(setting) | {"latents": latents, "tokens": setting.tokens}


def print_report(report: dict[str, Any]) -> None:
    machine, setting = report["machine"], report["setting"]
    print(f"\n{machine['name']} ({machine['device']}), torch {machine['torch']}")
    print(
        f"MEASURED at {setting['frames']} frames of {setting['width']} x {setting['height']} "
        f"({setting['tokens']} tokens), {setting['blocks']} blocks, random weights"
    )
    print(f"{'':40} {'s':>10} {'TFLOP':>10} {'TFLOP/s':>9} {'of matmul':>9} {'peak GiB':>9}")
    for row in report["parts"]:
        name = f"{row['part']}: {row['name']}"
        if row["status"] != "measured":
            print(f"{name:40} {row['status']}")
            continue
        peak = row["peak_memory_bytes"]
        memory = "?" if peak is None else f"{peak / 2**30:.2f}"
        print(
            f"{name:40} {row['seconds']:10.4f} {row['tflop']:10.3f} {row['tflop_per_s']:9.3f} "
            f"{row['utilisation']:9.0%} {memory:>9}"
        )
    print(f"peak memory: {report['peak_memory_kind']}")
    for rate in report["matmul"]:
        size = rate["size"]
        print(f"matmul {size}^3 in {rate['dtype']}: {rate['tflop_per_s']:.3f} TFLOP/s")
    print_generation("sum of measured parts", report["generation"], setting["steps"])
    extrapolated = [x for x in report["parts"] if "extrapolated_reference_seconds" in x]
    if extrapolated:
        print("\nEXTRAPOLATED to 81 frames of 832 x 480 and all blocks, by FLOP; NOT MEASURED")
        for row in extrapolated:
            seconds, name = row["extrapolated_reference_seconds"], f"{row['part']}: {row['name']}"
            print(f"{name:40} {seconds:10.1f} s for {row['reference_tflop']:9.3f} TFLOP")
        kind = "EXTRAPOLATED, NOT MEASURED"
        print_generation(kind, report["extrapolated_generation"], setting["steps"])
    print("\nFLOP ratios at 81 frames of 832 x 480 (counted)")
    for name, ratio in report["flop_ratios"].items():
        print(f"{name:40} {ratio:10.4f}")


def print_generation(kind: str, seconds: dict[str, float] | None, steps: int) -> None:
    for task, value in (seconds or {}).items():
        print(f"{task.replace('_', '-')}, {steps} steps, without loading: {value:.1f} s ({kind})")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.generate", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    parser.add_argument("--frames", type=int, help="default: 81, on a CPU 5")
    parser.add_argument("--size", metavar="WxH", help="default: 832x480, on a CPU 416x240")
    parser.add_argument("--blocks", type=int, help="default: 30 (all), on a CPU 2")
    parser.add_argument("--steps", type=int, default=50, help="of a whole generation")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs after the first")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    add_output(parser)
    return parser.parse_args(argv)


def read_setting(args: argparse.Namespace, device: torch.device) -> Setting:
    """The setting asked for; what was not given is the reference's, on a CPU the reduced one's.

    Raises:
        ConfigError, LayoutError: for options that cannot work.
    """
    default = CPU_SETTING if device.type == "cpu" else REFERENCE
    width, height = default.width, default.height
    if args.size is not None:
        sides = args.size.lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() for side in sides):
            raise ConfigError(f"the size {args.size!r} is unknown; write WxH, such as 832x480")
        width, height = map(int, sides)
    if width < 1 or height < 1 or width % SIZE_MULTIPLE or height % SIZE_MULTIPLE:
        raise ConfigError(f"{width} x {height}: both sides must be multiples of {SIZE_MULTIPLE}")
    frames = default.frames if args.frames is None else args.frames
    blocks = default.blocks if args.blocks is None else args.blocks
    if not 1 <= blocks <= REFERENCE.blocks:
        raise ConfigError(f"{blocks} blocks; expected 1 to {REFERENCE.blocks}")
    latent_shape(frames, height, width)
    return Setting(frames, width, height, blocks)


def read_parts(args: argparse.Namespace) -> list[str]:
    """The parts asked for.

    Raises:
        ConfigError: if one is unknown, or there is none.
    """
    parts = list(dict.fromkeys(part.strip() for part in args.parts.split(",")))
    if not set(parts) <= set(PARTS):
        raise ConfigError(f"the parts {args.parts!r}: choose from {', '.join(PARTS)}")
    return parts


def check_options(args: argparse.Namespace) -> None:
    """Find out before the long work what cannot end well.

    Raises:
        ConfigError: for such an option.
    """
    if args.steps < 1 or args.repeat < 1:
        raise ConfigError(f"--steps {args.steps}, --repeat {args.repeat}: at least 1 each")
    check_output(args)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for.

    Raises:
        StyleMasterError: for options that cannot work.
    """
    check_options(args)
    parts = read_parts(args)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    setting = read_setting(args, device)
    machine = machine_facts(device)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    yardstick = Yardstick(device)
    with tqdm(total=sum(len(row_names(part, setting)) for part in parts), unit="row") as bar:
        for part in parts:
            used = part_dtype(part, dtype)
            yardstick.measure(used)
            rows += measure_part(part, setting, device, used, args, bar)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            yardstick.measure(used)
        bar.set_description("FLOP ratios")
        ratios = flop_ratios()
        bar.set_description("done")
    for row in rows:
        if row["status"] == "measured":
            row["utilisation"] = row["tflop_per_s"] * 1e12 / yardstick.best[row["dtype"]]
    options = {"steps": args.steps, "repeat": args.repeat, "compile": args.compile}
    return {
        "format": "stylemaster-bench-generate-1",
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "setting": describe(setting) | {"dtype": dtype_name(dtype)} | options,
        "reference": describe(REFERENCE),
        "peak_memory_kind": "allocated on the device during the row"
        if device.type == "cuda"
        else "resident memory of the process, highest up to then",
        "matmul": yardstick.report(),
        "parts": rows,
        "flop_ratios": ratios,
        "extrapolation": "seconds * reference_tflop / tflop; never measured, and rough: small "
        "settings use a device less well and have other shares of attention",
        **generations(rows, setting, args.steps),
    }


def main(argv: list[str] | None = None) -> int:
    return run_benchmark("bench.generate", benchmark, print_report, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
