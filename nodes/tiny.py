"""The node that loads the whole small model at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import comfy.sd
from comfy_api.latest import io

from ..stylemaster_core.errors import WeightsError
from ..stylemaster_core.models.motion_adapter import load_motion_adapter
from ..stylemaster_core.pipelines.tiny import FOLDER, tiny_files
from .loaders import load_adapter, read_kind
from .native_tiny import (
    load_native_image_encoder,
    load_native_patch_vae,
    load_native_text_encoder,
)
from .native_wan import load_native_controlnet
from .paths import check_choice, fingerprint
from .sockets import (
    ControlNetSocket,
    MotionAdapterSocket,
    StyleAdapterSocket,
    schema,
)

Method = Literal["StyleMaster", "StyleCrafter"]


def load_tiny(method: Method = "StyleMaster", folder: Path = FOLDER) -> tuple[Any, ...]:
    """The small model as ComfyUI's own objects, in the order of the node's outputs.

    Args:
        method: whose adapter and LoRA it gets; the other parts are the same.
        folder: where its files are.

    Raises:
        WeightsError: if a file is missing, damaged or of another kind.
    """
    files = tiny_files(folder, stylecrafter=method == "StyleCrafter")

    def tensors(name: str, kind: Any, what: str) -> Any:
        return read_kind(files.need(name, "stylemaster-tiny"), kind, what)[0]

    model = comfy.sd.load_diffusion_model_state_dict(
        tensors("transformer", "wan_native", "Wan 2.1 transformer")
    )
    if model is None:
        raise WeightsError(f"{files.transformer} is no Wan model that this ComfyUI knows")
    return (
        model,
        load_native_text_encoder(files.need("text_encoder", "A prompt")),
        load_native_patch_vae(files.need("vae", "A video")),
        load_native_image_encoder(files.need("image_encoder", "A style picture")),
        # Small enough to do what the command line does: keys and values are made on the CPU.
        load_adapter(files.need("adapter", "A style")).float(),
        load_native_controlnet(
            tensors("controlnet", "gray_tile_controlnet", "gray-tile ControlNet")
        ),
        load_motion_adapter(tensors("motion_adapter", "motion_adapter", "motion adapter")),
    )


class LoadTiny(io.ComfyNode):
    """Nothing -> the whole small model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterTinyLoader",
            display_name="Load StyleMaster Tiny",
            description="Loads stylemaster-tiny, a small trained model that comes with this pack: "
            "restyles small videos (about 256 pixels high) in minutes on any computer, without "
            "downloads. To see how everything works; for quality take the released weights.",
            search_aliases=["small model", "demo", "tiny", "no download", "cpu", "stylecrafter"],
            inputs=[
                io.Combo.Input(
                    "method",
                    options=list(get_args(Method)),
                    default="StyleMaster",
                    optional=True,  # workflows from before it do not name it
                    tooltip="Whose adapter and LoRA: StyleMaster's chooses textures and a global "
                    "style, StyleCrafter's predicts a strength for each layer. All else is the "
                    "same.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A small Wan 2.1 for Apply Style."),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="For CLIP Text Encode. Knows words, not their order; weights of words "
                    "as in (boat:1.2) are left out of account.",
                ),
                io.Vae.Output(
                    display_name="vae", tooltip="For Gray-Tile Control, VAE Encode and VAE Decode."
                ),
                io.ClipVision.Output(display_name="clip_vision", tooltip="For Style Encoder."),
                StyleAdapterSocket.Output(
                    display_name="adapter",
                    tooltip="For Texture Selector and Apply Style; StyleCrafter's for Show Scales, "
                    "too.",
                ),
                ControlNetSocket.Output(
                    display_name="control_net", tooltip="For control_net of Gray-Tile Control."
                ),
                MotionAdapterSocket.Output(
                    display_name="motion_adapter",
                    tooltip="For motion_adapter of Load Motion Adapter; StyleCrafter's LoRA for "
                    "videos at motion_scale 1.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs: Any) -> str:
        files = [path for path in sorted(FOLDER.rglob("*")) if path.is_file()]
        return " ".join(fingerprint(path) for path in files)

    @classmethod
    def execute(cls, method: Method = "StyleMaster") -> io.NodeOutput:
        check_choice(method, get_args(Method), "method")
        return io.NodeOutput(*load_tiny(method))


NODES = [LoadTiny]
