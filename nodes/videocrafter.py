"""The node that loads VideoCrafter, the base model of StyleCrafter's video version."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from .loaders import read_kind
from .native_videocrafter import load_videocrafter
from .paths import STYLECRAFTER, fingerprint, model_file, model_names
from .sockets import schema

logger = logging.getLogger("stylemaster")

NONE = "(those of the UNet)"
LICENCE = (
    "VideoCrafter's released weights, and what is made from them, are for research and "
    "non-commercial use only"
)


class VideoCrafterLoader(io.ComfyNode):
    """models/diffusion_models -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterVideoCrafterLoader",
            display_name="Load VideoCrafter",
            description="Loads VideoCrafter's text-to-video UNet, on which StyleCrafter's video "
            f"version works. {LICENCE}. A video is a batch of its frames: take Empty Latent Image "
            "with a batch of 16 at 512 x 320; a batch of 1 is a picture. Sampled with "
            "euler_ancestral and ddim_uniform it is the release's DDIM.",
            search_aliases=["videocrafter", "stylecrafter video", "lvdm"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=model_names("diffusion_models"),
                    tooltip="The UNet that `stylemaster weights convert` makes of VideoCrafter's "
                    "model.ckpt; it makes files for VAE and CLIP as well.",
                ),
                io.Combo.Input(
                    "temporal_name",
                    options=[NONE, *model_names(STYLECRAFTER)],
                    default=NONE,
                    tooltip="StyleCrafter's temporal layers (temporal_v1_1), which make styled "
                    "videos steadier; they take the place of the UNet's.",
                ),
                io.Float.Input(
                    "fps",
                    default=8.0,
                    min=1.0,
                    max=60.0,
                    step=1.0,
                    tooltip="Frames per second that VideoCrafter2 is told of; the first "
                    "VideoCrafter knows none.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For Apply Style.")],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, temporal_name: str, fps: float) -> str:
        parts = [fingerprint(model_file(unet_name, "diffusion_models"))]
        if temporal_name != NONE:
            parts.append(fingerprint(model_file(temporal_name, STYLECRAFTER)))
        return " ".join([*parts, str(fps)])

    @classmethod
    def execute(cls, unet_name: str, temporal_name: str, fps: float) -> io.NodeOutput:
        path = model_file(unet_name, "diffusion_models")
        tensors, _ = read_kind(path, "videocrafter_unet", "UNet of VideoCrafter")
        temporal = None
        if temporal_name != NONE:
            other = model_file(temporal_name, STYLECRAFTER)
            temporal, _ = read_kind(other, "stylecrafter_temporal", "file of temporal layers")
        logger.warning(LICENCE)
        return io.NodeOutput(load_videocrafter(tensors, temporal, fps=fps))


NODES = [VideoCrafterLoader]
