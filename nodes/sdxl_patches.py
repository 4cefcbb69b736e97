"""Hooks on ComfyUI's SDXL and on VideoCrafter: StyleCrafter's branch in every cross-attention.

As on Wan (`wan_patches`), a conditioning carries its styles and the MODEL gets one APPLY_MODEL
wrapper. It puts a replacement of each cross-attention (`attn2`) into `transformer_options` for one
call, around whatever other packs have put there, before or after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import comfy.ldm.modules.attention
import comfy.model_base
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..stylemaster_core.errors import UnsupportedHostError, WeightsError
from ..stylemaster_core.models.decoupled_attention import style_residual
from ..stylemaster_core.models.style_adapter import StyleCrafterAdapter
from .native_videocrafter import VideoCrafter
from .sdxl_styles import LAYER_KEY, StyledRows, styled_rows
from .wan_patches import Hook, ModelCall, compute_dtype, raw, with_hooks

Place = tuple[str, int, int]  # part of the UNet, block in it, transformer block in that

PARTS = ("input", "output", "middle")  # StyleCrafter counts layers in this order, not as they run


class Host(NamedTuple):
    """A kind of model that a StyleCrafter adapter is for."""

    name: str
    model: type
    advice: str  # how to get it
    released: str  # what the released adapter needs


SDXL = Host(
    "SDXL",
    comfy.model_base.SDXL,
    "load an SDXL checkpoint (sd_xl_base_1.0 or one made from it)",
    "The released adapter needs a whole SDXL (70 cross-attentions, text of width 2048), not a "
    "distilled, smaller one",
)
VIDEOCRAFTER = Host(
    "VideoCrafter",
    VideoCrafter,
    "load it with Load VideoCrafter",
    "The released adapter needs VideoCrafter's text-to-video UNet at 320 x 512 (16 "
    "cross-attentions, text of width 1024)",
)
COMPILED = "torch.compile"  # key of ComfyUI's wrapper


def cross_attentions(unet: Any) -> Iterator[tuple[Place, Any]]:
    """Cross-attentions in the order in which StyleCrafter counts layers."""
    blocks = {"input": unet.input_blocks, "output": unet.output_blocks, "middle": None}
    for part in PARTS:
        for number, block in enumerate(blocks[part] or [unet.middle_block]):
            for module in block:
                if not isinstance(module, SpatialTransformer):
                    continue
                for index, layer in enumerate(module.transformer_blocks):
                    yield (part, number, index), layer.attn2


def patch_layers(model: ModelPatcher, adapter: StyleCrafterAdapter) -> ModelPatcher:
    """A clone of a MODEL that heeds the StyleCrafter styles of its conditionings.

    A conditioning that carries none runs as on the unpatched model.

    Raises:
        UnsupportedHostError: if it is not the kind of model that the adapter is for.
        WeightsError: if its cross-attentions are not those of the adapter.
    """
    assert adapter.unet_layers is not None
    host = VIDEOCRAFTER if adapter.unet_layers.video_layers else SDXL
    base = model.model
    unet = raw(base.diffusion_model)
    if not isinstance(base, host.model) or not isinstance(unet, UNetModel):
        found = f"{type(base.model_config).__name__} ({type(unet).__name__})"
        raise UnsupportedHostError(
            f"this MODEL is {found}, the adapter is StyleCrafter's for {host.name}; {host.advice}"
        )
    layers = [layer for _, layer in cross_attentions(unet)]
    found = [layer.to_q.out_features for layer in layers]
    text = layers[0].to_k.in_features if layers else 0
    wanted, wanted_text = adapter.unet_layers.layer_widths, adapter.text_width
    if found != wanted or text != wanted_text:
        raise WeightsError(
            f"this StyleCrafter adapter is for {len(wanted)} cross-attentions of widths "
            f"{sorted(set(wanted))} and text of width {wanted_text}; this MODEL has {len(found)} "
            f"of widths {sorted(set(found))} and text of width {text}. {host.released}"
        )
    return with_hooks(model, LAYER_KEY, _replace_attention)


def _replace_attention(call: ModelCall) -> list[Hook]:
    """Put the styles of the batch into the options of this call; no module is hooked."""
    if call.rows is None:
        return []
    like = call.x.new_empty(0, dtype=compute_dtype(call.model))
    size = (call.x.shape[2], call.x.shape[3])
    sampling = call.model.model_sampling
    styled = styled_rows(call.rows, size, sampling, float(call.t.max()), like)
    if COMPILED in call.options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
        raise UnsupportedHostError(
            "under TorchCompileModel a StyleCrafter style on SDXL could not go on and off "
            "during a run; take that node off"
        )
    if styled:
        unet = raw(call.model.diffusion_model)
        call.options = _with_replacements(call.options, unet, styled)
    return []


def _with_replacements(
    options: dict[str, Any], unet: Any, styled: Sequence[StyledRows]
) -> dict[str, Any]:
    replaced = options.get("patches_replace", {})
    attn2 = dict(replaced.get("attn2", {}))
    for layer, (place, _) in enumerate(cross_attentions(unet)):
        # A replacement may be for one transformer block or for all of a block of the UNet.
        previous = attn2.get(place) or attn2.get(place[:2]) or _text_attention
        attn2[place] = _styled_attention(layer, previous, styled)
    return {**options, "patches_replace": {**replaced, "attn2": attn2}}


def _text_attention(query: Tensor, keys: Tensor, values: Tensor, options: Any) -> Tensor:
    return comfy.ldm.modules.attention.optimized_attention(
        query,
        keys,
        values,
        options["n_heads"],
        attn_precision=options["attn_precision"],
        transformer_options=options,
    )


def _styled_attention(
    layer: int, previous: Callable[..., Tensor], styled: Sequence[StyledRows]
) -> Callable[..., Tensor]:
    """A cross-attention before its output projection: to the text, plus ours to the style."""

    def attend(query: Tensor, keys: Tensor, values: Tensor, options: Any) -> Tensor:
        attended = previous(query, keys, values, options)
        for rows in styled:
            style = rows.at(layer, query.shape[1])
            residual = style_residual(query[rows.index], style, options["n_heads"])
            attended = attended.index_add(0, rows.index, residual.to(attended))
        return attended

    return attend
