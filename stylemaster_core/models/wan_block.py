"""A block of diffusers' Wan transformer whose parts can be called one by one."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from einops import rearrange
from torch import Tensor, nn

from ..errors import LayoutError
from .decoupled_attention import BlockStyle, attend, style_residual
from .motion_adapter import BlockMotion
from .text_padding import padding_bias

MIN_FFN_TOKENS = 1024  # below it a matrix product gets slower


class Rotary(NamedTuple):
    """Rotary position embedding of a grid of tokens, for every pair of a head's channels."""

    cos: Tensor  # [1, L, 1, head width / 2]
    sin: Tensor
    turn: Tensor  # both as complex numbers

    @classmethod
    def of(cls, angles: tuple[Tensor, Tensor], dtype: torch.dtype) -> Rotary:
        """From diffusers' cosines and sines [1, L, 1, head width], for activations of `dtype`."""
        dtype = torch.promote_types(dtype, torch.float32)
        cos, sin = (angle[..., 0::2].to(dtype).contiguous() for angle in angles)
        return cls(cos, sin, torch.complex(cos, sin))


class KeysValues(NamedTuple):
    """The text of a prompt, ready for one block."""

    keys: Tensor  # [B, L, D]
    values: Tensor  # [B, L, D]
    bias: Tensor | None = None  # [L], added to the logits; see `padding_bias`

    def attend(self, query: Tensor, num_heads: int) -> Tensor:
        """[B, Lq, D] -> [B, Lq, D]."""
        return attend(query, self.keys, self.values, num_heads, self.bias)

    def expand(self, batch: int) -> KeysValues:
        """Let one prompt serve a whole batch."""
        return self._replace(
            keys=expand_rows(self.keys, batch), values=expand_rows(self.values, batch)
        )


def expand_rows(x: Tensor, batch: int) -> Tensor:
    """[1 or batch, L, D] -> [batch, L, D]."""
    if x.shape[0] not in (1, batch):
        raise LayoutError(
            f"got {x.shape[0]} conditions for a batch of {batch}; give one, or one per sample"
        )
    return x.expand(batch, -1, -1)


def widen(x: Tensor) -> Tensor:
    """At least float32: norms and modulations are computed in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm in float32, or in float64 where the input is; diffusers' own rounds float64."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.to(input) for p in (self.weight, self.bias))
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def rotate(x: Tensor, rotary: Rotary, num_heads: int) -> Tensor:
    """Rotary position embedding on interleaved pairs: [B, L, D] -> [B, L, D].

    A product of complex numbers where it runs eagerly: one pass over memory, the same bits. The
    compiler fuses real arithmetic, and does not know complex numbers.
    """
    pairs = widen(rearrange(x, "b l (n d two) -> b l n d two", n=num_heads, two=2))
    if x.device.type in ("cpu", "cuda", "meta") and not torch.compiler.is_compiling():
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * rotary.turn)
    else:
        a, b = pairs.unbind(-1)
        cos, sin = rotary.cos, rotary.sin
        rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return rearrange(rotated, "b l n d two -> b l (n d two)").to(x)


class StyledWanBlock(WanTransformerBlock):
    """A Wan block whose parts can be called one by one; modules and weights are diffusers'."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        qk_norm: str = "rms_norm_across_heads",
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps)
        self.num_heads = num_heads
        self.motion: BlockMotion | None = None
        self.norm1 = WideLayerNorm(dim, eps, elementwise_affine=False)
        self.norm2 = WideLayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.norm3 = WideLayerNorm(dim, eps, elementwise_affine=False)

    def text_keys_values(self, text_tokens: Tensor, padding: int = 1) -> KeysValues:
        """Keys and values of embedded text [B, L, D], whose last row stands for `padding` rows."""
        keys = self.attn2.norm_k(self.attn2.to_k(text_tokens))
        bias = padding_bias(keys.shape[1], padding, keys)
        return KeysValues(keys, self.attn2.to_v(text_tokens), bias)

    def self_attend(self, hidden: Tensor, modulation: Tensor, rotary: Rotary) -> Tensor:
        shift, scale, gate = self._modulate(modulation)[:, :3].chunk(3, dim=1)
        x = (self.norm1(widen(hidden)) * (1 + scale) + shift).to(hidden)
        query = rotate(self.attn1.norm_q(self._project("q", x)), rotary, self.num_heads)
        keys = rotate(self.attn1.norm_k(self._project("k", x)), rotary, self.num_heads)
        attended = attend(query, keys, self._project("v", x), self.num_heads)
        return (widen(hidden) + self._project("o", attended) * gate).to(hidden)

    def _project(self, name: str, x: Tensor) -> Tensor:
        """One of the linears q, k, v, o of self-attention, with the motion adapter if attached."""
        attn = self.attn1
        linears = {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v, "o": attn.to_out[0]}
        projected = linears[name](x)
        return projected if self.motion is None else projected + self.motion.residual(name, x)

    def cross_query(self, hidden: Tensor) -> Tensor:
        return self.attn2.norm_q(self.attn2.to_q(self.norm2(widen(hidden)).to(hidden)))

    def _modulate(self, modulation: Tensor) -> Tensor:
        # Offloading brings a parameter only to `forward`, and the parts are called without it.
        return self.scale_shift_table.to(modulation.device) + widen(modulation)

    def finish(self, hidden: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """Add the result of cross-attention (before its projection), then the feed-forward."""
        shift, scale, gate = self._modulate(modulation)[:, 3:].chunk(3, dim=1)
        hidden = hidden + self.attn2.to_out[0](attended)
        x = (self.norm3(widen(hidden)) * (1 + scale) + shift).to(hidden)
        return (widen(hidden) + widen(self._feed_forward(x)) * gate).to(hidden)

    def _feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward, a part of the tokens at a time: its inner width is most of the peak."""
        if torch.is_grad_enabled():
            return self.ffn(x)
        parts = x.flatten(0, 1).split(max(MIN_FFN_TOKENS, math.ceil(x.shape[1] / 4)))
        if len(parts) == 1:
            return self.ffn(x)
        return torch.cat([self.ffn(part) for part in parts]).view_as(x)

    def forward(
        self,
        hidden: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        text_kv: KeysValues,
        style: BlockStyle | None = None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]; modulation [B or 1, 6, D]; `style` rows as in `BlockStyle`."""
        hidden = self.self_attend(hidden, modulation, rotary)
        query = self.cross_query(hidden)
        attended = text_kv.attend(query, self.num_heads)
        if style is not None:
            attended = attended + style_residual(query, style, self.num_heads)
        return self.finish(hidden, attended, modulation)
