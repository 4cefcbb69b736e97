"""From the released checkpoints to the small safetensors files that nodes and command line load."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, WeightsError
from .files import Progress, read_state_dict, sha256_of, write_state_dict
from .numbers import check_weights, not_finite
from .shapes import (
    AdapterSizes,
    ControlNetSizes,
    Shape,
    StyleCrafterSdxlSizes,
    WanSizes,
    adapter_sizes,
    controlnet_sizes,
    expected_adapter_shapes,
    expected_base_shapes,
    expected_controlnet_shapes,
    expected_stylecrafter_sdxl_shapes,
    stylecrafter_sdxl_sizes,
    wan_sizes,
)
from .state_dict import (
    check_keys,
    describe_kind,
    detect_kind,
    shapes_of,
    split_release,
    strip_prefix,
    style_path_report,
)
from .videocrafter_parts import videocrafter_parts

__all__ = [
    "AdapterSizes",
    "ControlNetSizes",
    "WanSizes",
    "convert",
    "expected_adapter_shapes",
    "expected_base_shapes",
    "expected_controlnet_shapes",
]

logger = logging.getLogger("stylemaster")

ADAPTER_FORMAT = "stylemaster-adapter-1"
CONTROLNET_FORMAT = "stylemaster-gray-tile-controlnet-1"
BASE_FORMAT = "stylemaster-base-1"
STYLECRAFTER_SDXL_FORMAT = "stylecrafter-sdxl-1"
STYLECRAFTER_WAN_FORMAT = "stylecrafter-wan-1"
KNOWN_BASE = "wan2.1-t2v-1.3b"
SDXL_BASE = "sdxl-1.0"
CUSTOM_BASE = "custom"


def convert(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    include_base: bool = False,
    skip_check: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Convert a released file to safetensors.

    - the whole release: `<stem>_adapter.safetensors`, with `include_base` also
      `<stem>_base.safetensors`;
    - a ControlNet, StyleCrafter's adapter for SDXL or for VideoCrafter, or its temporal layers:
      `<stem>.safetensors`;
    - VideoCrafter's whole checkpoint: `<stem>_unet.safetensors`, `<stem>_vae.safetensors` and
      `<stem>_text_encoder.safetensors`;
    - a style adapter: `<stem>_adapter.safetensors`, or `<stem>.safetensors` where the stem says so
      already.

    Keys and shapes are checked against the release's rules, with sizes read off the file. If the
    style attention of the file is uniform, a warning is logged (`style_path_report`). NaN and
    infinity are refused, those that `dtype` would make, too.

    Args:
        source: .ckpt, .pt, .pth or .safetensors.
        out_dir: folder to write to; made if missing.
        overwrite: replace existing files.
        dtype: dtype of the written tensors; None keeps the stored one.
        include_base: of the whole release, write the Wan base, too.
        skip_check: do not look for NaN and infinity.
        progress: called while the source is hashed, with (bytes done, bytes in all).

    Returns:
        Paths written.

    Raises:
        ConfigError: if `dtype` is no floating point type, or `include_base` is asked of a file
            that holds no base.
        WeightsError: if the file is none of these, or its tensors are not those expected, or not
            finite, or a file to be written exists.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(
            f"{dtype} is no floating point type; choose torch.bfloat16, torch.float16 or "
            "torch.float32."
        )
    source, out_dir = Path(source), Path(out_dir)
    content = read_state_dict(source)
    tensors = strip_prefix(content.tensors)
    shapes = shapes_of(tensors)
    kind = detect_kind(shapes)
    base, adapter = split_release(tensors)
    if include_base and kind != "stylemaster":
        raise ConfigError(
            f"include_base was asked for, but {source} is {describe_kind(kind)}. Leave it out."
        )
    jobs: list[tuple[str, dict[str, Tensor], dict[str, str]]] = []
    if kind in ("stylemaster", "style_adapter"):
        stem = source.stem if source.stem.endswith("_adapter") else f"{source.stem}_adapter"
        jobs.append((stem, adapter, _adapter_metadata(adapter, source)))
        if kind == "stylemaster":
            # Checked even when it is not written: a release of which half is wrong is not trusted.
            base_metadata = _base_metadata(base, source)
            if include_base:
                jobs.append((f"{source.stem}_base", base, base_metadata))
        elif base:
            check_keys(shapes, shapes_of(adapter), f"style adapter {source}")
    elif kind == "gray_tile_controlnet":
        jobs.append((source.stem, tensors, _controlnet_metadata(shapes, source)))
    elif kind == "stylecrafter_sdxl":
        jobs.append((source.stem, tensors, _stylecrafter_metadata(shapes, source)))
    elif kind in ("stylecrafter_video", "stylecrafter_temporal", "videocrafter"):
        jobs += videocrafter_parts(kind, tensors, source)
    else:
        raise WeightsError(
            f"{source} is {describe_kind(kind)}. Only the releases of StyleMaster "
            "(stylemaster.ckpt, controlnet.ckpt), of StyleCrafter (stylecrafter_sdxl.ckpt, "
            "adapter_v1.pth, temporal_v1_1.pth) and of VideoCrafter (model.ckpt), or a style "
            "adapter, can be converted."
        )
    targets = [out_dir / f"{stem}.safetensors" for stem, _, _ in jobs]
    # Before hashing and writing, so that a later clash leaves no first file behind.
    existing = [str(path) for path in targets if path.exists()]
    if existing and not overwrite:
        raise WeightsError(
            f"{', '.join(existing)} exists and is not overwritten unless asked (overwrite=True, on "
            "the command line --overwrite). Choose another folder."
        )
    if not skip_check:
        # A base that is not written is looked at, too, for the reason above.
        for part in [part for _, part, _ in jobs] + [base] * (kind == "stylemaster"):
            check_weights(part, source)
        for _, part, _ in jobs:
            _check_range(part, dtype, source)
    origin = {"source_sha256": sha256_of(source, progress), "source_name": source.name}
    for path, (_, part, metadata) in zip(targets, jobs, strict=True):
        write_state_dict(
            path, _cast(part, dtype), content.metadata | metadata | origin, overwrite=overwrite
        )
    return targets


def _adapter_metadata(adapter: Mapping[str, Tensor], source: Path) -> dict[str, str]:
    shapes = shapes_of(adapter)
    sizes = adapter_sizes(shapes)
    check_keys(shapes, expected_adapter_shapes(sizes), f"style adapter in {source}")
    report = style_path_report(adapter)
    logger.log(
        logging.WARNING if report.is_uniform else logging.INFO, "%s: %s", source, report.message
    )
    # A contrastive projection stands before the style tokens: the base does not notice it.
    known = replace(sizes, contrastive_width=0) == AdapterSizes()
    return _metadata(ADAPTER_FORMAT, known, sizes.num_blocks)


def _base_metadata(base: Mapping[str, Tensor], source: Path) -> dict[str, str]:
    shapes = shapes_of(base)
    sizes = wan_sizes(shapes)
    check_keys(shapes, expected_base_shapes(sizes), f"Wan base in {source}")
    return _metadata(BASE_FORMAT, sizes == WanSizes(), sizes.num_blocks)


def _controlnet_metadata(shapes: Mapping[str, Shape], source: Path) -> dict[str, str]:
    sizes = controlnet_sizes(shapes)
    check_keys(shapes, expected_controlnet_shapes(sizes), f"gray-tile ControlNet {source}")
    return _metadata(CONTROLNET_FORMAT, sizes == ControlNetSizes(), sizes.num_blocks)


def _stylecrafter_metadata(shapes: Mapping[str, Shape], source: Path) -> dict[str, str]:
    sizes = stylecrafter_sdxl_sizes(shapes)
    check_keys(shapes, expected_stylecrafter_sdxl_shapes(sizes), f"StyleCrafter adapter {source}")
    is_known = sizes == StyleCrafterSdxlSizes()
    return _metadata(
        STYLECRAFTER_SDXL_FORMAT, is_known, len(sizes.layer_widths), known_base=SDXL_BASE
    )


def _metadata(
    file_format: str, is_known: bool, num_blocks: int, known_base: str = KNOWN_BASE
) -> dict[str, str]:
    return {
        "format": file_format,
        "base_model": known_base if is_known else CUSTOM_BASE,
        "num_blocks": str(num_blocks),
    }


def _check_range(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, source: Path) -> None:
    """Refuse numbers that are finite as stored, and would not be as written."""
    if dtype is None:
        return
    largest = torch.finfo(dtype).max
    for key, value in tensors.items():
        if not value.is_floating_point() or torch.finfo(value.dtype).max <= largest:
            continue
        if not_finite({key: value.to(dtype)}):
            raise WeightsError(
                f"{source}: {key!r} holds numbers up to {value.abs().max().item():g}, and {dtype} "
                f"ends at {largest:g}; choose bfloat16 or float32, or keep the stored type"
            )


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        key: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for key, value in tensors.items()
    }
