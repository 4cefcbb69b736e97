"""The decoupled style cross-attention (StyleMaster, sec. 3.2): its mathematics lives here alone.

In every block of the video transformer the style tokens get keys and values of their own beside
those of the text, and share the text's query and output projection:

    out = o(attend(q, k_text, v_text) + attend(q, norm(k_img(style)), v_img(style)))

Keys and values depend on the style alone, so `StyleAttention` makes them once for a whole
generation (`StyleKV`), and a block only ever sees plain tensors (`BlockStyle`). Both hosts,
diffusers' Wan and ComfyUI's native Wan, call `style_residual`.

StyleCrafter's branch (sec. 3.3) is the same with two more things: `norm_style`, a LayerNorm on what
the style's attention gives, and a gain per block. On SDXL it is `stylecrafter_sdxl`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError, LayoutError, WeightsError

NORM_K_IMG_EPS = 1e-5  # every other norm of the transformer has 1e-6
NORM_STYLE_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class StyleRegion:
    """A style and where, when and how strongly it acts.

    Attributes:
        tokens: [B or 1, S, Ds] style tokens.
        scale: strength of the whole style branch; 0 disables it, 1 is the trained value.
        block_scales: strength per transformer block, multiplied with `scale`; None for all 1.
        mask: None (everywhere), [h, w] or [t, h, w] in 0..1 of any resolution; resized to the token
            grid.
        start: first part of the sampling, 0..1, in which the style acts.
        end: last part of the sampling, inclusive.
        gains: [B or 1, blocks] factors 1 + s that a StyleCrafter adapter predicts from the prompt
            and the style (`StyleCrafterEncoder.gains`); None for all 1, as in StyleMaster.
    """

    tokens: Tensor
    scale: float = 1.0
    block_scales: Sequence[float] | None = None
    mask: Tensor | None = None
    start: float = 0.0
    end: float = 1.0
    gains: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3:
            raise LayoutError(f"style tokens must be [B, S, D], got {list(self.tokens.shape)}")
        if not torch.isfinite(self.tokens).all():
            raise LayoutError("the style tokens hold NaN or infinity; encode the style image again")
        if not all(math.isfinite(scale) for scale in (self.scale, *(self.block_scales or ()))):
            raise ConfigError("the strengths of a style must be finite numbers")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ConfigError(
                "a style's range must satisfy 0 <= start <= end <= 1, got "
                f"{self.start} to {self.end}"
            )
        if self.mask is not None and self.mask.ndim not in (2, 3):
            raise LayoutError(
                f"a style mask must be [h, w] or [t, h, w], got {list(self.mask.shape)}"
            )
        if self.gains is not None and not (
            self.gains.ndim == 2 and torch.isfinite(self.gains).all()
        ):
            raise LayoutError(
                f"gains must be finite numbers [B, blocks], got {list(self.gains.shape)}"
            )


Norm = tuple[Tensor, Tensor]  # weight and bias of a LayerNorm


class StyleKV(NamedTuple):
    """Keys and values of one style for all blocks.

    The strength is folded into the norm if there is one, otherwise into the values.
    """

    keys: Tensor  # [blocks, B, S, D]
    values: Tensor  # [blocks, B, S, D]
    norm: Norm | None = None  # each [blocks, B or 1, 1, D]


class BlockStyle(NamedTuple):
    """What one block adds to its text attention.

    The last rows of the batch (as many as the keys have) are styled, the rows before them are "no
    style". Masks are [1 or B, L, 1]; without masks a single region covers everything.
    """

    keys: tuple[Tensor, ...]  # per region [B, S, D]
    values: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]  # empty, or one per region and one for what no region covers
    no_style: Tensor | None  # [D] or [B, 1, D]; None: rows without style get nothing at all
    norms: tuple[Norm, ...] = ()  # per region, each [B or 1, 1, D]; empty: there are none

    def of_rows(self, samples: Sequence[int]) -> BlockStyle:
        """For rows that are these samples; what has 1 row is for all of them."""

        def of_all(x: Tensor) -> Tensor:
            return _rows(x, samples).expand(len(samples), -1, -1)

        return self._replace(
            keys=tuple(map(of_all, self.keys)),
            values=tuple(map(of_all, self.values)),
            norms=tuple(
                (_rows(weight, samples), _rows(bias, samples)) for weight, bias in self.norms
            ),
        )


def _rows(x: Tensor, samples: Sequence[int]) -> Tensor:
    return x if x.shape[0] == 1 else x[list(samples)]


def attend(
    query: Tensor, keys: Tensor, values: Tensor, num_heads: int, bias: Tensor | None = None
) -> Tensor:
    """Multi-head attention, [B, L, D] x [B, S, D] -> [B, L, D]; logits get the `bias` [S]."""
    query, keys, values = (
        rearrange(x, "b l (n d) -> b n l d", n=num_heads) for x in (query, keys, values)
    )
    mask = None if bias is None else bias[None]
    attended = F.scaled_dot_product_attention(query, keys, values, mask)
    return rearrange(attended, "b n l d -> b l (n d)")


def style_residual(query: Tensor, style: BlockStyle, num_heads: int) -> Tensor:
    """Attend from video tokens to style tokens; to be added to the text attention before `o`.

    Args:
        query: [B, L, D] normalised query, the same that attends to the text.
        style: keys and values of this block; see `BlockStyle` for the order of rows.
        num_heads: heads of the attention.

    Returns:
        [B, L or 1, D] residual, not yet added.

    Source: StyleMaster, sec. 3.2, and, with norms, StyleCrafter, sec. 3.3. Deviation: none for one
    style without a mask; masks are ours.
    """
    num_styled = style.keys[0].shape[0] if style.keys else 0
    num_plain = query.shape[0] - num_styled
    rows = []
    if num_plain:
        nothing = query.new_zeros(1) if style.no_style is None else style.no_style
        rows.append(nothing.expand(num_plain, query.shape[1] if num_styled else 1, query.shape[-1]))
    if num_styled:
        styled_query = query[num_plain:]
        parts = [
            attend(styled_query, k, v, num_heads)
            for k, v in zip(style.keys, style.values, strict=True)
        ]
        if style.norms:
            parts = [
                style_norm(part) * weight + bias
                for part, (weight, bias) in zip(parts, style.norms, strict=True)
            ]
        if style.masks:
            parts = [part * mask for part, mask in zip(parts, style.masks, strict=False)]
        total = sum(parts[1:], parts[0])
        if style.masks and style.no_style is not None:
            total = total.addcmul(style.masks[-1], style.no_style)
        rows.append(total)
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def style_norm(x: Tensor) -> Tensor:
    """LayerNorm without weight and bias over the whole width, all heads together."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_STYLE_EPS)


def scaled_norm(norm: nn.LayerNorm, scale: float | Tensor) -> Norm:
    """Weight and bias [B or 1, 1, D] of a norm, times a number or one per sample [B]."""
    if isinstance(scale, Tensor):
        scale = scale[:, None, None].to(norm.weight)
    return norm.weight[None, None] * scale, norm.bias[None, None] * scale


def check_overlap(regions: Sequence[StyleRegion]) -> None:
    """Check that no two styles without masks act at the same time.

    Where the range of one ends and that of the next begins, both act, each by half.

    Raises:
        ConfigError: if two do.
    """
    ranges = sorted((r.start, r.end) for r in regions if r.mask is None)
    for (_, end), (start, _) in pairwise(ranges):
        if start < end:
            raise ConfigError(
                f"{len(ranges)} styles without masks would act on everything at the same time; "
                "give each a mask, ranges that do not overlap, or blend them into one style"
            )


def region_masks(regions: Sequence[StyleRegion], grid: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Masks of styles that act at once on the token grid, and that of the rest, as tokens.

    Where masks overlap and sum to more than 1 they are scaled to sum to 1; where they sum to less,
    the rest is "no style".

    Args:
        regions: styles; a mask of None covers everything.
        grid: (t, h, w) tokens of the video.

    Returns:
        empty for a single region without a mask, else len(regions) + 1 tensors [1, t * h * w, 1],
        float32.
    """
    if len(regions) < 2 and all(region.mask is None for region in regions):
        return ()
    masks = torch.cat([_token_mask(region.mask, grid) for region in regions])
    total = masks.sum(0, keepdim=True)
    masks = torch.cat([masks / total.clamp(min=1), (1 - total).clamp(min=0)])
    return tuple(masks.unflatten(0, (-1, 1)).unsqueeze(-1))


def _token_mask(mask: Tensor | None, grid: tuple[int, int, int]) -> Tensor:
    """[1, t * h * w] in 0..1."""
    if mask is None:
        return torch.ones(1, grid[0] * grid[1] * grid[2])
    mask = mask.detach().float().cpu()
    if not (torch.isfinite(mask).all() and mask.min() >= 0 and mask.max() <= 1):
        raise LayoutError("a style mask must hold numbers in 0..1")
    mask = mask if mask.ndim == 3 else mask[None]
    return F.interpolate(mask[None, None], grid, mode="area").flatten(1)


class StyleProjection(nn.Module):
    """k_img, v_img and norm_k_img of one block (names of the release), perhaps norm_style."""

    def __init__(self, style_width: int, width: int, *, norm_style: bool = False) -> None:
        super().__init__()
        self.k_img = nn.Linear(style_width, width)
        self.v_img = nn.Linear(style_width, width)
        self.norm_k_img = nn.RMSNorm(width, eps=NORM_K_IMG_EPS)
        self.norm_style = nn.LayerNorm(width, eps=NORM_STYLE_EPS) if norm_style else None

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_k_img(self.k_img(tokens)), self.v_img(tokens)

    @torch.no_grad()
    def reset_for_training(self, generator: torch.Generator | None = None) -> None:
        """v_img at 0 so that training starts from the base model, k_img random and norm_k_img at 1.

        The release starts all three at 0, and then k_img and norm_k_img never receive a gradient.
        """
        nn.init.zeros_(self.v_img.weight)
        nn.init.zeros_(self.v_img.bias)
        nn.init.ones_(self.norm_k_img.weight)
        std = self.k_img.in_features**-0.5
        self.k_img.weight.normal_(0, std, generator=generator)
        nn.init.zeros_(self.k_img.bias)


class StyleAttention(nn.Module):
    """The style branch of all blocks; makes `StyleKV` from style tokens, once per generation."""

    def __init__(
        self,
        num_blocks: int,
        style_width: int,
        width: int,
        *,
        norm_style: bool = False,
        bypass: bool = False,
    ) -> None:
        """Make the modules.

        Args:
            num_blocks: blocks of the transformer.
            style_width: of the style tokens.
            width: of the transformer.
            norm_style: whether there is StyleCrafter's LayerNorm.
            bypass: whether "no style" is the base model, as in StyleCrafter; otherwise it is what
                all-zero tokens give.
        """
        super().__init__()
        self.bypass = bypass
        # ModuleDict, so that keys read blocks.N.cross_attn.k_img.weight as in the release.
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"cross_attn": StyleProjection(style_width, width, norm_style=norm_style)}
            )
            for _ in range(num_blocks)
        )

    @property
    def style_width(self) -> int:
        return self._block(0).k_img.in_features

    @property
    def width(self) -> int:
        return self._block(0).k_img.out_features

    def _block(self, index: int) -> StyleProjection:
        block = self.blocks[index]["cross_attn"]  # type: ignore[index]
        assert isinstance(block, StyleProjection)
        return block

    def block_scales(self, region: StyleRegion) -> list[float]:
        """Strength of a region in each block."""
        scales = region.block_scales
        if scales is None:
            scales = [1.0] * len(self.blocks)
        if len(scales) != len(self.blocks):
            raise ConfigError(
                f"got {len(scales)} block scales, but the model has {len(self.blocks)} blocks"
            )
        return [region.scale * scale for scale in scales]

    def forward(self, region: StyleRegion) -> StyleKV:
        """Keys and values of a style, strength folded in: all that follows is linear in it.

        Raises:
            LayoutError: if the tokens are of another width than the adapter's, or the gains are for
                other blocks.
        """
        weight = self._block(0).k_img.weight
        if region.tokens.shape[-1] != weight.shape[1]:
            raise LayoutError(
                f"the style tokens are {region.tokens.shape[-1]} wide, this adapter takes "
                f"{weight.shape[1]}; encode the style with the adapter that it is used with"
            )
        tokens = region.tokens.to(weight)
        pairs = [self._block(i)(tokens) for i in range(len(self.blocks))]
        scales = self.block_scales(region)
        gains = region.gains
        if gains is not None and gains.shape[1] != len(self.blocks):
            raise LayoutError(
                f"got gains for {gains.shape[1]} blocks, the model has {len(self.blocks)}; predict "
                "them with the adapter that the style is used with"
            )
        keys = torch.stack([key for key, _ in pairs])
        norms = [self._block(i).norm_style for i in range(len(self.blocks))]
        if None in norms:
            values = [value * scale for (_, value), scale in zip(pairs, scales, strict=True)]
            if gains is not None:
                factors = gains.to(weight).unbind(1)
                values = [v * f[:, None, None] for v, f in zip(values, factors, strict=True)]
            return StyleKV(keys, torch.stack(values))
        strengths = scales if gains is None else (gains * gains.new_tensor(scales)).unbind(1)
        scaled = [scaled_norm(n, s) for n, s in zip(norms, strengths, strict=True)]  # type: ignore[arg-type]
        weights, biases = (torch.stack(parts) for parts in zip(*scaled, strict=True))
        return StyleKV(keys, torch.stack([value for _, value in pairs]), (weights, biases))

    def no_style(self, regions: Sequence[StyleRegion]) -> Tensor:
        """What "no style" (all-zero tokens) adds in each block: [blocks, D]; all 0 with `bypass`.

        Zero tokens have equal keys, so attention is uniform and gives v_img's bias exactly.
        Strength scales it like the style itself, so that strength 0 is the base model; of several
        regions the strongest counts.
        """
        if self.bypass:
            bias = self._block(0).v_img.bias
            return bias.new_zeros(len(self.blocks), self.width)
        scales = zip(*(self.block_scales(region) for region in regions), strict=True)
        return torch.stack(
            [self._block(i).v_img.bias * max(scale) for i, scale in enumerate(scales)]
        )


def is_branch_key(key: str) -> bool:
    """Whether a tensor belongs to the style branch of a block."""
    return "_img." in key or ".norm_style." in key


def create_style_attention(state_dict: dict[str, Tensor]) -> StyleAttention | None:
    """Build the style branch from keys `blocks.N.cross_attn.{k,v,norm_k}_img.*`; None if absent.

    With `norm_style`, or beside a scale predictor, it is StyleCrafter's, where "no style" is the
    base model.

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    weights = {k: v for k, v in state_dict.items() if is_branch_key(k)}
    if not weights:
        return None
    from ..weights.state_dict import check_keys

    first = weights.get("blocks.0.cross_attn.k_img.weight")
    if first is None or first.ndim != 2:
        raise WeightsError(
            "no style attention: blocks.0.cross_attn.k_img.weight is missing or no matrix "
            f"(keys begin with {sorted(weights)[:2]}); use a StyleMaster adapter"
        )
    width, style_width = first.shape
    num_blocks = len({key.split(".")[1] for key in weights if key.endswith(".k_img.weight")})
    has_norm = any(".norm_style." in key for key in weights)
    has_scales = any(key.startswith("scale_predictor.") for key in state_dict)
    with torch.device("meta"):
        module = StyleAttention(
            num_blocks, style_width, width, norm_style=has_norm, bypass=has_norm or has_scales
        )
    check_keys(
        {k: tuple(v.shape) for k, v in weights.items()},
        {k: tuple(v.shape) for k, v in module.state_dict().items()},
        "style attention",
    )
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()
