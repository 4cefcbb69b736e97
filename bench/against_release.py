"""Ours beside the released model code: `python -m bench.against_release PATH`.

PATH is a checkout of StyleMaster's release; its Wan transformer and its control network run on the
same random weights. FLOP and memory are counted at real size, on tensors without content: exact,
however busy the machine is. Seconds are those of a processor, both sides by turns, at a small size.
`--write` puts the table into docs/speed.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stylemaster_core.errors import ConfigError
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.gray_tile_controlnet import load_gray_tile_controlnet
from stylemaster_core.models.small import draw_weights
from stylemaster_core.models.wan_transformer import load_transformer
from stylemaster_core.sampling.guidance import GuidanceWeights, combine_guidance
from stylemaster_core.weights.shapes import (
    AdapterSizes,
    ControlNetSizes,
    WanSizes,
    expected_adapter_shapes,
    expected_base_shapes,
    expected_controlnet_shapes,
)
from stylemaster_core.writing import write_text

from .live_memory import LiveMemory
from .runner import Report, add_output, check_output, machine_facts, run_benchmark

DOCS = Path(__file__).parents[1] / "docs" / "speed.md"
BEGIN, END = "<!-- against the release -->", "<!-- end -->"
WIDTH, HEADS, FFN_WIDTH, TEXT_WIDTH, FREQ_WIDTH = 1536, 12, 8960, 4096, 256
STYLE_TOKENS, TEXT_ROWS = 16, 512
PROMPT_ROWS, NEGATIVE_ROWS = 65, 127  # of the prompts, and one that stands for the padding
REAL_LATENTS, REAL_BLOCKS = (21, 60, 104), 30
REAL_NAME = "81 frames of 832 x 480, 30 blocks, bfloat16"


class Case(NamedTuple):
    """A guided step."""

    name: str
    text_scale: float
    style_scale: float
    controlled: bool


CASES = (
    Case("text to video", 8.0, 4.0, False),
    Case("video to video", 8.0, 3.0, True),
    Case("text scale = style scale", 4.0, 4.0, False),
    Case("the same with control", 4.0, 4.0, True),
)


class Inputs(NamedTuple):
    """Of both sides."""

    latents: Tensor  # [1, 16, t, h, w]
    gray: Tensor
    timestep: Tensor  # [1]
    text: Tensor  # [1, 512, Dt], equal rows from PROMPT_ROWS - 1 on
    negative: Tensor
    style: Tensor  # [1, S, Ds]


def read_release(path: Path) -> ModuleType:
    """The release's module of the transformer, without the rest of its package.

    Raises:
        ConfigError: if the path holds none.
    """
    inner = Path("diffsynth", "models", "wan_video_dit.py")
    file = next((p for p in (path / "stylemaster-wan" / inner, path / inner) if p.is_file()), None)
    if file is None:
        raise ConfigError(
            f"{path} holds no stylemaster-wan/{inner.as_posix()}; give the folder of a checkout of "
            "StyleMaster's released code"
        )
    names = "release_models", "release_models.utils", "release_models.wan_video_dit"
    package, utils = ModuleType(names[0]), ModuleType(names[1])
    package.__path__ = []  # type: ignore[attr-defined]
    utils.hash_state_dict_keys = lambda *_: ""  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location(names[2], file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, dict(zip(names, (package, utils, module), strict=True))):
        spec.loader.exec_module(module)
    return module


def create_both(release: ModuleType, blocks: int, draw: Callable[[Any], Any]) -> tuple[Any, Any]:
    """(transformer, control network) of the release and of ours, with the same weights."""
    sizes: dict[str, Any] = {"width": WIDTH, "num_blocks": blocks}
    base = draw(expected_base_shapes(WanSizes(ffn_width=FFN_WIDTH, **sizes)))
    adapter = draw(expected_adapter_shapes(AdapterSizes(patch_width=80, global_width=48, **sizes)))
    style = {key: value for key, value in adapter.items() if "_img." in key}
    half: dict[str, Any] = {"width": WIDTH, "num_blocks": (blocks + 1) // 2}
    control = draw(expected_controlnet_shapes(ControlNetSizes(ffn_width=FFN_WIDTH, **half)))
    arguments: dict[str, Any] = {
        "dim": WIDTH,
        "in_dim": 16,
        "ffn_dim": FFN_WIDTH,
        "text_dim": TEXT_WIDTH,
        "freq_dim": FREQ_WIDTH,
        "eps": 1e-6,
        "patch_size": (1, 2, 2),
        "num_heads": HEADS,
        "num_layers": blocks,
        "has_image_input": False,
    }
    style_width = style["blocks.0.cross_attn.k_img.weight"].shape[1]
    # Not on "meta": the release keeps its rotary table as a plain attribute.
    net = release.WanModel(out_dim=16, **arguments)
    for block in net.blocks:
        block.cross_attn.k_img = torch.nn.Linear(style_width, WIDTH)
        block.cross_attn.v_img = torch.nn.Linear(style_width, WIDTH)
        block.cross_attn.norm_k_img = release.RMSNorm(WIDTH)
    tile = release.WanControlNet(**arguments)
    net.load_state_dict(base | style, assign=True)
    tile.load_state_dict(control, assign=True)
    device = control["patch_embedding.weight"].device  # "meta" for tensors without content
    ours = load_transformer(base | style), load_gray_tile_controlnet(control)
    torch.nn.Module.to(ours[0], device)
    theirs = tuple(module.requires_grad_(False).eval() for module in (net, tile))
    return theirs, ours


def release_step(models: Any, x: Inputs, case: Case) -> Tensor:
    """A step as the release's pipeline has it: three passes, and the control network once."""
    net, control = models
    states = control(x=x.gray, timestep=x.timestep, context=x.text) if case.controlled else None
    zero = torch.zeros_like(x.style)
    styled = net(x.latents, x.timestep, x.style, x.text, control_state=states)
    negative = net(x.latents, x.timestep, zero, x.negative, control_state=states)
    text = net(x.latents, x.timestep, zero, x.text, control_state=states)
    scales = {"text_scale": case.text_scale, "style_scale": case.style_scale}
    return combine_guidance(negative, text, styled, **scales)


def our_step(models: Any, x: Inputs, case: Case, *, batched: bool = False) -> Callable[[], Tensor]:
    """A step of the sampling loop, after what is made once per generation."""
    net, control = models
    regions = [_Region(x.style)]
    rows = [PROMPT_ROWS, NEGATIVE_ROWS] if not batched else [NEGATIVE_ROWS, NEGATIVE_ROWS]
    text, negative = (
        net.embed_text(words[:, :count], 1, TEXT_ROWS - count + 1)
        for words, count in zip((x.text, x.negative), rows, strict=True)
    )
    style = net.prepare_style(regions, net.style_keys_values(regions), (), True)
    weights = GuidanceWeights.of(case.text_scale, case.style_scale)
    wanted = [(weights.negative, negative, False), (weights.text, text, False)]
    wanted = [row for row in (*wanted, (weights.styled, text, True)) if row[0]]
    branches = [net.prepare_branch(kv, style, styled=styled) for _, kv, styled in wanted]
    groups = net.group_branches(branches, batched=batched)
    prompt = None
    if case.controlled:
        padding = TEXT_ROWS - PROMPT_ROWS + 1
        prompt = control.prepare_text(x.text[:, :PROMPT_ROWS], padding=padding)

    def run() -> Tensor:
        states = None if prompt is None else control(x.gray, x.timestep, prompt)
        velocities = net.velocities(x.latents, x.timestep, groups, control=states)
        return sum(
            (v * weight for v, (weight, *_) in zip(velocities, wanted, strict=True)),
            torch.zeros_like(x.latents),
        )

    return run


class _Region(StyleRegion):
    """Tensors without content cannot be looked at."""

    def __post_init__(self) -> None:
        pass


def draw_inputs(latents: tuple[int, int, int], dtype: torch.dtype, device: str) -> Inputs:
    def draw(*shape: int) -> Tensor:
        return (
            torch.randn(*shape).to(dtype)
            if device == "cpu"
            else torch.empty(shape, dtype=dtype, device=device)
        )

    texts = draw(2, 1, TEXT_ROWS, TEXT_WIDTH)
    if device == "cpu":
        texts[0, :, PROMPT_ROWS - 1 :] = 0
        texts[1, :, NEGATIVE_ROWS - 1 :] = 0
    timestep = torch.full((1,), 700.0, dtype=dtype, device=device)
    moving = draw(2, 1, 16, *latents)
    style = draw(1, STYLE_TOKENS, TEXT_WIDTH)
    return Inputs(moving[0], moving[1], timestep, texts[0], texts[1], style)


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Attention that keeps no scores, as a fused kernel; without content there is nothing else."""
    name = "torch.nn.functional.scaled_dot_product_attention"
    with mock.patch(name, lambda query, *_, **__: torch.empty_like(query)):
        yield


def count(release: ModuleType) -> Report:
    """FLOP and bytes of a step at real size: both grow evenly with the blocks, from 2 on."""
    x = draw_inputs(REAL_LATENTS, torch.bfloat16, "meta")

    def draw(shapes: Any) -> dict[str, Tensor]:
        return {k: torch.empty(v, dtype=torch.bfloat16, device="meta") for k, v in shapes.items()}

    found: list[dict[str, tuple[int, ...]]] = []
    for blocks in (2, 4):  # every second one has a control block
        create = partial(create_both, release, blocks, draw)
        found.append({case.name: _count_case(create, x, case) for case in CASES})
    ratios, memory = {}, {}
    for name, two in found[0].items():
        more = (REAL_BLOCKS - 2) // 2
        flop, our_flop, peak, *ours = (
            a + more * (b - a) for a, b in zip(two, found[1][name], strict=True)
        )
        ratios[name] = our_flop / flop
        for words, mine in zip(("", ", in one batch"), ours, strict=True):
            memory[name + words] = {"release": peak, "ours": mine, "ratio": mine / peak}
    return {"flop_ratios": ratios, "memory": memory}


def _count_case(create: Callable[[], tuple[Any, Any]], x: Inputs, case: Case) -> tuple[int, ...]:
    """FLOP of the release and of ours; peaks of the release, of ours, and of ours in one batch.

    Each count has new models, so that what a model keeps for the next steps is in each peak.
    """
    plain = partial(release_step, create()[0], x, case)
    flop = _flop(plain), _flop(our_step(create()[1], x, case))
    with fused_attention():
        mine = (_peak(our_step(create()[1], x, case, batched=batched)) for batched in (False, True))
        return *flop, _peak(plain), *mine


def _flop(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def _peak(run: Callable[[], object]) -> int:
    with LiveMemory() as memory, torch.no_grad():
        run()
    return memory.peak


def measure(release: ModuleType, args: argparse.Namespace) -> Report:
    """Seconds of the processor in a step, and how far the two results are apart."""
    torch.manual_seed(0)
    seeds = iter(range(9))

    def draw(shapes: Any) -> dict[str, Tensor]:
        return {key: value.float() for key, value in draw_weights(shapes, next(seeds)).items()}

    theirs, ours = create_both(release, args.blocks, draw)
    x = draw_inputs(args.latents, torch.float32, "cpu")
    rows = {}
    with torch.no_grad():
        for case in CASES:
            sides = partial(release_step, theirs, x, case), our_step(ours, x, case)
            seconds: tuple[list[float], list[float]] = ([], [])
            results = [run() for run in sides]
            for _ in range(args.repeat):
                for run, taken in zip(sides, seconds, strict=True):
                    before = time.process_time()
                    run()
                    taken.append(time.process_time() - before)
            both = [statistics.median(taken) for taken in seconds]
            difference = float((results[0] - results[1]).norm() / results[0].norm())
            rows[case.name] = {
                "release": both[0],
                "ours": both[1],
                "ratio": both[1] / both[0],
                "difference": difference,
            }
            print(f"{case.name}: {both[0]:.2f} s, ours {both[1]:.2f} s", file=sys.stderr)
    return rows


def table(report: Report) -> str:
    """The report in Markdown."""
    setting, machine = report["setting"], report["machine"]
    t, h, w = setting["latents"]
    lines = [
        "| ours over the release's | FLOP | peak memory | in one batch | CPU seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for case in CASES:
        memory = [report["memory"][case.name + end]["ratio"] for end in ("", ", in one batch")]
        seconds = report["seconds"][case.name]
        lines.append(
            f"| {case.name} | {report['flop_ratios'][case.name]:.4f} | {memory[0]:.2f} | "
            f"{memory[1]:.2f} | {seconds['ratio']:.2f} ({seconds['release']:.1f} s: "
            f"{seconds['ours']:.1f} s) |"
        )
    apart = max(row["difference"] for row in report["seconds"].values())
    lines += [
        "",
        f"FLOP and memory (over the weights, with a fused attention) are counted at {REAL_NAME}. "
        f"CPU seconds were measured on a core of {machine['name']} at latents of {t} x {h} x {w}, "
        f"{setting['blocks']} blocks, float32, {machine['threads']} thread, on a machine with a "
        f"load of {machine['load_average']:.1f}; at few tokens the 512 rows of text, of which ours "
        "merges the padding, weigh more than at real size. The results are at "
        f"most {apart:.1e} apart. {report['date']}, torch {machine['torch']}.",
    ]
    return "\n".join(lines)


def write_docs(path: Path, words: str, begin: str = BEGIN, end: str = END) -> None:
    """Put the table between its marks.

    Raises:
        ConfigError: if the marks are missing.
    """
    text = path.read_text()
    if not (0 <= text.find(begin) < text.find(end)):
        raise ConfigError(f"{path} lacks the lines {begin} and {end}, between which the table goes")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    write_text(path, f"{before}{begin}\n{words}\n{end}{after}", overwrite=True)


def benchmark(args: argparse.Namespace) -> Report:
    """Run it.

    Raises:
        ConfigError: for options that cannot work.
    """
    check_output(args)
    try:
        t, h, w = (int(side) for side in args.latents.lower().split("x"))
    except ValueError:
        raise ConfigError(f"--latents {args.latents}; expected TxHxW, such as 5x30x52") from None
    if min(t, h, w, args.blocks, args.repeat) < 1 or h % 2 or w % 2:
        raise ConfigError("--latents must be positive with even H and W, --blocks and --repeat too")
    args.latents = (t, h, w)
    release = read_release(args.release)
    machine = machine_facts(torch.device("cpu"))
    counted = count(release)
    report = {
        "format": "stylemaster-bench-against-release-1",
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "setting": {"latents": args.latents, "blocks": args.blocks, "repeat": args.repeat},
        **counted,
        "seconds": measure(release, args),
    }
    if args.write:
        write_docs(DOCS, table(report))
    return report


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.against_release", description=__doc__)
    parser.add_argument("release", type=Path, metavar="PATH", help="a checkout of the release")
    parser.add_argument("--latents", default="5x30x52", help="of the seconds; default %(default)s")
    parser.add_argument("--blocks", type=int, default=2, help="of the seconds; default %(default)s")
    parser.add_argument("--repeat", type=int, default=3, help="timed rounds after a first")
    parser.add_argument("--write", action="store_true", help="the table into docs/speed.md")
    add_output(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    def show(report: Report) -> None:
        print(table(report))

    return run_benchmark("bench.against_release", benchmark, show, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
