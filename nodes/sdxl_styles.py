"""StyleCrafter's styles on a CONDITIONING of SDXL: keys and values of each layer of the UNet."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..stylemaster_core.errors import UnsupportedHostError
from ..stylemaster_core.models.decoupled_attention import BlockStyle, StyleRegion, check_overlap
from ..stylemaster_core.models.style_adapter import StyleCrafterAdapter
from ..stylemaster_core.models.stylecrafter_sdxl import (
    MAX_TEXT_TOKENS,
    LayerKV,
    layer_styles,
    level_masks,
)
from .block_styles import in_range
from .conditionings import COND, Conditioning, Row, refuse_masks, with_model_cond

LAYER_KEY = "stylecrafter_layers"


@dataclass(frozen=True, eq=False)
class LayerPreparedStyle:
    """A style with its gains for one prompt, and its keys and values in each layer."""

    region: StyleRegion
    keys_values: list[LayerKV]


@dataclass(frozen=True, eq=False)
class LayerCondition:
    """All styles of a conditioning; with `styled` False none of them acts.

    That still has to be there, as ComfyUI batches only conditionings that carry the same.
    """

    styles: tuple[LayerPreparedStyle, ...]
    styled: bool
    made: dict[Any, Any] = field(default_factory=dict)  # tensors of the last step, to be used again

    shapes = ()  # rows of any conditions may share a batch

    @property
    def batch(self) -> int:
        gains = (style.region.gains for style in self.styles)
        return max(1 if g is None else g.shape[0] for g in gains)

    def refuse_area(self) -> None:
        """Refuse to be cut to a conditioning area, as `refuse_masks`."""
        refuse_masks([style.region for style in self.styles])

    def active(self, model_sampling: Any, sigma: float) -> tuple[int, ...]:
        """Which styles act at this step."""
        if not self.styled:
            return ()
        return tuple(
            i
            for i, style in enumerate(self.styles)
            if in_range(model_sampling, sigma, style.region.start, style.region.end)
        )

    def layers(
        self, active: tuple[int, ...], size: tuple[int, int], like: Tensor
    ) -> tuple[list[BlockStyle], dict[int, tuple[Tensor, ...]]]:
        """What each layer adds, and masks by a layer's number of tokens, for active styles."""
        key = (active, size, like.device, like.dtype)
        if key not in self.made:
            regions = [self.styles[i].region for i in active]
            keys_values = [self.styles[i].keys_values for i in active]
            self.made.clear()
            self.made[key] = (
                layer_styles(regions, keys_values, like),
                level_masks(regions, (1, *size), like),
            )
        return self.made[key]


class StyledRows(NamedTuple):
    """The rows of a batch in which the styles of one condition act, and what they add."""

    index: Tensor  # [R] places in the batch
    layers: list[BlockStyle]  # for R rows
    masks: dict[int, tuple[Tensor, ...]]

    def at(self, layer: int, num_tokens: int) -> BlockStyle:
        """What a layer adds.

        Raises:
            UnsupportedHostError: if there are masks, but none for so many tokens.
        """
        if num_tokens not in self.masks:
            if any(self.masks.values()):
                raise UnsupportedHostError(
                    f"a layer has {num_tokens} tokens, masks were made for "
                    f"{sorted(self.masks)}: another node changes the sizes inside the UNet; take "
                    "it off (e.g. PatchModelAddDownscale), or leave out the mask of the style"
                )
            return self.layers[layer]
        return self.layers[layer]._replace(masks=self.masks[num_tokens])


def styled_rows(
    rows: Sequence[Row], size: tuple[int, int], model_sampling: Any, sigma: float, like: Tensor
) -> list[StyledRows]:
    """The rows in which styles act at this step, by condition.

    Args:
        rows: conditions and samples, in the order of the batch.
        size: height and width of the latents.
        model_sampling: ComfyUI's; it knows what percent of the sampling a sigma is.
        sigma: of this step.
        like: any tensor of the wanted device and dtype.
    """
    places: dict[int, list[int]] = {}
    for number, (condition, _) in enumerate(rows):
        places.setdefault(id(condition), []).append(number)
    found = []
    for numbers in places.values():
        condition = rows[numbers[0]][0]
        active = condition.active(model_sampling, sigma)
        if not active:
            continue
        layers, masks = condition.layers(active, size, like)
        samples = [rows[number][1] for number in numbers]
        index = torch.tensor(numbers, device=like.device)
        found.append(StyledRows(index, [layer.of_rows(samples) for layer in layers], masks))
    return found


@torch.no_grad()
def predicted_gains(adapter: StyleCrafterAdapter, text: Tensor, tokens: Tensor) -> Tensor:
    """How strongly each layer takes a style: [B, layers] in 0..2.

    Args:
        adapter: its predictor is widened to float32 for this one use.
        text: [B, L, Dt] features of the positive prompt.
        tokens: [1, S, Ds] style tokens.

    Raises:
        LayoutError: for text or tokens of another model or adapter.
    """
    if adapter.unet_layers is not None:
        text = text[:, :MAX_TEXT_TOKENS]
    predictor = copy.deepcopy(adapter.encoder.scale_predictor).float()
    return predictor.gains(text.float().cpu(), tokens.float().cpu())


def layer_conditionings(
    adapter: StyleCrafterAdapter,
    region: StyleRegion,
    positive: Conditioning,
    negative: Conditioning,
) -> tuple[Conditioning, Conditioning, Conditioning]:
    """Let a style act on a prompt, beside those that it carries already.

    Args:
        adapter: for SDXL.
        region: the style, yet without gains.
        positive: of several prompts each gets gains of its own.
        negative: the negative prompt.

    Returns:
        styled, positive without style, negative.

    Raises:
        LayoutError: for tokens or text that do not belong to the adapter.
        ConfigError: if two styles without masks act at the same time.
    """
    assert adapter.unet_layers is not None
    keys_values = adapter.unet_layers.keys_values(region.tokens)
    gains = [predicted_gains(adapter, text, region.tokens) for text, _ in positive]

    def carrying(
        conditioning: Conditioning, gains: Sequence[Tensor | None], *, styled: bool
    ) -> Conditioning:
        changed = []
        for entry, gain in zip(conditioning, gains, strict=True):
            own = LayerPreparedStyle(replace(region, gains=gain), keys_values)

            def extend(present: COND | None, own: LayerPreparedStyle = own) -> COND:
                carried = () if present is None else present.cond[0][0].styles
                check_overlap([style.region for style in (*carried, own)])
                return COND([(LayerCondition((*carried, own), styled), 0)])

            changed += with_model_cond([entry], LAYER_KEY, extend)
        return changed

    return (
        carrying(positive, gains, styled=True),
        # With gains, too: the next Apply Style styles this one.
        carrying(positive, gains, styled=False),
        carrying(negative, [None] * len(negative), styled=False),
    )
