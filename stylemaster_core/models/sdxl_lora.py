"""LoRA files of the community, merged into an SDXL pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import WeightsError
from ..weights.lora import read_lora

_PREFIXES = {
    "unet": ("lora_unet_", "unet.", "diffusion_model."),
    "text_encoder": ("lora_te1_", "text_encoder."),
    "text_encoder_2": ("lora_te2_", "text_encoder_2."),
}


@torch.no_grad()
def merge_lora(pipe: Any, path: Path, scale: float) -> None:
    """Add a LoRA to the weights of a pipeline.

    Args:
        pipe: `StableDiffusionXLPipeline`, before any style.
        path: .safetensors, with names of kohya's trainers, PEFT or diffusers; linear layers only.
        scale: strength; 1 is the trained one, below 0 leads away from it.

    Raises:
        WeightsError: if the file holds no LoRA, one for another model, or parts other than linear
            layers. Then nothing was changed.
    """
    lora = read_lora(path)
    modules = {f"{name}.weight": module for name, module in _modules(pipe)}
    unknown = sorted(set(lora.changes) - set(modules))
    if unknown:
        raise WeightsError(
            f"{path}: {len(unknown)} of {len(lora.changes)} parts fit no linear layer of this SDXL "
            f"({', '.join(unknown[:3])}, ...); give a LoRA for SDXL, on linear layers"
        )
    for name, change in lora.changes.items():
        shape = tuple(modules[name].weight.shape)
        if change.shape != shape:
            raise WeightsError(
                f"{path}: {name} is for a layer of {list(change.shape)}, this SDXL has "
                f"{list(shape)}; give a LoRA for SDXL"
            )
    for name, change in lora.changes.items():
        weight = modules[name].weight
        weight.copy_(weight.float() + change.delta().to(weight.device) * scale)


def _modules(pipe: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers by all names that files use for them."""
    for part, prefixes in _PREFIXES.items():
        for name, module in getattr(pipe, part).named_modules():
            if not isinstance(module, nn.Linear):
                continue
            names = [name, _original_name(name, pipe.unet)] if part == "unet" else [name]
            if part != "unet":  # with and without the wrapper that some releases have
                names.append(f"text_model.{name}")
            for prefix in prefixes:
                for used in names:
                    yield (prefix + used).replace(".", "_"), module


def _original_name(name: str, unet: Any) -> str:
    """A layer of an attention under its name in the original code; others as they are."""
    parts = name.split(".")
    each = unet.config.layers_per_block + 1
    if "attentions" not in parts:
        return name
    inner = ".".join(parts[parts.index("attentions") + 2 :])
    if parts[0] == "mid_block":
        return f"middle_block.1.{inner}"
    block, attention = int(parts[1]), int(parts[3])
    if parts[0] == "down_blocks":
        return f"input_blocks.{1 + block * each + attention}.1.{inner}"
    return f"output_blocks.{block * each + attention}.1.{inner}"
