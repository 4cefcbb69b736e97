"""Small random models of the released architecture, for demonstrations and tests.

They need no downloads, run every step in seconds on a CPU and make noise, not pictures.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WeightsError
from ..weights.files import write_state_dict
from ..weights.shapes import (
    AdapterSizes,
    ControlNetSizes,
    Shape,
    WanSizes,
    expected_adapter_shapes,
    expected_base_shapes,
    expected_controlnet_shapes,
)
from ..writing import written_beside

WIDTH = 256
NUM_BLOCKS = 4
TEXT_WIDTH = 64
CLIP_WIDTH = 80
CLIP_PROJECTION = 48
MOTION_RANK = 4
VAE_BASE_WIDTH = 8


class SmallModels(NamedTuple):
    """Where the small models are; each is what the loader of its kind takes."""

    stylemaster: Path  # the whole release format: base, style model, image K and V
    controlnet: Path
    image_encoder: Path  # a folder
    vae: Path
    text_encoder: Path  # a description of a HashedWordsTextEncoder
    motion_adapter: Path


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Check that none of the files to be written exists, unless `overwrite`.

    Raises:
        WeightsError: naming those that do.
    """
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise WeightsError(
            f"{', '.join(existing)} exists and is not overwritten unless asked (overwrite=True); "
            "choose another folder"
        )


def write_small_models(
    folder: str | Path, *, seed: int = 0, overwrite: bool = False
) -> SmallModels:
    """Write a set of small random models that fit each other.

    The transformer has 4 blocks of width 256 (2 heads of 128), text and style width 64, 4 global
    and 2 texture tokens; CLIP is 80 wide with embeddings of 48. All formats are those of the
    released files.

    Args:
        folder: made if missing.
        seed: of the weights; equal seeds give equal weights.
        overwrite: replace existing files.

    Returns:
        The paths written, about 15 MB in all.

    Raises:
        WeightsError: if one of the files exists and `overwrite` is False.
    """
    folder = Path(folder)
    models = SmallModels(
        stylemaster=folder / "stylemaster_small.ckpt",
        controlnet=folder / "controlnet_small.ckpt",
        image_encoder=folder / "image_encoder_small",
        vae=folder / "vae_small.safetensors",
        text_encoder=folder / "text_encoder.json",
        motion_adapter=folder / "motion_adapter_small.safetensors",
    )
    refuse_existing(models, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    release = expected_base_shapes(_wan_sizes()) | expected_adapter_shapes(_adapter_sizes())
    write_checkpoint(models.stylemaster, draw_weights(release, seed))
    control = expected_controlnet_shapes(_controlnet_sizes())
    write_checkpoint(models.controlnet, draw_weights(control, seed + 1))
    write_small_image_encoder(models.image_encoder, seed + 2)
    _write_vae(models.vae, seed + 3)
    motion = draw_weights(_motion_shapes(), seed + 4)
    write_state_dict(models.motion_adapter, motion, overwrite=True)
    settings = {"kind": "hashed_words", "width": TEXT_WIDTH, "seed": seed}
    models.text_encoder.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return models


def draw_weights(shapes: Mapping[str, Shape], seed: int) -> dict[str, Tensor]:
    """Draw random weights that keep activations of order 1.

    Each tensor has a generator of its own, made of its name: the others do not change it.

    Args:
        shapes: key to shape.
        seed: of all of them.

    Returns:
        bfloat16 tensors on the CPU.
    """
    weights = {}
    for name, shape in shapes.items():
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        mean, std = _mean_and_std(name, shape)
        values = torch.randn(shape, generator=generator) * std + mean
        weights[name] = values.to(torch.bfloat16)
    return weights


def _mean_and_std(name: str, shape: Shape) -> tuple[float, float]:
    leaf = name.rpartition(".")[2]
    if leaf == "gamma" or (leaf == "weight" and len(shape) == 1):
        return 1.0, 0.1
    if "bias" in leaf or leaf == "modulation":
        return 0.0, 0.1
    if leaf in ("style_emb", "query_emb"):
        return 0.0, 1.0
    if leaf in ("proj_patch", "proj"):
        return 0.0, shape[0] ** -0.5
    if leaf == "class_embedding" or "position_embedding" in name:
        return 0.0, 0.5
    fan_in = max(1, torch.Size(shape[1:]).numel())
    # So that the control is felt without drowning the picture.
    gain = 0.2 if name.startswith("zero_convs") else 1.0
    return 0.0, gain * fan_in**-0.5


def _wan_sizes() -> WanSizes:
    return WanSizes(width=WIDTH, ffn_width=WIDTH, num_blocks=NUM_BLOCKS, text_width=TEXT_WIDTH)


def _adapter_sizes() -> AdapterSizes:
    return AdapterSizes(
        width=WIDTH,
        num_blocks=NUM_BLOCKS,
        style_width=TEXT_WIDTH,
        patch_width=CLIP_WIDTH,
        num_layers=2,
        local_tokens=2,
        global_tokens=4,
        global_width=CLIP_PROJECTION,
    )


def _controlnet_sizes() -> ControlNetSizes:
    return ControlNetSizes(
        width=WIDTH, ffn_width=WIDTH, num_blocks=NUM_BLOCKS // 2, text_width=TEXT_WIDTH
    )


def _motion_shapes() -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for block in range(NUM_BLOCKS):
        for projection in "qkvo":
            name = f"diffusion_model.blocks.{block}.self_attn.{projection}"
            shapes[f"{name}.lora_A.weight"] = (MOTION_RANK, WIDTH)
            shapes[f"{name}.lora_B.weight"] = (WIDTH, MOTION_RANK)
    return shapes


def write_checkpoint(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a pickled checkpoint beside its place, then rename it."""
    # The release is a pickled checkpoint; safetensors would not exercise that path.
    with written_beside(path, overwrite=True) as part:
        torch.save(weights, part)


def write_small_image_encoder(folder: Path, seed: int) -> None:
    """Write a CLIP image encoder of 2 layers, features 80 wide, as a folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_PROJECTION,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        shapes = {
            key: tuple(value.shape)
            for key, value in CLIPVisionModelWithProjection(config).state_dict().items()
        }
    folder.mkdir(parents=True, exist_ok=True)
    weights = draw_weights(shapes, seed)
    write_state_dict(folder / "model.safetensors", weights, {"format": "pt"}, overwrite=True)
    config.architectures = ["CLIPVisionModelWithProjection"]
    config.save_pretrained(str(folder))


def _write_vae(path: Path, seed: int) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from .vae import native_vae_state_dict

    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=VAE_BASE_WIDTH)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights = native_vae_state_dict(draw_weights(shapes, seed))
    write_state_dict(path, weights, overwrite=True)
