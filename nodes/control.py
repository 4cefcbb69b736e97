"""The node that keeps the content of a video by its gray tile."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..stylemaster_core.data.gray_tile import cover_resize_frames, gray_tile
from ..stylemaster_core.errors import ConfigError, LayoutError
from ..stylemaster_core.layouts import pad_video
from ..stylemaster_core.reading import reading
from .conditionings import Conditioning, controlled_conditioning, create_control
from .layouts import Latent, image_to_frames, latent_padding, latent_video_size, video_to_image
from .loaders import read_kind
from .native_wan import load_native_controlnet
from .paths import ADAPTERS, check_named, model_file, named_fingerprint, names_or_link
from .sockets import ControlNetSocket, range_inputs, schema
from .wan_patches import patch_control


def tile_image(image: Tensor, factor: int, latent: Latent | None) -> Tensor:
    """The gray tile of a video as IMAGE, padded as its latents will be.

    Args:
        image: IMAGE of any size and length.
        factor: of the tile.
        latent: of the video to be made, to whose size the frames are brought; None keeps theirs.

    Raises:
        LayoutError: if the frames are not as many as the latent's.
    """
    frames = image_to_frames(image, "the control video")
    if latent is not None:
        padding = latent_padding(latent)
        frames = cover_resize_frames(frames, padding.height, padding.width)
    padded, _ = pad_video(frames)
    if latent is not None and padded.shape[:3] != latent_video_size(latent):
        length, height, width = latent_video_size(latent)
        raise LayoutError(
            f"{len(frames)} control frames become a video of {padded.shape[0]} frames of "
            f"{padded.shape[2]} x {padded.shape[1]}, the LATENT is one of {length} frames of "
            f"{width} x {height}; make it with StyleMaster Latent from the same frames"
        )
    return video_to_image(gray_tile(padded, *padded.shape[1:3], factor=factor))


def load_controlnet(name: str) -> Any:
    """The control network of a file in ComfyUI's folders.

    Raises:
        ConfigError, WeightsError: if none was chosen, or it is none.
    """
    check_named(name, "control_net")
    path = model_file(name, "controlnet", ADAPTERS)
    with reading(path, "a gray-tile ControlNet"):
        tensors, _ = read_kind(path, "gray_tile_controlnet", "gray-tile ControlNet")
        return load_native_controlnet(tensors)


class GrayTileControl(io.ComfyNode):
    """MODEL, prompts and a video -> MODEL and prompts that keep its content."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterGrayTileControl",
            display_name="Gray-Tile Control",
            description="Keeps the content of a video while its style changes: a coarse gray copy "
            "of the frames guides the model. Any number of frames and any size.",
            search_aliases=["controlnet", "tile control", "video to video", "content control"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan 2.1 text-to-video model (1.3B)."),
                io.Combo.Input(
                    "control_net_name",
                    options=names_or_link("controlnet", ADAPTERS),
                    tooltip="Gray-tile ControlNet in models/controlnet or models/stylemaster; not "
                    "used if control_net is linked.",
                ),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
                io.Image.Input("frames", tooltip="The video whose content is kept."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt; the control network reads it, too."
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Int.Input(
                    "factor",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="How much smaller the tile is: more keeps less. The released network "
                    "knows 8, stylemaster-tiny 2 and 4.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Strength of the control; 0 switches it off.",
                ),
                *range_inputs(
                    "Part of the sampling at which the control begins.",
                    "Part of the sampling at which it ends; the rest is free. Release: 0.7.",
                    end=0.7,
                ),
                io.Conditioning.Input(
                    "styled",
                    optional=True,
                    tooltip="The styled output of Apply Style, if it was applied before.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latent that will be sampled: the frames are brought to its size. "
                    "Without it they are padded as StyleMaster Latent pads them.",
                ),
                ControlNetSocket.Input(
                    "control_net",
                    optional=True,
                    tooltip="From Load StyleMaster Tiny; takes the place of a file.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler or guider."),
                io.Conditioning.Output(
                    display_name="styled",
                    tooltip="The styled prompt with control; the positive one if none was linked.",
                ),
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with control."),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative prompt with control."
                ),
                io.Image.Output(display_name="gray_tile", tooltip="What the network sees."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, control_net_name: str, **_others: Any) -> str:
        return named_fingerprint(control_net_name, "controlnet", ADAPTERS)

    @classmethod
    def execute(
        cls,
        model: Any,
        control_net_name: str,
        vae: Any,
        frames: Tensor,
        positive: Conditioning,
        negative: Conditioning,
        factor: int,
        strength: float,
        start: float,
        end: float,
        styled: Conditioning | None = None,
        latent: Latent | None = None,
        control_net: Any = None,
    ) -> io.NodeOutput:
        if strength < 0:
            raise ConfigError(f"the control strength is {strength}; it must not be negative")
        network = control_net or load_controlnet(control_net_name)
        patched = patch_control(model, network, strength=strength, start=start, end=end)
        tile = tile_image(frames, factor, latent)
        control = create_control(positive, vae.encode(tile))
        conditionings = (
            controlled_conditioning(conditioning, control)
            for conditioning in (styled or positive, positive, negative)
        )
        return io.NodeOutput(patched, *conditionings, tile)


NODES = [GrayTileControl]
