"""SDXL from a single checkpoint file, as the community shares them, without the network.

diffusers converts such a file, but wants a folder with the configuration of every part, which it
would download. It is the same for all of them, so it is written here.
"""

from __future__ import annotations

import json
import lzma
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import WeightsError

MERGES = Path(__file__).with_name("clip_tokens") / "merges.txt.xz"
END = "<|endoftext|>"
Configs = Mapping[str, Mapping[str, Any]]

_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2, "pad_token_id": 1}
# stabilityai/stable-diffusion-xl-base-1.0, what differs from the classes' own defaults.
SDXL: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {
        "sample_size": 1024,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "scaling_factor": 0.13025,
    },
    "text_encoder": _CLIP
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    "text_encoder_2": _CLIP
    | {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    },
}
_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "scheduler": "EulerDiscreteScheduler",
}
UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
SDXL_KEYS = (
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    "conditioner.embedders.1.model.positional_embedding",
    "first_stage_model.decoder.conv_in.weight",
)


def load_sdxl_file(path: Path, *, dtype: torch.dtype, configs: Configs = SDXL) -> Any:
    """Load a whole SDXL checkpoint (.safetensors): UNet, both text encoders and the VAE.

    Args:
        path: the file.
        dtype: of the weights.
        configs: of the parts, if they are not SDXL's own.

    Returns:
        diffusers' `StableDiffusionXLPipeline`.

    Raises:
        WeightsError: if the file is no SDXL, or lacks a part.
    """
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
        StableDiffusionXLPipeline,
    )

    from ..weights.files import read_keys

    keys = read_keys(path)
    missing = [key for key in (UNET_KEY, *SDXL_KEYS) if key not in keys]
    if missing:
        raise WeightsError(
            f"{path} is no whole SDXL checkpoint (it lacks {', '.join(missing)}); give one with "
            "UNet, both text encoders and VAE, or a folder in diffusers' format"
        )
    with tempfile.TemporaryDirectory() as folder:
        _write_configs(Path(folder), configs)
        try:
            return StableDiffusionXLPipeline.from_single_file(
                str(path),
                config=folder,
                local_files_only=True,
                torch_dtype=dtype,
                add_watermarker=False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise WeightsError(
                f"{path} cannot be loaded as SDXL ({error}); SD 1.5, the refiner and distilled, "
                "smaller SDXL do not work"
            ) from error


def write_tokenizer(folder: Path, pad_token: str, *, merges: list[str] | None = None) -> int:
    """Write CLIP's tokenizer as a folder, from the merges that come with this package.

    Returns:
        The number of its tokens, of which the last two begin and end a text.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if merges is None:
        merges = lzma.decompress(MERGES.read_bytes()).decode().splitlines()
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{x}</w>" for x in letters)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    options = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad_token,
    }
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return len(tokens)


def _write_configs(folder: Path, configs: Configs) -> None:
    """The folder that diffusers wants: configurations without weights."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline"}
    for part, config in configs.items():
        library = "transformers" if part.startswith("text") else "diffusers"
        index[part] = [library, _CLASSES[part]]
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part).mkdir()
        (folder / part / name).write_text(json.dumps({"_class_name": _CLASSES[part], **config}))
    for part, pad_token in (("tokenizer", END), ("tokenizer_2", "!")):
        index[part] = ["transformers", "CLIPTokenizer"]
        write_tokenizer(folder / part, pad_token)
    (folder / "model_index.json").write_text(json.dumps(index))
