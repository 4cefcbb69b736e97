"""The gray-tile ControlNet (StyleMaster, sec. 3.4): content guidance without colour.

Copies of every second block run on the clean latents of the gray tile; zero-initialised 1 x 1
convolutions turn their states into residuals for the transformer. The network is one for both
hosts: a host supplies its block class, its linear layers and its rotary embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError, LayoutError, WeightsError
from ..weights.state_dict import check_keys, native_block_key_to_diffusers, strip_prefix
from .timestep import Kept, sinusoidal_embedding, wave_frequencies


class WanHost(Protocol):
    """What a host model contributes to the control network."""

    def create_block(self, width: int, ffn_width: int, num_heads: int) -> nn.Module:
        """A Wan block of the host."""
        ...

    def block_key(self, native_key: str) -> str:
        """Name in the host's block of a weight that the release calls `native_key`."""
        ...

    def rotary(self, grid: tuple[int, int, int], head_width: int, like: Tensor) -> Any:
        """Rotary embedding of a token grid, in the form that the host's blocks take."""
        ...

    def prepare_text(self, block: nn.Module, text_tokens: Tensor, padding: int) -> Any:
        """What the host's block needs of the embedded text; see `merge_padding` for `padding`."""
        ...

    def run_block(
        self, block: nn.Module, hidden: Tensor, modulation: Tensor, rotary: Any, text: Any
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        ...


class ControlText:
    """The prompt, embedded and prepared for every control block; made once per generation."""

    def __init__(self, per_block: list[Any], batch: int) -> None:
        self.per_block = per_block
        self.batch = batch


class GrayTileControlNet(nn.Module):
    """Control states from gray-tile latents, timestep and POSITIVE prompt, never style or noise."""

    def __init__(
        self,
        host: WanHost,
        *,
        width: int,
        ffn_width: int,
        num_heads: int,
        num_blocks: int,
        in_channels: int = 16,
        text_width: int = 4096,
        freq_width: int = 256,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        self.host = host
        self.num_heads = num_heads
        self.freq_width = freq_width
        self._frequencies: Kept[Tensor] = Kept()
        self._rotary: Kept[Any] = Kept()
        self.patch_embedding = operations.Conv3d(in_channels, width, (1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = nn.Sequential(
            operations.Linear(text_width, width),
            nn.GELU(approximate="tanh"),
            operations.Linear(width, width),
        )
        self.time_embedding = nn.Sequential(
            operations.Linear(freq_width, width), nn.SiLU(), operations.Linear(width, width)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), operations.Linear(width, 6 * width))
        self.control_blocks = nn.ModuleList(
            host.create_block(width, ffn_width, num_heads) for _ in range(num_blocks)
        )
        self.zero_convs = nn.ModuleList(
            operations.Conv1d(width, width, 1) for _ in range(num_blocks)
        )

    def prepare_text(
        self, text: Tensor, dtype: torch.dtype | None = None, padding: int = 1
    ) -> ControlText:
        """Embed text [B, L, Dt] once per generation; its last row counts `padding` times."""
        first = cast(nn.Linear, self.text_embedding[0])
        width = first.in_features
        if text.ndim != 3 or text.shape[-1] != width:
            raise LayoutError(
                f"text features must be [B, L, {width}] for this control network, got "
                f"{list(text.shape)}"
            )
        tokens = self.text_embedding(text.to(dtype or first.weight.dtype))
        per_block = [
            self.host.prepare_text(block, tokens, padding) for block in self.control_blocks
        ]
        return ControlText(per_block, text.shape[0])

    def forward(
        self,
        control_latents: Tensor,
        timestep: Tensor,
        text: Tensor | ControlText,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Control states, one per control block.

        Args:
            control_latents: [B or 1, 16, t, h, w] clean normalised latents of the gray tile.
            timestep: [1] or [B] in 0..1000.
            text: [B or 1, L, Dt] features of the positive prompt, or what `prepare_text` made.
            dtype: compute dtype, where it differs from the weights' (fp8 storage).

        Returns:
            list of [B, t * h/2 * w/2, D]; state i belongs after transformer block i * stride.

        Raises:
            LayoutError: for latents, timesteps or text of the wrong shape.

        Source: StyleMaster, sec. 3.4 and its released code; deviation: none.
        """
        dtype = dtype or cast(nn.Conv1d, self.zero_convs[0]).weight.dtype
        shape, channels = control_latents.shape, self.patch_embedding.in_channels
        if len(shape) != 5 or shape[1] != channels or shape[3] % 2 or shape[4] % 2 or 0 in shape:
            raise LayoutError(
                f"control latents must be [B, {channels}, t, h, w] with even h and w, got "
                f"{list(shape)}"
            )
        text = text if isinstance(text, ControlText) else self.prepare_text(text, dtype)
        batch = max(shape[0], text.batch)
        if not {shape[0], text.batch, timestep.numel()} <= {1, batch} or timestep.ndim != 1:
            raise LayoutError(
                f"control latents for {shape[0]} videos, text for {text.batch} and timesteps "
                f"{list(timestep.shape)} do not belong together; give one, or one per video"
            )
        x = self.patch_embedding(control_latents.to(dtype))
        grid = (x.shape[2], x.shape[3], x.shape[4])
        hidden = rearrange(x, "b d t h w -> b (t h w) d").expand(batch, -1, -1).contiguous()
        frequencies = self._frequencies.get(
            hidden.device, lambda: wave_frequencies(self.freq_width, hidden.device)
        )
        wave = sinusoidal_embedding(timestep.to(hidden.device), frequencies)
        time = self.time_projection(self.time_embedding(wave.to(dtype)))
        modulation = rearrange(time, "b (six d) -> b six d", six=6)
        head_width = hidden.shape[-1] // self.num_heads
        rotary = self._rotary.get(
            (grid, hidden.device, hidden.dtype), lambda: self.host.rotary(grid, head_width, hidden)
        )
        states = []
        for block, zero_conv, block_text in zip(
            self.control_blocks, self.zero_convs, text.per_block, strict=True
        ):
            hidden = self.host.run_block(block, hidden, modulation, rotary, block_text)
            states.append(zero_conv(hidden.transpose(1, 2)).transpose(1, 2))
        return states


class DiffusersHost:
    """Control blocks of diffusers' Wan."""

    def create_block(self, width: int, ffn_width: int, num_heads: int) -> nn.Module:
        from .wan_block import StyledWanBlock

        return StyledWanBlock(width, ffn_width, num_heads)

    def block_key(self, native_key: str) -> str:
        return native_block_key_to_diffusers(native_key)

    def rotary(self, grid: tuple[int, int, int], head_width: int, like: Tensor) -> Any:
        from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

        from .wan_block import Rotary

        with torch.device(like.device):
            rope = WanRotaryPosEmbed(head_width, (1, 1, 1), max(grid))
            return Rotary.of(rope(like.new_empty(1, 1, *grid)), like.dtype)

    def prepare_text(self, block: nn.Module, text_tokens: Tensor, padding: int) -> Any:
        return block.text_keys_values(text_tokens, padding)  # type: ignore[operator]

    def run_block(
        self, block: nn.Module, hidden: Tensor, modulation: Tensor, rotary: Any, text: Any
    ) -> Tensor:
        return block(hidden, modulation, rotary, text.expand(hidden.shape[0]))


def load_gray_tile_controlnet(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    host: WanHost | None = None,
    operations: Any = nn,
) -> GrayTileControlNet:
    """Build the control network from release-format weights; all sizes are read off them.

    Args:
        state_dict: keys of the release's `controlnet.ckpt`. Tensors are not copied.
        num_heads: None for width / 128.
        host: supplies the blocks; None for diffusers'.
        operations: namespace with Linear, Conv1d and Conv3d (torch.nn, or ComfyUI's cast
            operations).

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    host = host or DiffusersHost()
    weights = strip_prefix(dict(state_dict))
    needed = ("patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight")
    needed += ("control_blocks.0.ffn.0.weight",)
    missing = [key for key in needed if key not in weights]
    if missing:
        raise WeightsError(
            f"these {len(weights)} tensors are no gray-tile ControlNet: {missing[0]} is missing"
        )
    patch, text, time, ffn = (weights[key].shape for key in needed)
    width = patch[0]
    heads = num_heads or width // 128
    if heads < 1 or width % heads:
        raise WeightsError(
            f"a width of {width} does not divide into {heads} heads; pass num_heads="
        )
    with torch.device("meta"):
        module = GrayTileControlNet(
            host,
            width=width,
            ffn_width=ffn[0],
            num_heads=heads,
            num_blocks=1
            + max(int(k.split(".")[1]) for k in weights if k.startswith("control_blocks.")),
            in_channels=patch[1],
            text_width=text[1],
            freq_width=time[1],
            operations=operations,
        )
    renamed = {_host_key(host, key): value for key, value in weights.items()}
    check_keys(
        {key: tuple(value.shape) for key, value in renamed.items()},
        {key: tuple(value.shape) for key, value in module.state_dict().items()},
        "gray-tile ControlNet",
    )
    module.load_state_dict(renamed, assign=True)
    return module.requires_grad_(False).eval()


def _host_key(host: WanHost, key: str) -> str:
    if not key.startswith("control_blocks."):
        return key
    prefix, index, rest = key.split(".", 2)
    return f"{prefix}.{index}.{host.block_key(rest)}"


def copy_from_transformer(
    state_dict: Mapping[str, Tensor], *, stride: int = 2
) -> dict[str, Tensor]:
    """Weights of a new control network: copies of every `stride`-th block, zero convolutions at 0.

    Args:
        state_dict: Wan transformer under the release's key names; `*_img` keys are left out.
        stride: of the copied blocks; the release has 2.

    Returns:
        Copied tensors under the release's names of `controlnet.ckpt`.

    Raises:
        ConfigError: for a stride that could not be read off the number of copies later.
        WeightsError: if the state dict is no such transformer.

    Source: StyleMaster's released code (`load_from_wan_state_dict`).
    """
    embeddings = ("patch_embedding.", "text_embedding.", "time_embedding.", "time_projection.")
    weights = {k: v.clone() for k, v in state_dict.items() if k.startswith(embeddings)}
    blocks = sorted({int(k.split(".")[1]) for k in state_dict if k.startswith("blocks.")})
    missing = {"patch_embedding.bias", "text_embedding.0.weight"} - set(weights)
    if missing or not blocks:
        raise WeightsError(
            f"these {len(state_dict)} tensors are no Wan transformer under the release's key "
            "names; convert it first (`stylemaster weights convert`)"
        )
    chosen = blocks[::stride] if 1 <= stride <= len(blocks) else []
    if not chosen or math.ceil(len(blocks) / len(chosen)) != stride:
        raise ConfigError(
            f"a stride of {stride} over {len(blocks)} blocks cannot work; use 1 or 2, or a "
            "divisor of the number of blocks"
        )
    for j, i in enumerate(chosen):
        prefix = f"blocks.{i}."
        for key, value in state_dict.items():
            if key.startswith(prefix) and "_img." not in key:
                weights[f"control_blocks.{j}.{key.removeprefix(prefix)}"] = value.clone()
        width = weights["patch_embedding.bias"].shape[0]
        like = weights["patch_embedding.bias"]
        weights[f"zero_convs.{j}.weight"] = like.new_zeros(width, width, 1)
        weights[f"zero_convs.{j}.bias"] = like.new_zeros(width)
    return weights
