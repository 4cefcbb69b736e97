"""The parts of a generation at real size: how each is built with random weights, and its FLOP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from stylemaster_core.layouts import latent_shape
from stylemaster_core.models.decoupled_attention import StyleAttention, StyleRegion

WIDTH, FFN_WIDTH, NUM_HEADS = 1536, 8960, 12  # Wan 2.1 T2V 1.3B
TEXT_WIDTH, TEXT_LENGTH, STYLE_TOKENS = 4096, 512, 16
TEXT_LAYERS, IMAGE_LAYERS = 24, 32  # UMT5-XXL, CLIP ViT-H/14

# What can be timed, by name.
Rows = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Setting:
    """What is generated, and how much of each network is there."""

    frames: int = 81
    width: int = 832
    height: int = 480
    blocks: int = 30

    @property
    def latents(self) -> tuple[int, int, int]:
        return latent_shape(self.frames, self.height, self.width)

    @property
    def tokens(self) -> int:
        t, h, w = self.latents
        return t * h * w // 4

    def layers(self, whole: int) -> int:
        """Layers of another network: all of them, or as few as there are blocks."""
        return whole if self.blocks == REFERENCE.blocks else min(self.blocks, whole)


REFERENCE = Setting()
CPU_SETTING = Setting(frames=5, width=416, height=240, blocks=2)
# The release decodes 832 x 480 in 9 overlapping tiles of this size.
RELEASE_TILE, NUM_RELEASE_TILES = dataclasses.replace(REFERENCE, width=416, height=240), 9


class UncheckedRegion(StyleRegion):
    """A style that is not searched for NaN: a meta tensor cannot be looked at."""

    def __post_init__(self) -> None:
        pass


# Builders of rows are called inside `building`, which sets device and dtype of what they draw.


def _create_transformer(setting: Setting, compiled: bool) -> Any:
    from stylemaster_core.models.wan_transformer import StyledWanTransformer

    net = StyledWanTransformer(num_layers=setting.blocks)
    net.style_attention = StyleAttention(setting.blocks, TEXT_WIDTH, WIDTH)
    net.requires_grad_(False).eval()
    if compiled:
        net.compile_repeated_blocks(fullgraph=True)
    return net


def _inputs(setting: Setting) -> tuple[Any, ...]:
    latents = torch.randn(1, 16, *setting.latents)
    timestep = torch.full((1,), 500.0, dtype=torch.float32)
    return latents, timestep, torch.randn(1, TEXT_LENGTH, TEXT_WIDTH)


def transformer_rows(setting: Setting, compiled: bool) -> Rows:
    net = _create_transformer(setting, compiled)
    latents, timestep, text = _inputs(setting)
    regions = [UncheckedRegion(torch.randn(1, STYLE_TOKENS, TEXT_WIDTH))]
    return {
        "plain pass": lambda: net(latents, timestep, text, style=regions),
        "text K, V": lambda: net.embed_text(text, 1),
        "style K, V": lambda: net.style_keys_values(regions),
    }


def step_rows(setting: Setting, compiled: bool) -> Rows:
    net = _create_transformer(setting, compiled)
    latents, timestep, text = _inputs(setting)
    regions = [UncheckedRegion(torch.randn(1, STYLE_TOKENS, TEXT_WIDTH))]
    with torch.no_grad():
        negative, positive = net.embed_text(text, 1), net.embed_text(text, 1)
        style = net.prepare_style(regions, net.style_keys_values(regions), (), True)
        wanted = [(negative, False), (positive, False), (positive, True)]
        three = [net.prepare_branch(kv, style, styled=styled) for kv, styled in wanted]
    two = [three[0], three[2]]  # equal scales: the middle branch has coefficient 0
    return {
        "three branches, batched": lambda: net.velocities(latents, timestep, three),
        "three branches, one by one": lambda: net.velocities(
            latents, timestep, three, batched=False
        ),
        "equal scales, batched": lambda: net.velocities(latents, timestep, two),
    }


def controlnet_rows(setting: Setting, compiled: bool) -> Rows:
    from stylemaster_core.models.gray_tile_controlnet import DiffusersHost, GrayTileControlNet

    control = GrayTileControlNet(
        DiffusersHost(),
        width=WIDTH,
        ffn_width=FFN_WIDTH,
        num_heads=NUM_HEADS,
        num_blocks=-(-setting.blocks // 2),
    )
    control.requires_grad_(False).eval()
    if compiled:
        for block in control.control_blocks:
            block.compile(fullgraph=True)
    latents, timestep, text = _inputs(setting)
    with torch.no_grad():
        prepared = control.prepare_text(text)
    return {"one evaluation": lambda: control(latents, timestep, prepared)}


def vae_rows(setting: Setting, compiled: bool) -> Rows:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    vae: Any = AutoencoderKLWan().requires_grad_(False).eval()
    video = torch.rand(1, 3, setting.frames, setting.height, setting.width) * 2 - 1
    latents = torch.randn(1, 16, *setting.latents)

    def encode(tiled: bool) -> object:
        vae.enable_tiling() if tiled else vae.disable_tiling()
        return vae.encode(video).latent_dist.mode()

    def decode(tiled: bool) -> object:
        vae.enable_tiling() if tiled else vae.disable_tiling()
        return vae.decode(latents).sample

    return {
        "encode": lambda: encode(False),
        "encode, tiled": lambda: encode(True),
        "decode": lambda: decode(False),
        "decode, tiled": lambda: decode(True),
    }


def text_rows(setting: Setting, compiled: bool) -> Rows:
    from transformers import UMT5Config, UMT5EncoderModel

    layers = setting.layers(TEXT_LAYERS)
    model = UMT5EncoderModel(
        UMT5Config(
            # Look-ups cost memory, but no FLOP.
            vocab_size=256384 if layers == TEXT_LAYERS else 1024,
            d_model=TEXT_WIDTH,
            d_kv=64,
            d_ff=10240,
            num_layers=layers,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    model.requires_grad_(False).eval()
    ids = torch.ones(1, TEXT_LENGTH, dtype=torch.long)
    return {f"UMT5, {TEXT_LENGTH} tokens": lambda: model(input_ids=ids)}


def image_rows(setting: Setting, compiled: bool) -> Rows:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1024,
        num_hidden_layers=setting.layers(IMAGE_LAYERS),
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )
    model = CLIPVisionModelWithProjection(config).requires_grad_(False).eval()
    pixels = torch.randn(1, 3, 224, 224)
    return {"CLIP, one image": lambda: model(pixel_values=pixels)}


PARTS: dict[str, Callable[[Setting, bool], Rows]] = {
    "transformer": transformer_rows,
    "step": step_rows,
    "controlnet": controlnet_rows,
    "vae": vae_rows,
    "text": text_rows,
    "image": image_rows,
}


@contextmanager
def building(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """New modules and tensors are drawn on `device`, in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@cache
def meta_rows(part: str, setting: Setting) -> Rows:
    """Rows of a part on the meta device, which has shapes but no memory and computes nothing."""
    with building("meta", torch.bfloat16):
        return PARTS[part](setting, False)


def row_names(part: str, setting: Setting) -> list[str]:
    """Names of a part's rows, which are the same for any number of blocks."""
    return list(meta_rows(part, dataclasses.replace(setting, blocks=1)))


def _num_layers(part: str, setting: Setting) -> int:
    if part == "controlnet":
        return -(-setting.blocks // 2)
    whole = {"text": TEXT_LAYERS, "image": IMAGE_LAYERS}.get(part, setting.blocks)
    return setting.layers(whole)


@cache
def count_flop(part: str, name: str, setting: Setting) -> int:
    """FLOP of one row of a part."""
    if part != "vae" and setting.blocks > 3:
        # Guidance branches share work in block 0 alone; all later blocks cost the same.
        small, larger = (dataclasses.replace(setting, blocks=blocks) for blocks in (1, 3))
        first, flop = (count_flop(part, name, few) for few in (small, larger))
        one, several, layers = (_num_layers(part, each) for each in (small, larger, setting))
        return first + (flop - first) * (layers - one) // (several - one)
    if part == "vae" and setting.frames > 5:
        # After the first frame it works in chunks of 4, and all chunks cost the same.
        first, second = (
            count_flop(part, name, dataclasses.replace(setting, frames=frames)) for frames in (1, 5)
        )
        return first + (setting.latents[0] - 1) * (second - first)
    run = meta_rows(part, setting)[name]  # outside the counter: preparation is not part of a row
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def flop_ratios() -> dict[str, float]:
    """Ratios at the reference; one step of the release is three plain passes."""
    plain = count_flop("transformer", "plain pass", REFERENCE)
    control = count_flop("controlnet", "one evaluation", REFERENCE)
    three = count_flop("step", "three branches, batched", REFERENCE)
    two = count_flop("step", "equal scales, batched", REFERENCE)
    ratios = {
        "step / three plain passes": three / (3 * plain),
        "step, equal scales / three plain passes": two / (3 * plain),
        "ControlNet / plain pass": control / plain,
    }
    for name in ("encode", "decode"):
        tiles = NUM_RELEASE_TILES * count_flop("vae", name, RELEASE_TILE)
        ratios[f"VAE {name} / the release's 9 tiles"] = count_flop("vae", name, REFERENCE) / tiles
    return ratios
