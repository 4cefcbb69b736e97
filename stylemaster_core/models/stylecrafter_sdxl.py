"""StyleCrafter's adapter for SDXL: what it adds in each cross-attention of the UNet.

Layers are counted in the order of diffusers: those of the down blocks, then of the up blocks, then
of the middle block (SDXL: 24 + 36 + 10). Hosts call `style_residual` with a layer's `BlockStyle`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, LayoutError, WeightsError
from ..weights.shapes import (
    expected_stylecrafter_sdxl_shapes,
    sdxl_layer_key,
    stylecrafter_sdxl_sizes,
)
from ..weights.stylecrafter_video_keys import (
    stylecrafter_sdxl_to_video,
    stylecrafter_video_to_sdxl,
    video_layer_names,
)
from .decoupled_attention import (
    NORM_STYLE_EPS,
    BlockStyle,
    StyleRegion,
    region_masks,
    scaled_norm,
)
from .stylecrafter import (
    StyleCrafterEncoder,
    load_stylecrafter_encoder,
    stylecrafter_heads,
)

logger = logging.getLogger("stylemaster")

MAX_TEXT_TOKENS = 77  # of the prompt, that the scale predictor looks at
VIDEO_NUM_HEADS = 8  # of both query transformers of the video release
NUM_LEVELS = 4  # resolutions of a UNet, from that of the latents on
LICENCE_NOTE = (
    "StyleCrafter's released weights: their authors allow research and non-commercial use "
    "(README of GongyeLiu/StyleCrafter and of its SDXL version), though the hub tags them "
    "apache-2.0"
)


class StyleLayer(nn.Module):
    """K, V and LayerNorm of one cross-attention (names of the release)."""

    def __init__(self, style_width: int, width: int) -> None:
        super().__init__()
        self.to_k_style = nn.Linear(style_width, width, bias=False)
        self.to_v_style = nn.Linear(style_width, width, bias=False)
        self.norm_style = nn.LayerNorm(width, eps=NORM_STYLE_EPS)


class LayerKV(NamedTuple):
    """What one layer keeps of a style: all that its projections were needed for."""

    keys: Tensor  # [B, S, D]
    values: Tensor  # [B, S, D]
    norm: nn.LayerNorm  # over D


class StyleCrafterSdxl(nn.Module):
    """The adapter: an encoder, and projections of its tokens for every cross-attention.

    `keys_values` is made once per style; then `free_projections` gives back 341 of 431 million
    numbers.
    """

    # Of the video release's adapter (`load_stylecrafter_video`); empty for SDXL's.
    video_layers: Sequence[str] = ()
    name: str = ""  # of its file

    def __init__(self, encoder: StyleCrafterEncoder, layer_widths: Sequence[int]) -> None:
        super().__init__()
        self.layer_widths = list(layer_widths)
        self.encoder = encoder
        style_width = encoder.image_context_model.projection.shape[1]
        self.layers = nn.ModuleList(StyleLayer(style_width, width) for width in layer_widths)

    @property
    def method(self) -> str:
        """What a style that is made with it says of its origin."""
        return "stylecrafter-video" if self.video_layers else "stylecrafter-sdxl"

    def free_projections(self) -> None:
        """Forget the projections; only `encoder` and `gains` work afterwards."""
        self.layers = nn.ModuleList()

    @torch.no_grad()
    def keys_values(self, tokens: Tensor) -> list[LayerKV]:
        """Keys and values of a style in each layer, on the adapter's device, float32.

        Args:
            tokens: [B, S, Ds] of `encoder`.

        Raises:
            LayoutError: for tokens of another width.
            WeightsError: after `free_projections`.
        """
        if not self.layers:
            raise WeightsError("the adapter's projections were freed; load the adapter again")
        width = self.encoder.image_context_model.projection.shape[1]
        if tokens.ndim != 3 or tokens.shape[-1] != width:
            raise LayoutError(
                f"style tokens must be [B, S, {width}] for this adapter, got "
                f"{list(tokens.shape)}; encode the style with the adapter that it is used with"
            )
        tokens = tokens.to(self.encoder.image_context_model.projection.device).float()
        layers = [layer for layer in self.layers if isinstance(layer, StyleLayer)]
        made = []
        for layer in layers:
            shape = (*tokens.shape[:2], layer.to_k_style.out_features)
            norm = copy.deepcopy(layer.norm_style).float()  # so that nothing of the adapter is held
            made.append(LayerKV(tokens.new_empty(shape), tokens.new_empty(shape), norm))
        # Widened one after another in the same place: with a copy of each, made and freed between
        # what stays, the process kept 1.3 GB afterwards (measured in ComfyUI).
        place = tokens.new_empty(max(layer.to_k_style.weight.numel() for layer in layers))
        for layer, kept in zip(layers, made, strict=True):
            for linear, result in ((layer.to_k_style, kept.keys), (layer.to_v_style, kept.values)):
                weight = place[: linear.weight.numel()].view_as(linear.weight)
                torch.matmul(tokens, weight.copy_(linear.weight).T, out=result)
        return made

    @torch.no_grad()
    def gains(self, text: Tensor, tokens: Tensor) -> Tensor:
        """How strongly each layer takes the style: [B, layers] in 0..2, for `StyleRegion.gains`.

        Args:
            text: [B or 1, L, Dt] features of the positive prompt; of a long one the first 77.
            tokens: [B or 1, S, Ds] style tokens.
        """
        return self.encoder.gains(text[:, :MAX_TEXT_TOKENS], tokens)

    def release_state_dict(self) -> dict[str, Tensor]:
        """Weights under the names of the release."""
        weights = self.encoder.release_state_dict()
        for index, layer in enumerate(self.layers):
            weights |= {sdxl_layer_key(index, k): v for k, v in layer.state_dict().items()}
        if self.video_layers:
            return stylecrafter_sdxl_to_video(weights, self.video_layers)
        return weights


def load_stylecrafter_sdxl(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> StyleCrafterSdxl:
    """Build the adapter from the release's weights, and log the licence note.

    Args:
        state_dict: stylecrafter_sdxl.ckpt, or what `stylemaster weights convert` made of it. All
            sizes are read off it; tensors are not copied.
        metadata: of the file; `style_num_heads` and `scale_num_heads` where it is not width / 64.

    Returns:
        a frozen module; see `encoder`, `keys_values` and `gains`.

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    from ..weights.state_dict import check_keys, shapes_of

    shapes = shapes_of(state_dict)
    sizes = stylecrafter_sdxl_sizes(shapes)
    check_keys(shapes, expected_stylecrafter_sdxl_shapes(sizes), "StyleCrafter adapter for SDXL")
    encoder = load_stylecrafter_encoder(state_dict, **stylecrafter_heads(metadata or {}))
    with torch.device("meta"):
        module = StyleCrafterSdxl(encoder, sizes.layer_widths)
    for index, layer in enumerate(module.layers):
        names = list(layer.state_dict())
        weights = {name: state_dict[sdxl_layer_key(index, name)] for name in names}
        layer.load_state_dict(weights, assign=True)
    logger.warning(LICENCE_NOTE)
    return module.requires_grad_(False).eval()


def load_stylecrafter_video(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> StyleCrafterSdxl:
    """Build the adapter for VideoCrafter from the video release's weights.

    It is the same adapter in other sizes, once its layers are counted as SDXL's are: down, up,
    middle.

    Args:
        state_dict: adapter_v1.pth, or what `stylemaster weights convert` made of it.
        metadata: of the file; `style_num_heads` and `scale_num_heads` where it is not 8.

    Returns:
        as `load_stylecrafter_sdxl`.

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    heads = dict.fromkeys(("style_num_heads", "scale_num_heads"), str(VIDEO_NUM_HEADS))
    module = load_stylecrafter_sdxl(
        stylecrafter_video_to_sdxl(state_dict), heads | dict(metadata or {})
    )
    module.video_layers = video_layer_names(state_dict)
    return module


def layer_styles(
    regions: Sequence[StyleRegion], keys_values: Sequence[Sequence[LayerKV]], like: Tensor
) -> list[BlockStyle]:
    """What each layer adds, but for the masks, which depend on its resolution (`level_masks`).

    Args:
        regions: styles, with gains (without: all 1), strength and perhaps strengths per layer.
        keys_values: of each region.
        like: any tensor of the wanted device and dtype.

    Returns:
        for each layer a `BlockStyle` in which "no style" is nothing.

    Raises:
        ConfigError, LayoutError: for strengths or gains of another number of layers.
    """
    num_layers = len(keys_values[0])
    strengths = [_strengths(region, num_layers) for region in regions]
    styles = []
    for index in range(num_layers):
        layers = [kv[index] for kv in keys_values]
        norms = []
        for layer, strength in zip(layers, strengths, strict=True):
            weight, bias = scaled_norm(layer.norm, strength[:, index].to(layer.keys.device))
            norms.append((weight.to(like), bias.to(like)))
        styles.append(
            BlockStyle(
                tuple(layer.keys.to(like) for layer in layers),
                tuple(layer.values.to(like) for layer in layers),
                (),
                None,
                tuple(norms),
            )
        )
    return styles


def _strengths(region: StyleRegion, num_layers: int) -> Tensor:
    """[B or 1, layers]: strength, strength per layer and gain."""
    scales = [1.0] * num_layers if region.block_scales is None else list(region.block_scales)
    gains = torch.ones(1, num_layers) if region.gains is None else region.gains.float().cpu()
    if len(scales) != num_layers:
        raise ConfigError(
            f"got strengths for {len(scales)} layers, but the model has {num_layers} that take a "
            "style"
        )
    if gains.shape[1] != num_layers:
        raise LayoutError(
            f"got gains for {gains.shape[1]} layers, the adapter has {num_layers}; predict them "
            "with the adapter that the style is used with"
        )
    return region.scale * gains * torch.tensor(scales)


def level_masks(
    regions: Sequence[StyleRegion], size: tuple[int, int, int], like: Tensor
) -> dict[int, tuple[Tensor, ...]]:
    """Masks for `BlockStyle.masks` by a layer's number of tokens; all empty without masks.

    Args:
        regions: styles.
        size: frames, height and width of the latents; each frame is a row of the batch.
        like: any tensor of the wanted device and dtype.

    Returns:
        masks [frames or 1, tokens, 1].
    """
    masks: dict[int, tuple[Tensor, ...]] = {}
    frames, height, width = size
    if all(region.mask is None or region.mask.ndim == 2 for region in regions):
        frames = 1
    for _ in range(NUM_LEVELS):
        level = region_masks(regions, (frames, height, width))
        masks[height * width] = tuple(
            mask.view(frames, height * width, 1).to(like) for mask in level
        )
        height, width = -(-height // 2), -(-width // 2)
    return masks
