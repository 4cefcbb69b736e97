"""The gray-tile ControlNet on ComfyUI's own Wan blocks, so that the nodes need no diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.wan.model
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from ..stylemaster_core.models.gray_tile_controlnet import load_gray_tile_controlnet


class NativeWanHost:
    """Control blocks of ComfyUI's native Wan; weights are cast on use (`manual_cast`).

    The release's key names under `control_blocks.N` are those of the native block.
    """

    operations: Any = comfy.ops.manual_cast

    def create_block(self, width: int, ffn_width: int, num_heads: int) -> nn.Module:
        return comfy.ldm.wan.model.WanAttentionBlock(
            "t2v_cross_attn",
            width,
            ffn_width,
            num_heads,
            qk_norm=True,
            cross_attn_norm=True,
            eps=1e-6,
            operation_settings={"operations": self.operations, "device": None, "dtype": None},
        )

    def block_key(self, native_key: str) -> str:
        return native_key

    def rotary(self, grid: tuple[int, int, int], head_width: int, like: Tensor) -> Tensor:
        side = 2 * (head_width // 6)
        embed = comfy.ldm.flux.layers.EmbedND(
            dim=head_width, theta=10000, axes_dim=[head_width - 2 * side, side, side]
        )
        axes = [torch.arange(n, device=like.device, dtype=torch.float32) for n in grid]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        return embed(positions.reshape(1, -1, 3)).movedim(1, 2)

    def prepare_text(self, block: nn.Module, text_tokens: Tensor, padding: int) -> Tensor:
        assert padding == 1  # ComfyUI's attention takes no bias
        return text_tokens

    def run_block(
        self, block: nn.Module, hidden: Tensor, modulation: Tensor, rotary: Tensor, text: Tensor
    ) -> Tensor:
        return block(hidden, e=modulation, freqs=rotary, context=text)


def load_native_controlnet(state_dict: Mapping[str, Tensor]) -> comfy.model_patcher.ModelPatcher:
    """Build the control network and hand it to ComfyUI's memory manager.

    Args:
        state_dict: the release's keys; the dtype of the tensors is the dtype of storage.

    Returns:
        a ModelPatcher whose `model` is the `GrayTileControlNet`; for `patch_control`.

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    host = NativeWanHost()
    net = load_gray_tile_controlnet(state_dict, host=host, operations=host.operations)
    patcher = comfy.model_patcher.ModelPatcher(
        net,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    # How newer versions make another one for another GPU (MultiGPU CFG Split).
    patcher.cached_patcher_init = (_load_again, (net,))
    return patcher


def _load_again(net: nn.Module) -> comfy.model_patcher.ModelPatcher:
    return load_native_controlnet({key: value.cpu() for key, value in net.state_dict().items()})
