"""What a CONDITIONING carries for StyleMaster: its styles and its control, as `model_conds`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.conds
import torch
from torch import Tensor

from ..stylemaster_core.errors import ConfigError, LayoutError, UnsupportedHostError
from ..stylemaster_core.models.decoupled_attention import (
    StyleAttention,
    StyleKV,
    StyleRegion,
    check_overlap,
)

STYLE_KEY = "stylemaster_style"
CONTROL_KEY = "stylemaster_control"

Conditioning = list[Any]  # of [text features [B, L, Dt], options]
Row = tuple[Any, int]  # a condition, and which sample of it


@dataclass(frozen=True, eq=False)
class PreparedStyle:
    """A style, its keys and values for all blocks, and what "no style" adds at its strength."""

    region: StyleRegion
    kv: StyleKV  # [blocks, B, S, D]
    no_style: Tensor  # [blocks, D]
    scales: list[float]  # of each block

    def sample(self, index: int, like: Tensor) -> StyleKV:
        """Keys and values [blocks, S, D], and norm [blocks, 1, D], of one sample of the batch."""

        def part(x: Tensor) -> Tensor:
            return x[:, min(index, x.shape[1] - 1)].to(like)

        norm = self.kv.norm
        return StyleKV(
            part(self.kv.keys),
            part(self.kv.values),
            None if norm is None else (part(norm[0]), part(norm[1])),
        )


@dataclass(frozen=True, eq=False)
class StyleCondition:
    """All styles of a conditioning. `styled` False: "no style" at the strength of these styles."""

    styles: tuple[PreparedStyle, ...]
    styled: bool
    masks: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict)  # made once per token grid

    @property
    def batch(self) -> int:
        kvs = [style.kv for style in self.styles]
        return max(x.shape[1] for kv in kvs for x in (kv.keys, *(kv.norm or ())))

    @property
    def num_blocks(self) -> int:
        return len(self.styles[0].scales)

    @property
    def shapes(self) -> list[Any]:
        """What must agree between conditionings that run in one batch."""
        return [
            (
                style.kv.keys.shape[0],
                *style.kv.keys.shape[2:],
                style.kv.keys.dtype,
                style.kv.norm is None,
            )
            for style in self.styles
        ]

    def refuse_area(self) -> None:
        """Refuse to be cut to a conditioning area.

        Raises:
            UnsupportedHostError: if a style has a mask, which belongs to the whole video.
        """
        refuse_masks([style.region for style in self.styles])


def refuse_masks(regions: Sequence[StyleRegion]) -> None:
    """Check that no style with a mask is cut to a conditioning area.

    Raises:
        UnsupportedHostError: if one has a mask, which belongs to the whole picture.
    """
    if any(region.mask is not None for region in regions):
        raise UnsupportedHostError(
            "a style with a mask cannot be combined with a conditioning area; use the style's "
            "mask, or a conditioning mask instead of the area"
        )


@dataclass(frozen=True, eq=False)
class ControlCondition:
    """Gray-tile latents and the prompt that the network reads."""

    latents: Tensor  # [B or 1, 16, t, h, w] as a VAE gives them
    text: Tensor  # [B or 1, L, Dt] features of the positive prompt

    @property
    def batch(self) -> int:
        return max(self.latents.shape[0], self.text.shape[0])

    @property
    def shapes(self) -> list[Any]:
        return [self.latents.shape[1:], self.text.shape[1:]]

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        """Latents and text of one sample of the batch, each with a batch of 1."""
        latents, text = (x[min(index, x.shape[0] - 1), None] for x in (self.latents, self.text))
        return latents, text

    def refuse_area(self) -> None:
        """Refuse to be cut to a conditioning area.

        Raises:
            UnsupportedHostError: always.
        """
        raise UnsupportedHostError(
            "the gray-tile control covers the whole video and cannot be combined with a "
            "conditioning area; use a conditioning mask instead"
        )


class COND(comfy.conds.CONDRegular):
    """One of the conditions above as ComfyUI's samplers know it: `cond` is a list of `Row`.

    Not a tensor, so that context windows leave it alone: the wrappers cut it themselves.
    """

    def process_cond(self, batch_size: int, **kwargs: Any) -> COND:
        condition = self.cond[0][0]
        if kwargs.get("area") is not None:
            condition.refuse_area()
        if condition.batch not in (1, batch_size):
            raise LayoutError(
                f"a style or control for {condition.batch} videos meets a batch of {batch_size}; "
                "give one, or one per video"
            )
        return self._copy_with([(condition, i) for i in range(batch_size)])

    def can_concat(self, other: COND) -> bool:
        return self.cond[0][0].shapes == other.cond[0][0].shapes

    def concat(self, others: Sequence[COND]) -> list[Row]:
        return [row for cond in (self, *others) for row in cond.cond]

    def size(self) -> list[int]:
        return [len(self.cond)]


@torch.no_grad()
def prepare_styles(
    regions: Sequence[StyleRegion], adapter: StyleAttention
) -> tuple[PreparedStyle, ...]:
    """Keys and values of styles, made once; the adapter is not needed afterwards.

    Args:
        regions: styles; `mask` is ComfyUI's MASK [t, h, w] or [h, w] of any resolution, or None.
        adapter: from `create_style_attention`.

    Raises:
        LayoutError, ConfigError: for tokens or block scales that do not belong to the adapter.
    """
    return tuple(
        PreparedStyle(
            region, adapter(region), adapter.no_style([region]), adapter.block_scales(region)
        )
        for region in regions
    )


def styled_conditioning(
    conditioning: Conditioning, styles: Sequence[PreparedStyle]
) -> Conditioning:
    """Let styles act on a conditioning, beside those that it carries already.

    Args:
        conditioning: the prompt.
        styles: from `prepare_styles`; with none nothing changes.

    Raises:
        ConfigError: if two styles without masks act at the same time.
    """
    return _with_styles(conditioning, styles, styled=True)


def unstyled_conditioning(
    conditioning: Conditioning, styles: Sequence[PreparedStyle]
) -> Conditioning:
    """The "no style" that belongs to these styles: what all-zero tokens add, at their strength.

    For the positive and negative branches of the guidance. Not the same as a conditioning without
    styles, which skips the style branch.
    """
    return _with_styles(conditioning, styles, styled=False)


def _with_styles(
    conditioning: Conditioning, styles: Sequence[PreparedStyle], *, styled: bool
) -> Conditioning:
    if not styles:
        return conditioning

    def extend(present: COND | None) -> COND:
        carried = () if present is None else present.cond[0][0].styles
        both = (*carried, *styles)
        check_overlap([style.region for style in both])
        if len({style.kv.norm is None for style in both}) > 1:
            raise ConfigError(
                "styles of adapters with and without norm_style (StyleCrafter's and StyleMaster's) "
                "cannot act on one prompt; use styles of one adapter"
            )
        return COND([(StyleCondition(both, styled), 0)])

    return with_model_cond(conditioning, STYLE_KEY, extend)


def controlled_conditioning(conditioning: Conditioning, control: ControlCondition) -> Conditioning:
    """Let a control act on a conditioning; all branches of the guidance get the same object."""
    return with_model_cond(conditioning, CONTROL_KEY, lambda _: COND([(control, 0)]))


def create_control(positive: Conditioning, latents: Tensor) -> ControlCondition:
    """The control of a video.

    Args:
        positive: the prompt that the network reads, for all branches (of several the first).
        latents: [B or 1, 16, t, h, w] of the gray tile, as VAE Encode gives them.

    Raises:
        LayoutError: for latents that are not a Wan video's.
    """
    if latents.ndim != 5 or latents.shape[1] != 16:
        raise LayoutError(
            f"control latents must be [B, 16, t, h, w], got {list(latents.shape)}; encode the gray "
            "tile with the Wan 2.1 VAE"
        )
    return ControlCondition(latents, positive[0][0])


def with_model_cond(
    conditioning: Conditioning, key: str, make: Callable[[COND | None], COND]
) -> Conditioning:
    changed = []
    for text, options in conditioning:
        conds = dict(options.get("model_conds", {}))
        conds[key] = make(conds.get(key))
        changed.append([text, {**options, "model_conds": conds}])
    return changed
