"""Measure StyleCrafter on SDXL in a real ComfyUI on the CPU: `python -m bench.sdxl`.

A step with a style through Style Guider against the stock DualCFGGuider on three plain prompts, on
the native UNet at real width with fewer layers and random weights; resident memory of both; what
the adapter takes and leaves at real size; and FLOP of whole SDXL at 1024 x 1024, counted without
computing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from stylemaster_core.errors import ConfigError, StyleMasterError
from stylemaster_core.models.decoupled_attention import BlockStyle
from stylemaster_core.models.sdxl_file import SDXL
from stylemaster_core.models.sdxl_unet import StyledUNet, cross_attentions
from stylemaster_core.models.small import draw_weights
from stylemaster_core.weights.files import write_state_dict
from stylemaster_core.weights.shapes import (
    StyleCrafterSdxlSizes,
    StyleCrafterSizes,
    expected_stylecrafter_sdxl_shapes,
)
from tests.comfy import server

from .comfy import LIMIT_S, find_comfyui, say
from .runner import add_output, check_output, machine_facts, run_benchmark
from .workloads import building

INSIDE = Path(__file__).with_name("sdxl_inside.py")
PARTS = ("speed", "native memory", "ours memory", "adapter")
GOAL_SECONDS_RATIO, GOAL_BYTES = 1.05, 0.4e9
ERRORS = (StyleMasterError, server.ComfyUIError)
STYLE_TOKENS = 16


def unet_config(width: int, layers: int) -> dict[str, Any]:
    """ComfyUI's SDXL UNet: one residual block for each two of the real one, and fewer layers.

    Args:
        width: of the first level; 320 is real.
        layers: transformer blocks at the lowest level and in the middle, half of them one above;
            10 is real.
    """
    half = -(-layers // 2)
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": width,
        "num_res_blocks": [1, 1, 1],
        "channel_mult": (1, 2, 4),
        "transformer_depth": [0, half, layers],
        "transformer_depth_output": [0, 0, half, half, layers, layers],
        "transformer_depth_middle": layers,
        "num_head_channels": min(width, 64),
        "context_dim": 2048,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "use_temporal_attention": False,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
        "legacy": False,
    }


def layer_widths(config: dict[str, Any]) -> tuple[int, ...]:
    """Of the cross-attentions of such a UNet, in the adapter's order: down, up, middle."""
    wide = [config["model_channels"] * factor for factor in config["channel_mult"]]
    down, up = config["transformer_depth"], config["transformer_depth_output"][::-1]
    counted = [(wide[i * len(wide) // len(down)], depth) for i, depth in enumerate(down)]
    counted += [(wide[-1 - i * len(wide) // len(up)], depth) for i, depth in enumerate(up)]
    counted.append((wide[-1], config["transformer_depth_middle"]))
    return tuple(width for width, depth in counted for _ in range(depth))


def write_adapters(folder: Path, widths: tuple[int, ...], *, real: bool) -> dict[str, str]:
    """Random adapters as half-precision files: one for the UNet, one of real size where asked."""
    # The style encoder is not measured, so it is small.
    encoder = StyleCrafterSizes(feature_width=64, num_layers=1, num_scales=len(widths))
    wanted = {"adapter": StyleCrafterSdxlSizes(encoder, widths)}
    wanted |= {"real_adapter": StyleCrafterSdxlSizes()} if real else {}
    paths = {}
    for seed, (name, sizes) in enumerate(wanted.items()):
        weights = draw_weights(expected_stylecrafter_sdxl_shapes(sizes), seed)
        half = {key: value.half() for key, value in weights.items()}
        paths[name] = str(write_state_dict(folder / f"{name}.safetensors", half))
    return paths


def count_flop(size: int) -> dict[str, float]:
    """TFLOP of one step of whole SDXL in three branches, without and with a style.

    Args:
        size: height and width of the picture, px.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with building("meta", torch.bfloat16):
        unet: Any = UNet2DConditionModel(**SDXL["unet"])
        latents, time = torch.empty(3, 4, size // 8, size // 8), torch.ones(3)
        added = {"text_embeds": torch.empty(3, 1280), "time_ids": torch.empty(3, 6)}
        text = torch.empty(3, 77, 2048)
        styles = []
        for name in cross_attentions(unet):
            width = unet.get_submodule(name).to_q.out_features
            tokens, norm = torch.empty(1, STYLE_TOKENS, width), torch.empty(1, 1, width)
            styles.append(BlockStyle((tokens,), (tokens,), (), None, ((norm, norm),)))
        counted = {}
        with StyledUNet(unet) as host:
            for name, given in (("native", None), ("ours", styles)):
                host.set(given, {})
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    unet(latents, time, text, added_cond_kwargs=added)
                counted[name] = counter.get_total_flops() / 1e12
    return {
        "tflop_per_step": counted["native"],
        "tflop_per_step_with_style": counted["ours"],
        "ratio": counted["ours"] / counted["native"],
    }


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for.

    Raises:
        StyleMasterError: for options that cannot work.
        ComfyUIError: if a part fails inside ComfyUI.
    """
    check_output(args)
    if min(args.layers, args.steps, args.repeat) < 1:
        raise ConfigError("--layers, --steps and --repeat must be at least 1")
    if args.size < 64 or args.size % 32 or args.width < 32 or args.width % 32:
        raise ConfigError("--size must be a multiple of 32, at least 64, --width one of 32")
    parts = list(dict.fromkeys(part.strip() for part in args.parts.split(",")))
    if not set(parts) <= set(PARTS):
        raise ConfigError(f"the parts {args.parts!r}: choose from {', '.join(PARTS)}")
    checkout = find_comfyui(args.comfyui)
    machine = machine_facts(torch.device("cpu"))
    unet = unet_config(args.width, args.layers)
    options = {key: getattr(args, key) for key in ("width", "layers", "size", "steps", "repeat")}
    report: dict[str, Any] = {
        "format": "stylemaster-bench-sdxl-1",
        "command": "python -m bench.sdxl",
        "date": datetime.date.today().isoformat(),
        "machine": {key: machine[key] for key in ("name", "system", "load_average", "threads")},
        "comfyui": checkout.version,
        "torch": None,
        "setting": {**options, "cross_attentions": len(layer_widths(unet))},
        "goals": {"seconds_ratio": GOAL_SECONDS_RATIO, "peak_bytes_more": GOAL_BYTES},
    }
    say("counting FLOP of whole SDXL")
    report["whole_sdxl_1024"] = count_flop(1024)
    with tempfile.TemporaryDirectory(prefix="bench_sdxl_") as folder:
        base = Path(folder)
        (base / "models").mkdir()
        say("drawing random weights")
        setting = {"unet": unet, "latents": [args.size // 8] * 2, **options}
        setting |= write_adapters(base / "models", layer_widths(unet), real="adapter" in parts)
        for part in parts:
            say(f"{part}: running inside ComfyUI {checkout.version}")
            argument = json.dumps({**setting, "part": part})
            found = server.run_script(checkout, base, INSIDE, argument, timeout_s=LIMIT_S)
            report["torch"] = found.pop("torch")
            report["machine"]["threads"] = found.pop("threads")
            report[part.replace(" ", "_")] = found
    if {"native memory", "ours memory"} <= set(parts):
        native, ours = report["native_memory"], report["ours_memory"]
        report["peak_bytes_more"] = ours["peak_bytes"] - native["peak_bytes"]
    return report


def print_report(report: dict[str, Any]) -> None:
    """A line for each number."""
    whole = report["whole_sdxl_1024"]
    print(f"\nComfyUI {report['comfyui']}, torch {report['torch']}; {report['setting']}")
    print(f"whole SDXL at 1024 x 1024: {whole['tflop_per_step']:.3f} TFLOP a step (counted)")
    print(f"  with a style: times {whole['ratio']:.6f}")
    if "speed" in report:
        found = report["speed"]
        for name in ("native", "ours"):
            print(f"{name}: {found[name]['cpu_seconds_per_step']:.3f} s of CPU time a step")
        spread = found["cpu_seconds_ratio_by_round"]
        print(
            f"ratio of CPU time {found['cpu_seconds_ratio']:.4f}, goal {GOAL_SECONDS_RATIO}; "
            f"rounds {min(spread):.3f} to {max(spread):.3f}; of FLOP {found['flop_ratio']:.6f}"
        )
    if "peak_bytes_more" in report:
        more = report["peak_bytes_more"] / 1e6
        print(f"peak memory: {more:+.1f} MB against plain, goal {GOAL_BYTES / 1e6:.0f}")
    if "adapter" in report:
        found = report["adapter"]
        print(f"adapter of {found['weights_bytes'] / 1e6:.0f} MB at real size:")
        for name in ("loaded_anonymous", "kept", "on_device", "after_anonymous"):
            print(f"  {name}: {found[f'{name}_bytes'] / 1e6:.1f} MB")
        print(f"  K and V: {found['keys_values_seconds']:.2f} s, freed: {found['freed']}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.sdxl", description=__doc__)
    parser.add_argument("--comfyui", metavar="PATH", help="default: as the tests find it")
    parser.add_argument("--width", type=int, default=320, help="of the first level")
    parser.add_argument("--layers", type=int, default=2, help="at the lowest level; 10 is SDXL's")
    parser.add_argument("--size", type=int, default=256, help="height and width, px")
    parser.add_argument("--steps", type=int, default=1, help="of each run")
    parser.add_argument("--repeat", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all (%(default)s)")
    add_output(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_benchmark("bench.sdxl", benchmark, print_report, parse_arguments(argv), ERRORS)


if __name__ == "__main__":
    sys.exit(main())
