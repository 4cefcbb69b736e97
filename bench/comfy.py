"""Measure the nodes in a real ComfyUI on the CPU: `python -m bench.comfy`.

A step of the native Wan with the stock DualCFGGuider on three plain prompts against a step with a
style through Style Guider, at the same setting and with random weights; what Apply Style costs once
and what stays of it; the ControlNet; interrupts; memory; and what a rerun executes on a server.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stylemaster_core.errors import ConfigError, StyleMasterError
from stylemaster_core.layouts import SIZE_MULTIPLE, latent_shape
from stylemaster_core.models.small import draw_weights
from stylemaster_core.weights.files import write_state_dict
from stylemaster_core.weights.shapes import (
    AdapterSizes,
    ControlNetSizes,
    WanSizes,
    expected_adapter_shapes,
    expected_base_shapes,
    expected_controlnet_shapes,
)
from tests.comfy import server, small_models

from .runner import add_output, check_output, machine_facts, run_benchmark

INSIDE = Path(__file__).with_name("comfy_inside.py")
FFN_WIDTHS = {256: 512, 1536: 8960}  # of the tests' small model, and of Wan 2.1 1.3B
PARTS = ("speed", "costs", "memory", "server")
GOAL = 1.03  # seconds of a step, ours against native
LIMIT_S = 3600.0
ERRORS = (StyleMasterError, server.ComfyUIError)
SERVER_STEPS, INTERRUPTED_AFTER = 12, 2
ADAPTER, TILE, PICTURE = "bench_adapter.safetensors", "bench_tile.safetensors", "bench_style.png"


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def write_weights(models: Path, args: argparse.Namespace) -> dict[str, str]:
    """Random weights of the asked size in released formats and dtype; the paths by kind."""
    width, ffn_width = args.width, FFN_WIDTHS[args.width]
    control_blocks = max(1, args.blocks // 2)
    shapes = {
        "transformer": expected_base_shapes(
            WanSizes(width=width, ffn_width=ffn_width, num_blocks=args.blocks)
        ),
        # The style projector is not measured, so it is small.
        "adapter": expected_adapter_shapes(
            AdapterSizes(width=width, num_blocks=args.blocks, patch_width=80, global_width=48)
        ),
        "controlnet": expected_controlnet_shapes(
            ControlNetSizes(width=width, ffn_width=ffn_width, num_blocks=control_blocks)
        ),
    }
    paths = {}
    for seed, (kind, wanted) in enumerate(shapes.items()):
        paths[kind] = str(models / f"bench_{kind}.safetensors")
        write_state_dict(paths[kind], draw_weights(wanted, seed))
    return paths


def measure_inside(
    checkout: server.Checkout, base: Path, parts: list[str], args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the parts that need no server, each in a process of its own."""
    setting = {
        "width": args.width,
        "latents": latents_of(args),
        "steps": args.steps,
        "repeat": args.repeat,
        **write_weights(base / "models", args),
    }
    for part in parts:
        say(f"{part}: running inside ComfyUI {checkout.version}")
        argument = json.dumps({**setting, "part": part})
        yield part, server.run_script(checkout, base, INSIDE, argument, timeout_s=LIMIT_S)


def latents_of(args: argparse.Namespace) -> list[int]:
    return list(latent_shape(args.frames, args.height_px, args.width_px))[-3:]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A node of an API workflow; "@name:1" is the second output of `name`."""
    links = {}
    for key, value in inputs.items():
        if isinstance(value, str) and value.startswith("@"):
            name, _, output = value[1:].partition(":")
            links[key] = [name, int(output or 0)]
    return {"class_type": class_type, "inputs": {**inputs, **links}}


def workflow(seed: int) -> dict[str, Any]:
    """Video to video with a style picture, on the tests' small models."""
    conditioned = {"model": "@control:0", "styled": "@control:1"}
    conditioned |= {"positive": "@control:2", "negative": "@control:3"}
    graph = {
        "model": node("UNETLoader"),
        "clip": node("CLIPLoader"),
        "vae": node("VAELoader"),
        "clip vision": node("CLIPVisionLoader"),
        "prompt": node("CLIPTextEncode", clip="@clip", text="a cat in the rain"),
        "negative prompt": node("CLIPTextEncode", clip="@clip", text="blurry"),
        "style picture": node("LoadImage", image=PICTURE),
        "video": node("RepeatImageBatch", image="@style picture", amount=5),
        "load adapter": node("StyleMasterAdapterLoader", adapter_name=ADAPTER),
        "style encoder": node(
            "StyleMasterStyleEncoder",
            clip_vision="@clip vision",
            image="@style picture",
            shuffle_seed=0,
            crop="center",
        ),
        "texture selector": node(
            "StyleMasterTextureSelector",
            adapter="@load adapter",
            features="@style encoder",
            prompt="@prompt",
            mode="release",
            drop_rate=0.95,
            keep=0,
            selection_seed=0,
            several="mean",
        ),
        "apply style": node(
            "StyleMasterApplyStyle",
            model="@model",
            adapter="@load adapter",
            style="@texture selector",
            positive="@prompt",
            negative="@negative prompt",
            strength=1.0,
            start=0.0,
            end=1.0,
            blocks="all",
            block_weights="",
            first_frame=0,
            last_frame=-1,
        ),
        "latent": node("StyleMasterLatent", num_frames=5, width=64, height=64, frames="@video"),
        "control": node(
            "StyleMasterGrayTileControl",
            model="@apply style:0",
            control_net_name=TILE,
            vae="@vae",
            frames="@video",
            styled="@apply style:1",
            positive="@apply style:2",
            negative="@apply style:3",
            latent="@latent",
            factor=8,
            strength=1.0,
            start=0.0,
            end=0.7,
        ),
        "sampler": node(
            "StyleMasterSampler",
            **conditioned,
            latent="@latent",
            seed=seed,
            steps=SERVER_STEPS,
            text_cfg=8.0,
            style_cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            shift=5.0,
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples="@sampler", vae="@vae"),
        "crop": node("StyleMasterCrop", frames="@decode", latent="@sampler"),
        "preview": node("PreviewImage", images="@crop"),
    }
    return small_models.with_stub_loaders(graph)


def write_server_models(models: Path) -> None:
    """The tests' small models, and what our nodes of the workflow load."""
    small_models.write_small_models(models)
    small_models.save(small_models.adapter_weights(), models / "stylemaster" / ADAPTER)
    small_models.save(small_models.controlnet_weights(), models / "controlnet" / TILE)


def measure_server(comfy: server.ComfyServer) -> dict[str, Any]:
    """What a real server says: import time, nodes of a rerun, steps after an interrupt."""
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(comfy.input_dir / PICTURE)
    say("server: running a workflow, and again with another seed")
    first, again = (_run(comfy, seed) for seed in (1, 2))
    say("server: interrupting a workflow")
    progress: list[int] = []

    def interrupt_once(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data.get("node") == "sampler":
            progress.append(data["value"])
            if data["value"] == INTERRUPTED_AFTER:
                comfy.interrupt()

    stopped = comfy.run_prompt(workflow(3), on_event=interrupt_once)
    if stopped.status != "interrupted":
        raise server.ComfyUIError(f"the interrupt led to {stopped.status}: {stopped.error}")
    return {
        "pack_import_seconds": comfy.pack_imports()[server.PACK_NAME].seconds,
        "first_run_nodes": first.node_seconds,
        "rerun_nodes": again.node_seconds,
        "cached_nodes": sorted(set(first.node_seconds) - set(again.node_seconds)),
        "interrupt": {
            "steps_asked_for": SERVER_STEPS,
            "steps_done_at_request": INTERRUPTED_AFTER,
            "steps_done_at_end": max(progress),
        },
    }


def _run(comfy: server.ComfyServer, seed: int) -> server.Result:
    result = comfy.run_prompt(workflow(seed))
    if result.status != "success":
        raise server.ComfyUIError(f"the workflow ended with {result.status}: {result.error}")
    return result


def rows_of(report: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The table: name, value, what it means."""
    if "speed" in report:
        yield from _speed_rows(report["speed"])
    if "costs" in report:
        yield from _cost_rows(report["costs"])
    if "memory" in report:
        yield from _memory_rows(report["memory"])
    if "server" in report:
        yield from _server_rows(report["server"])


def _speed_rows(speed: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    native, ours = speed["native"], speed["ours"]
    pairs = (
        ("native step", native, "DualCFGGuider, three plain prompts"),
        ("our step", ours, "Style Guider with the style branch"),
    )
    for name, found, meaning in pairs:
        value = f"{found['seconds_per_step']:.3f} s"
        yield name, value, f"{meaning}; median of {len(found['seconds'])} steps"
        yield "  CPU time", f"{found['cpu_seconds_per_step']:.3f} s", "without waiting for a core"
        yield "  work", f"{found['tflop_per_step']:.6f} TFLOP", "counted, exact"
        rows = ", ".join(map(str, found["rows_per_model_call"]))
        yield "  batch", rows, "branches in each call of the model in a step"
    for name, key, meaning in (
        (
            "ratio of seconds",
            "seconds",
            f"ours / native, goal {GOAL}; telling only on an idle machine",
        ),
        ("ratio of CPU time", "cpu_seconds", "the same"),
    ):
        spread = speed[f"{key}_ratio_by_round"]
        noise = f"single rounds {min(spread):.3f} to {max(spread):.3f}"
        yield name, f"{speed[f'{key}_ratio']:.4f}", f"{meaning}; {noise}"
    yield "ratio of FLOP", f"{speed['flop_ratio']:.6f}", "the same, without noise"
    alone = f"+{speed['style_alone_share']:.2%}"
    yield "style branch alone", alone, "its CPU time, run by itself / a native step's"


def _cost_rows(costs: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    apply, control, interrupt = (costs[x] for x in ("apply_style", "control", "interrupt"))
    blocks = apply["real_blocks"]
    yield "Apply Style", f"{apply['seconds']:.4f} s", "the node, once for each execution"
    yield "  K and V", f"{apply['real_seconds']:.3f} s", f"its main part for {blocks} blocks"
    real, all_blocks = apply["real_kept_bytes"], apply["real_projection_bytes"]
    yield "  kept", f"{apply['kept_bytes'] / 1e6:.3f} MB", "K, V and tokens, in the conditionings"
    yield "  kept, all blocks", f"{real / 1e6:.2f} MB", f"the same for {blocks} blocks"
    freed = "freed" if apply["projections_freed"] else "STILL HELD"
    held = f"by MODEL and prompts, of {all_blocks / 1e6:.0f} MB for {blocks} blocks"
    yield "  adapter's K, V weights", freed, held
    ms = apply["real_rows_seconds_per_step"] * 1e3
    yield "  K, V per step", f"{ms:.2f} ms", f"making {blocks} blocks' rows of three branches"
    value = f"{control['network_calls']} in {control['steps']}"
    rows = ", ".join(map(str, control["rows_per_network_call"]))
    yield "ControlNet calls", value, f"calls in steps; once a step expected; batch {rows}"
    share = f"{control['blocks']} control blocks"
    yield "  step", f"{control['seconds_per_step']:.3f} s", f"with style and control, {share}"
    yield (
        "interrupt",
        f"{interrupt['steps']:.2f} steps",
        "from the request at a step's begin to its end",
    )
    begun = str(interrupt["steps_begun_after_request"])
    yield "  begun afterwards", begun, "steps; 0 means within one step"


def _memory_rows(memory: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, found in memory.items():
        gib = (found["before_bytes"] / 2**30, found["peak_bytes"] / 2**30)
        yield f"memory, {name}", f"{gib[0]:.3f} GiB", "resident before the sampling"
        yield "  peak", f"{gib[1]:.3f} GiB", f"highest of {found['peak_of']}, process of its own"


def _server_rows(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    rerun = ", ".join(found["rerun_nodes"])
    yield "pack import", f"{found['pack_import_seconds']:.1f} s", "ComfyUI's log; goal below 0.5"
    first, again = (sum(found[key].values()) for key in ("first_run_nodes", "rerun_nodes"))
    yield "first run", f"{first:.2f} s", f"{len(found['first_run_nodes'])} nodes, small models"
    yield "only seed changed", f"{again:.2f} s", f"ran again: {rerun}"
    stop = found["interrupt"]
    more = stop["steps_done_at_end"] - stop["steps_done_at_request"]
    meaning = f"finished after the request, of {stop['steps_asked_for']} (the request's way in it)"
    yield "interrupt on the server", f"{more} steps", meaning


def print_report(report: dict[str, Any]) -> None:
    machine, setting = report["machine"], report["setting"]
    print(
        f"\n{machine['name']}, {machine['threads']} threads, load {machine['load_average']:.1f} at "
        f"the start; ComfyUI {report['comfyui']}, torch {report['torch']}"
    )
    print(
        f"Width {setting['width']}, {setting['blocks']} blocks, {setting['frames']} frames of "
        f"{setting['size'][0]} x {setting['size'][1]} ({setting['tokens']} tokens), random weights"
    )
    for name, value, meaning in rows_of(report):
        print(f"{name:26} {value:>18}  {meaning}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.comfy", description=__doc__)
    parser.add_argument("--comfyui", metavar="PATH", help="default: as the tests find it")
    parser.add_argument("--width", type=int, default=1536, choices=sorted(FFN_WIDTHS))
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--size", metavar="WxH", default="320x192")
    parser.add_argument("--steps", type=int, default=2, help="of each run")
    parser.add_argument("--repeat", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all (%(default)s)")
    parser.add_argument("--server-device", choices=("cpu", "gpu"), default="cpu")
    add_output(parser)
    return parser.parse_args(argv)


def check_options(args: argparse.Namespace) -> server.Checkout:
    """Find out before the long work what cannot end well.

    Raises:
        ConfigError, LayoutError: for such an option.
    """
    sides = args.size.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError(f"the size {args.size!r} is unknown; write WxH, such as 320x192")
    args.width_px, args.height_px = map(int, sides)
    if any(side < SIZE_MULTIPLE or side % SIZE_MULTIPLE for side in map(int, sides)):
        raise ConfigError(f"{args.size}: both sides must be multiples of {SIZE_MULTIPLE}")
    latents_of(args)
    if min(args.blocks, args.steps, args.repeat) < 1:
        raise ConfigError("--blocks, --steps and --repeat must be at least 1")
    args.parts = list(dict.fromkeys(part.strip() for part in args.parts.split(",")))
    if not set(args.parts) <= set(PARTS):
        raise ConfigError(f"the parts {args.parts}: choose from {', '.join(PARTS)}")
    check_output(args)
    return find_comfyui(args.comfyui)


def find_comfyui(path: str | None) -> server.Checkout:
    """The ComfyUI at a path, or as the tests find it.

    Raises:
        ConfigError: if there is none.
    """
    if path:
        os.environ["COMFYUI_PATHS"] = path
    try:
        found = server.find_comfyui()
    except server.ComfyUIError as error:
        raise ConfigError(str(error)) from error
    if not found:
        raise ConfigError("no ComfyUI found; pass --comfyui the folder that contains custom_nodes")
    return found[0]


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for.

    Raises:
        StyleMasterError: for options that cannot work.
        ComfyUIError: if ComfyUI does not start, or a part fails inside it.
    """
    checkout = check_options(args)
    machine = machine_facts(torch.device("cpu"))
    frames, height, width = latents_of(args)
    report: dict[str, Any] = {
        "format": "stylemaster-bench-comfy-1",
        "date": datetime.date.today().isoformat(),
        "machine": {key: machine[key] for key in ("name", "system", "load_average", "threads")},
        "comfyui": checkout.version,
        "torch": None,
        "setting": {
            "width": args.width,
            "blocks": args.blocks,
            "frames": args.frames,
            "size": [args.width_px, args.height_px],
            "tokens": frames * (height // 2) * (width // 2),
            "steps": args.steps,
            "repeat": args.repeat,
            "text_cfg": 8.0,
            "style_cfg": 3.0,
            "attention": "scaled_dot_product_attention",
        },
        "goal_seconds_ratio": GOAL,
    }
    inside = [part for part in ("speed", "costs") if part in args.parts]
    if "memory" in args.parts:
        inside += ["native memory", "ours memory"]
    with tempfile.TemporaryDirectory(prefix="bench_comfy_") as folder:
        base = Path(folder)
        (base / "models").mkdir()
        if inside:
            say("drawing random weights")
            for part, result in measure_inside(checkout, base, inside, args):
                report["torch"] = result.pop("torch")
                report["machine"]["threads"] = result.pop("threads")
                which, _, what = part.rpartition(" ")
                (report.setdefault(what, {}) if which else report)[which or what] = result
        if "server" in args.parts:
            models = base / "small_models"
            write_server_models(models)
            say(f"server: starting ComfyUI {checkout.version}")
            on_cpu = args.server_device == "cpu"
            with server.ComfyServer(checkout, base / "server", models, on_cpu=on_cpu) as comfy:
                report["server"] = measure_server(comfy)
    return report


def main(argv: list[str] | None = None) -> int:
    return run_benchmark("bench.comfy", benchmark, print_report, parse_arguments(argv), ERRORS)


if __name__ == "__main__":
    sys.exit(main())
