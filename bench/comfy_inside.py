"""What `bench.comfy` measures inside ComfyUI. Argument: the setting as JSON; prints JSON.

Everything is built as the nodes build it: ComfyUI's loader makes the MODEL, our nodes the rest.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import gc
import math
import statistics
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.ldm.wan.model
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from custom_nodes_stylemaster.bench.comfy_measure import (
    Setting,
    Stopwatch,
    compare,
    draw,
    memory,
    run_part,
    sampling_memory,
)
from custom_nodes_stylemaster.nodes import conditionings, native_wan, wan_patches
from custom_nodes_stylemaster.nodes.apply_style import ApplyStyle
from custom_nodes_stylemaster.nodes.block_styles import TokenGrid, block_styles
from custom_nodes_stylemaster.nodes.loaders import load_adapter
from custom_nodes_stylemaster.nodes.sampling import create_guider
from custom_nodes_stylemaster.stylemaster_core.models.decoupled_attention import (
    StyleRegion,
    create_style_attention,
    style_residual,
)
from custom_nodes_stylemaster.stylemaster_core.models.style_tokens import Style
from torch import Tensor

STYLE_TOKENS, STYLE_WIDTH = 16, 4096  # of the released adapter
TEXT_TOKENS, TEXT_WIDTH = 512, 4096  # to which ComfyUI's UMT5 pads
REAL_BLOCKS = 30
TEXT_CFG, STYLE_CFG, SHIFT = 8.0, 3.0, 5.0


def load_model(setting: Setting) -> Any:
    """The MODEL in float32, so that no weight is cast in a step and hides our share of it."""
    weights = comfy.utils.load_torch_file(setting.transformer)
    options = {"dtype": torch.float32}
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options)
    return ModelSamplingSD3().patch(model, SHIFT)[0]


def prompts() -> tuple[Any, Any, Any]:
    """Three prompts as UMT5 gives them."""
    first, second, third = ([[draw(i, 1, TEXT_TOKENS, TEXT_WIDTH), {}]] for i in range(3))
    return first, second, third


def apply_style(model: Any, adapter: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    """The node: MODEL, and styled, positive, negative."""
    _, positive, negative = prompts()
    style = Style(draw(7, 1, STYLE_TOKENS, STYLE_WIDTH))
    output = ApplyStyle.execute(
        model, adapter, style, positive, negative, 1.0, 0.0, 1.0, "all", "", 0, -1
    )
    patched, *conds = output.args
    return patched, tuple(conds)


def native_guider(model: Any) -> Any:
    guider = Guider_DualCFG(model)
    guider.set_conds(*prompts())
    guider.set_cfg(STYLE_CFG, TEXT_CFG)
    return guider


def style_guider(model: Any, conds: Sequence[Any]) -> Any:
    return create_guider(model, conds[0], conds[1], conds[2], TEXT_CFG, STYLE_CFG)


def stopwatch(setting: Setting, guider: Any) -> Stopwatch:
    return Stopwatch(guider, draw(3, 1, 16, *setting.latents))


def speed(setting: Setting) -> dict[str, Any]:
    model = load_model(setting)
    styled, conds = apply_style(model, load_adapter(Path(setting.adapter)))
    makers = {
        "native": lambda: stopwatch(setting, native_guider(model)),
        "ours": lambda: stopwatch(setting, style_guider(styled, conds)),
    }
    dtype = str(wan_patches.compute_dtype(model.model)).removeprefix("torch.")
    result = {"dtype": dtype, **compare(makers, setting)}
    alone = style_alone(setting, model, conds)
    result["style_alone_cpu_seconds_per_step"] = alone
    result["style_alone_share"] = alone / result["native"]["cpu_seconds_per_step"]
    return result


def style_alone(setting: Setting, model: Any, conds: Sequence[Any]) -> float:
    """CPU seconds of what the style branch adds to a step, without the model around it."""
    rows = [(condition_of(conditioning), 0) for conditioning in conds]
    grid = token_grid(setting)
    query = draw(5, len(rows), math.prod(grid.size), setting.width)
    heads = model.model.diffusion_model.num_heads
    runs = []
    for _ in range(5):
        started = time.process_time()
        for style in block_styles(rows, grid, model.model.model_sampling, 0.5, query):
            torch.add(query, style_residual(query, style, heads))
        runs.append(time.process_time() - started)
    return statistics.median(runs)


def token_grid(setting: Setting) -> TokenGrid:
    frames, height, width = setting.latents
    return TokenGrid((frames, height // 2, width // 2), None)


def costs(setting: Setting) -> dict[str, Any]:
    model = load_model(setting)
    applied, styled, conds = application(setting, model)
    return {
        "apply_style": applied | real_projections(setting),
        "interrupt": interruption(setting, styled, conds),
        "control": control(setting, styled, conds),
    }


def application(setting: Setting, model: Any) -> tuple[dict[str, Any], Any, tuple[Any, ...]]:
    """Time of the node, and what stays of it and of the adapter."""
    before = memory()
    adapter = load_adapter(Path(setting.adapter))
    projections = sum(p.nbytes for p in adapter.attention.state_dict().values())
    loaded = memory()
    runs = []
    for _ in range(3):
        started = time.perf_counter()
        styled, conds = apply_style(model, adapter)
        runs.append(time.perf_counter() - started)
    kept = {id(x): x for c in conds for style in condition_of(c).styles for x in tensors_of(style)}
    alive = weakref.ref(adapter.attention)
    del adapter
    gc.collect()
    result = {
        "first_seconds": runs[0],
        "seconds": statistics.median(runs),
        "kept_bytes": sum(x.untyped_storage().nbytes() for x in kept.values()),
        "projection_bytes": projections,
        # Of the loaded adapter, which ComfyUI's cache of node outputs may hold. What is mapped
        # from the file takes no memory that others need.
        "loaded_anonymous_bytes": loaded["anonymous"] - before["anonymous"],
        "projections_freed": alive() is None,
    }
    return result, styled, conds


def condition_of(conditioning: Any) -> Any:
    return conditioning[0][1]["model_conds"][conditionings.STYLE_KEY].cond[0][0]


def tensors_of(style: Any) -> list[Tensor]:
    return [style.kv.keys, style.kv.values, style.no_style, style.region.tokens]


def real_projections(setting: Setting) -> dict[str, Any]:
    """Keys and values for all blocks of the real model, which most of the node's time goes to."""
    weights: dict[str, Tensor] = {}
    for block in range(REAL_BLOCKS):
        prefix = f"blocks.{block}.cross_attn."
        for name in ("k_img", "v_img"):
            matrix = weights.get(f"blocks.0.cross_attn.{name}.weight")
            if matrix is None:
                matrix = draw(block, setting.width, STYLE_WIDTH).bfloat16()
            weights[f"{prefix}{name}.weight"] = matrix.clone()
            weights[f"{prefix}{name}.bias"] = torch.ones(setting.width, dtype=torch.bfloat16)
        weights[f"{prefix}norm_k_img.weight"] = torch.ones(setting.width, dtype=torch.bfloat16)
    attention = create_style_attention(weights)
    region = StyleRegion(draw(7, 1, STYLE_TOKENS, STYLE_WIDTH))
    runs, steps = [], []
    for _ in range(3):
        started = time.perf_counter()
        prepared = conditionings.prepare_styles([region], attention)
        runs.append(time.perf_counter() - started)
    rows = [(conditionings.StyleCondition(prepared, styled), 0) for styled in (False, False, True)]
    grid, like = token_grid(setting), torch.empty(0)
    for _ in range(5):
        started = time.perf_counter()
        block_styles(rows, grid, None, 0.5, like)
        steps.append(time.perf_counter() - started)
    return {
        "real_blocks": REAL_BLOCKS,
        "real_seconds": statistics.median(runs),
        "real_kept_bytes": sum(x.nbytes for style in prepared for x in tensors_of(style)),
        "real_projection_bytes": sum(x.nbytes for x in weights.values()),
        "real_rows_seconds_per_step": statistics.median(steps),
    }


def interruption(setting: Setting, styled: Any, conds: Sequence[Any]) -> dict[str, Any]:
    """How long the sampling goes on when it is interrupted right after a step has begun."""
    watch = stopwatch(setting, style_guider(styled, conds))
    requested: list[float] = []

    def interrupt(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        if len(watch.rows) == 2 and not requested:
            comfy.model_management.interrupt_current_processing(True)
            requested.append(time.perf_counter())
        return executor(*args, **kwargs)

    watch.guider.model_patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stop", interrupt)
    try:
        watch.sample(4)
    except comfy.model_management.InterruptProcessingException:
        waited = time.perf_counter() - requested[0]
    else:
        raise RuntimeError("the interrupt was not heeded")
    finally:
        comfy.model_management.interrupt_current_processing(False)
    return {
        "steps_begun_after_request": len(watch.rows) - 2,
        "seconds": waited,
        "steps": waited / watch.seconds[0],
    }


def control(setting: Setting, styled: Any, conds: Sequence[Any]) -> dict[str, Any]:
    """Calls of the ControlNet, and what a step costs with it."""
    weights = comfy.utils.load_torch_file(setting.controlnet)
    network = native_wan.load_native_controlnet({k: v.float() for k, v in weights.items()})
    model = wan_patches.patch_control(styled, network)
    tile = conditionings.create_control(conds[1], draw(9, 1, 16, *setting.latents))
    given = [conditionings.controlled_conditioning(c, tile) for c in conds]
    calls: list[int] = []
    hook = network.model.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    watch = stopwatch(setting, style_guider(model, given))
    watch.sample(setting.steps)
    hook.remove()
    return {
        "blocks": len(network.model.control_blocks),
        "steps": setting.steps,
        "network_calls": len(calls),
        "rows_per_network_call": calls,
        "seconds_per_step": statistics.median(watch.seconds),
        "tflop_per_step": stopwatch(setting, style_guider(model, given)).flop() / 1e12,
    }


def native_memory(setting: Setting) -> dict[str, Any]:
    model = load_model(setting)
    return sampling_memory(stopwatch(setting, native_guider(model)), setting.steps)


def ours_memory(setting: Setting) -> dict[str, Any]:
    model = load_model(setting)
    styled, conds = apply_style(model, load_adapter(Path(setting.adapter)))
    return sampling_memory(stopwatch(setting, style_guider(styled, conds)), setting.steps)


PARTS = {
    "speed": speed,
    "costs": costs,
    "native memory": native_memory,
    "ours memory": ours_memory,
}


if __name__ == "__main__":
    # What a GPU uses. A CPU's default is slower, and our share of the step would look smaller.
    comfy.ldm.wan.model.optimized_attention = comfy.ldm.modules.attention.attention_pytorch
    run_part(PARTS)
