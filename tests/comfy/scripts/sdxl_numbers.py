"""StyleCrafter on the native SDXL UNet, against golden numbers: RESULTS."""

import json
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file
from scripts import golden_sdxl as sdxl
from scripts import golden_wan as wan
from torch import Tensor

torch.set_grad_enabled(False)
(results_path,) = wan.arguments()
patches, styles = wan.pack("nodes.sdxl_patches"), wan.pack("nodes.sdxl_styles")
Region = wan.pack("stylemaster_core.models.decoupled_attention").StyleRegion
x, adapter, plain = sdxl.tensors, sdxl.load_adapter(), sdxl.load_model()
tokens = adapter.encoder(x["clip_features"])
other_tokens = adapter.encoder(x["clip_features"].flip(-1))
styled_model = patches.patch_layers(plain, adapter)
positive, negative = sdxl.conditioning(), sdxl.conditioning("negative_")
results: dict[str, Tensor] = {"style_tokens": tokens}
facts: dict[str, Any] = {}
noise, sigmas = x["latents"], x["sampler_sigmas"]
# diffusers begins at sqrt(sigma^2 + 1) times the noise, ComfyUI here at sigma times the noise.
start = noise * (1 + 1 / sigmas[0] ** 2) ** 0.5
SIGMA = float(plain.model.model_sampling.sigma(x["timestep"].float()))


def conds(*regions: Any) -> tuple[Any, Any, Any]:
    given = (positive, positive, negative)
    for region in regions:
        given = styles.layer_conditionings(adapter, region, given[1], given[2])
    return given


def prediction(model: Any, conditioning: Any, latents: Tensor | None = None) -> Tensor:
    """Noise that the UNet predicts for golden latents, which are those after input scaling."""
    latents = noise if latents is None else latents
    scaled = latents * (SIGMA**2 + 1) ** 0.5
    return wan.velocity(model, conditioning, scaled, SIGMA)


def guided(model: Any, given: Any, scales: tuple[float, float]) -> Tensor:
    guider = wan.pack("nodes.guider").StyleGuider(model)
    guider.set_conds(*given)
    guider.set_cfg(*scales)
    latents = wan.run_guider(guider, start, comfy.samplers.ksampler("euler"), sigmas)
    return model.model.process_latent_in(latents)


full, half = conds(Region(tokens)), conds(Region(tokens, 0.5))
results["scale_scalar"] = styles.predicted_gains(adapter, x["prompt_embeds"], tokens)[..., None] - 1
results["eps_text_style_scale1"] = prediction(styled_model, full[0])
for name, given in (("positive", positive), ("no_style", full[1])):
    results[f"eps_text.{name}"] = prediction(styled_model, given)
results["plain"] = prediction(plain, positive)
for name, scales in (("g7p5_s5", (7.5, 5.0)), ("g7p5_s0", (7.5, 7.5)), ("g5_s5", (5.0, 5.0))):
    results[f"latents_after_3_euler_steps.{name}"] = guided(styled_model, half, scales)

# Mistakes that must be seen.
parts = patches.PARTS
patches.PARTS = ("input", "middle", "output")  # as the blocks are run
results["wrong.order.eps"] = prediction(styled_model, full[0])
results["wrong.order"] = guided(styled_model, half, (7.5, 5.0))
patches.PARTS = parts
results["wrong.scale"] = guided(styled_model, conds(Region(tokens, 0.55)), (7.5, 5.0))
results["wrong.range"] = guided(styled_model, conds(Region(tokens, 0.5, end=0.5)), (7.5, 5.0))

# One batch a step, whatever is in it; ranges and masks.
calls: list[int] = []
guided(wan.watched(styled_model, calls), half, (7.5, 5.0))
facts["calls"] = calls
# The three steps lie at 33, 67 and 100 percent of the way.
# The same branches in the same batch, whose size decides how sums are rounded.
results["same.outside/range"] = guided(styled_model, conds(Region(tokens, end=0.1)), (7.5, 5.0))
results["same.outside/plain"] = guided(plain, (positive, positive, negative), (7.5, 5.0))
ones, left = torch.ones(1, 5, 5), torch.tensor([[[1.0, 0.0]]])
results["same.ones/mask"] = prediction(styled_model, conds(Region(tokens, mask=ones))[0])
results["same.ones/none"] = results["eps_text_style_scale1"]
two = [Region(tokens, mask=left), Region(other_tokens, mask=1 - left)]
results["same.two/ab"] = prediction(styled_model, conds(*two)[0])
results["same.two/ba"] = prediction(styled_model, conds(*reversed(two))[0])
results["half_masked"] = prediction(styled_model, conds(two[0])[0])
touching = [Region(tokens, end=0.5), Region(tokens, start=0.5)]
results["same.touching/two"] = guided(styled_model, conds(*touching), (7.5, 5.0))
results["same.touching/one"] = guided(styled_model, conds(Region(tokens)), (7.5, 5.0))
pair = torch.cat([noise, noise.flip(-1)])
both = prediction(styled_model, full[0], pair)
results["same.batch/two"] = both
results["same.batch/one"] = torch.cat(
    [prediction(styled_model, full[0], part) for part in pair.split(1)]
)
mixed = wan.velocities(
    styled_model, [full[1], full[0], conds(Region(other_tokens))[0]], noise * 2, SIGMA
)
alone = [
    wan.velocity(styled_model, c, noise * 2, SIGMA)
    for c in (full[1], full[0], conds(Region(other_tokens))[0])
]
results["same.mixed/batch"], results["same.mixed/alone"] = torch.cat(mixed), torch.cat(alone)

# LoRA, before and after, and folded into the weights.
names = [k for k in plain.model.state_dict() if "attn2.to_" in k or "attn1.to_q" in k]
generator = torch.Generator().manual_seed(3)
state = plain.model.state_dict()
change = {k: torch.randn(state[k].shape, generator=generator) * 0.1 for k in names if "weight" in k}
lora = {key: ("diff", (value,)) for key, value in change.items()}
before = plain.clone()
before.add_patches(lora, 0.7)
after = styled_model.clone()
after.add_patches(lora, 0.7)
folded = sdxl.load_model()
folded.model.load_state_dict({k: state[k] + 0.7 * v for k, v in change.items()}, strict=False)
results["same.lora/before"] = prediction(patches.patch_layers(before, adapter), full[0])
results["same.lora/after"] = prediction(after, full[0])
results["same.folded/lora"] = results["same.lora/after"]
results["same.folded/folded"] = prediction(patches.patch_layers(folded, adapter), full[0])
results["same.unloaded/with"] = prediction(styled_model, full[0])
results["same.unloaded/without"] = results["eps_text_style_scale1"]


# Another pack's patches: of inputs, of outputs, a replacement; before and after ours.
def louder(n: Tensor, context: Tensor, value: Tensor, _options: Any) -> Any:
    return n * 1.1, context, value * 1.2


def doubled(q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
    attended = wan.pack("nodes.sdxl_patches")._text_attention(q, k, v, options)
    seen.append(q.shape[0])
    return 2 * attended


def foreign(model: Any) -> Any:
    clone = model.clone()
    clone.set_model_attn2_patch(louder)
    clone.set_model_attn2_output_patch(lambda n, _options: 0.9 * n)
    clone.set_model_attn2_replace(doubled, "input", 5, 0)
    clone.set_model_attn2_replace(doubled, "middle", 0)  # all of the block
    return clone


seen: list[int] = []
results["same.foreign/first"] = prediction(patches.patch_layers(foreign(plain), adapter), full[0])
facts["foreign.seen"] = len(seen)
results["same.foreign/last"] = prediction(foreign(styled_model), full[0])
results["foreign.plain"] = prediction(foreign(plain), positive)
results["same.off/foreign"] = prediction(foreign(styled_model), conds(Region(tokens, 0.0))[0])
results["same.off/plain"] = results["foreign.plain"]

facts["wrappers"] = len(
    patches.patch_layers(styled_model, adapter).get_wrappers(
        WrappersMP.APPLY_MODEL, styles.LAYER_KEY
    )
)
compiled = styled_model.clone()
compiled.add_wrapper_with_key(
    WrappersMP.APPLY_MODEL, "torch.compile", lambda executor, *a, **k: executor(*a, **k)
)
other_wan = wan.load_model(wan.golden("weights_dit_a"))
masked = conds(two[0])[0]
masked_area = [[masked[0][0], {**masked[0][1], "area": (4, 4, 0, 0), "strength": 1.0}]]
errors = {
    "wan": lambda: patches.patch_layers(other_wan, adapter),
    "layers": lambda: patches.patch_layers(sdxl.load_model(transformer_depth_middle=1), adapter),
    "text": lambda: patches.patch_layers(sdxl.load_model(context_dim=32), adapter),
    "compiled": lambda: prediction(compiled, full[0]),
    "tokens": lambda: conds(Region(tokens[..., :-1])),
    "overlap": lambda: conds(Region(tokens), Region(other_tokens)),
    "area": lambda: prediction(styled_model, masked_area),
    "style_on_wan": lambda: wan.pack("nodes.wan_patches").patch_style(
        plain, wan.adapter(wan.golden("weights_dit_a"))
    ),
}
facts |= {f"error.{name}": wan.error_of(call) for name, call in errors.items()}
facts["leftovers"] = wan.leftovers(plain)

save_file({k: v.contiguous().clone() for k, v in results.items()}, results_path)
print(json.dumps(facts))
