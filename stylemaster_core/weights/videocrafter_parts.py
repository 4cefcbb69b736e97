"""What the released checkpoints of VideoCrafter and of StyleCrafter on it are converted to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .shapes import expected_stylecrafter_sdxl_shapes, stylecrafter_sdxl_sizes
from .state_dict import Kind, check_keys, shapes_of
from .stylecrafter_video_keys import stylecrafter_video_to_sdxl, video_layer_names
from .videocrafter_keys import TEMPORAL_KEY, VideoCrafterSizes, videocrafter_sizes

UNET_FORMAT = "videocrafter-unet-1"
TEMPORAL_FORMAT = "stylecrafter-temporal-1"
ADAPTER_FORMAT = "stylecrafter-video-1"
KNOWN_BASE = "videocrafter1-t2v-512"
LICENCE = "research and non-commercial use only"  # clause 10 of VideoCrafter's licence
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.model."

Part = tuple[str, dict[str, Tensor], dict[str, str]]  # name without ending, tensors, metadata


def videocrafter_parts(kind: Kind, tensors: Mapping[str, Tensor], source: Path) -> list[Part]:
    """The files to be made of a release, checked against its rules.

    Args:
        kind: `videocrafter`, `stylecrafter_video` or `stylecrafter_temporal`.
        tensors: without the prefix of the UNet.
        source: the file that they are from.

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    if kind == "stylecrafter_video":
        return [(source.stem, dict(tensors), _adapter_metadata(tensors, source))]
    if kind == "stylecrafter_temporal":
        metadata = {"format": TEMPORAL_FORMAT, "licence": LICENCE}
        _check_temporal(tensors, source)
        return [(source.stem, dict(tensors), metadata)]
    vae, text, unet = (
        {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix) and _part_of(key) == prefix
        }
        for prefix in (VAE_PREFIX, TEXT_PREFIX, "")
    )
    _check_parts(unet, vae, text, source)
    sizes = videocrafter_sizes(shapes_of(unet))
    base = KNOWN_BASE if sizes == VideoCrafterSizes() else "custom"
    metadata = {"format": UNET_FORMAT, "base_model": base, "licence": LICENCE}
    return [
        (f"{source.stem}_unet", unet, metadata),
        (f"{source.stem}_vae", vae, {"licence": LICENCE}),
        (f"{source.stem}_text_encoder", text, {"licence": LICENCE}),
    ]


def _part_of(key: str) -> str | None:
    """Prefix of the part that a key of the checkpoint belongs to; None for the noise schedule's."""
    for prefix in (VAE_PREFIX, TEXT_PREFIX):
        if key.startswith(prefix):
            return prefix
    # The schedule is the same for all, and is computed.
    return "" if "." in key else None


def _check_parts(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor], source: Path
) -> None:
    from ..models.sd_parts import load_sd2_text, load_sd_vae
    from ..models.videocrafter_unet import check_unet_keys

    check_unet_keys(shapes_of(unet), f"VideoCrafter's UNet in {source}")
    load_sd_vae(_on_meta(vae))
    load_sd2_text(_on_meta(text))


def _on_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.empty_like(value, device="meta") for key, value in tensors.items()}


def _check_temporal(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Every module has all tensors of the first; whether they fit a UNet its loader sees."""
    modules = {match[1] for key in tensors if (match := TEMPORAL_KEY.fullmatch(key))}
    leaves = {key.removeprefix("init_attn.0.") for key in tensors if key.startswith("init_attn.0.")}
    expected = {
        f"{module}.{leaf}": tuple(tensors[f"{module}.{leaf}"].shape)
        if f"{module}.{leaf}" in tensors
        else ()
        for module in modules
        for leaf in leaves
    }
    check_keys(shapes_of(tensors), expected, f"temporal layers in {source}")


def _adapter_metadata(tensors: Mapping[str, Tensor], source: Path) -> dict[str, str]:
    from ..models.stylecrafter_sdxl import VIDEO_NUM_HEADS

    shapes = shapes_of(stylecrafter_video_to_sdxl(tensors))
    sizes = stylecrafter_sdxl_sizes(shapes)
    check_keys(shapes, expected_stylecrafter_sdxl_shapes(sizes), f"StyleCrafter adapter {source}")
    return {
        "format": ADAPTER_FORMAT,
        "base_model": KNOWN_BASE if sizes.encoder.style_width == 1024 else "custom",
        "num_blocks": str(len(video_layer_names(tensors))),
        "style_num_heads": str(VIDEO_NUM_HEADS),
        "scale_num_heads": str(VIDEO_NUM_HEADS),
    }
