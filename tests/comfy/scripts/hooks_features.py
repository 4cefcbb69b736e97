"""What ComfyUI offers beside our style: does the style act under it? Argument: REFERENCE (inputs).

For each feature that this ComfyUI has: how far a styled sampling is from one without style under
it, how far the feature moves the result, and how many calls of the model it takes; or the refusal.
"""

import importlib
import json
from collections.abc import Callable
from typing import Any

import comfy.context_windows as windows
import comfy.supported_models
import torch
from safetensors.torch import load_file
from scripts import golden_wan as wan

torch.set_grad_enabled(False)
x = load_file(wan.arguments()[0])
conditionings, patches = wan.pack("nodes.conditionings"), wan.pack("nodes.wan_patches")
Region = wan.pack("stylemaster_core.models.decoupled_attention").StyleRegion
weights = wan.golden("weights_dit_a")
adapter = wan.adapter(weights)
plain = wan.load_model(weights)
styled_model = patches.patch_style(plain, adapter)
positive, negative = [[x["in.text"], {}]], [[x["in.negative"], {}]]
sigmas = torch.linspace(1, 0, 13)
calls: list[int] = []


def branches(scale: float) -> tuple[Any, Any, Any]:
    styles = conditionings.prepare_styles([Region(x["in.tokens"], scale)], adapter)
    return (
        conditionings.styled_conditioning(positive, styles),
        conditionings.unstyled_conditioning(positive, styles),
        conditionings.unstyled_conditioning(negative, styles),
    )


def sample(model: Any, scale: float, latents: str = "in.latents") -> torch.Tensor:
    return wan.guided(wan.watched(model, calls), branches(scale), (5.0, 3.0), x[latents], sigmas)


def node(module: str, name: str, **inputs: Any) -> Callable[[Any], Any]:
    """A stock node that changes a MODEL."""
    cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    return lambda model: cls.execute(model, **inputs)[0]


def caching(name: str) -> Callable[[Any], Any]:
    # Random weights change more from step to step than trained ones do.
    options = {"reuse_threshold": 3.0, "start_percent": 0.15, "end_percent": 0.95}
    return node("nodes_easycache", name, **options, verbose=False)


def window(freenoise: bool) -> Callable[[Any], Any]:
    def with_windows(model: Any) -> Any:
        model = model.clone()
        model.model_options["context_handler"] = windows.IndexListContextHandler(
            windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
            windows.get_matching_fuse_method(windows.ContextFuseMethods.PYRAMID),
            context_length=3,
            context_overlap=1,
            dim=2,
            freenoise=freenoise,
        )
        if freenoise:
            windows.create_sampler_sample_wrapper(model)
        return model

    return with_windows


def cloned_for_another_gpu(model: Any) -> Any:
    model.cached_patcher_init = (lambda: wan.load_model(weights), ())
    return model.deepclone_multigpu(model.load_device)


def cloned_control() -> dict[str, float]:
    """A MODEL with the gray-tile control, cloned for another GPU, against itself."""
    network = wan.pack("nodes.native_wan").load_native_controlnet(wan.control_weights(weights))
    model = patches.patch_control(styled_model, network)
    latents = plain.model.process_latent_out(x["in.control"])
    control = conditionings.create_control(positive, latents)
    given = conditionings.controlled_conditioning(branches(1.0)[0], control)
    before = wan.velocity(model, given, x["in.latents"], 0.7)
    other = cloned_for_another_gpu(model)
    (copied,) = other.get_additional_models_with_key(patches.CONTROL_KEY)
    return {
        "difference": wan.relative(wan.velocity(other, given, x["in.latents"], 0.7), before),
        "own_network": copied.model is not network.model,
        "control": wan.relative(
            before, wan.velocity(styled_model, branches(1.0)[0], x["in.latents"], 0.7)
        ),
    }


def causal(_: Any) -> Any:
    config = comfy.supported_models.WAN21_CausalAR_T2V(wan.CONFIG | {"model_type": "t2v"})
    config.set_inference_dtype(torch.float32, None)
    other = wan.comfy.model_patcher.ModelPatcher(
        config.get_model({}, ""), plain.load_device, plain.offload_device
    )
    return patches.patch_style(other, adapter)


FEATURES: dict[str, tuple[Callable[[], Callable[[Any], Any]], str]] = {
    "EasyCache": (lambda: caching("EasyCacheNode"), "in.latents"),
    "LazyCache": (lambda: caching("LazyCacheNode"), "in.latents"),
    "CFGZeroStar": (lambda: node("nodes_cfg", "CFGZeroStar"), "in.latents"),
    "CFGNorm": (lambda: node("nodes_cfg", "CFGNorm", strength=1.0), "in.latents"),
    "NAGuidance": (
        lambda: node("nodes_nag", "NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5),
        "in.latents",
    ),
    "context windows": (lambda: window(False), "in.long_latents"),
    "context windows with FreeNoise": (lambda: window(True), "in.long_latents"),
    "MultiGPU CFG Split (its clones)": (lambda: cloned_for_another_gpu, "in.latents"),
    "CausalAR models": (lambda: causal, "in.latents"),
}


def measure(feature: Callable[[Any], Any], latents: str) -> dict[str, float]:
    model = feature(styled_model.clone())
    calls.clear()
    styled = sample(model, 1.0, latents)
    count = len(calls)
    return {
        "style": wan.relative(styled, sample(model, 0.0, latents)),
        "feature": wan.relative(styled, sample(styled_model, 1.0, latents)),
        "calls": count,
        "finite": bool(styled.isfinite().all()),
    }


facts: dict[str, Any] = {}
for name, (make, latents) in FEATURES.items():
    try:
        feature = make()
    except (ImportError, AttributeError) as error:
        facts[name] = f"absent: {error}"
        continue
    try:
        facts[name] = measure(feature, latents)
    except AttributeError as error:
        facts[name] = f"absent: {error}"
    except Exception as error:  # noqa: BLE001
        facts[name] = f"{type(error).__name__}: {error}"
if hasattr(plain, "deepclone_multigpu"):
    facts["cloned control"] = cloned_control()
facts["leftovers"] = wan.leftovers(plain)
print(json.dumps(facts))
