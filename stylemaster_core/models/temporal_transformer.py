"""VideoCrafter's temporal transformer: every place of a video attends over its own frames.

Both hosts of the model run this one: diffusers' UNet in the core, ComfyUI's in the nodes. The
layers are made by a namespace that is given, so that ComfyUI can bring those that cast weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NUM_GROUPS = 32
NORM_EPS = 1e-6  # of the GroupNorm; the LayerNorms have 1e-5


class RelativePositions(nn.Module):
    """One vector for each distance in frames, those further apart taken for the farthest."""

    def __init__(self, max_distance: int, width: int, **factory: Any) -> None:
        super().__init__()
        self.embeddings_table = nn.Parameter(torch.empty(2 * max_distance + 1, width, **factory))
        nn.init.xavier_uniform_(self.embeddings_table)

    def forward(self, num_frames: int, like: Tensor) -> Tensor:
        """[num_frames, num_frames, width]: of each frame to each, in the dtype of `like`."""
        farthest = self.embeddings_table.shape[0] // 2
        frame = torch.arange(num_frames, device=like.device)
        distance = (frame[None] - frame[:, None]).clamp(-farthest, farthest)
        return self.embeddings_table.to(like)[distance + farthest]


class TemporalAttention(nn.Module):
    """Self-attention with relative positions on keys and values."""

    def __init__(
        self, width: int, num_heads: int, max_distance: int, layers: Any, **factory: Any
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (
            layers.Linear(width, width, bias=False, **factory) for _ in range(3)
        )
        self.to_out = nn.Sequential(layers.Linear(width, width, **factory))
        head_width = width // num_heads
        self.relative_position_k = RelativePositions(max_distance, head_width, **factory)
        self.relative_position_v = RelativePositions(max_distance, head_width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> the same."""
        query, keys, values = (
            rearrange(linear(x), "n t (h d) -> n h t d", h=self.num_heads)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        query = query * query.shape[-1] ** -0.5
        num_frames = x.shape[1]
        near_keys = self.relative_position_k(num_frames, query)
        near_values = self.relative_position_v(num_frames, query)
        logits = query @ keys.mT + torch.einsum("nhtd,tsd->nhts", query, near_keys)
        shares = logits.softmax(-1)
        attended = shares @ values + torch.einsum("nhts,tsd->nhtd", shares, near_values)
        return self.to_out(rearrange(attended, "n h t d -> n t (h d)"))


class _GatedLinear(nn.Module):
    def __init__(self, width: int, out_width: int, layers: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = layers.Linear(width, 2 * out_width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class _FeedForward(nn.Module):
    def __init__(self, width: int, layers: Any, **factory: Any) -> None:
        super().__init__()
        # The identity stands where the release has a dropout of 0, so that names agree.
        self.net = nn.Sequential(
            _GatedLinear(width, 4 * width, layers, **factory),
            nn.Identity(),
            layers.Linear(4 * width, width, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TemporalBlock(nn.Module):
    """Two self-attentions over frames, and a gated MLP."""

    def __init__(
        self, width: int, num_heads: int, max_distance: int, layers: Any, **factory: Any
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (layers.LayerNorm(width, **factory) for _ in range(3))
        self.attn1 = TemporalAttention(width, num_heads, max_distance, layers, **factory)
        self.attn2 = TemporalAttention(width, num_heads, max_distance, layers, **factory)
        self.ff = _FeedForward(width, layers, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x)) + x
        return self.ff(self.norm3(x)) + x


class TemporalTransformer(nn.Module):
    """A residual over the frames of a video (names of the release).

    Attributes:
        rests_on_pictures: a picture is returned as it is; otherwise it is a video of one frame.

    Source: VideoCrafter's released code; deviation: none.
    """

    rests_on_pictures = True

    def __init__(
        self,
        channels: int,
        width: int,
        num_heads: int,
        max_distance: int,
        *,
        linear: bool = True,
        layers: Any = nn,
        **factory: Any,
    ) -> None:
        """Make the modules.

        Args:
            channels: of the pictures, a multiple of 32.
            width: of the attention, a multiple of `num_heads`.
            num_heads: of the attention.
            max_distance: in frames, from which on distances are no longer told apart.
            linear: whether it is entered and left by linear layers; otherwise by convolutions.
            layers: where `Linear`, `Conv1d`, `GroupNorm` and `LayerNorm` come from.
            factory: `device` and `dtype` of the weights.
        """
        super().__init__()
        self.norm = layers.GroupNorm(NUM_GROUPS, channels, eps=NORM_EPS, **factory)
        self.linear = linear
        if linear:
            self.proj_in = layers.Linear(channels, width, **factory)
            self.proj_out = layers.Linear(width, channels, **factory)
        else:
            self.proj_in = layers.Conv1d(channels, width, 1, **factory)
            self.proj_out = layers.Conv1d(width, channels, 1, **factory)
        self.transformer_blocks = nn.ModuleList(
            [TemporalBlock(width, num_heads, max_distance, layers, **factory)]
        )

    def forward(self, hidden_states: Tensor, num_frames: int) -> Tensor:
        """Attend over frames.

        Args:
            hidden_states: [B * T, C, h, w], the frames of a video one after another.
            num_frames: T; with 1 it is a picture, and returned as it is.

        Returns:
            [B * T, C, h, w].
        """
        if num_frames == 1 and self.rests_on_pictures:
            return hidden_states
        height, width = hidden_states.shape[-2:]
        video = rearrange(hidden_states, "(b t) c h w -> b c t h w", t=num_frames)
        # Statistics are those of a whole clip: normed before it is taken apart.
        x = rearrange(self.norm(video), "b c t h w -> (b h w) t c")
        x = self._project(self.proj_in, x)
        for block in self.transformer_blocks:
            x = block(x)
        x = self._project(self.proj_out, x)
        return hidden_states + rearrange(x, "(b h w) t c -> (b t) c h w", h=height, w=width)

    def _project(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x) if self.linear else layer(x.mT).mT
