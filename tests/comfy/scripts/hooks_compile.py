"""The hooks under ComfyUI's torch.compile wrapper; prints facts as JSON. Argument: REFERENCE."""

import json
from typing import Any

import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_torch_compile
from safetensors.torch import load_file
from scripts import golden_wan as wan

torch.set_grad_enabled(False)
x = load_file(wan.arguments()[0])
conditionings, patches = wan.pack("nodes.conditionings"), wan.pack("nodes.wan_patches")
Region = wan.pack("stylemaster_core.models.decoupled_attention").StyleRegion
weights = wan.golden("weights_dit_a")
adapter = wan.adapter(weights)
plain = wan.load_model(weights)
network = wan.pack("nodes.native_wan").load_native_controlnet(wan.control_weights(weights))
positive = [[x["in.text"], {}]]
graphs: list[int] = []


def counting(graph: Any, _: Any, **__: Any) -> Any:
    graphs.append(1)
    return graph.forward


def compiled(model: Any, keys: list[str]) -> Any:
    """As the TorchCompileModel node does it, with a back end that only counts."""
    model = model.clone()
    guards = {}
    if hasattr(nodes_torch_compile, "skip_torch_compile_dict"):
        guards = {"guard_filter_fn": nodes_torch_compile.skip_torch_compile_dict}
    set_torch_compile_wrapper(model=model, backend=counting, options=guards, keys=keys)
    return model


def styled(region: Any) -> Any:
    prepared = conditionings.prepare_styles([region], adapter)
    conditioning = conditionings.styled_conditioning(positive, prepared)
    raw = plain.model.process_latent_out(x["in.control"])
    control = conditionings.create_control(positive, raw)
    return conditionings.controlled_conditioning(conditioning, control)


def hooked(model: Any) -> Any:
    return patches.patch_control(patches.patch_style(model, adapter), network, end=0.5)


conds = {
    "plain": positive,
    "style": styled(Region(x["in.tokens"])),
    "other style": styled(Region(x["in.other_tokens"], 0.5)),
    "mask": styled(Region(x["in.tokens"], mask=x["in.mask"])),
}
EARLY, LATE = 0.95, 0.3  # with and without control, which ends at half the sampling
runs = [
    ("plain", EARLY),
    ("style", EARLY),
    ("style", LATE),
    ("other style", EARLY),
    ("mask", LATE),
    ("plain", LATE),
    ("style", EARLY),
]
whole = ["diffusion_model"]
blocks = [f"diffusion_model.blocks.{i}" for i in range(3)]
eager = hooked(plain)
facts: dict[str, Any] = {}
for name, model in (
    ("compiled first", hooked(compiled(plain, whole))),
    ("hooked first", compiled(hooked(plain), whole)),
    ("blocks", compiled(hooked(plain), blocks)),
):
    torch._dynamo.reset()
    facts[name] = []
    for kind, sigma in runs:
        graphs.clear()
        velocity = wan.velocity(model, conds[kind], x["in.latents"], sigma)
        exact = wan.velocity(eager, conds[kind], x["in.latents"], sigma)
        facts[name].append([kind, sigma, wan.relative(velocity, exact), len(graphs)])
facts["leftovers"] = wan.leftovers(plain)
print(json.dumps(facts))
