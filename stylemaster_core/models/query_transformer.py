"""The query transformer: learned queries read a set of features.

Called "Q-Former" in the papers; really a plain self-attention encoder over [queries | features].
Source: StyleCrafter, sec. 3.2; StyleMaster's texture branch uses the same module. Layer names are
those of the releases.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualAttentionBlock(nn.Module):
    """Pre-norm self-attention and MLP with erf-GELU; LayerNorm eps 1e-5."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=nn.GELU(approximate="none"),
                c_proj=nn.Linear(4 * width, width),
            )
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, key_padding_mask=padding, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class QueryTransformer(nn.Module):
    """[B, N, width] features -> [B, num_queries, out_width] tokens."""

    def __init__(
        self, num_queries: int, width: int, num_layers: int, num_heads: int, out_width: int
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, num_queries, width) * width**-0.5)
        self.ln1 = nn.LayerNorm(width)
        self.transformer_blocks = nn.Module()
        self.transformer_blocks.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, num_heads) for _ in range(num_layers)
        )
        self.ln2 = nn.LayerNorm(width)
        self.projection = nn.Parameter(torch.randn(width, out_width) * width**-0.5)

    def forward(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """`padding` [B, N] is True for features that nothing attends to; None for none of them."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        if padding is not None:
            padding = F.pad(padding, (queries.shape[1], 0), value=False)
        x = self.ln1(torch.cat([queries, features], dim=1))
        for block in self.transformer_blocks.resblocks:  # type: ignore[union-attr]
            x = block(x, padding)
        return self.ln2(x[:, : queries.shape[1]]) @ self.projection
