"""The workflows that the pack ships, made small enough to run on a CPU, and what they ask for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.comfy import small_models

FOLDER = Path(__file__).parents[2] / "workflows"
WIDTH, HEIGHT, FRAMES, LONG_FRAMES = 64, 48, 5, 17
STEPS = 2
# They bring their own models; see test_tiny.py.
TINY = ("tiny_video_to_video", "stylecrafter_tiny_video", "two_methods_side_by_side")
SDXL = "sdxl_image_in_a_style"
VIDEOCRAFTER = "stylecrafter_videocrafter"
SDXL_SIDE = 64
ONE_OBJECT = "style_on_one_object"
# By workflow: stock nodes that older versions lack; they say so when it is opened or run.
NEWER_NODES = {ONE_OBJECT: ("SAM3_TrackToMask", "SAM3_VideoTrack")}

# By class of the node: the inputs that decide about size and time.
_SMALL: dict[str, dict[str, Any]] = {
    "StyleMasterSampler": {"steps": STEPS},
    "BasicScheduler": {"steps": STEPS},
    "ImageScale": {"width": WIDTH, "height": HEIGHT},
    "ImageScaleToTotalPixels": {"megapixels": 0.01},
    "ImageFromBatch": {"length": FRAMES},
    "StyleMasterCompareStyles": {"side": 64},
    "WanContextWindowsManual": {"context_length": 9, "context_overlap": 4},
}


def names() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "api").glob("*.json"))


def lacking(name: str, info: Mapping[str, Any]) -> list[str]:
    """Classes of a workflow that a version lacks, as is known of it."""
    return [class_type for class_type in NEWER_NODES.get(name, ()) if class_type not in info]


def sampling_names() -> list[str]:
    """Those that make pictures or videos with models of the user; the others train."""
    return [name for name in names() if name not in TINY and not name.startswith("train_")]


def load(name: str) -> dict[str, Any]:
    """A workflow as it is shipped, in API format."""
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def node_titled(workflow: Mapping[str, Any], title: str) -> str:
    """The id of the only node of that title."""
    (found,) = (key for key, node in workflow.items() if node["_meta"]["title"] == title)
    return found


def small(name: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A shipped workflow with small models, sizes and steps.

    Args:
        name: of the workflow.
        changes: inputs to set, by the title of the node.
    """
    workflow = small_models.with_stub_loaders(load(name))
    for node in workflow.values():
        inputs = node["inputs"]
        inputs |= _SMALL.get(node["class_type"], {})
        if node["class_type"] == "EmptyLatentImage":
            inputs |= {"width": SDXL_SIDE, "height": SDXL_SIDE}
            inputs["batch_size"] = min(inputs["batch_size"], FRAMES)
        if node["class_type"] == "StyleMasterLatent":
            inputs |= {"width": WIDTH, "height": HEIGHT}
            inputs["num_frames"] = min(inputs["num_frames"], FRAMES)
        if node["class_type"] == "SolidMask":
            inputs["width"] = inputs["width"] * WIDTH // 832
            inputs["height"] = HEIGHT
    for title, inputs in (changes or {}).items():
        node = workflow[node_titled(workflow, title)]
        unknown = inputs.keys() - node["inputs"].keys()
        assert not unknown, f"{title} has no {unknown}"
        node["inputs"] |= inputs
    return workflow


def write_models(models_dir: Path) -> None:
    """Small random weights under the names that the workflows ask for."""
    from stylemaster_core.data.thumbnails import thumbnail_jpeg
    from stylemaster_core.models.style_tokens import Style, save_style

    save, ours = small_models.save, models_dir / "stylemaster"
    save(small_models.adapter_weights(), ours / "stylemaster_adapter.safetensors")
    save(
        small_models.controlnet_weights(),
        models_dir / "controlnet" / "stylemaster_controlnet.safetensors",
    )
    save(_motion_weights(), models_dir / "loras" / "stylemaster_motion.safetensors")
    weights, heads = small_models.sdxl_adapter()
    save(weights, models_dir / "stylecrafter" / "stylecrafter_sdxl.safetensors", heads)
    small_models.write_videocrafter(
        models_dir,
        {
            "unet": "diffusion_models/videocrafter_t2v_512_unet.safetensors",
            "adapter": "stylecrafter/stylecrafter_adapter_v1.safetensors",
            "temporal": "stylecrafter/stylecrafter_temporal_v1_1.safetensors",
        },
    )
    kept = ours / "styles" / "blend_00001_.safetensors"
    if not kept.exists():
        tokens = small_models.LOCAL_TOKENS + small_models.GLOBAL_TOKENS
        generator = torch.Generator().manual_seed(4)
        kept.parent.mkdir(exist_ok=True)
        style = Style(torch.randn(1, tokens, small_models.TEXT_WIDTH, generator=generator))
        picture = np.full((96, 96, 3), (200, 120, 40), np.uint8)
        save_style(kept, style, tags=["oil", "storm"], thumbnail=thumbnail_jpeg(picture))


def _motion_weights(rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"A": (rank, small_models.WIDTH), "B": (small_models.WIDTH, rank)}
    return {
        f"diffusion_model.blocks.{block}.self_attn.{layer}.lora_{part}.weight": torch.randn(
            *shape, generator=generator
        )
        * 0.1
        for block in range(small_models.NUM_BLOCKS)
        for layer in "qkvo"
        for part, shape in shapes.items()
    }


def write_inputs(input_dir: Path) -> None:
    """The pictures and clips that the workflows name, and others to put in their place."""
    if (input_dir / "content.mp4").exists():
        return
    from stylemaster_core.data.demo_scene import demo_clip, demo_styles, write_demo_inputs
    from stylemaster_core.data.videos import write_video

    for name, pixels in {**demo_styles(), "example": demo_styles()["mosaic"]}.items():
        Image.fromarray(pixels).save(input_dir / f"{name}.png")
    clip = demo_clip(LONG_FRAMES, 72, 96)
    write_video(input_dir / "content.mp4", clip, fps=12)
    write_video(input_dir / "reversed.mp4", clip[::-1].copy(), fps=12)
    write_demo_inputs(input_dir)
