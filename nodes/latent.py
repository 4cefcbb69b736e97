"""Nodes for videos of any size and length: pad them to what Wan can do, and cut back."""

from __future__ import annotations

from typing import Any

from comfy.utils import common_upscale
from comfy_api.latest import io
from torch import Tensor

from ..stylemaster_core.layouts import Padding, fit_area, pad_video
from .layouts import (
    Latent,
    crop_image,
    empty_latent,
    frames_to_image,
    image_to_frames,
)
from .paths import check_choice
from .sockets import schema

KEEP, FOLLOW, CUT = "no", "to the area", "to the size"
RESIZE = (KEEP, FOLLOW, CUT)


def resized(frames: Tensor, width: int, height: int, resize: str) -> Tensor:
    """Frames [T, H, W, C] as they are, of about the area and in their own shape, or of the size."""
    check_choice(resize, RESIZE, "resize")
    if resize == KEEP:
        return frames
    if resize == FOLLOW:
        height, width = fit_area(frames.shape[1], frames.shape[2], height * width)
    if frames.shape[1:3] == (height, width):
        return frames
    scaled = common_upscale(frames.movedim(-1, 1), width, height, "lanczos", "center")
    return scaled.movedim(1, -1)


class StyleMasterLatent(io.ComfyNode):
    """Numbers or IMAGE -> LATENT, and the IMAGE in its size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterLatent",
            display_name="StyleMaster Latent",
            description="An empty video latent for any size and length: padded to 4n+1 frames and "
            "sides that are multiples of 16. StyleMaster Crop cuts the decoded frames back. It can "
            "bring linked frames to a size that suits their shape, too.",
            search_aliases=["empty latent video", "wan latent", "video size"],
            inputs=[
                io.Int.Input(
                    "num_frames",
                    default=81,
                    min=1,
                    max=10000,
                    tooltip="Frames of the video, 1 for a picture. Not used if frames are linked.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    tooltip="Width in pixels. With frames it is used only if they are resized.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    tooltip="Height in pixels. With frames it is used only if they are resized.",
                ),
                io.Image.Input(
                    "frames",
                    optional=True,
                    tooltip="A video whose size and length are taken.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The Wan 2.1 VAE: encodes the frames, to start from them with a "
                    "denoise below 1. Without it the latent is empty.",
                ),
                io.Combo.Input(
                    "resize",
                    options=list(RESIZE),
                    default=KEEP,
                    optional=True,
                    tooltip="Of linked frames. to the area: they keep their shape, upright or "
                    "wide, and get about as many pixels as width x height, both sides multiples of "
                    "16. to the size: exactly width x height, the rest is cut off.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="Remembers the size."),
                io.Int.Output(display_name="num_frames", tooltip="Frames before padding."),
                io.Int.Output(display_name="width", tooltip="Width before padding."),
                io.Int.Output(display_name="height", tooltip="Height before padding."),
                io.Image.Output(
                    display_name="frames",
                    tooltip="The linked frames in that size, for Gray-Tile Control; nothing "
                    "without.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        num_frames: int,
        width: int,
        height: int,
        frames: Tensor | None = None,
        vae: Any = None,
        resize: str = KEEP,
    ) -> io.NodeOutput:
        padding = Padding(num_frames, height, width)
        padded = None
        if frames is not None:
            frames = resized(frames, width, height, resize)
            padded, padding = pad_video(image_to_frames(frames, "the video"))
        latent = empty_latent(padding)
        if padded is not None and vae is not None:
            latent["samples"] = vae.encode(frames_to_image(padded))
        return io.NodeOutput(latent, padding.num_frames, padding.width, padding.height, frames)


class StyleMasterCrop(io.ComfyNode):
    """Decoded IMAGE -> IMAGE of the asked size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterCrop",
            display_name="StyleMaster Crop",
            description="Cuts decoded frames back to the size and length that StyleMaster Latent "
            "was given.",
            search_aliases=["unpad", "trim video", "crop frames"],
            inputs=[
                io.Image.Input("frames", tooltip="From VAE Decode."),
                io.Latent.Input(
                    "latent", tooltip="The latent that was decoded; it remembers the size."
                ),
            ],
            outputs=[io.Image.Output(display_name="frames", tooltip="The video.")],
        )

    @classmethod
    def execute(cls, frames: Tensor, latent: Latent) -> io.NodeOutput:
        return io.NodeOutput(crop_image(frames, latent))


NODES = [StyleMasterLatent, StyleMasterCrop]
