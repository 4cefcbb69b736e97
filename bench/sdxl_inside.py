"""What `bench.sdxl` measures inside ComfyUI. Argument: the setting as JSON; prints JSON.

The native SDXL UNet at real width with fewer layers, for which ComfyUI's loader has no name, so it
is built by hand; our nodes make the rest.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from custom_nodes_stylemaster.bench.comfy_measure import (
    Setting,
    Stopwatch,
    compare,
    draw,
    memory,
    run_part,
    sampling_memory,
)
from custom_nodes_stylemaster.nodes.apply_style import ApplyStyle
from custom_nodes_stylemaster.nodes.loaders import load_adapter
from custom_nodes_stylemaster.nodes.sampling import create_guider
from custom_nodes_stylemaster.nodes.sdxl_styles import predicted_gains
from custom_nodes_stylemaster.stylemaster_core.models.decoupled_attention import StyleRegion
from custom_nodes_stylemaster.stylemaster_core.models.style_tokens import Style
from custom_nodes_stylemaster.stylemaster_core.models.stylecrafter_sdxl import layer_styles
from torch import Tensor

STYLE_TOKENS, STYLE_WIDTH = 16, 2048  # of the released adapter
TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH = 77, 2048, 1280
TEXT_CFG, STYLE_CFG, STRENGTH = 7.5, 5.0, 0.5
HIGHEST_SIGMA = 14.6


def load_model(setting: Setting) -> Any:
    """The MODEL in float32, so that no weight is cast in a step and hides our share of it."""
    config = comfy.supported_models.SDXL(dict(setting.unet))
    config.unet_config |= setting.unet  # over what the class sets for the real depth
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.diffusion_model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(float("norm" in name and name.endswith("weight")))
        else:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def prompts() -> tuple[Any, Any, Any]:
    """Three prompts as SDXL's two text encoders give them."""
    first, second, third = (
        [[draw(i, 1, TEXT_TOKENS, TEXT_WIDTH), {"pooled_output": draw(i, 1, POOLED_WIDTH)}]]
        for i in range(3)
    )
    return first, second, third


def style() -> Style:
    return Style(draw(7, 1, STYLE_TOKENS, STYLE_WIDTH))


def apply_style(model: Any, adapter: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    """The node: MODEL, and styled, positive, negative."""
    _, positive, negative = prompts()
    output = ApplyStyle.execute(
        model, adapter, style(), positive, negative, STRENGTH, 0.0, 1.0, "all", "", 0, -1
    )
    patched, *conds = output.args
    return patched, tuple(conds)


def native_watch(setting: Setting, model: Any) -> Stopwatch:
    """Plain guidance with as many branches as ours."""
    guider = Guider_DualCFG(model)
    guider.set_conds(*prompts())
    guider.set_cfg(STYLE_CFG, TEXT_CFG)
    return Stopwatch(guider, latents(setting), HIGHEST_SIGMA)


def our_watch(setting: Setting, styled: Any, conds: Sequence[Any]) -> Stopwatch:
    guider = create_guider(styled, conds[0], conds[1], conds[2], TEXT_CFG, STYLE_CFG)
    return Stopwatch(guider, latents(setting), HIGHEST_SIGMA)


def latents(setting: Setting) -> Tensor:
    return draw(3, 1, 4, *setting.latents)


def speed(setting: Setting) -> dict[str, Any]:
    model = load_model(setting)
    styled, conds = apply_style(model, load_adapter(Path(setting.adapter)))
    makers = {
        "native": lambda: native_watch(setting, model),
        "ours": lambda: our_watch(setting, styled, conds),
    }
    return compare(makers, setting)


def native_memory(setting: Setting) -> dict[str, Any]:
    return sampling_memory(native_watch(setting, load_model(setting)), setting.steps)


def ours_memory(setting: Setting) -> dict[str, Any]:
    model = load_model(setting)
    styled, conds = apply_style(model, load_adapter(Path(setting.adapter)))
    return sampling_memory(our_watch(setting, styled, conds), setting.steps)


def adapter(setting: Setting) -> dict[str, Any]:
    """The adapter at real size, without a UNet: what loading, a style and a step take and keep."""
    before = memory()
    loaded = load_adapter(Path(setting.real_adapter))
    layers = loaded.layers
    weights = sum(x.nbytes for x in layers.parameters())
    projections = sum(x.nbytes for x in layers.layers.parameters())
    after_loading = memory()
    started = time.perf_counter()
    region = StyleRegion(style().tokens, STRENGTH)
    text = draw(1, 1, TEXT_TOKENS, TEXT_WIDTH)
    region = StyleRegion(
        region.tokens, STRENGTH, gains=predicted_gains(loaded, text, region.tokens)
    )
    gains_seconds = time.perf_counter() - started
    started = time.perf_counter()
    keys_values = layers.keys_values(region.tokens)
    seconds = time.perf_counter() - started
    kept = [x for layer in keys_values for x in (layer.keys, layer.values)]
    kept += [x for layer in keys_values for x in layer.norm.parameters()]
    steps = []
    for _ in range(5):
        started = time.perf_counter()
        rows = layer_styles([region], [keys_values], torch.empty(0, dtype=torch.bfloat16))
        steps.append(time.perf_counter() - started)
    on_device = [x for s in rows for x in (*s.keys, *s.values, *s.norms[0])]
    alive = weakref.ref(layers)
    del loaded, layers
    gc.collect()
    return {
        "layers": len(keys_values),
        "weights_bytes": weights,
        "projection_bytes": projections,
        # What is mapped from the file is not counted: it takes no memory that others need.
        "loaded_anonymous_bytes": after_loading["anonymous"] - before["anonymous"],
        "gains_seconds": gains_seconds,
        "keys_values_seconds": seconds,
        "kept_bytes": sum(x.untyped_storage().nbytes() for x in kept),
        "on_device_bytes": sum(x.nbytes for x in on_device),
        "layer_styles_seconds": statistics.median(steps),
        "freed": alive() is None,
        "after_anonymous_bytes": memory()["anonymous"] - before["anonymous"],
    }


PARTS = {
    "speed": speed,
    "native memory": native_memory,
    "ours memory": ours_memory,
    "adapter": adapter,
}


if __name__ == "__main__":
    # What a GPU uses. A CPU's default is slower, and our share of the step would look smaller.
    attention = comfy.ldm.modules.attention
    attention.optimized_attention = attention.attention_pytorch
    run_part(PARTS)
