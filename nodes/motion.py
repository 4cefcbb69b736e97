"""The motion adapter on ComfyUI's native Wan: merged as a LoRA, or added while it runs."""

from __future__ import annotations

import types
from typing import Any

import comfy.model_management
import comfy.sd
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..stylemaster_core.errors import ConfigError
from ..stylemaster_core.models.motion_adapter import (
    MotionAdapter,
    motion_adapter_state_dict,
)
from .block_styles import in_range
from .wan_patches import check_model, hooked, raw, raw_blocks, with_wrapper

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

    def apply_with_motion(
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """APPLY_MODEL wrapper."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        base, hooks = executor.class_obj, []
        if in_range(base.model_sampling, float(t.max()), start, end):
            for block, layers in zip(raw_blocks(base), blocks, strict=True):
                attention = raw(block.self_attn)
                for name in PROJECTIONS:
                    down, up = (layers[name].get_submodule(f"lora_{x}").weight for x in "AB")
                    moved = (down.to(x.device), up.to(x.device) * scale)
                    linear = raw(getattr(attention, name))
                    hooks.append((linear, _linear_with_motion, {"stylemaster_motion": moved}))
        with hooked(hooks):
            options = transformer_options or {}
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    return with_wrapper(model, WrappersMP.APPLY_MODEL, MOTION_KEY, apply_with_motion)


def _linear_with_motion(self: Any, x: Tensor) -> Tensor:
    """`forward` of a projection of the self-attention."""
    previous = self.stylemaster_previous or types.MethodType(type(self).forward, self)
    down, up = self.stylemaster_motion
    return previous(x) + F.linear(F.linear(x, down.to(x)), up.to(x))
