"""The motion adapter on ComfyUI's native Wan: merged as a LoRA, or added while it runs."""

from __future__ import annotations

import types
from typing import Any

import comfy.sd
import torch.nn.functional as F
from torch import Tensor

from ..stylemaster_core.errors import ConfigError
from ..stylemaster_core.models.motion_adapter import (
    MotionAdapter,
    motion_adapter_state_dict,
)
from .wan_patches import Hook, ModelCall, check_model, raw, raw_blocks, with_hooks

MOTION_KEY = "stylemaster_motion"
PROJECTIONS = ("q", "k", "v", "o")


def patch_motion(model: Any, adapter: MotionAdapter, scale: float, start: float, end: float) -> Any:
    """A clone of a MODEL with the motion adapter at `scale` within a range of the sampling.

    Over the whole sampling it is a LoRA like any other. Within a range the low-rank part is added
    to the outputs of the layers, because weights cannot change between two steps.

    Raises:
        ConfigError: for a range that cannot be.
        UnsupportedHostError, WeightsError: if adapter and model do not belong together.
    """
    if not 0 <= start <= end <= 1:
        raise ConfigError(
            f"the motion's range must satisfy 0 <= start <= end <= 1, got {start} to {end}"
        )
    blocks = [block["self_attn"] for block in adapter.blocks]  # type: ignore[index]
    width = blocks[0]["q"].lora_A.in_features
    check_model(model, width, len(blocks), "this motion adapter")
    if scale == 0:
        return model.clone()
    if start == 0 and end == 1:
        lora = motion_adapter_state_dict(adapter)
        return comfy.sd.load_lora_for_models(model, None, lora, scale, 0)[0]

    def motion_hooks(call: ModelCall) -> list[Hook]:
        hooks: list[Hook] = []
        if call.in_range(start, end):
            for block, layers in zip(raw_blocks(call.model), blocks, strict=True):
                attention = raw(block.self_attn)
                for name in PROJECTIONS:
                    down, up = (layers[name].get_submodule(f"lora_{x}").weight for x in "AB")
                    moved = (down.to(call.x.device), up.to(call.x.device) * scale)
                    linear = raw(getattr(attention, name))
                    hooks.append((linear, _linear_with_motion, {"stylemaster_motion": moved}))
        return hooks

    return with_hooks(model, MOTION_KEY, motion_hooks)


def _linear_with_motion(self: Any, x: Tensor) -> Tensor:
    """`forward` of a projection of the self-attention."""
    previous = self.stylemaster_previous or types.MethodType(type(self).forward, self)
    down, up = self.stylemaster_motion
    return previous(x) + F.linear(F.linear(x, down.to(x)), up.to(x))
