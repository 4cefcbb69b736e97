"""A small random VideoCrafter with StyleCrafter's adapter in the releases' formats, for trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..weights.shapes import (
    Shape,
    StyleCrafterSdxlSizes,
    StyleCrafterSizes,
    expected_stylecrafter_sdxl_shapes,
)
from ..weights.stylecrafter_video_keys import stylecrafter_sdxl_to_video
from ..weights.videocrafter_keys import TEMPORAL_KEY, VideoCrafterSizes
from ..weights.videocrafter_parts import TEXT_PREFIX, VAE_PREFIX
from .sdxl_unet import cross_attentions
from .small import (
    CLIP_WIDTH,
    draw_weights,
    refuse_existing,
    write_checkpoint,
    write_small_image_encoder,
)
from .videocrafter_unet import VideoCrafterUNet

TEXT_WIDTH = 64
TEXT_LAYERS = 3
VOCABULARY = 49408  # CLIP's
SIZES = VideoCrafterSizes(
    channels=(32, 64),
    attention=(True, False),
    layers_per_block=1,
    head_width=8,
    text_width=TEXT_WIDTH,
    init_width=64,
)
VAE_WIDTHS = (32, 32, 32, 32)


class SmallVideoCrafter(NamedTuple):
    """Where the small models are; each has the format of the released file."""

    checkpoint: Path  # as model.ckpt: UNet, VAE and text encoder
    adapter: Path  # as adapter_v1.pth
    temporal: Path  # as temporal_v1_1.pth
    image_encoder: Path  # a folder


def write_small_videocrafter(
    folder: str | Path, *, seed: int = 0, overwrite: bool = False
) -> SmallVideoCrafter:
    """Write a small random VideoCrafter, an adapter and an image encoder that fit each other.

    Args:
        folder: made if missing.
        seed: of the weights; equal seeds give equal weights.
        overwrite: replace existing files.

    Returns:
        The paths written, about 12 MB in all.

    Raises:
        WeightsError: if one of the files exists and `overwrite` is False.
    """
    folder = Path(folder)
    models = SmallVideoCrafter(
        folder / "videocrafter_small.ckpt",
        folder / "stylecrafter_video_small.pth",
        folder / "stylecrafter_temporal_small.pth",
        folder / "image_encoder_small",
    )
    refuse_existing(models, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        unet = VideoCrafterUNet(SIZES)
    names = unet.release_keys
    shapes = {names[key]: tuple(value.shape) for key, value in unet.state_dict().items()}
    parts = (("model.diffusion_model.", shapes), (VAE_PREFIX, _vae()), (TEXT_PREFIX, _text()))
    whole = {prefix + key: shape for prefix, part in parts for key, shape in part.items()}
    write_checkpoint(models.checkpoint, draw_weights(whole, seed))
    temporal = {key: shape for key, shape in shapes.items() if TEMPORAL_KEY.fullmatch(key)}
    write_checkpoint(models.temporal, draw_weights(temporal, seed + 1))
    write_checkpoint(models.adapter, draw_weights(_adapter(unet), seed + 2))
    write_small_image_encoder(models.image_encoder, seed + 3)
    return models


def _adapter(unet: VideoCrafterUNet) -> dict[str, Shape]:
    layers: list[Any] = [unet.get_submodule(name) for name in cross_attentions(unet)]
    widths = tuple(layer.to_q.out_features for layer in layers)
    encoder = StyleCrafterSizes(
        feature_width=CLIP_WIDTH,
        style_width=TEXT_WIDTH,
        text_width=TEXT_WIDTH,
        num_tokens=8,
        num_layers=1,
        num_scales=len(layers),
        scale_width=TEXT_WIDTH,
        scale_num_layers=1,
    )
    shapes = expected_stylecrafter_sdxl_shapes(StyleCrafterSdxlSizes(encoder, widths))
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    released = stylecrafter_sdxl_to_video(tensors, unet.style_layer_names)
    return {key: tuple(value.shape) for key, value in released.items()}


def _vae() -> dict[str, Shape]:
    """Names and shapes of SD's VAE in the original's naming."""
    shapes: dict[str, Shape] = {}

    def conv(name: str, inside: int, outside: int, size: int = 3) -> None:
        shapes.update({f"{name}.weight": (outside, inside, size, size), f"{name}.bias": (outside,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def residual(name: str, width: int) -> None:
        for number in (1, 2):
            norm(f"{name}.norm{number}", width)
            conv(f"{name}.conv{number}", width, width)

    width = VAE_WIDTHS[0]
    for half, inside, outside, way in (("encoder", 3, 8, "down"), ("decoder", 4, 3, "up")):
        conv(f"{half}.conv_in", inside, width)
        for level in range(len(VAE_WIDTHS)):
            for block in range(1 + (half == "decoder")):
                residual(f"{half}.{way}.{level}.block.{block}", width)
            if level != (len(VAE_WIDTHS) - 1 if half == "encoder" else 0):
                conv(f"{half}.{way}.{level}.{way}sample.conv", width, width)
        residual(f"{half}.mid.block_1", width)
        residual(f"{half}.mid.block_2", width)
        norm(f"{half}.mid.attn_1.norm", width)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{half}.mid.attn_1.{name}", width, width, 1)
        norm(f"{half}.norm_out", width)
        conv(f"{half}.conv_out", width, outside)
    conv("quant_conv", 8, 8, 1)
    conv("post_quant_conv", 4, 4, 1)
    return shapes


def _text() -> dict[str, Shape]:
    """Names and shapes of a text tower in open_clip's naming."""
    layer = nn.TransformerEncoderLayer(TEXT_WIDTH, 1, device="meta")  # for its attention's names
    shapes: dict[str, Shape] = {
        "token_embedding.weight": (VOCABULARY, TEXT_WIDTH),
        "positional_embedding": (77, TEXT_WIDTH),
        "text_projection": (TEXT_WIDTH, TEXT_WIDTH),
        "logit_scale": (),
        "ln_final.weight": (TEXT_WIDTH,),
        "ln_final.bias": (TEXT_WIDTH,),
    }
    for number in range(TEXT_LAYERS):
        prefix = f"transformer.resblocks.{number}."
        for key, value in layer.self_attn.state_dict().items():
            shapes[f"{prefix}attn.{key}"] = tuple(value.shape)
        for name in ("ln_1", "ln_2"):
            shapes |= {
                f"{prefix}{name}.weight": (TEXT_WIDTH,),
                f"{prefix}{name}.bias": (TEXT_WIDTH,),
            }
        for name, inside, outside in (("c_fc", 1, 4), ("c_proj", 4, 1)):
            shapes[f"{prefix}mlp.{name}.weight"] = (outside * TEXT_WIDTH, inside * TEXT_WIDTH)
            shapes[f"{prefix}mlp.{name}.bias"] = (outside * TEXT_WIDTH,)
    return shapes
