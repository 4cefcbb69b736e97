"""Whether a device computes what the CPU does, at sizes that take seconds.

Random weights of the released architecture; the reference is float64 on the CPU.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from stylemaster_core.layouts import LATENT_CHANNELS
from stylemaster_core.models.decoupled_attention import StyleAttention
from stylemaster_core.models.gray_tile_controlnet import (
    copy_from_transformer,
    load_gray_tile_controlnet,
)
from stylemaster_core.models.wan_transformer import StyledWanTransformer
from stylemaster_core.pipelines.encode_style import encode_style
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.stylize import StylizeConfig, stylize
from stylemaster_core.pipelines.tiny import tiny_files, tiny_settings
from stylemaster_core.sampling.denoise import denoise
from stylemaster_core.sampling.guidance import combine_guidance
from stylemaster_core.sampling.samplers import SamplerName
from stylemaster_core.sampling.schedules import flow_match_sigmas
from stylemaster_core.training.config import FlowConfig, RunConfig, TrainConfig
from stylemaster_core.training.loop import train
from stylemaster_core.training.samples import MemoryDataset, Sample
from stylemaster_core.training.style_modulation import create_style_trainer
from stylemaster_core.training.synthetic import SyntheticWorld
from stylemaster_core.weights.state_dict import diffusers_to_native

from .generate import dtype_name
from .runner import psnr

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_STEPS = 4
ALLOWED = 1.05  # error of the optimised path over that of three plain passes
SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "ffn_dim": 256,
    "num_layers": 3,
}
TEXT_WIDTH, STYLE_WIDTH = 64, 96
LATENTS = (1, LATENT_CHANNELS, 3, 8, 10)
LEAST_DB = 40.0  # of tiny's video to that of the CPU, both in float32

Checks = list[dict[str, Any]]


def check_device(device: torch.device, *, seeds: int = 4) -> Checks:
    """All checks: what was measured, the bound, and whether it holds.

    Args:
        device: to check.
        seeds: over how many draws of weights and inputs errors are averaged.
    """
    rows: Checks = []
    checks: dict[str, Callable[[torch.device], Checks]] = {
        "guided steps": partial(_guided_steps, seeds=seeds),
        "samplers": _samplers,
        "branches": _branches,
        "stylemaster-tiny": _tiny,
        "training": _resumed_training,
    }
    for name, check in checks.items():
        try:
            rows += check(device)
        except (RuntimeError, NotImplementedError) as error:
            words = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            rows.append(_row(name, math.nan, math.nan, False, words))
    return rows


def _row(name: str, value: float, bound: float, holds: bool, note: str = "") -> dict[str, Any]:
    return {"check": name, "value": value, "bound": bound, "holds": holds, "note": note}


def random_models(seed: int) -> tuple[Any, Any]:
    """A transformer with a style branch, and a control network, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    net = StyledWanTransformer(text_dim=TEXT_WIDTH, **SIZES)
    width = SIZES["num_attention_heads"] * SIZES["attention_head_dim"]
    net.style_attention = StyleAttention(SIZES["num_layers"], STYLE_WIDTH, width)
    _fill(net, generator)
    base = {k: v for k, v in net.state_dict().items() if not k.startswith("style_attention.")}
    control = load_gray_tile_controlnet(copy_from_transformer(diffusers_to_native(base)))
    _fill(control, generator)
    return net.double().requires_grad_(False), control.double().requires_grad_(False)


def _fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    for name, value in module.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        if ".norm" in name and name.endswith("weight"):
            drawn = 1 + 0.1 * drawn
        elif value.ndim > 1:
            drawn = drawn / math.sqrt(math.prod(value.shape[1:]))
        else:
            drawn = 0.1 * drawn
        # What float16 and bfloat16 hold exactly, so that only the computing differs.
        value.copy_(drawn.to(torch.bfloat16))


def _conditions(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    shapes = {
        "noise": LATENTS,
        "control": LATENTS,
        "text": (1, 12, TEXT_WIDTH),
        "negative": (1, 12, TEXT_WIDTH),
        "style": (1, 16, STYLE_WIDTH),
    }
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value.to(torch.bfloat16).double() for name, value in drawn.items()}


def _guided(
    models: tuple[Any, Any],
    x: dict[str, Tensor],
    *,
    controlled: bool,
    sampler: Any = "euler",
    batched: bool = False,
) -> Tensor:
    return denoise(
        models[0],
        x["noise"],
        sigmas=flow_match_sigmas(NUM_STEPS, shift=5.0),
        text=x["text"],
        negative_text=x["negative"],
        style=x["style"],
        text_scale=8.0,
        style_scale=3.0,
        sampler=sampler,
        batch_branches=batched,
        **({"controlnet": models[1], "control_latents": x["control"]} if controlled else {}),
    )


@torch.no_grad()
def _plain(models: tuple[Any, Any], x: dict[str, Tensor], *, controlled: bool) -> Tensor:
    """Three plain passes a step, combined by the formula."""
    net, control = models
    latents, zero = x["noise"], torch.zeros_like(x["style"])
    sigmas = flow_match_sigmas(NUM_STEPS, shift=5.0).tolist()
    for sigma, following in itertools.pairwise(sigmas):
        timestep = torch.tensor([sigma * 1000], dtype=torch.float32, device=latents.device)
        states = control(x["control"], timestep, x["text"]) if controlled else None
        negative, text, styled = (
            net(latents, timestep, words, style=style, control=states)
            for words, style in ((x["negative"], zero), (x["text"], zero), (x["text"], x["style"]))
        )
        velocity = combine_guidance(negative, text, styled, text_scale=8.0, style_scale=3.0)
        latents = latents + (following - sigma) * velocity.to(latents.dtype)
    return latents


def _moved(
    models: tuple[Any, Any], x: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Any, Any], dict[str, Tensor]]:
    """Weights and conditions in a dtype; the latents stay float32, as in the pipeline."""
    # The module's own `to`: diffusers' warns that some layers should stay in float32.
    net, control = (torch.nn.Module.to(copy.deepcopy(m), device, dtype) for m in models)
    moved = {
        name: value.to(device, torch.float32 if name in ("noise",) else dtype)
        for name, value in x.items()
    }
    return (net, control), moved


def _error(result: Tensor, reference: Tensor) -> float:
    return float((result.double().cpu() - reference).norm() / reference.norm())


def _guided_steps(device: torch.device, *, seeds: int) -> Checks:
    """Errors of the optimised path beside those of plain passes, both against float64."""
    rows: Checks = []
    for controlled, dtype in itertools.product((False, True), DTYPES):
        errors: list[tuple[float, float]] = []
        for seed in range(seeds):
            models, x = random_models(seed), _conditions(seed)
            reference = _plain(models, x, controlled=controlled)
            there, moved = _moved(models, x, device, dtype)
            ours = _guided(there, moved, controlled=controlled)
            plain = _plain(there, moved, controlled=controlled)
            errors.append((_error(ours, reference), _error(plain, reference)))
        ours_rms, plain_rms = np.sqrt(np.square(errors).mean(0)).tolist()
        name = f"guided steps, {'with' if controlled else 'without'} control, {dtype_name(dtype)}"
        bound = ALLOWED * plain_rms
        rows.append(_row(name, ours_rms, bound, ours_rms <= bound, "relative error"))
    return rows


def _samplers(device: torch.device) -> Checks:
    models, x = random_models(0), _conditions(0)
    there, moved = _moved(models, x, device, torch.float32)
    rows = []
    for sampler in get_args(SamplerName):
        reference = _guided(models, x, controlled=False, sampler=sampler)
        error = _error(_guided(there, moved, controlled=False, sampler=sampler), reference)
        rows.append(_row(f"sampler {sampler}, float32", error, 1e-4, error <= 1e-4))
    return rows


def _branches(device: torch.device) -> Checks:
    """Guidance branches in one batch, or one by one."""
    models, x = random_models(1), _conditions(1)
    there, moved = _moved(models, x, device, torch.float32)
    one_by_one = _guided(there, moved, controlled=True).double().cpu()
    error = _error(_guided(there, moved, controlled=True, batched=True), one_by_one)
    return [_row("batched branches, float32", error, 1e-5, error <= 1e-5)]


def _tiny(device: torch.device) -> Checks:
    """A video of the small model, to that of the CPU."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    frames = np.stack([np.roll(picture, shift, 1) for shift in range(5)])
    results = []
    for place in ("cpu", str(device)):
        models = Models(tiny_files(), device=place, dtype="float32", keep_loaded=True)
        style = encode_style(models, picture[::-1].copy(), "").style
        settings: dict[str, Any] = tiny_settings(frames) | {"num_steps": NUM_STEPS}
        config = StylizeConfig("video-to-video", **settings)
        results.append(stylize(models, style, config, frames=frames).frames)
    decibel = psnr(*results)
    return [
        _row("stylemaster-tiny, float32, dB to the CPU's", decibel, LEAST_DB, decibel >= LEAST_DB)
    ]


def _resumed_training(device: torch.device) -> Checks:
    """Weights after four steps in one go, and after two and two."""
    with tempfile.TemporaryDirectory() as folder:
        whole = _trained(device, Path(folder, "whole"), stop=False)
        parts = _trained(device, Path(folder, "parts"), stop=True)
    error = max(float((whole[key] - parts[key]).abs().max()) for key in whole)
    return [_row("training in two parts", error, 1e-5, error <= 1e-5, "largest difference")]


def _trained(device: torch.device, folder: Path, *, stop: bool) -> dict[str, Tensor]:
    world = SyntheticWorld(size=(1, 4, 4), text_length=6, text_width=TEXT_WIDTH)
    data = world.dataset(8)
    features = {key: tuple(value.shape) for key, value in data[0].items()}
    net = random_models(0)[0].float()
    base = {k: v for k, v in net.state_dict().items() if not k.startswith("style_attention.")}
    run = RunConfig(num_steps=4, batch_size=2, precision="float32", save_every=2, validate_every=0)
    config = TrainConfig("style", run, flow=FlowConfig(text_length=8))
    for samples in (_Stopping(data.samples, folder / "stop"), data) if stop else (data,):
        trainer = create_style_trainer(
            config, base, features, null_text=torch.zeros(1, TEXT_WIDTH), num_heads=2
        )
        result = train(trainer, samples, folder, resume=True, cpu=device.type == "cpu")
    assert result.finished
    return {key: value.detach().cpu() for key, value in trainer.trained().items()}


class _Stopping(MemoryDataset):
    """Samples of which the fourth asks the training to stop."""

    def __init__(self, samples: Any, stop: Path) -> None:
        super().__init__(samples)
        self.stop, self.read = stop, 0

    def __getitem__(self, index: int) -> Sample:
        self.read += 1
        if self.read == 4:
            self.stop.touch()
        return super().__getitem__(index)
