"""Key maps between the namings of the same weights: native Wan, diffusers, open_clip, Hugging Face.

Every map renames or splits tensors and changes no number. A key that has no rule is an error with
its name: a file that is read by half would run and give wrong pictures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from ..errors import UnsupportedHostError, WeightsError

Value = TypeVar("Value")

# Native name and diffusers name of each part; ".weight" and ".bias" stay as they are.
_BLOCK_PARTS = (
    ("modulation", "scale_shift_table"),
    *(
        (f"{native}.{part}", f"{diffusers}.{diffusers_part}")
        for native, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, diffusers_part in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    ),
    # Native norm1 and norm2 have no weights, so the one norm that has them counts differently.
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
)
_TOP_PARTS = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
)
_BLOCK_TO_DIFFUSERS = dict(_BLOCK_PARTS)
_BLOCK_TO_NATIVE = {diffusers: native for native, diffusers in _BLOCK_PARTS}
_TOP_TO_DIFFUSERS = dict(_TOP_PARTS)
_TOP_TO_NATIVE = {diffusers: native for native, diffusers in _TOP_PARTS}

_BLOCK_KEY = re.compile(r"(blocks\.\d+\.)(.+)")


def native_block_key_to_diffusers(rest: str) -> str:
    """Rename one key of a Wan block, without its "blocks.N." or "control_blocks.N.".

    Args:
        rest: such as "self_attn.q.weight".

    Returns:
        Such as "attn1.to_q.weight".

    Raises:
        WeightsError: if there is no such key in a block.
    """
    return _rename(rest, _BLOCK_TO_DIFFUSERS, "a native Wan block")


def diffusers_block_key_to_native(rest: str) -> str:
    """Rename one key of a diffusers Wan block, without its "blocks.N.".

    Args:
        rest: such as "attn1.to_q.weight".

    Returns:
        Such as "self_attn.q.weight".

    Raises:
        WeightsError: if there is no such key in a block.
    """
    return _rename(rest, _BLOCK_TO_NATIVE, "a diffusers Wan block")


def native_to_diffusers(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename a native Wan text-to-video transformer to diffusers' `WanTransformer3DModel`.

    Args:
        state_dict: native keys without prefix (`strip_prefix`) and without the style adapter
            (`split_release`); the values are passed on.

    Returns:
        The same values under diffusers' keys.

    Raises:
        WeightsError: if a key belongs to something else.
    """
    return _map_keys(state_dict, _BLOCK_TO_DIFFUSERS, _TOP_TO_DIFFUSERS, "a native Wan transformer")


def diffusers_to_native(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename diffusers' `WanTransformer3DModel` to the native Wan transformer.

    Args:
        state_dict: diffusers keys; the values are passed on.

    Returns:
        The same values under native keys.

    Raises:
        WeightsError: if a key belongs to something else.
    """
    return _map_keys(state_dict, _BLOCK_TO_NATIVE, _TOP_TO_NATIVE, "a diffusers Wan transformer")


def vae_native_to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a native Wan 2.1 VAE to diffusers' `AutoencoderKLWan`.

    Args:
        state_dict: keys of Wan2.1_VAE.pth or wan_2.1_vae.safetensors.

    Returns:
        The same tensors under diffusers' keys.

    Raises:
        UnsupportedHostError: if the installed diffusers has no converter.

    Source: the converter of diffusers itself.
    """
    try:
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    except ImportError as error:
        raise UnsupportedHostError(
            "Reading a native Wan VAE needs diffusers 0.35 or newer with its "
            "convert_wan_vae_to_diffusers. Install it with `pip install -U diffusers`."
        ) from error
    return convert_wan_vae_to_diffusers(dict(state_dict))


def open_clip_to_hf_vision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's image tower to transformers' `CLIPVisionModelWithProjection`.

    The text tower is left out. q, k and v, one matrix there, become three; the projection is
    stored transposed.

    Args:
        state_dict: keys "visual.*" of an open_clip checkpoint, others are ignored.

    Returns:
        Keys "vision_model.*" and "visual_projection.weight".

    Raises:
        WeightsError: if there is no image tower or one of its keys has no rule.

    Source: parameter names of open_clip and of transformers; deviation: none.
    """
    parts = {
        "conv1": "vision_model.embeddings.patch_embedding",
        "ln_pre": "vision_model.pre_layrnorm",
        "ln_post": "vision_model.post_layernorm",
    }
    what = "an open_clip image tower"
    result: dict[str, Tensor] = {}
    for full_key, value in state_dict.items():
        if not full_key.startswith("visual."):
            continue
        key = full_key.removeprefix("visual.")
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", key)
        if key == "class_embedding":
            result["vision_model.embeddings.class_embedding"] = value
        elif key == "positional_embedding":
            result["vision_model.embeddings.position_embedding.weight"] = value
        elif key == "proj":
            result["visual_projection.weight"] = value.T.contiguous()
        elif layer is None:
            result[_rename(key, parts, what)] = value
        else:
            prefix = f"vision_model.encoder.layers.{layer.group(1)}."
            result |= _open_clip_layer(prefix, layer.group(2), value, what)
    if not result:
        raise WeightsError(
            "No key starts with 'visual.', so there is no open_clip image tower. Choose an "
            "open_clip checkpoint."
        )
    return result


def open_clip_to_hf_text(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's text tower to transformers' `CLIPTextModel`, but for its last layer.

    What remains ends with the last layer but one and the final norm, as SD 2 reads its prompts.

    Args:
        state_dict: keys "transformer.resblocks.N.*" and the embeddings; `text_projection` and
            `logit_scale` are left out.

    Returns:
        Keys "embeddings.*", "encoder.*" and "final_layer_norm.*".

    Raises:
        WeightsError: if a key has no rule.

    Source: parameter names of open_clip and of transformers; deviation: none.
    """
    parts = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
    what = "an open_clip text tower"
    layers = [
        (re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", key), key) for key in state_dict
    ]
    last = max((int(layer[1]) for layer, _ in layers if layer), default=0)
    result: dict[str, Tensor] = {}
    for layer, key in layers:
        value = state_dict[key]
        if key in ("text_projection", "logit_scale"):
            continue
        if key == "positional_embedding":
            result["embeddings.position_embedding.weight"] = value
        elif layer is None:
            result[_rename(key, parts, what)] = value
        elif int(layer[1]) < last:
            result |= _open_clip_layer(f"encoder.layers.{layer[1]}.", layer[2], value, what)
    return result


def _open_clip_layer(prefix: str, rest: str, value: Tensor, what: str) -> dict[str, Tensor]:
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    fused = re.fullmatch(r"attn\.in_proj_(weight|bias)", rest)
    if fused is None:
        return {prefix + _rename(rest, parts, what): value}
    thirds = zip("qkv", value.chunk(3), strict=True)
    return {f"{prefix}self_attn.{name}_proj.{fused[1]}": third.clone() for name, third in thirds}


def umt5_native_to_hf(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename Wan's own UMT5 encoder to transformers' `UMT5EncoderModel`.

    Args:
        state_dict: keys of models_t5_umt5-xxl-enc-bf16.pth; the values are passed on.

    Returns:
        The same values; the embedding stands under both of its tied names.

    Raises:
        WeightsError: if a key has no rule.

    Source: parameter names of Wan 2.1 and of transformers; deviation: none.
    """
    parts = {
        "norm1": "layer.0.layer_norm",
        "attn.q": "layer.0.SelfAttention.q",
        "attn.k": "layer.0.SelfAttention.k",
        "attn.v": "layer.0.SelfAttention.v",
        "attn.o": "layer.0.SelfAttention.o",
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "norm2": "layer.1.layer_norm",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
    }
    what = "Wan's own UMT5 encoder"
    result: dict[str, Value] = {}
    for key, value in state_dict.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if block is not None:
            result[f"encoder.block.{block.group(1)}.{_rename(block.group(2), parts, what)}"] = value
        elif key == "token_embedding.weight":
            result["shared.weight"] = value
            result["encoder.embed_tokens.weight"] = value
        else:
            result[_rename(key, {"norm": "encoder.final_layer_norm"}, what)] = value
    return result


def _map_keys(
    state_dict: Mapping[str, Value],
    in_block: Mapping[str, str],
    top: Mapping[str, str],
    what: str,
) -> dict[str, Value]:
    result: dict[str, Value] = {}
    for key, value in state_dict.items():
        block = _BLOCK_KEY.fullmatch(key)
        if block is not None:
            result[block[1] + _rename(block[2], in_block, what, block[1])] = value
        else:
            result[_rename(key, top, what)] = value
    return result


def _rename(key: str, parts: Mapping[str, str], what: str, prefix: str = "") -> str:
    if key in parts:
        return parts[key]
    stem, _, leaf = key.rpartition(".")
    if leaf in ("weight", "bias") and stem in parts:
        return f"{parts[stem]}.{leaf}"
    raise WeightsError(
        f"{prefix + key!r} is no key of {what}. The file holds more than that, or "
        "something else (a style adapter, an image-to-video model, fp8 scales): split it first, or "
        "choose a plain file."
    )
