"""Random weights of stylemaster-tiny's sizes, for tests that ask for mechanism and not for style.

Only the VAE is a real one: the linear transform of the demonstration clip.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from stylemaster_core.data.demo_scene import demo_clip
from stylemaster_core.errors import WeightsError
from stylemaster_core.layouts import frames_to_video
from stylemaster_core.models.patch_vae import PatchVAE, save_patch_vae, video_to_blocks
from stylemaster_core.models.small import draw_weights
from stylemaster_core.pipelines.tiny import FOLDER, tiny_files
from stylemaster_core.weights.files import write_state_dict
from stylemaster_core.weights.shapes import (
    AdapterSizes,
    ControlNetSizes,
    Shape,
    StyleCrafterSizes,
    StyleCrafterWanSizes,
    WanSizes,
    expected_adapter_shapes,
    expected_base_shapes,
    expected_controlnet_shapes,
    expected_stylecrafter_wan_shapes,
)

WIDTH, FFN_WIDTH, NUM_BLOCKS, TEXT_WIDTH = 256, 768, 6, 4096
CLIP_WIDTH, CLIP_PROJECTION, STYLE_WIDTH = 96, 128, 128
WORDS = {"kind": "hashed_words", "width": TEXT_WIDTH, "max_length": 24, "seed": 0}


def is_shipped() -> bool:
    """Whether the trained weights are there."""
    try:
        tiny_files()
        tiny_files(stylecrafter=True)
    except WeightsError:
        return False
    return True


def shipped_or_standin(folder: Path) -> Path:
    """The folder of the trained weights; of random ones, written to `folder`, without them."""
    return FOLDER if is_shipped() else write_standin(folder)


def pack_with_weights(folder: Path) -> Path:
    """The pack; without the trained weights a copy of it, in `folder`, that has random ones."""
    pack = FOLDER.parents[1]
    if is_shipped():
        return pack
    for part in ("nodes", "stylemaster_core", "web", "locales", "workflows"):
        shutil.copytree(pack / part, folder / part)
    shutil.copy(pack / "__init__.py", folder)
    place = folder / "stylemaster_core" / FOLDER.name
    shutil.rmtree(place, ignore_errors=True)
    write_standin(place)
    return folder


def write_standin(folder: Path) -> Path:
    """Write a whole set, as its trainers would, and return `folder`."""
    base = WanSizes(WIDTH, FFN_WIDTH, NUM_BLOCKS, TEXT_WIDTH)
    adapter = AdapterSizes(
        width=WIDTH,
        num_blocks=NUM_BLOCKS,
        style_width=STYLE_WIDTH,
        patch_width=CLIP_WIDTH,
        global_width=CLIP_PROJECTION,
    )
    encoder = StyleCrafterSizes(
        feature_width=CLIP_WIDTH,
        style_width=WIDTH,
        text_width=TEXT_WIDTH,
        num_layers=2,
        num_scales=NUM_BLOCKS,
        scale_width=STYLE_WIDTH,
    )
    stylecrafter = StyleCrafterWanSizes(encoder, WIDTH, norm_style=True)
    control = ControlNetSizes(WIDTH, FFN_WIDTH, NUM_BLOCKS // 2, TEXT_WIDTH)
    folder.mkdir(parents=True)
    _write(folder / "transformer.safetensors", expected_base_shapes(base), 0)
    _write(folder / "style_adapter.safetensors", expected_adapter_shapes(adapter), 1)
    _write(folder / "controlnet.safetensors", expected_controlnet_shapes(control), 2)
    _write(folder / "motion_adapter.safetensors", _motion_shapes(), 3)
    _write(
        folder / "stylecrafter_adapter.safetensors",
        expected_stylecrafter_wan_shapes(stylecrafter),
        6,
    )
    _write(folder / "stylecrafter_video_lora.safetensors", _motion_shapes(), 7)
    _write_vae(folder / "vae.safetensors")
    _write_image_encoder(folder / "image_encoder")
    (folder / "text_encoder.json").write_text(json.dumps(WORDS))
    return folder


def _write(path: Path, shapes: dict[str, Shape], seed: int) -> None:
    write_state_dict(path, {k: v.half() for k, v in draw_weights(shapes, seed).items()})


def _motion_shapes(rank: int = 4) -> dict[str, Shape]:
    shapes = {"A": (rank, WIDTH), "B": (WIDTH, rank)}
    return {
        f"diffusion_model.blocks.{block}.self_attn.{layer}.lora_{part}.weight": shape
        for block in range(NUM_BLOCKS)
        for layer in "qkvo"
        for part, shape in shapes.items()
    }


def _write_vae(path: Path) -> None:
    vae = PatchVAE()
    with torch.no_grad():
        for key, value in draw_weights(
            {k: tuple(v.shape) for k, v in vae.state_dict().items()}, 4
        ).items():
            vae.state_dict()[key].copy_(value)
    blocks = video_to_blocks(frames_to_video(demo_clip(9, 128, 192))).movedim(1, -1).flatten(0, 2)
    vae.set_linear(blocks.mean(0), torch.cov(blocks.T))
    save_patch_vae(path, vae)


def _write_image_encoder(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_PROJECTION,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=128,
        patch_size=8,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    folder.mkdir()
    _write(
        folder / "model.safetensors", {k: tuple(v.shape) for k, v in model.state_dict().items()}, 5
    )
    config.save_pretrained(str(folder))
