"""A small random SDXL with a StyleCrafter adapter in the release's format, for trials and tests."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..weights.shapes import (
    StyleCrafterSdxlSizes,
    StyleCrafterSizes,
    expected_stylecrafter_sdxl_shapes,
)
from .sdxl_file import END, write_tokenizer
from .small import (
    CLIP_WIDTH,
    draw_weights,
    refuse_existing,
    write_checkpoint,
    write_small_image_encoder,
)

WIDTH = 32  # of every block of the UNet, and of each text encoder
TEXT_WIDTH = 2 * WIDTH
POOLED_WIDTH = 16
TIME_WIDTH = 8
NUM_LAYERS = 11  # cross-attentions: 3 in the down blocks, 6 in the up blocks, 2 in the middle
UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [WIDTH] * 3,
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_WIDTH,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [4, 4, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_WIDTH,
    "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * TIME_WIDTH,
}

VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8] * 4,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}


class SmallSdxl(NamedTuple):
    """Where the small models are."""

    sdxl: Path  # folder of a diffusers pipeline
    adapter: Path  # in the format of stylecrafter_sdxl.ckpt
    image_encoder: Path  # a folder


def small_adapter_sizes() -> StyleCrafterSdxlSizes:
    """Sizes of the adapter for the small UNet."""
    encoder = StyleCrafterSizes(
        feature_width=CLIP_WIDTH,
        style_width=TEXT_WIDTH,
        text_width=TEXT_WIDTH,
        num_layers=2,
        num_scales=NUM_LAYERS,
        scale_width=64,
        scale_num_layers=1,
    )
    return StyleCrafterSdxlSizes(encoder, (WIDTH,) * NUM_LAYERS)


def write_small_sdxl(folder: str | Path, *, seed: int = 0, overwrite: bool = False) -> SmallSdxl:
    """Write a small random SDXL, a StyleCrafter adapter and an image encoder that fit each other.

    Args:
        folder: made if missing.
        seed: of the weights; equal seeds give equal weights.
        overwrite: replace existing files.

    Returns:
        The paths written, about 5 MB in all.

    Raises:
        WeightsError: if one of the files exists and `overwrite` is False.
    """
    folder = Path(folder)
    models = SmallSdxl(
        folder / "sdxl_small",
        folder / "stylecrafter_sdxl_small.ckpt",
        folder / "image_encoder_small",
    )
    refuse_existing(models, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    _pipeline(folder, seed).save_pretrained(str(models.sdxl))
    adapter = expected_stylecrafter_sdxl_shapes(small_adapter_sizes())
    write_checkpoint(models.adapter, draw_weights(adapter, seed + 1))
    write_small_image_encoder(models.image_encoder, seed + 2)
    return models


def _pipeline(folder: Path, seed: int) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
        StableDiffusionXLPipeline,
    )
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    with tempfile.TemporaryDirectory() as tokens:
        # Single bytes, and bytes that end a word. By files, as the arguments of its constructor
        # changed with transformers 5.
        count = write_tokenizer(Path(tokens) / "tokenizer", END, merges=[])
        tokenizer: Any = CLIPTokenizer.from_pretrained(str(Path(tokens) / "tokenizer"))
    text = CLIPTextConfig(
        vocab_size=count,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=POOLED_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=count - 2,
        eos_token_id=count - 1,
    )
    scheduler: Any = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return StableDiffusionXLPipeline(
        vae=_drawn(AutoencoderKL(**VAE), seed + 3),
        text_encoder=_drawn(CLIPTextModel(text), seed + 4),
        text_encoder_2=_drawn(CLIPTextModelWithProjection(text), seed + 5),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_drawn(UNet2DConditionModel(**UNET), seed + 6),
        scheduler=scheduler,
        add_watermarker=False,
    )


def _drawn(module: Any, seed: int) -> Any:
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    weights = draw_weights(shapes, seed)
    module.load_state_dict({key: value.to(torch.float32) for key, value in weights.items()})
    assert isinstance(module, nn.Module)
    return module.eval()
