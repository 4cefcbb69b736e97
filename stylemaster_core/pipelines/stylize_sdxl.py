"""StyleCrafter on SDXL: style pictures and a prompt in, a picture out."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.images import CropMode, clip_pixels, stylecrafter_video_pixels
from ..errors import ConfigError, WeightsError
from ..models.decoupled_attention import StyleRegion
from ..models.image_encoder import load_image_encoder
from ..models.style_adapter import StyleCrafterAdapter, create_adapter
from ..models.style_tokens import Style, provenance_of
from ..models.stylecrafter import is_encoder_key
from ..models.stylecrafter_sdxl import LayerKV, StyleCrafterSdxl
from ..reading import reading
from ..sampling.denoise_image import ImageText, denoise_image
from ..seeds import LOWEST_OF_TORCH, check_seed
from ..weights.numbers import check_module, check_weights
from ..weights.state_dict import describe_kind, detect_kind, shapes_of, strip_prefix

NEGATIVE_PROMPT = "monochrome, lowres, bad anatomy, worst quality, low quality"


@dataclass(frozen=True)
class SdxlConfig:
    """Settings of a generation; the defaults are the release's."""

    prompt: str = ""
    negative_prompt: str = NEGATIVE_PROMPT
    size: tuple[int, int] = (1024, 1024)  # (height, width) px, multiples of 8
    seed: int = 0
    num_steps: int = 30
    text_scale: float = 7.5
    style_scale: float = 5.0  # 0: as equal to text_scale


def check_sdxl_config(config: SdxlConfig) -> None:
    """Refuse settings that cannot work; nothing is loaded.

    Raises:
        ConfigError: saying what was expected.
    """
    height, width = config.size
    if height < 64 or width < 64 or height % 8 or width % 8:
        raise ConfigError(f"the size must be multiples of 8, at least 64, got {width}x{height}")
    if config.num_steps < 1:
        raise ConfigError(f"the number of steps must be at least 1, got {config.num_steps}")
    for name in ("text_scale", "style_scale"):
        if not math.isfinite(getattr(config, name)):
            raise ConfigError(
                f"{name.replace('_', ' ')} must be a finite number, got {getattr(config, name)}"
            )
    check_seed(config.seed, lowest=LOWEST_OF_TORCH)


class PreparedStyle(NamedTuple):
    """A style whose projections are no longer needed."""

    region: StyleRegion
    keys_values: list[LayerKV]


def load_adapter(path: Path, *, skip_check: bool = False) -> StyleCrafterSdxl:
    """Read a StyleCrafter adapter for SDXL or VideoCrafter.

    Its encoder is float32, its projections are as stored.

    Args:
        path: of the file.
        skip_check: do not look for NaN and infinity.

    Raises:
        WeightsError: if the file is of another kind, damaged, incomplete or not finite.
    """
    with reading(path, "a StyleCrafter adapter for SDXL"):
        return _load_adapter(path, skip_check)


def _load_adapter(path: Path, skip_check: bool) -> StyleCrafterSdxl:
    from ..weights.files import read_state_dict

    content = read_state_dict(path)
    tensors = strip_prefix(content.tensors)
    kind = detect_kind(shapes_of(tensors))
    if kind not in ("stylecrafter_sdxl", "stylecrafter_video"):
        raise WeightsError(
            f"{path} is {describe_kind(kind)}; expected StyleCrafter's adapter for SDXL "
            "(stylecrafter_sdxl.safetensors) or for VideoCrafter "
            "(stylecrafter_adapter_v1.safetensors), which `stylemaster weights convert` makes"
        )
    if not skip_check:
        check_weights(tensors, path)
    # Projections stay mapped from the file, and are widened one by one when they are used.
    weights = {k: v.float() if is_encoder_key(k) else v for k, v in tensors.items()}
    adapter = create_adapter(path.name, kind, weights, content.metadata)
    assert isinstance(adapter, StyleCrafterAdapter) and adapter.unet_layers is not None
    adapter.unet_layers.name = path.name
    return adapter.unet_layers


def load_sdxl(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    loras: Sequence[tuple[Path, float]] = (),
    skip_check: bool = False,
) -> Any:
    """Load SDXL as a pipeline of diffusers; nothing is downloaded.

    Args:
        path: a single checkpoint file, or a folder of a diffusers pipeline.
        device: where it runs.
        dtype: of all but the VAE, which is float32.
        loras: files with strengths, merged into the weights.
        skip_check: do not look for NaN and infinity.

    Raises:
        WeightsError: if something is missing, incomplete, of another model or not finite.
    """
    from ..models.sdxl_file import load_sdxl_file
    from ..models.sdxl_lora import merge_lora

    with reading(path, "SDXL"):
        pipe = load_sdxl_file(path, dtype=dtype) if path.is_file() else _load_folder(path, dtype)
    pipe.set_progress_bar_config(disable=True)
    # In float16 SDXL's VAE overflows.
    pipe.vae.to(torch.float32)
    for lora, scale in loras:
        with reading(lora, "a LoRA for SDXL"):
            merge_lora(pipe, lora, scale)
    pipe = pipe.to(device)
    if not skip_check:
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                check_module(part, path)
    return pipe


def _load_folder(path: Path, dtype: torch.dtype) -> Any:
    import json

    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
        StableDiffusionXLPipeline,
    )

    index = path / "model_index.json"
    if not index.is_file():
        raise WeightsError(
            f"{path} is no folder of a diffusers pipeline (model_index.json is missing); give a "
            "single SDXL checkpoint, or a folder such as a download of "
            "stabilityai/stable-diffusion-xl-base-1.0"
        )
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if name != "StableDiffusionXLPipeline":
        raise WeightsError(
            f"{path} is a {name}; StyleCrafter's adapter needs SDXL (StableDiffusionXLPipeline)"
        )
    try:
        return StableDiffusionXLPipeline.from_pretrained(
            str(path), torch_dtype=dtype, local_files_only=True, add_watermarker=False
        )
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be loaded ({error}); download it again") from error


@torch.no_grad()
def encode_style(
    adapter: StyleCrafterSdxl,
    image_encoder: Path,
    images: Sequence[np.ndarray],
    *,
    crop: CropMode = "center",
    device: torch.device | str = "cpu",
    names: Sequence[str] = (),
    skip_check: bool = False,
) -> Style:
    """Encode pictures that are references of one style.

    Args:
        adapter: from `load_adapter`.
        image_encoder: CLIP ViT-H/14 vision tower, file or folder.
        images: uint8 [H, W, 3] each.
        crop: how CLIP's square is cut.
        device: where CLIP runs.
        names: of the pictures, for the provenance.
        skip_check: do not look for NaN and infinity in CLIP.

    Raises:
        LayoutError, WeightsError: for pictures or files that cannot work.

    Source: StyleCrafter's SDXL code (its image processor, CLIP's hidden states but one) or video
    code (its resize, CLIP's last layer), as the adapter needs; several pictures as in its video
    code.
    """
    encoder = load_image_encoder(image_encoder, device=device, dtype=torch.float32)
    if not skip_check:
        check_module(encoder.model, image_encoder)
    if adapter.video_layers:
        if crop != "center":
            raise ConfigError(
                f"the adapter for VideoCrafter prepares pictures in a way of its own and has only "
                f"the crop center, got {crop}; leave it out"
            )
        pixels = [stylecrafter_video_pixels(image)[None] for image in images]
        features = [encoder.stylecrafter_video(picture).cpu() for picture in pixels]
    else:
        pixels = [clip_pixels(image, crop=crop, size=encoder.image_size)[None] for image in images]
        features = [encoder.penultimate(picture).cpu() for picture in pixels]
    provenance = provenance_of(
        images, method=adapter.method, adapter=adapter.name, crop=crop, names=names
    )
    return Style(adapter.encoder(features), provenance)


def prepare_styles(
    adapter: StyleCrafterSdxl, regions: Sequence[StyleRegion]
) -> list[PreparedStyle]:
    """Keys and values of styles for every layer; then the adapter's projections are freed."""
    prepared = [PreparedStyle(region, adapter.keys_values(region.tokens)) for region in regions]
    adapter.free_projections()
    gc.collect()
    return prepared


@torch.no_grad()
def stylize_sdxl(
    pipe: Any,
    adapter: StyleCrafterSdxl,
    styles: Sequence[PreparedStyle],
    config: SdxlConfig,
    *,
    callback: Callable[[int], object] = lambda step: None,
    stage: Callable[[str], None] = lambda name: None,
) -> np.ndarray:
    """Generate a picture.

    Args:
        pipe: diffusers' `StableDiffusionXLPipeline`, with any scheduler and LoRA.
        adapter: predicts how strongly each layer takes a style.
        styles: from `prepare_styles`; none for plain SDXL.
        config: prompt and settings.
        callback: called after each step with its number.
        stage: called with the name of each stage.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ConfigError, WeightsError: for settings or models that cannot work.

    Source: StyleCrafter's SDXL code; deviation: the order of width and height in `original_size` is
    SDXL's own.
    """
    check_sdxl_config(config)
    height, width = config.size
    from ..models.sdxl_unet import check_unet

    check_unet(pipe.unet, adapter)
    device, dtype = pipe.unet.device, pipe.unet.dtype
    stage("encoding the prompt")
    tokens, negative, pooled, negative_pooled = pipe.encode_prompt(
        config.prompt, device=device, negative_prompt=config.negative_prompt
    )
    regions = [
        replace(style.region, gains=adapter.gains(tokens.float().cpu(), style.region.tokens))
        for style in styles
    ]
    generator = torch.Generator("cpu").manual_seed(config.seed)
    factor = pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, height // factor, width // factor)
    noise = torch.randn(shape, generator=generator).to(device, dtype)
    stage("sampling")
    latents = denoise_image(
        pipe.unet,
        pipe.scheduler,
        noise,
        num_steps=config.num_steps,
        text=ImageText(tokens, pooled),
        negative_text=ImageText(negative, negative_pooled),
        time_ids=torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=dtype),
        regions=regions,
        keys_values=[style.keys_values for style in styles],
        text_scale=config.text_scale,
        style_scale=config.style_scale,
        generator=generator,
        callback=callback,
    )
    stage("decoding")
    return _decode(pipe, latents)


def _decode(pipe: Any, latents: Tensor) -> np.ndarray:
    vae = pipe.vae
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    pictures = vae.decode(latents, return_dict=False)[0]
    pixels = ((pictures[0].float().clamp(-1, 1) + 1) * 127.5).round()
    return pixels.permute(1, 2, 0).to(torch.uint8).cpu().numpy()
