"""ComfyUI's native SDXL with the golden small UNet and adapter (inside ComfyUI only)."""

import json
from pathlib import Path
from typing import Any

import comfy.ldm.flux.model as flux
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import comfy.utils
import torch
from safetensors.torch import load_file
from scripts.golden_wan import pack
from torch import Tensor

FILE = Path(__file__).parents[2] / "golden" / "stylecrafter" / "x3_sdxl_unet.safetensors"
WIDTH, NUM_HEADS = 32, 4
CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": WIDTH,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": (1, 1, 1),
    "transformer_depth": [0, 1, 2],
    "transformer_depth_output": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "num_head_channels": WIDTH // NUM_HEADS,
    "context_dim": 24,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "num_classes": "sequential",
    "adm_in_channels": 64,
    "legacy": False,
}
# What ComfyUI reads off other checkpoints.
SD15: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "context_dim": 768,
    "adm_in_channels": None,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
}
FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
if "txt_ids_dims" in flux.FluxParams.__annotations__:
    FLUX["txt_ids_dims"] = []
tensors = load_file(FILE)
meta = json.loads(FILE.with_suffix(".json").read_text())


def under(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load_model(**changes: Any) -> comfy.model_patcher.ModelPatcher:
    """A MODEL; ComfyUI's loader would insist on text of width 2048, so it is built by hand."""
    config = comfy.supported_models.SDXL(CONFIG | changes)
    config.unet_config |= CONFIG | changes  # over what the class sets for the real size
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    model.embedder = openaimodel.Timestep(meta["cfg"]["unet"]["addition_time_embed_dim"])
    names = comfy.utils.unet_to_diffusers(CONFIG)
    weights = {names[k]: v for k, v in under("unet.").items()}
    if not changes:
        model.diffusion_model.load_state_dict(weights)
    return _patcher(model)


def other_model(detected: dict[str, Any]) -> comfy.model_patcher.ModelPatcher:
    """The MODEL that ComfyUI makes of a checkpoint with these sizes, without memory for weights."""
    config = comfy.model_detection.model_config_from_unet_config(dict(detected))
    config.set_inference_dtype(torch.float32, None)
    return _patcher(config.get_model({}, "", device=torch.device("meta")))


def _patcher(model: Any) -> comfy.model_patcher.ModelPatcher:
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def load_adapter(**changes: Any) -> Any:
    """The adapter; its heads stand in no weight, so a file tells them in its header."""
    heads = {
        key: str(meta["cfg"]["adapter"][f"{name}_config"]["params"]["num_heads"])
        for key, name in (
            ("style_num_heads", "image_context"),
            ("scale_num_heads", "scale_predictor"),
        )
    }
    core = pack("stylemaster_core.models.stylecrafter_sdxl")
    layers = core.load_stylecrafter_sdxl(under("adapter.") | changes, heads)
    return pack("stylemaster_core.models.style_adapter").StyleCrafterAdapter(
        "golden", layers.encoder, layers
    )


def conditioning(prefix: str = "") -> Any:
    """Text of the prompt, or with `negative_` of the negative prompt."""
    height, width, top, left, target_height, target_width = tensors["time_ids"][0].int().tolist()
    options = {
        "pooled_output": tensors[f"{prefix}pooled"],
        "height": height,
        "width": width,
        "crop_h": top,
        "crop_w": left,
        "target_height": target_height,
        "target_width": target_width,
    }
    return [[tensors[f"{prefix}prompt_embeds"], options]]
