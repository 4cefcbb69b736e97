"""What a state dict is, taken apart and checked by its keys and shapes.

The maps between namings live in `key_maps` and are offered here, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import WeightsError
from .key_maps import (
    diffusers_block_key_to_native,
    diffusers_to_native,
    native_block_key_to_diffusers,
    native_to_diffusers,
    open_clip_to_hf_vision,
    umt5_native_to_hf,
    vae_native_to_diffusers,
)
from .shapes import Shape

__all__ = [
    "Kind",
    "StylePathReport",
    "check_keys",
    "describe_kind",
    "detect_kind",
    "diffusers_block_key_to_native",
    "diffusers_to_native",
    "native_block_key_to_diffusers",
    "native_to_diffusers",
    "open_clip_to_hf_vision",
    "shapes_of",
    "split_release",
    "strip_prefix",
    "style_path_report",
    "umt5_native_to_hf",
    "vae_native_to_diffusers",
]

Value = TypeVar("Value")

Kind = Literal[
    "stylemaster",
    "style_adapter",
    "gray_tile_controlnet",
    "wan_native",
    "wan_diffusers",
    "motion_adapter",
    "wan_vae_native",
    "wan_vae_diffusers",
    "patch_vae",
    "clip_vision_hf",
    "clip_vision_open_clip",
    "umt5_hf",
    "umt5_native",
    "style_tokens",
    "stylecrafter_sdxl",
    "stylecrafter_wan",
    "stylecrafter_video",
    "stylecrafter_temporal",
    "videocrafter",
    "videocrafter_unet",
    "sd_vae",
    "clip_text_open_clip",
    "unknown",
]

_DESCRIPTIONS: dict[Kind, str] = {
    "stylemaster": "the whole StyleMaster release, base model included; make a style adapter of it "
    "with `stylemaster weights convert` and put that into models/stylemaster",
    "style_adapter": "a StyleMaster style adapter; put it into models/stylemaster",
    "gray_tile_controlnet": "a StyleMaster gray-tile ControlNet; put it into models/controlnet",
    "wan_native": "a Wan base model in ComfyUI's format; put it into models/diffusion_models",
    "wan_diffusers": "a Wan base model in diffusers' format, for the command line; in ComfyUI use "
    "the file from Comfy-Org/Wan_2.1_ComfyUI_repackaged",
    "motion_adapter": "a motion adapter (a LoRA on the self-attention of Wan); put it into "
    "models/loras",
    "wan_vae_native": "a Wan VAE in ComfyUI's format; put it into models/vae",
    "wan_vae_diffusers": "a Wan VAE in diffusers' format, for the command line",
    "patch_vae": "a StyleMaster patch VAE, a small stand-in for Wan's VAE",
    "clip_vision_hf": "a CLIP image encoder; put it into models/clip_vision",
    "clip_vision_open_clip": "a CLIP model in open_clip's format, for the command line; in ComfyUI "
    "use clip_vision_h.safetensors",
    "umt5_hf": "a UMT5 text encoder; put it into models/text_encoders",
    "umt5_native": "a UMT5 text encoder in Wan's own format, for the command line; in ComfyUI use "
    "the file from Comfy-Org/Wan_2.1_ComfyUI_repackaged",
    "style_tokens": "saved style tokens of one or more style images",
    "stylecrafter_sdxl": "a StyleCrafter adapter for SDXL; put it into models/stylecrafter",
    "stylecrafter_wan": "a StyleCrafter adapter for Wan; put it into models/stylecrafter",
    "stylecrafter_video": "a StyleCrafter adapter for VideoCrafter; put it into "
    "models/stylecrafter",
    "stylecrafter_temporal": "temporal layers of VideoCrafter, trained for StyleCrafter; put "
    "them into models/stylecrafter",
    "videocrafter": "the whole checkpoint of VideoCrafter; make files of its parts with "
    "`stylemaster weights convert`",
    "videocrafter_unet": "VideoCrafter's UNet; put it into models/diffusion_models",
    "sd_vae": "Stable Diffusion's VAE; put it into models/vae",
    "clip_text_open_clip": "CLIP's text encoder in open_clip's format; put it into "
    "models/text_encoders",
    "unknown": "of a kind that StyleMaster does not know",
}

_ADAPTER_PARTS = ("style_model.", "image_context_model.", "scale_predictor.")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_IMAGE_KEY = re.compile(
    r"blocks\.\d+\.cross_attn\.(k_img|v_img|norm_k_img|norm_style)\.(weight|bias)"
)
_LORA_KEY = re.compile(r"(.+)\.lora_(?:A|B|down|up)(?:\.default)?\.weight")
_MOTION_TARGET = re.compile(r"blocks\.\d+\.self_attn\.[qkvo]")
_NORM_KEY = re.compile(r"blocks\.(\d+)\.cross_attn\.norm_k_img\.weight")
_LISTED = 10


class StylePathReport(NamedTuple):
    """What the image K of a style adapter can do."""

    max_norm_k_img: tuple[float, ...]  # largest |norm_k_img.weight| of each block
    is_uniform: bool  # True if style attention is uniform in every block
    message: str  # for the user


def shapes_of(state_dict: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shapes of all tensors.

    Args:
        state_dict: tensors on any device, "meta" included.

    Returns:
        Key to shape.
    """
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def strip_prefix(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Take "model.diffusion_model." or "diffusion_model." off the front of every key.

    Args:
        state_dict: any mapping by key.

    Returns:
        The same values.

    Raises:
        WeightsError: if two keys become one.
    """
    result: dict[str, Value] = {}
    for key, value in state_dict.items():
        stripped = next((key[len(p) :] for p in _PREFIXES if key.startswith(p)), key)
        if stripped in result:
            raise WeightsError(
                f"The file holds {stripped!r} twice, with and without prefix {_PREFIXES}; two "
                "models seem to be merged. Use a file of one model."
            )
        result[stripped] = value
    return result


def detect_kind(shapes: Mapping[str, Shape]) -> Kind:
    """Tell what a file holds from its keys.

    Args:
        shapes: key to shape, with or without a "diffusion_model." prefix.

    Returns:
        The kind; "unknown" if no rule applies.
    """
    keys = set(strip_prefix(shapes))
    return _style_or_host(keys) or _motion_adapter(keys) or _encoder_or_vae(keys) or "unknown"


def describe_kind(kind: Kind) -> str:
    """A kind in words for users, with the folder where such a file belongs.

    Args:
        kind: a result of `detect_kind`.

    Returns:
        A noun phrase that fits after "This file is".
    """
    return _DESCRIPTIONS[kind]


def split_release(state_dict: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """Split the whole release into the Wan base and the style adapter.

    Args:
        state_dict: keys of stylemaster.ckpt without prefix.

    Returns:
        (base, adapter); the adapter is `style_model.*`, or StyleCrafter's encoder, and the image K
        and V of each block. Each is empty if the file has none of it.
    """
    base: dict[str, Value] = {}
    adapter: dict[str, Value] = {}
    for key, value in state_dict.items():
        in_adapter = key.startswith(_ADAPTER_PARTS) or _IMAGE_KEY.fullmatch(key) is not None
        (adapter if in_adapter else base)[key] = value
    return base, adapter


def check_keys(
    state_dict_shapes: Mapping[str, Shape], expected_shapes: Mapping[str, Shape], what: str
) -> None:
    """Compare keys and shapes with what is expected.

    Args:
        state_dict_shapes: what came.
        expected_shapes: what was expected.
        what: the thing in words, such as "style adapter my.safetensors".

    Raises:
        WeightsError: with the count and the first ten of the missing, the unexpected and the
            wrongly shaped keys.
    """
    missing = sorted(set(expected_shapes) - set(state_dict_shapes))
    unexpected = sorted(set(state_dict_shapes) - set(expected_shapes))
    wrong = [
        f"{key} {tuple(state_dict_shapes[key])} instead of {tuple(shape)}"
        for key, shape in sorted(expected_shapes.items())
        if key in state_dict_shapes and tuple(state_dict_shapes[key]) != tuple(shape)
    ]
    if not (missing or unexpected or wrong):
        return
    parts = [
        f"{len(names)} {label}: {', '.join(names[:_LISTED])}{', ...' * (len(names) > _LISTED)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", wrong),
        )
        if names
    ]
    raise WeightsError(
        f"The tensors of {what} are not those expected ({len(state_dict_shapes)} came, "
        f"{len(expected_shapes)} expected).\n" + "\n".join(parts) + "\nUse the file that was "
        "published for this model, or download it again."
    )


def style_path_report(state_dict: Mapping[str, Tensor]) -> StylePathReport:
    """Look whether the style attention of an adapter can tell style tokens apart.

    The released training code starts `norm_k_img` and `k_img` at zero, where neither ever gets a
    gradient. A norm of zeros makes every style key zero, so that all tokens get the same weight.

    Args:
        state_dict: an adapter or the whole release, without prefix.

    Returns:
        The largest |norm_k_img.weight| of each block, and what that means in words.

    Raises:
        WeightsError: if there is no `norm_k_img`.

    Source: StyleMaster release, initialisation of the image K; deviation: none.
    """
    by_block = {
        int(match.group(1)): float(value.detach().to(torch.float32).abs().max())
        for key, value in state_dict.items()
        if (match := _NORM_KEY.fullmatch(key))
    }
    if not by_block:
        raise WeightsError(
            "There is no blocks.N.cross_attn.norm_k_img.weight, so this is not a style adapter. "
            "Choose a StyleMaster adapter or the released stylemaster.ckpt."
        )
    maxima = tuple(by_block[block] for block in sorted(by_block))
    alive = sum(value != 0.0 for value in maxima)
    if alive == 0:
        message = (
            "style attention is uniform: the file's norm_k_img is zero in all "
            f"{len(maxima)} blocks, so every style token gets the same weight; no part of the "
            "video can choose among the style tokens; the style still acts through v_img, as one "
            "average over all of them"
        )
    elif alive < len(maxima):
        message = (
            f"style attention works in {alive} of {len(maxima)} blocks; in the others norm_k_img "
            "is zero and every style token gets the same weight"
        )
    else:
        message = (
            f"style attention works in all {len(maxima)} blocks (norm_k_img reaches "
            f"{min(maxima):.3g} to {max(maxima):.3g})"
        )
    return StylePathReport(maxima, alive == 0, message)


def _style_or_host(keys: set[str]) -> Kind | None:
    has_wan = "head.modulation" in keys and "blocks.0.self_attn.q.weight" in keys
    if "style_tokens" in keys:
        return "style_tokens"
    if _any_starts(keys, ("control_blocks.", "zero_convs.")):
        return "gray_tile_controlnet"
    if _any_starts(keys, ("style_model.",)):
        return "stylemaster" if has_wan else "style_adapter"
    if has_wan:
        return "wan_native"
    if _any_starts(keys, ("image_context_model.",)):
        if any(_IMAGE_KEY.fullmatch(key) for key in keys):
            return "stylecrafter_wan"
        numbered = any(re.match(r"kv_attn_layers\.\d+\.", key) for key in keys)
        return "stylecrafter_sdxl" if numbered else "stylecrafter_video"
    if any(_IMAGE_KEY.fullmatch(key) for key in keys):
        return "style_adapter"
    if {"scale_shift_table", "blocks.0.attn1.to_q.weight"} <= keys:
        return "wan_diffusers"
    return _videocrafter(keys)


def _videocrafter(keys: set[str]) -> Kind | None:
    if "init_attn.0.proj_in.weight" not in keys:
        return None
    if "input_blocks.0.0.weight" not in keys:
        return "stylecrafter_temporal"
    return "videocrafter" if _any_starts(keys, ("first_stage_model.",)) else "videocrafter_unet"


def _motion_adapter(keys: set[str]) -> Kind | None:
    targets = [match.group(1) for key in keys if (match := _LORA_KEY.fullmatch(key))]
    if targets and all(_MOTION_TARGET.fullmatch(target) for target in targets):
        return "motion_adapter"
    return None


def _encoder_or_vae(keys: set[str]) -> Kind | None:
    # RMS norms ("gamma") set the Wan VAE apart from image VAEs of the same block names.
    if "decoder.middle.0.residual.0.gamma" in keys:
        return "wan_vae_native"
    if "decoder.mid_block.resnets.0.norm1.gamma" in keys:
        return "wan_vae_diffusers"
    if {"patch_encoder.linear.weight", "patch_decoder.linear.weight"} <= keys:
        return "patch_vae"
    if {"encoder.down.0.block.0.norm1.weight", "quant_conv.weight"} <= keys:
        return "sd_vae"
    # A class token sets CLIP apart from SigLIP.
    if "vision_model.embeddings.class_embedding" in keys:
        return "clip_vision_hf"
    if {"visual.class_embedding", "visual.transformer.resblocks.0.ln_1.weight"} <= keys:
        return "clip_vision_open_clip"
    if {"transformer.resblocks.0.ln_1.weight", "token_embedding.weight"} <= keys:
        return "clip_text_open_clip"
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in keys:
        # UMT5 has position biases in every layer, T5 only in the first.
        bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
        has_second = "encoder.block.1.layer.0.SelfAttention.q.weight" in keys
        return "umt5_hf" if bias in keys or not has_second else None
    if {"token_embedding.weight", "blocks.0.attn.q.weight"} <= keys:
        return "umt5_native"
    return None


def _any_starts(keys: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in keys)
