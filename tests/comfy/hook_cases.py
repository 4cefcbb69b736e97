"""Inputs for the hooks' tests, and what the core says to them; the ComfyUI side gets both by file.

Names: `in.*` inputs, `core.*` results of the core, which the script inside ComfyUI must meet.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stylemaster_core import (
    StyleRegion,
    combine_guidance,
    denoise,
    flow_match_sigmas,
    load_gray_tile_controlnet,
    load_transformer,
)
from stylemaster_core.models.decoupled_attention import region_masks
from stylemaster_core.models.gray_tile_controlnet import copy_from_transformer
from stylemaster_core.models.motion_adapter import MotionAdapter, motion_adapter_state_dict
from tests.conftest import Golden

SIGMA = 0.7
SIZE = (3, 8, 10)  # latent frames, height, width
LONG = 5  # latent frames that need context windows
# Windows of length 3 or, looped, 4, with overlap 1: a frame that is only looked at (the anchor of
# ComfyUI 0.21 and newer), and those that are kept.
Window = tuple[list[int], list[int]]
WINDOWS: dict[str, list[Window]] = {
    "static": [([], [0, 1, 2]), ([], [2, 3, 4])],
    "static.anchored": [([], [0, 1, 2]), ([1], [2, 3, 4])],
    "looped": [([], [0, 1, 2, 3]), ([], [3, 4, 0, 1])],
    "looped.anchored": [([], [0, 1, 2, 3]), ([2], [3, 4, 0, 1])],
}
TEXT_SCALES = [6.0, 1.0, 3.0, 3.0, 2.0]
STYLE_SCALES = [4.0, 2.0]  # by halves of the sampling: 3 steps, 2 steps
RANGES = [(0.0, 0.4), (0.6, 1.0)]
MOTION_SCALE = -0.3


def make_inputs(case: Golden) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = case["out.style_feat"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    text = case["in.context_pos"]
    return {
        "in.text": text,
        "in.negative": case["in.context_neg"],
        "in.tokens": tokens,
        "in.other_tokens": draw(*tokens.shape) * tokens.std(),
        "in.latents": draw(1, 16, *SIZE),
        "in.two_latents": draw(2, 16, *SIZE),
        "in.two_tokens": torch.cat([tokens, draw(*tokens.shape) * tokens.std()]),
        "in.long_latents": draw(1, 16, LONG, *SIZE[1:]),
        "in.control": case["in.control_latents"],
        "in.two_control": draw(2, 16, *SIZE),
        "in.long_control": draw(1, 16, LONG, *SIZE[1:]),
        "in.mask": torch.rand(1, 17, 23, generator=generator),  # as a MASK of one picture
        "in.frame_mask": torch.rand(9, 30, 40, generator=generator),
        "in.long_mask": torch.rand(LONG, 4, 5, generator=generator),
        "in.block_scales": torch.tensor([1.0, 0.0, 0.5]),
        "in.sigmas": flow_match_sigmas(5, shift=5.0),
    }


def make_adapters(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A motion adapter, and a LoRA on the queries and outputs that the style shares."""
    generator = torch.Generator().manual_seed(6)
    motion = MotionAdapter(3, 256, rank=4)
    motion.reset_for_training(generator)
    lora = {}
    for name, value in motion.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 0.5, generator=generator)
    for block, projection in itertools.product(range(3), "qo"):
        prefix = f"diffusion_model.blocks.{block}.cross_attn.{projection}.lora_"
        lora[f"{prefix}A.weight"] = torch.randn(4, 256, generator=generator) / 16
        lora[f"{prefix}B.weight"] = torch.randn(256, 4, generator=generator) / 4
    return motion_adapter_state_dict(motion), lora


def fold(weights: dict[str, Tensor], lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with a LoRA at strength 1 added."""
    folded = dict(weights)
    for key, down in lora.items():
        if key.endswith("lora_A.weight"):
            target = key.removeprefix("diffusion_model.").replace("lora_A.", "")
            up = lora[key.replace("lora_A", "lora_B")]
            folded[target] = weights[target] + up @ down
    return folded


def stored_as_fp8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's weights rounded to 8 bits; ComfyUI keeps the patch embedding as it is."""
    return {
        key: value
        if key.startswith("patch_embedding.") or "_img." in key
        else value.to(torch.float8_e4m3fn).float()
        for key, value in weights.items()
    }


class Core:
    """The core's models on golden weights."""

    def __init__(self, golden: Any) -> None:
        self.weights = golden("weights_dit_a").tensors
        self.net = load_transformer(self.weights)
        convs = golden("03_controlnet_a").group("weights.")
        self.control = load_gray_tile_controlnet(copy_from_transformer(self.weights) | convs)

    def velocity(
        self,
        x: dict[str, Tensor],
        regions: Sequence[StyleRegion],
        *,
        latents: str = "in.latents",
        net: Any = None,
        control: Tensor | None = None,
        styled: bool = True,
    ) -> Tensor:
        net = net or self.net
        z, timestep = x[latents], torch.tensor([SIGMA * 1000])
        states = None if control is None else self.control(control, timestep, x["in.text"])
        if styled:
            return net(z, timestep, x["in.text"], style=regions, control=states)
        masks = region_masks(regions, net.token_grid(z))
        style = net.prepare_style(regions, net.style_keys_values(regions), masks, True)
        branch = net.prepare_branch(net.embed_text(x["in.text"], len(z)), style, styled=False)
        return net.velocities(z, timestep, [branch], control=states)[0]


@torch.no_grad()
def make_results(golden: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Inputs with the core's results, the motion adapter, the LoRA."""
    core = Core(golden)
    x = make_inputs(golden("04_guidance"))
    motion, lora = make_adapters(core.weights)
    a, b = x["in.tokens"], x["in.other_tokens"]
    regions = {
        "mask": [StyleRegion(a, 0.8, mask=x["in.mask"])],
        "frame_mask": [StyleRegion(a, mask=x["in.frame_mask"])],
        "two_masks": [
            StyleRegion(a, 0.7, x["in.block_scales"].tolist(), x["in.mask"]),
            StyleRegion(b, 1.2, mask=x["in.frame_mask"]),
        ],
        "all_and_mask": [StyleRegion(a), StyleRegion(b, mask=x["in.frame_mask"])],
        "block_scales": [StyleRegion(a, 1.5, x["in.block_scales"].tolist())],
    }
    for name, styles in regions.items():
        x[f"core.{name}"] = core.velocity(x, styles)
        x[f"core.{name}.unstyled"] = core.velocity(x, styles, styled=False)
    one = [StyleRegion(a)]
    x["core.two_videos"] = core.velocity(
        x,
        [StyleRegion(x["in.two_tokens"])],
        latents="in.two_latents",
        control=x["in.two_control"],
    )
    x["core.fp8"] = core.velocity(x, one, net=load_transformer(stored_as_fp8(core.weights)))
    x["core.lora"] = core.velocity(x, one, net=load_transformer(fold(core.weights, lora)))
    x["core.motion"] = _with_motion(core, x, one, motion)
    still = x["in.long_mask"][:1].expand(LONG, -1, -1)
    for name, windows in WINDOWS.items():
        x[f"core.windows.{name}"] = _windows(core, x, x["in.long_mask"], windows)
        x[f"core.still_mask_windows.{name}"] = _windows(core, x, still, windows)
    x["core.ranges"] = _sampled(
        core, x, [StyleRegion(t, start=s, end=e) for t, (s, e) in zip((a, b), RANGES, strict=True)]
    )
    x["core.two_videos_sampled"] = _sampled(
        core, x, [StyleRegion(x["in.two_tokens"])], "in.two_latents", x["in.two_control"]
    )
    x["core.schedule"] = _scheduled(core, x)
    return x, motion, lora


def _with_motion(
    core: Core, x: dict[str, Tensor], regions: list[StyleRegion], weights: dict[str, Tensor]
) -> Tensor:
    from stylemaster_core import load_motion_adapter

    adapter = load_motion_adapter(weights)
    adapter.scale = MOTION_SCALE
    with adapter.attach(core.net):
        return core.velocity(x, regions)


def _windows(core: Core, x: dict[str, Tensor], mask: Tensor, windows: Sequence[Window]) -> Tensor:
    """One pass per window, mean where they overlap; mask and control cut by hand."""
    total, count = torch.zeros_like(x["in.long_latents"]), torch.zeros(1, 1, LONG, 1, 1)
    for anchor, kept in windows:
        window = anchor + kept
        part = {**x, "in.latents": x["in.long_latents"][:, :, window]}
        regions = [
            StyleRegion(x["in.tokens"], mask=mask[window]),
            StyleRegion(x["in.other_tokens"], 0.5, mask=x["in.mask"]),
        ]
        control = x["in.long_control"][:, :, window]
        velocity = core.velocity(part, regions, control=control)
        total[:, :, kept] += velocity[:, :, len(anchor) :]
        count[:, :, kept] += 1
    return total / count


def _sampled(
    core: Core,
    x: dict[str, Tensor],
    regions: list[StyleRegion],
    latents: str = "in.latents",
    control: Tensor | None = None,
) -> Tensor:
    return denoise(
        core.net,
        x[latents],
        sigmas=x["in.sigmas"],
        text=x["in.text"],
        negative_text=x["in.negative"],
        style=regions,
        text_scale=5.0,
        style_scale=3.0,
        controlnet=None if control is None else core.control,
        control_latents=control,
        control_range=(0.2, 0.6),
    )


def _scheduled(core: Core, x: dict[str, Tensor]) -> Tensor:
    latents, zero = x["in.latents"], torch.zeros_like(x["in.tokens"])
    sigmas = x["in.sigmas"].tolist()
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        timestep = torch.tensor([sigma * 1000])
        styled = core.net(latents, timestep, x["in.text"], style=x["in.tokens"])
        text_scale, style_scale = TEXT_SCALES[step], STYLE_SCALES[0 if step < 3 else 1]
        velocity = styled
        if text_scale != 1:
            velocity = combine_guidance(
                core.net(latents, timestep, x["in.negative"], style=zero),
                core.net(latents, timestep, x["in.text"], style=zero),
                styled,
                text_scale=text_scale,
                style_scale=style_scale,
            )
        latents = latents + (following - sigma) * velocity
    return latents
