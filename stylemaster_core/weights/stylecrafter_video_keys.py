"""Names of StyleCrafter's video adapter: those of its release, and those of the SDXL adapter's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import WeightsError
from .shapes import sdxl_layer_key

_PREDICTOR = "scale_predictor.scale_predictor"
_VIDEO_LAYER = re.compile(
    r"kv_attn_layers\.((input|middle|output)_blocks?(?:_(\d+))?_1_transformer_blocks_0_attn2_processor)"
    r"\.(.+)"
)
_VIDEO_ORDER = ("input", "middle", "output")  # of the scales in StyleCrafter's video release
_SDXL_ORDER = ("input", "output", "middle")  # and in its SDXL release
_UNITS = ("text_proj.weight", "text_proj.bias", "style_proj.weight", "style_proj.bias")


def video_layer_names(keys: Iterable[str]) -> list[str]:
    """Names of the layers of StyleCrafter's video adapter, in the order of its scales."""
    found = {m[1]: (_VIDEO_ORDER.index(m[2]), int(m[3] or 0))
             for key in keys if (m := _VIDEO_LAYER.fullmatch(key))}  # fmt: skip
    return sorted(found, key=found.__getitem__)


def _in_sdxl_order(names: Sequence[str]) -> list[int]:
    """Which layer of the video adapter stands at each place of the SDXL adapter's order."""
    parts = [_SDXL_ORDER.index(name.split("_")[0]) for name in names]
    return sorted(range(len(names)), key=parts.__getitem__)


def stylecrafter_video_to_sdxl(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename StyleCrafter's video adapter, or its encoder alone, to that of its SDXL release.

    Args:
        state_dict: keys of adapter_v1.pth, with or without those of the layers.

    Returns:
        The same tensors. The video release's scale predictor takes text and style as they are and
        has no last projection; the unit matrices in their places change no number. Its layers, and
        the queries of their scales, are put in the order in which SDXL's are counted: down, up,
        middle.

    Raises:
        WeightsError: if there is no scale predictor, a key has no rule, or there are not as many
            scales as layers.
    """
    names = video_layer_names(state_dict)
    order = _in_sdxl_order(names)
    places = {names[index]: place for place, index in enumerate(order)}
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        layer = _VIDEO_LAYER.fullmatch(key)
        if layer is not None:
            renamed[sdxl_layer_key(places[layer[1]], layer[4])] = value
        elif key.startswith("image_context_model."):
            renamed[key.replace(".style_emb", ".query_emb")] = value
        elif key.startswith("scale_predictor.out."):
            renamed[key.replace(".out.", ".out_proj.", 1)] = value
        elif key.startswith("scale_predictor."):
            name = key.replace(".scale_emb", ".query_emb")
            renamed[f"scale_predictor.{name}"] = value
        else:
            raise WeightsError(f"{key!r} is no key of StyleCrafter's video adapter")
    queries = renamed.get(f"{_PREDICTOR}.query_emb")
    if queries is None:
        raise WeightsError(
            f"no 'scale_predictor.scale_emb' among {len(state_dict)} keys: this is not "
            "StyleCrafter's video release; use adapter_v1.pth"
        )
    if names:
        if queries.shape[1] != len(names):
            raise WeightsError(
                f"the adapter has {queries.shape[1]} scales for {len(names)} layers; use "
                "adapter_v1.pth as it was published"
            )
        renamed[f"{_PREDICTOR}.query_emb"] = queries[:, order]
    unit = torch.eye(queries.shape[-1], dtype=queries.dtype)
    renamed[f"{_PREDICTOR}.proj"] = unit
    for name in ("text_proj", "style_proj"):
        renamed[f"scale_predictor.{name}.weight"] = unit
        renamed[f"scale_predictor.{name}.bias"] = torch.zeros_like(unit[0])
    return renamed


def stylecrafter_sdxl_to_video(
    state_dict: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    """The inverse of `stylecrafter_video_to_sdxl`, for layers of these names."""
    order = _in_sdxl_order(names)
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key in (f"{_PREDICTOR}.proj", *(f"scale_predictor.{name}" for name in _UNITS)):
            continue
        if key == f"{_PREDICTOR}.query_emb":
            value = value[:, [order.index(index) for index in range(len(order))]]
        layer = re.fullmatch(r"kv_attn_layers\.(\d+)\.(.+)", key)
        if layer is not None:
            key = f"kv_attn_layers.{names[order[int(layer[1]) // 2]]}.{layer[2]}"
        elif key.startswith("image_context_model."):
            key = key.replace(".query_emb", ".style_emb")
        else:
            key = key.replace("scale_predictor.out_proj.", "scale_predictor.out.")
            key = key.replace(_PREDICTOR, "scale_predictor").replace(".query_emb", ".scale_emb")
        renamed[key] = value
    return renamed
