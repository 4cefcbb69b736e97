"""ComfyUI's native Wan with the golden weights, and short cuts to run it (inside ComfyUI only)."""

import importlib
import sys
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[2] / "golden" / "stylemaster"
SHIFT = 5.0
CONFIG: dict[str, Any] = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 256,
    "ffn_dim": 256,
    "num_heads": 2,
    "num_layers": 3,
    "in_dim": 16,
    "out_dim": 16,
    "text_dim": 128,
    "freq_dim": 256,
    "patch_size": (1, 2, 2),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}


def pack(module: str) -> Any:
    """A module of the pack, under the name that ComfyUI gave the pack."""
    return importlib.import_module(f"custom_nodes_stylemaster.{module}")


def golden(name: str) -> dict[str, Tensor]:
    return {
        key: value.float() if value.dtype == torch.bfloat16 else value
        for key, value in load_file(GOLDEN / f"{name}.safetensors").items()
    }


def load_model(
    weights: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    **changes: Any,
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL. ComfyUI's loader would insist on text of width 4096, so it is built by hand."""
    config = comfy.supported_models.WAN21_T2V(CONFIG | changes)
    config.set_inference_dtype(dtype, compute_dtype)
    model = config.get_model({}, "")
    base = {k: v for k, v in weights.items() if "_img." not in k and "style_model." not in k}
    missing, unexpected = model.diffusion_model.load_state_dict(base, strict=False)
    assert not unexpected and (changes or not missing), (missing, unexpected)
    patcher = comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return ModelSamplingSD3().patch(patcher, SHIFT)[0]


def adapter(weights: dict[str, Tensor]) -> Any:
    attention = pack("stylemaster_core.models.decoupled_attention")
    return attention.create_style_attention(weights)


def control_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The release's copy rule, and the golden zero convolutions."""
    core = pack("stylemaster_core.models.gray_tile_controlnet")
    convs = {k[8:]: v for k, v in golden("03_controlnet_a").items() if k.startswith("weights.")}
    return core.copy_from_transformer(weights) | convs


class Once(comfy.samplers.Sampler):
    """Asks the model once, at given latents and sigma, and keeps its velocity."""

    def __init__(self, latents: Tensor, sigma: float) -> None:
        self.latents, self.sigma = latents, sigma

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: Any, *_: Any) -> Tensor:
        sigma = torch.full((self.latents.shape[0],), self.sigma)
        denoised = model_wrap(self.latents, sigma, **extra_args)
        self.velocity = (self.latents - denoised) / self.sigma
        return self.latents


def apply_style(**inputs: Any) -> Any:
    """What Apply Style gives; where nothing is said, the style acts always and everywhere."""
    rest = {"start": 0.0, "end": 1.0, "blocks": "all", "block_weights": "0:1"}
    rest |= {"first_frame": 0, "last_frame": -1}
    return pack("nodes.apply_style").ApplyStyle.execute(**(rest | inputs))


def run_guider(guider: Any, latents: Tensor, sampler: Any, sigmas: Tensor, **kw: Any) -> Tensor:
    empty = torch.zeros_like(latents)
    return guider.sample(latents, empty, sampler, sigmas, disable_pbar=True, seed=1, **kw)


def velocity(model: Any, conditioning: Any, latents: Tensor, sigma: float) -> Tensor:
    """Velocity of one conditioning, through ComfyUI's sampling."""
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    once = Once(latents, sigma)
    run_guider(guider, latents, once, torch.tensor([sigma, 0.0]))
    return once.velocity


def velocities(model: Any, conditionings: list[Any], latents: Tensor, sigma: float) -> list[Tensor]:
    """Velocities of several conditionings, in one batch where ComfyUI can."""

    class Many(comfy.samplers.CFGGuider):
        def predict_noise(
            self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None
        ) -> Tensor:
            conds = [self.conds[name] for name in names]
            self.outputs = comfy.samplers.calc_cond_batch(
                self.inner_model, conds, x, timestep, model_options
            )
            return self.outputs[0]

    names = [f"c{i}" for i in range(len(conditionings))]
    guider = Many(model)
    guider.inner_set_conds(dict(zip(names, conditionings, strict=True)))
    run_guider(guider, latents, Once(latents, sigma), torch.tensor([sigma, 0.0]))
    return [(latents - output) / sigma for output in guider.outputs]


def guided(
    model: Any, conds: tuple[Any, Any, Any], scales: tuple[Any, Any], noise: Tensor, sigmas: Tensor
) -> Tensor:
    """Final latents of Euler steps with `StyleGuider`, normalised."""
    guider = pack("nodes.guider").StyleGuider(model)
    guider.set_conds(*conds)
    guider.set_cfg(*scales)
    latents = run_guider(guider, noise, comfy.samplers.ksampler("euler"), sigmas)
    return model.model.process_latent_in(latents)


def watched(model: Any, calls: list[Any], before: Any = None) -> Any:
    """A clone that notes the batch of each call of the transformer; `before` runs first."""

    def wrapper(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(x.shape[0])
        if before is not None:
            before()
        return executor(x, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", wrapper)
    return clone


def leftovers(model: Any) -> list[str]:
    """What hooks left on the modules of a MODEL."""
    found = []
    for name, module in model.model.diffusion_model.named_modules():
        found += [f"{name}.{key}" for key in vars(module) if key.startswith("stylemaster")]
        own = getattr(vars(module).get("forward"), "__func__", None)
        if own not in (None, type(module).forward):  # ComfyUI itself may leave the original
            found.append(f"{name}.forward")
    return found


def error_of(call: Any) -> str:
    """Class and message of the error that a call raises; empty if none."""
    # An interrupt is a BaseException since ComfyUI 0.20.
    interrupt = comfy.model_management.InterruptProcessingException
    try:
        call()
    except (Exception, interrupt) as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return ""


def relative(value: Tensor, reference: Tensor) -> float:
    """Largest deviation, as a part of the largest reference value."""
    return ((value - reference).abs().max() / reference.abs().max()).item()


def arguments() -> list[str]:
    return sys.argv[1:]
