"""VideoCrafter with the golden small UNet and adapter (inside ComfyUI only)."""

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import load_file
from scripts.golden_wan import pack
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "golden" / "stylecrafter"
HEADS = {"style_num_heads": "4", "scale_num_heads": "4"}
NUM_FRAMES = 4
tensors = load_file(FOLDER / "v5_unet.safetensors")
frames = rearrange(tensors["x"], "1 c t h w -> t c h w")


def under(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load_model(**changes: Tensor) -> Any:
    """A MODEL, by the pack's own loader."""
    return pack("nodes.native_videocrafter").load_videocrafter(under("unet.") | changes)


def load_adapter() -> Any:
    core = pack("stylemaster_core.models.stylecrafter_sdxl")
    layers = core.load_stylecrafter_video(under("adapter."), HEADS)
    return pack("stylemaster_core.models.style_adapter").StyleCrafterAdapter(
        "golden", layers.encoder, layers
    )


def conditioning(*, negative: bool = False) -> Any:
    text = tensors["context"]
    return [[text.flip(1) if negative else text, {}]]


def rows(name: str) -> Tensor:
    """A golden video as a batch of its frames."""
    return rearrange(tensors[name], "1 c t h w -> t c h w")


def sigma_of(model: Any) -> float:
    return float(model.model.model_sampling.sigma(tensors["t"].float()))


def style() -> Any:
    return pack("stylemaster_core.models.style_tokens").Style(tensors["style_tokens"])


def seeded(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
