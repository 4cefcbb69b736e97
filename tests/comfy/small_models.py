"""Small random models in the formats that ComfyUI's loaders and this pack's loaders take.

ComfyUI reads all sizes of a Wan transformer off its weights but two: heads are 128 wide and the
text is 4096 wide. The stubs in `stub_nodes` stand in for the encoders, whose sizes it fixes.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDTH = 256
FFN_WIDTH = 512
NUM_BLOCKS = 4
TEXT_WIDTH = 4096
CLIP_WIDTH = 80  # the defaults of StubCLIPVisionLoader
CLIP_PROJECTION = 48
SDXL_CLIP_WIDTH = 40  # of the recorded adapter for SDXL
SD_TEXT_WIDTH = 64  # of the small VideoCrafter
LOCAL_TOKENS = 2
GLOBAL_TOKENS = 4
VAE_WIDTH = 8

RECORDED_SDXL = Path(__file__).parents[1] / "golden" / "stylecrafter" / "x3_sdxl_unet.safetensors"
TRANSFORMER_FILE = "wan_small.safetensors"
VAE_FILE = "wan_vae_small.safetensors"


def write_small_models(models_dir: Path) -> None:
    """Write the transformer and the VAE where ComfyUI's UNETLoader and VAELoader look for them."""
    save(wan_weights(), models_dir / "diffusion_models" / TRANSFORMER_FILE)
    save(vae_weights(), models_dir / "vae" / VAE_FILE)


def save(weights: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in weights.items()}, path, metadata)


def wan_weights(seed: int = 0) -> dict[str, Tensor]:
    """A native Wan transformer without a style branch, float32, 19 MB."""
    from stylemaster_core.weights.shapes import WanSizes, expected_base_shapes

    sizes = WanSizes(width=WIDTH, ffn_width=FFN_WIDTH, num_blocks=NUM_BLOCKS, text_width=TEXT_WIDTH)
    return _random(expected_base_shapes(sizes), seed)


def adapter_weights(seed: int = 1, style_width: int = TEXT_WIDTH) -> dict[str, Tensor]:
    """The style part of a release: `style_model.*` and K and V of each block, 40 MB."""
    from stylemaster_core.weights.shapes import AdapterSizes, expected_adapter_shapes

    sizes = AdapterSizes(
        width=WIDTH,
        num_blocks=NUM_BLOCKS,
        style_width=style_width,
        patch_width=CLIP_WIDTH,
        num_layers=2,
        local_tokens=LOCAL_TOKENS,
        global_tokens=GLOBAL_TOKENS,
        global_width=CLIP_PROJECTION,
    )
    return _random(expected_adapter_shapes(sizes), seed)


def controlnet_weights(seed: int = 2) -> dict[str, Tensor]:
    """A gray-tile ControlNet for every second block, with convolutions that are not zero, 12 MB."""
    from stylemaster_core.weights.shapes import ControlNetSizes, expected_controlnet_shapes

    sizes = ControlNetSizes(
        width=WIDTH, ffn_width=FFN_WIDTH, num_blocks=NUM_BLOCKS // 2, text_width=TEXT_WIDTH
    )
    return _random(expected_controlnet_shapes(sizes), seed)


def sdxl_adapter() -> tuple[dict[str, Tensor], dict[str, str]]:
    """The recorded StyleCrafter adapter for the small SDXL UNet, and its heads."""
    from safetensors.torch import load_file

    recorded = load_file(RECORDED_SDXL)
    weights = {
        key.removeprefix("adapter."): value
        for key, value in recorded.items()
        if key.startswith("adapter.")
    }
    return weights, {"style_num_heads": "5", "scale_num_heads": "2"}


def write_videocrafter(models_dir: Path, names: Mapping[str, str]) -> None:
    """Small VideoCrafter files, converted from checkpoints in the format of the releases.

    Args:
        models_dir: of ComfyUI.
        names: where to write the UNet, the adapter and the temporal layers.
    """
    from stylemaster_core.models.small_videocrafter import write_small_videocrafter
    from stylemaster_core.weights.convert import convert

    with tempfile.TemporaryDirectory() as folder:
        small = write_small_videocrafter(folder)
        made = {
            "unet": convert(small.checkpoint, folder)[0],
            "adapter": convert(small.adapter, folder)[0],
            "temporal": convert(small.temporal, folder)[0],
        }
        for part, name in names.items():
            (models_dir / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made[part], models_dir / name)


def vae_weights(seed: int = 3) -> dict[str, Tensor]:
    """A Wan VAE of base width 8 with ComfyUI's keys, 4 MB."""
    from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]

    from stylemaster_core.models.vae import native_vae_state_dict

    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=VAE_WIDTH)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return native_vae_state_dict(_random(shapes, seed))


def with_stub_loaders(workflow: Mapping[str, Any]) -> dict[str, Any]:
    """Copy an API workflow with its loaders replaced by small models and stubs.

    So that a workflow made for real models runs as it is, all other nodes untouched.
    """
    workflow = _with_stub_tracker(copy.deepcopy(dict(workflow)))
    stubs = dict(_STUB_LOADERS)
    if any(node["class_type"] == "CheckpointLoaderSimple" for node in workflow.values()):
        stubs["CLIPVisionLoader"] = ("StubCLIPVisionLoader", {"width": SDXL_CLIP_WIDTH})
    if any(node["class_type"] == "StyleMasterVideoCrafterLoader" for node in workflow.values()):
        stubs["CLIPLoader"] = ("StubTextEncoderLoader", {"tokens": 77, "width": SD_TEXT_WIDTH})
        stubs["VAELoader"] = ("StubEnlargingVAELoader", {})
    for node in workflow.values():
        stub = stubs.get(node["class_type"])
        if stub is not None:
            node["class_type"], node["inputs"] = stub[0], dict(stub[1])
    return workflow


def _with_stub_tracker(workflow: dict[str, Any]) -> dict[str, Any]:
    """SAM 3 has one size, and older versions lack it: a moving mask in its place."""
    for key, node in list(workflow.items()):
        if node["class_type"] == "SAM3_TrackToMask":
            track = workflow.pop(node["inputs"]["track_data"][0])["inputs"]
            words = workflow.pop(track["conditioning"][0])["inputs"]
            assert words["clip"][0] == track["model"][0]
            del workflow[track["model"][0]]
            stub = {"class_type": "StubTrackedMask", "inputs": {"images": track["images"]}}
            workflow[key] = node | stub
    return workflow


_STUB_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "UNETLoader": ("UNETLoader", {"unet_name": TRANSFORMER_FILE, "weight_dtype": "default"}),
    "CheckpointLoaderSimple": ("StubCheckpointLoader", {}),
    "CLIPLoader": ("StubTextEncoderLoader", {}),
    "CLIPVisionLoader": ("StubCLIPVisionLoader", {}),
    "VAELoader": ("StubVAELoader", {"vae_name": VAE_FILE}),
}


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    from stylemaster_core.models.small import draw_weights

    return {key: value.float() for key, value in draw_weights(shapes, seed).items()}
