"""The tensors each file must hold, by rule.

Source: key lists of the released stylemaster.ckpt, controlnet.ckpt and stylecrafter_sdxl.ckpt;
deviation: none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import WeightsError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WanSizes:
    """Sizes of a native Wan transformer; the defaults are Wan 2.1 T2V 1.3B."""

    width: int = 1536
    ffn_width: int = 8960
    num_blocks: int = 30
    text_width: int = 4096
    freq_width: int = 256  # of the sinusoidal timestep embedding
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)


@dataclass(frozen=True)
class AdapterSizes:
    """Sizes of a style adapter; the defaults are the released one's."""

    width: int = 1536  # of the host's transformer
    num_blocks: int = 30
    style_width: int = 4096  # of the style tokens
    patch_width: int = 1280  # of the image encoder's patch features
    num_layers: int = 3  # of the q-former
    local_tokens: int = 2
    global_tokens: int = 14
    global_width: int = 1024  # of the image encoder's projected embedding
    contrastive_width: int = 0  # hidden width of the contrastive projection; 0: there is none


@dataclass(frozen=True)
class ControlNetSizes:
    """Sizes of a gray-tile ControlNet; the defaults are the released one's."""

    width: int = 1536
    ffn_width: int = 8960
    num_blocks: int = 15  # control blocks, one for every second block of the host
    text_width: int = 4096
    freq_width: int = 256
    in_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)


@dataclass(frozen=True)
class StyleCrafterSizes:
    """Sizes of StyleCrafter's encoder; the defaults are the released SDXL adapter's."""

    feature_width: int = 1280  # of the image encoder's features
    style_width: int = 2048  # of the style tokens
    text_width: int = 2048
    num_tokens: int = 16
    num_layers: int = 4  # of the query transformer
    num_scales: int = 70  # layers of the host that take the style
    scale_width: int = 512
    scale_num_layers: int = 2


@dataclass(frozen=True)
class StyleCrafterSdxlSizes:
    """Sizes of a StyleCrafter adapter for SDXL; the defaults are the released one's."""

    encoder: StyleCrafterSizes = StyleCrafterSizes()
    # Of the cross-attentions: down blocks, up blocks, middle.
    layer_widths: tuple[int, ...] = (640,) * 4 + (1280,) * 50 + (640,) * 6 + (1280,) * 10


@dataclass(frozen=True)
class StyleCrafterWanSizes:
    """Sizes of a StyleCrafter adapter for Wan; the defaults are for Wan 2.1 T2V 1.3B."""

    encoder: StyleCrafterSizes = StyleCrafterSizes(
        style_width=1536, text_width=4096, num_layers=3, num_scales=30
    )
    width: int = 1536  # of the transformer
    norm_style: bool = True


def expected_base_shapes(sizes: WanSizes | None = None) -> dict[str, Shape]:
    """Keys and shapes of a native Wan text-to-video transformer.

    Args:
        sizes: by default Wan 2.1 T2V 1.3B (825 tensors).

    Returns:
        Key to shape.
    """
    s = sizes or WanSizes()
    shapes = _embedding_shapes(s)
    for block in range(s.num_blocks):
        shapes |= _block_shapes(f"blocks.{block}.", s.width, s.ffn_width)
    shapes["head.modulation"] = (1, 2, s.width)
    out = s.out_channels * s.patch_size[0] * s.patch_size[1] * s.patch_size[2]
    return shapes | _linear("head.head", s.width, out)


def expected_adapter_shapes(sizes: AdapterSizes | None = None) -> dict[str, Shape]:
    """Keys and shapes of a style adapter: `style_model.*` and the image K and V of each block.

    Args:
        sizes: by default the release's (196 tensors, none of them of a contrastive projection).

    Returns:
        Key to shape.
    """
    s = sizes or AdapterSizes()
    shapes: dict[str, Shape] = {}
    for block in range(s.num_blocks):
        prefix = f"blocks.{block}.cross_attn."
        shapes |= _linear(f"{prefix}k_img", s.style_width, s.width)
        shapes |= _linear(f"{prefix}v_img", s.style_width, s.width)
        shapes[f"{prefix}norm_k_img.weight"] = (s.width,)
    shapes["style_model.style_emb"] = (1, s.local_tokens, s.patch_width)
    shapes["style_model.proj_patch"] = (s.patch_width, s.style_width)
    for layer in range(s.num_layers):
        shapes |= _query_layer(f"style_model.transformer_blocks.resblocks.{layer}.", s.patch_width)
    shapes |= _layer_norm("style_model.ln1", s.patch_width)
    shapes |= _layer_norm("style_model.ln2", s.patch_width)
    shapes |= _linear("style_model.proj", s.global_width, s.global_tokens * s.style_width)
    shapes |= _layer_norm("style_model.norm", s.style_width)
    if s.contrastive_width:
        shapes |= _linear("style_model.contrastive.fc1", s.global_width, s.contrastive_width)
        shapes |= _linear("style_model.contrastive.fc2", s.contrastive_width, s.global_width)
    return shapes


def expected_controlnet_shapes(sizes: ControlNetSizes | None = None) -> dict[str, Shape]:
    """Keys and shapes of a gray-tile ControlNet.

    Args:
        sizes: by default the release's (447 tensors).

    Returns:
        Key to shape.
    """
    s = sizes or ControlNetSizes()
    shapes = _embedding_shapes(s)
    for block in range(s.num_blocks):
        shapes |= _block_shapes(f"control_blocks.{block}.", s.width, s.ffn_width)
        shapes[f"zero_convs.{block}.weight"] = (s.width, s.width, 1)
        shapes[f"zero_convs.{block}.bias"] = (s.width,)
    return shapes


def expected_stylecrafter_encoder_shapes(
    sizes: StyleCrafterSizes | None = None,
) -> dict[str, Shape]:
    """Keys and shapes of StyleCrafter's encoder: `image_context_model.*`, `scale_predictor.*`.

    Args:
        sizes: by default the released SDXL adapter's (92 tensors).

    Returns:
        Key to shape.
    """
    s = sizes or StyleCrafterSizes()
    prefix = "image_context_model."
    shapes = _query_transformer(prefix, s.num_tokens, s.feature_width, s.num_layers, s.style_width)
    prefix = "scale_predictor."
    shapes |= _linear(f"{prefix}text_proj", s.text_width, s.scale_width)
    shapes |= _linear(f"{prefix}style_proj", s.style_width, s.scale_width)
    inner = f"{prefix}scale_predictor."
    shapes |= _query_transformer(
        inner, s.num_scales, s.scale_width, s.scale_num_layers, s.scale_width
    )
    shapes |= _linear(f"{prefix}out_proj.0", s.scale_width, 32)
    return shapes | _linear(f"{prefix}out_proj.2", 32, 1)


def expected_stylecrafter_sdxl_shapes(
    sizes: StyleCrafterSdxlSizes | None = None,
) -> dict[str, Shape]:
    """Keys and shapes of a StyleCrafter adapter for SDXL.

    Args:
        sizes: by default the release's (372 tensors).

    Returns:
        Key to shape.
    """
    s = sizes or StyleCrafterSdxlSizes()
    shapes = expected_stylecrafter_encoder_shapes(s.encoder)
    for index, width in enumerate(s.layer_widths):
        for name in ("to_k_style", "to_v_style"):
            shapes[sdxl_layer_key(index, f"{name}.weight")] = (width, s.encoder.style_width)
        shapes |= _layer_norm(sdxl_layer_key(index, "norm_style"), width)
    return shapes


def expected_stylecrafter_wan_shapes(
    sizes: StyleCrafterWanSizes | None = None,
) -> dict[str, Shape]:
    """Keys and shapes of a StyleCrafter adapter for Wan: its encoder, K, V and norms of each block.

    Args:
        sizes: by default those for Wan 2.1 T2V 1.3B.

    Returns:
        Key to shape.
    """
    s = sizes or StyleCrafterWanSizes()
    shapes = expected_stylecrafter_encoder_shapes(s.encoder)
    for block in range(s.encoder.num_scales):
        prefix = f"blocks.{block}.cross_attn."
        shapes |= _linear(f"{prefix}k_img", s.encoder.style_width, s.width)
        shapes |= _linear(f"{prefix}v_img", s.encoder.style_width, s.width)
        shapes[f"{prefix}norm_k_img.weight"] = (s.width,)
        if s.norm_style:
            shapes |= _layer_norm(f"{prefix}norm_style", s.width)
    return shapes


def stylecrafter_wan_sizes(shapes: Mapping[str, Shape]) -> StyleCrafterWanSizes:
    """Read the sizes of a StyleCrafter adapter for Wan off its shapes; as `stylecrafter_sizes`."""
    key = "blocks.0.cross_attn.k_img.weight"
    return StyleCrafterWanSizes(
        stylecrafter_sizes(shapes),
        _shape(shapes, key, 2, "a StyleCrafter adapter for Wan")[0],
        "blocks.0.cross_attn.norm_style.weight" in shapes,
    )


def sdxl_layer_key(index: int, name: str) -> str:
    """Name of a tensor of a layer: the release counts self-attentions, too, which have none."""
    return f"kv_attn_layers.{2 * index + 1}.{name}"


def stylecrafter_sizes(shapes: Mapping[str, Shape]) -> StyleCrafterSizes:
    """Read the sizes of StyleCrafter's encoder off an adapter's shapes.

    Args:
        shapes: key to shape.

    Returns:
        Sizes; that every tensor agrees with them is `check_keys`' matter.

    Raises:
        WeightsError: if a tensor that tells a size is missing.
    """
    what = "a StyleCrafter adapter"
    tokens, scales = "image_context_model", "scale_predictor.scale_predictor"
    _, num_tokens, feature_width = _shape(shapes, f"{tokens}.query_emb", 3, what)
    _, num_scales, scale_width = _shape(shapes, f"{scales}.query_emb", 3, what)
    return StyleCrafterSizes(
        feature_width=feature_width,
        style_width=_shape(shapes, f"{tokens}.proj", 2, what)[1],
        text_width=_shape(shapes, "scale_predictor.text_proj.weight", 2, what)[1],
        num_tokens=num_tokens,
        num_layers=_count(shapes, f"{tokens}.transformer_blocks.resblocks"),
        num_scales=num_scales,
        scale_width=scale_width,
        scale_num_layers=_count(shapes, f"{scales}.transformer_blocks.resblocks"),
    )


def stylecrafter_sdxl_sizes(shapes: Mapping[str, Shape]) -> StyleCrafterSdxlSizes:
    """Read the sizes of a StyleCrafter adapter for SDXL off its shapes; as `stylecrafter_sizes`."""
    encoder = stylecrafter_sizes(shapes)
    what = "a StyleCrafter adapter for SDXL"
    widths = [
        _shape(shapes, sdxl_layer_key(index, "to_k_style.weight"), 2, what)[0]
        for index in range(encoder.num_scales)
    ]
    return StyleCrafterSdxlSizes(encoder, tuple(widths))


def wan_sizes(shapes: Mapping[str, Shape]) -> WanSizes:
    """Read the sizes of a native Wan transformer off its shapes.

    Args:
        shapes: key to shape, without prefixes such as "diffusion_model.".

    Returns:
        Sizes; that every tensor agrees with them is `check_keys`' matter.

    Raises:
        WeightsError: if a tensor that tells a size is missing.
    """
    what = "a Wan transformer"
    patch = _shape(shapes, "patch_embedding.weight", 5, what)
    patch_volume = patch[2] * patch[3] * patch[4]
    return WanSizes(
        width=patch[0],
        ffn_width=_shape(shapes, "blocks.0.ffn.0.weight", 2, what)[0],
        num_blocks=_count(shapes, "blocks"),
        text_width=_shape(shapes, "text_embedding.0.weight", 2, what)[1],
        freq_width=_shape(shapes, "time_embedding.0.weight", 2, what)[1],
        in_channels=patch[1],
        out_channels=_shape(shapes, "head.head.weight", 2, what)[0] // patch_volume,
        patch_size=(patch[2], patch[3], patch[4]),
    )


def adapter_sizes(shapes: Mapping[str, Shape]) -> AdapterSizes:
    """Read the sizes of a style adapter off its shapes.

    Args:
        shapes: key to shape, without prefixes such as "diffusion_model.".

    Returns:
        Sizes; that every tensor agrees with them is `check_keys`' matter.

    Raises:
        WeightsError: if a tensor that tells a size is missing.
    """
    what = "a style adapter"
    width, style_width = _shape(shapes, "blocks.0.cross_attn.k_img.weight", 2, what)
    _, local_tokens, patch_width = _shape(shapes, "style_model.style_emb", 3, what)
    global_rows, global_width = _shape(shapes, "style_model.proj.weight", 2, what)
    contrastive_width = 0
    if any(key.startswith("style_model.contrastive.") for key in shapes):
        contrastive_width = _shape(shapes, "style_model.contrastive.fc1.weight", 2, what)[0]
    return AdapterSizes(
        width=width,
        num_blocks=_count(shapes, "blocks"),
        style_width=style_width,
        patch_width=patch_width,
        num_layers=_count(shapes, "style_model.transformer_blocks.resblocks"),
        local_tokens=local_tokens,
        global_tokens=global_rows // style_width,
        global_width=global_width,
        contrastive_width=contrastive_width,
    )


def controlnet_sizes(shapes: Mapping[str, Shape]) -> ControlNetSizes:
    """Read the sizes of a gray-tile ControlNet off its shapes.

    Args:
        shapes: key to shape.

    Returns:
        Sizes; that every tensor agrees with them is `check_keys`' matter.

    Raises:
        WeightsError: if a tensor that tells a size is missing.
    """
    what = "a gray-tile ControlNet"
    patch = _shape(shapes, "patch_embedding.weight", 5, what)
    return ControlNetSizes(
        width=patch[0],
        ffn_width=_shape(shapes, "control_blocks.0.ffn.0.weight", 2, what)[0],
        num_blocks=_count(shapes, "control_blocks"),
        text_width=_shape(shapes, "text_embedding.0.weight", 2, what)[1],
        freq_width=_shape(shapes, "time_embedding.0.weight", 2, what)[1],
        in_channels=patch[1],
        patch_size=(patch[2], patch[3], patch[4]),
    )


def _embedding_shapes(sizes: WanSizes | ControlNetSizes) -> dict[str, Shape]:
    width = sizes.width
    return (
        {
            "patch_embedding.weight": (width, sizes.in_channels, *sizes.patch_size),
            "patch_embedding.bias": (width,),
        }
        | _linear("text_embedding.0", sizes.text_width, width)
        | _linear("text_embedding.2", width, width)
        | _linear("time_embedding.0", sizes.freq_width, width)
        | _linear("time_embedding.2", width, width)
        | _linear("time_projection.1", width, 6 * width)
    )


def _block_shapes(prefix: str, width: int, ffn_width: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{prefix}modulation": (1, 6, width)}
    for attention in ("self_attn", "cross_attn"):
        for name in "qkvo":
            shapes |= _linear(f"{prefix}{attention}.{name}", width, width)
        shapes[f"{prefix}{attention}.norm_q.weight"] = (width,)
        shapes[f"{prefix}{attention}.norm_k.weight"] = (width,)
    shapes |= _layer_norm(f"{prefix}norm3", width)
    shapes |= _linear(f"{prefix}ffn.0", width, ffn_width)
    return shapes | _linear(f"{prefix}ffn.2", ffn_width, width)


def _query_transformer(
    prefix: str, num_queries: int, width: int, num_layers: int, out_width: int
) -> dict[str, Shape]:
    """Shapes of a query transformer under StyleCrafter's names."""
    shapes: dict[str, Shape] = {
        f"{prefix}query_emb": (1, num_queries, width),
        f"{prefix}proj": (width, out_width),
    }
    for layer in range(num_layers):
        shapes |= _query_layer(f"{prefix}transformer_blocks.resblocks.{layer}.", width)
    return shapes | _layer_norm(f"{prefix}ln1", width) | _layer_norm(f"{prefix}ln2", width)


def _query_layer(prefix: str, width: int) -> dict[str, Shape]:
    return (
        _layer_norm(f"{prefix}ln_1", width)
        | {
            f"{prefix}attn.in_proj_weight": (3 * width, width),
            f"{prefix}attn.in_proj_bias": (3 * width,),
        }
        | _linear(f"{prefix}attn.out_proj", width, width)
        | _layer_norm(f"{prefix}ln_2", width)
        | _linear(f"{prefix}mlp.c_fc", width, 4 * width)
        | _linear(f"{prefix}mlp.c_proj", 4 * width, width)
    )


def _linear(name: str, in_features: int, out_features: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def _layer_norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    # Not the highest number: a lone "blocks.999999999." must not make a list that long.
    return len({match.group(1) for key in shapes if (match := pattern.match(key))})


def _shape(shapes: Mapping[str, Shape], key: str, dimensions: int, what: str) -> Shape:
    shape = shapes.get(key)
    if shape is None or len(shape) != dimensions:
        came = "is missing" if shape is None else f"has the shape {tuple(shape)}"
        raise WeightsError(
            f"This is not {what}: {key} {came}, a tensor of {dimensions} dimensions was expected. "
            "Choose a file of that kind, or download it again if it should be one."
        )
    return tuple(shape)
