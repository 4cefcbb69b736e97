"""LoRAs of each naming: the core merges them as ComfyUI does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stylemaster_core.models.small import draw_weights
from stylemaster_core.weights.lora import merge_wan_loras
from stylemaster_core.weights.shapes import WanSizes, expected_base_shapes

SCRIPT = Path(__file__).parent / "scripts" / "lora_forms.py"
WIDTH, RANK = 24, 4
# Prefix, separator of names, and the endings of the two matrices; those that ComfyUI knows.
FORMS = {
    "kohya": ("lora_unet_", "_", "lora_down.weight", "lora_up.weight"),
    "comfyui": ("diffusion_model.", ".", "lora_A.weight", "lora_B.weight"),
    "lightx2v": ("diffusion_model.", ".", "lora_down.weight", "lora_up.weight"),
}
LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.v", "blocks.1.ffn.0")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_each_naming_equals_comfyui(run_in_comfy: Callable[..., Any], tmp_path: Path) -> None:
    sizes = WanSizes(width=WIDTH, ffn_width=32, num_blocks=2, text_width=10, freq_width=8)
    base = {k: v.float() for k, v in draw_weights(expected_base_shapes(sizes), 0).items()}
    for folder in ("loras", "merged"):
        (tmp_path / folder).mkdir()
    save_file(base, tmp_path / "base.safetensors")
    for form, (prefix, separator, down, up) in FORMS.items():
        tensors = {}
        for layer in LAYERS:
            name = prefix + layer.replace(".", separator)
            rows, columns = base[f"{layer}.weight"].shape
            tensors |= {f"{name}.{down}": draw(RANK, columns), f"{name}.{up}": draw(rows, RANK)}
            tensors[f"{name}.alpha"] = torch.tensor(3.0)
        if form == "lightx2v":
            tensors["diffusion_model.blocks.0.norm3.diff"] = draw(WIDTH)
            tensors["diffusion_model.blocks.0.self_attn.o.diff_b"] = draw(WIDTH)
        path = tmp_path / "loras" / f"{form}.safetensors"
        save_file(tensors, path)
        merged = merge_wan_loras(base, [(path, 0.7)], torch.float32)
        save_file(merged, tmp_path / "merged" / path.name)
    deviations = run_in_comfy(SCRIPT, tmp_path)
    assert set(deviations) == set(FORMS)
    assert max(deviations.values()) < 1e-5
