"""StyleCrafter on VideoCrafter's UNet in ComfyUI, against golden numbers: RESULTS NUM_STEPS."""

import json
import os
import tempfile
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.samplers
import comfy.sd
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from scripts import golden_sdxl as sdxl
from scripts import golden_videocrafter as vc
from scripts import golden_wan as wan
from torch import Tensor

torch.set_grad_enabled(False)
results_path, num_steps = wan.arguments()
results: dict[str, Tensor] = {}
facts: dict[str, Any] = {}
adapter, plain = vc.load_adapter(), vc.load_model()
positive, negative = vc.conditioning(), vc.conditioning(negative=True)
SIGMA = vc.sigma_of(plain)


def applied(model: Any = plain, **changes: Any) -> Any:
    options = {
        "model": model,
        "adapter": adapter,
        "style": vc.style(),
        "positive": positive,
        "negative": negative,
        "strength": 1.0,
    }
    return wan.apply_style(**(options | changes))


def prediction(model: Any, conditioning: Any, latents: Tensor = vc.frames) -> Tensor:
    """Noise that the UNet predicts for golden latents, which are those after input scaling."""
    return wan.velocity(model, conditioning, latents * (SIGMA**2 + 1) ** 0.5, SIGMA)


model, styled, unstyled, other = applied()
results["style_tokens"] = adapter.encoder(vc.tensors["clip_features"])
gains = adapter.layers.gains(vc.tensors["context"], vc.tensors["style_tokens"])
results["scales"] = gains - 1
results["eps_text"] = prediction(plain, positive)
results["eps_text.unstyled"] = prediction(model, unstyled)
results["eps_text_style"] = prediction(model, styled)
results["eps_image_mode"] = prediction(model, styled, vc.frames[:1])

# ---- mistakes that must be seen ----
temporal = wan.pack("stylemaster_core.models.temporal_transformer")
attention = wan.pack("stylemaster_core.models.decoupled_attention")
native = wan.pack("nodes.native_videocrafter")
unet = plain.model.diffusion_model


def mistaken(name: str, owner: Any, attribute: str, wrong: Any) -> None:
    right = getattr(owner, attribute)
    setattr(owner, attribute, wrong)
    results[f"wrong.{name}"] = prediction(model, styled)
    setattr(owner, attribute, right)


real_attend, real_positions = attention.attend, temporal.RelativePositions.forward
real_patches = native.VideoCrafterUNet._patches


def unscaled(query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    return real_attend(query * (query.shape[-1] // heads) ** 0.5, keys, values, heads)


def without_first(self: Any, options: Any, count: int) -> Any:
    made = real_patches(self, options, count)
    return {**made, "input_block_patch": made["input_block_patch"][1:]}


mistaken("logits", attention, "attend", unscaled)
mistaken(
    "positions",
    temporal.RelativePositions,
    "forward",
    lambda self, count, like: real_positions(self, count + 1, like)[:-1, 1:],
)
mistaken("init_attn", native.VideoCrafterUNet, "_patches", without_first)
for module in unet.modules():
    if isinstance(module, temporal.TemporalTransformer):
        norm = module.norm.forward
        module.norm.forward = lambda x, norm=norm: rearrange(
            norm(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=x.shape[2]
        )
results["wrong.norm"] = prediction(model, styled)
for module in unet.modules():
    if isinstance(module, temporal.TemporalTransformer):
        del module.norm.forward
block = unet.output_blocks[1]  # transformer, temporal layer, upsampling
block.insert(2, block.pop(3))
results["wrong.upsampling"] = prediction(model, styled)
block.insert(2, block.pop(3))
results["same.restored/after"] = prediction(model, styled)
results["same.restored/before"] = results["eps_text_style"]
ungained = [[text, dict(options)] for text, options in styled]
condition = ungained[0][1]["model_conds"]["stylecrafter_layers"].cond[0][0]
region = condition.styles[0].region
object.__setattr__(region, "gains", None)
condition.made.clear()
results["wrong.gains"] = prediction(model, styled)
object.__setattr__(region, "gains", gains)
condition.made.clear()

# ---- sampling with what ComfyUI has: euler_ancestral on ddim_uniform, guided by 16 and 8.5 ----
sampling = model.model.model_sampling
sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", int(num_steps))
results["sigmas"] = sigmas
start = vc.frames * (1 + 1 / sigmas[0] ** 2) ** 0.5


def guided(given: Any, text: float = 16.0, style: float = 8.5, name: str = "euler") -> Tensor:
    drawn = torch.Generator().manual_seed(2)  # versions of ComfyUI seed their own differently
    noise = {"noise_sampler": lambda *_: torch.randn(start.shape, generator=drawn)}
    guider = wan.pack("nodes.guider").StyleGuider(given[0])
    guider.set_conds(*given[1:])
    guider.set_cfg(text, style)
    sampler = comfy.samplers.ksampler(name, noise if "ancestral" in name else {})
    return plain.model.process_latent_in(wan.run_guider(guider, start, sampler, sigmas))


given = (model, styled, unstyled, other)
results["sampled.eta0"] = guided(given)
results["sampled.eta1"] = guided(given, name="euler_ancestral")
results["wrong.base"] = guided(given, 15.0, 7.5)

# ---- ComfyUI's own ways ----
pair = torch.cat([prediction(model, styled), prediction(model, unstyled)])
both = wan.velocities(model, [styled, unstyled], vc.frames * (SIGMA**2 + 1) ** 0.5, SIGMA)
results["same.batch/together"], results["same.batch/alone"] = torch.cat(both), pair
calls: list[int] = []
guided((wan.watched(model, calls), *given[1:]))
facts["calls"] = calls

lora: dict[str, Tensor] = {}
change: dict[str, Tensor] = {}
for name in ("input_blocks.3.1", "input_blocks.3.2", "init_attn.0"):
    key = f"{name}.transformer_blocks.0.attn1.to_q"
    width = unet.state_dict()[f"{key}.weight"].shape[0]
    up, down = vc.seeded(width, 2), vc.seeded(2, width, seed=4)
    stem = f"lora_unet_{key.replace('.', '_')}"
    lora |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    lora[f"{stem}.alpha"] = torch.tensor(2.0)
    change[f"{key}.weight"] = vc.tensors[f"unet.{key}.weight"] + 0.5 * up @ down
with_lora, _ = comfy.sd.load_lora_for_models(plain, None, lora, 0.5, 0.0)
results["same.lora/loaded"] = prediction(applied(with_lora)[0], styled)
results["same.lora/folded"] = prediction(applied(vc.load_model(**change))[0], styled)
results["same.unloaded/after"] = prediction(model, styled)
results["same.unloaded/before"] = results["eps_text_style"]

steps: list[int] = []


def stop(step: int, *_others: Any) -> None:
    steps.append(step)
    comfy.model_management.interrupt_current_processing(True)


def interrupted() -> None:
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": styled})
    sampler = comfy.samplers.ksampler("euler")
    guider.sample(start, start * 0, sampler, sigmas, callback=stop, disable_pbar=True, seed=1)


facts["interrupted"] = wan.error_of(interrupted).split(":")[0]
facts["interrupted.steps"] = steps
comfy.model_management.interrupt_current_processing(False)
real_dtype = comfy.model_management.unet_dtype
comfy.model_management.unet_dtype = lambda **_: torch.float16  # as a GPU has it
half = vc.load_model(**{k: v.half() for k, v in vc.under("unet.").items()})
facts["half"] = [str(half.model.get_dtype()), str(half.model.manual_cast_dtype)]
comfy.model_management.unet_dtype = real_dtype
results["half"] = prediction(applied(half)[0], styled)

# ---- v1: CLIP's features ----
seen = load_file(vc.FOLDER / "v1_clip_features.safetensors")
cfg = json.loads((vc.FOLDER / "v1_clip_features.json").read_text())["cfg"]
visual = wan.pack("stylemaster_core.weights.key_maps").open_clip_to_hf_vision(seen)
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "config.json")
    with open(path, "w") as file:
        inner = visual["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        options = {
            "model_type": "clip_vision_model",
            "hidden_size": cfg["width"],
            "intermediate_size": inner,
            "num_attention_heads": cfg["heads"],
            "num_hidden_layers": cfg["layers"],
            "num_channels": 3,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "gelu",
            "projection_dim": visual["visual_projection.weight"].shape[0],
        }
        json.dump(options, file)
    vision = comfy.clip_vision.ClipVisionModel(path)
vision.model.float()  # on a CPU ComfyUI would keep it in half precision
facts["vision"] = [list(keys) for keys in vision.load_sd(visual)]
encoding = wan.pack("nodes.style_encoding")
image = seen["image_u8"].permute(1, 2, 0)[None].float() / 255
features = encoding.encode_pictures(vision, image, 0, "center")
results["features"] = features.seen_by(adapter)
results["features.patches"] = features.patches

squashed = encoding.encode_pictures(vision, image, 0, "squash")
sdxl_model, sdxl_adapter = sdxl.load_model(), sdxl.load_adapter()
errors = {
    "crop": lambda: squashed.seen_by(adapter),
    "sdxl_model": lambda: applied(sdxl_model),
    "sdxl_adapter": lambda: applied(adapter=sdxl_adapter),
    "frames": lambda: applied(first_frame=2),
    "missing": lambda: native.load_videocrafter(
        {k: v for k, v in vc.under("unet.").items() if k != "init_attn.0.norm.bias"}
    ),
    "temporal": lambda: native.load_videocrafter(
        vc.under("unet."), {"init_attn.0.norm.bias": torch.ones(3)}
    ),
}
facts |= {f"error.{name}": wan.error_of(call) for name, call in errors.items()}
facts["keys"] = sorted(set(unet.state_dict()) ^ set(vc.under("unet.")))
facts["leftovers"] = wan.leftovers(plain)

save_file({k: v.contiguous().clone() for k, v in results.items()}, results_path)
print(json.dumps(facts))
