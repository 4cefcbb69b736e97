"""Nodes that make, mix, keep and load a STYLE."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

from comfy_api.latest import io
from torch import Tensor

from ..stylemaster_core.data.images import CropMode
from ..stylemaster_core.data.thumbnails import read_thumbnail, thumbnail_jpeg
from ..stylemaster_core.errors import ConfigError, LayoutError
from ..stylemaster_core.models.style_adapter import (
    StyleAdapter,
    StyleCrafterAdapter,
    StyleMasterAdapter,
)
from ..stylemaster_core.models.style_tokens import (
    BlendMode,
    Style,
    blend_styles,
    parse_tags,
    read_style,
    save_style,
)
from ..stylemaster_core.models.texture_selector import RELEASE_DROP_RATE, SelectionMode
from .conditionings import Conditioning
from .layouts import image_to_frames, pictures_to_image
from .paths import STYLES, check_choice, fingerprint, model_file, model_names, save_numbered
from .sockets import (
    StyleAdapterSocket,
    StyleFeatures,
    StyleFeaturesSocket,
    StyleSocket,
    schema,
)
from .style_encoding import encode_pictures, encode_stylecrafter, select_textures

logger = logging.getLogger("stylemaster")

NUM_BLENDED = 4


class StyleEncoder(io.ComfyNode):
    """CLIP_VISION, IMAGE -> STYLE_FEATURES."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterStyleEncoder",
            display_name="Style Encoder",
            description="Looks at style pictures with CLIP: at each as it is, and shuffled so that "
            "only its texture remains.",
            search_aliases=["style image", "clip vision encode", "style reference"],
            inputs=[
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="CLIP ViT-H/14 for the released adapters (clip_vision_h.safetensors).",
                ),
                io.Image.Input("image", tooltip="Style picture, or a batch of several."),
                io.Int.Input(
                    "shuffle_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="Seed of the shuffle of the content. The same for every picture.",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(get_args(CropMode)),
                    default="center",
                    tooltip="center cuts the longer side, as the adapter was trained; pad keeps "
                    "the whole picture; squash distorts it.",
                ),
            ],
            outputs=[
                StyleFeaturesSocket.Output(
                    display_name="features", tooltip="For Texture Selector."
                ),
                io.Image.Output(display_name="shuffled", tooltip="The shuffled pictures."),
            ],
        )

    @classmethod
    def execute(
        cls, clip_vision: Any, image: Tensor, shuffle_seed: int, crop: CropMode
    ) -> io.NodeOutput:
        features = encode_pictures(clip_vision, image, shuffle_seed, crop)
        return io.NodeOutput(features, pictures_to_image(features.shuffled))


class TextureSelector(io.ComfyNode):
    """STYLE_FEATURES -> STYLE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterTextureSelector",
            display_name="Texture Selector",
            description="Keeps the patches of the style picture that carry texture, and makes "
            "style tokens of them. The picture shows: what CLIP saw, similarity to the prompt, "
            "kept patches lit, shuffled picture. A StyleCrafter adapter reads all patches: then "
            "only several counts, and the picture is what CLIP saw.",
            search_aliases=["style tokens", "patch selection", "texture"],
            inputs=[
                StyleAdapterSocket.Input("adapter", tooltip="From Load StyleMaster Adapter."),
                StyleFeaturesSocket.Input("features", tooltip="From Style Encoder."),
                io.Conditioning.Input(
                    "prompt",
                    tooltip="The positive prompt of the video: patches are compared with it.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(get_args(SelectionMode)),
                    default="release",
                    tooltip="release keeps the patches MOST similar to the prompt: the released "
                    "weights were trained so. paper keeps the LEAST similar: with clip_prompt "
                    "compared in CLIP's own text-image space, without it by release's measure "
                    "(the paper names no space). all keeps every patch, random a seeded choice.",
                ),
                io.Float.Input(
                    "drop_rate",
                    default=RELEASE_DROP_RATE,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="Share of the patches that are dropped; not used by mode all, nor if "
                    "keep is above 0. The release has 0.95.",
                ),
                io.Int.Input(
                    "keep",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="How many patches to keep, in place of the drop rate; 0 takes the drop "
                    "rate. Not used by mode all. The paper keeps 15.",
                ),
                io.Int.Input(
                    "selection_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="Seed of mode random; the other modes do not use it.",
                ),
                io.Combo.Input(
                    "several",
                    options=list(get_args(BlendMode)),
                    default="mean",
                    tooltip="Several style pictures: mean mixes them evenly, concatenate lets the "
                    "video choose among the tokens of all (StyleCrafter: reads them together, as "
                    "in its paper). One picture: not used.",
                ),
                io.Conditioning.Input(
                    "clip_prompt",
                    optional=True,
                    tooltip="Only for mode paper: the same prompt from CLIP Text Encode with the "
                    "text half of CLIP ViT-H/14 (CLIPLoader, type stable_diffusion). Its pooled "
                    "embedding is compared with each patch.",
                ),
            ],
            outputs=[
                StyleSocket.Output(
                    display_name="style", tooltip="For Apply Style, Blend Styles, Save Style."
                ),
                io.Image.Output(display_name="picture", tooltip="What was kept and why."),
            ],
        )

    @classmethod
    def execute(
        cls,
        adapter: StyleAdapter,
        features: StyleFeatures,
        prompt: Conditioning,
        mode: SelectionMode,
        drop_rate: float,
        keep: int,
        selection_seed: int,
        several: BlendMode,
        clip_prompt: Conditioning | None = None,
    ) -> io.NodeOutput:
        check_choice(several, get_args(BlendMode), "several")
        if isinstance(adapter, StyleCrafterAdapter):
            _refuse_selection(mode, keep, clip_prompt)
            return io.NodeOutput(*encode_stylecrafter(adapter, features, several))
        assert isinstance(adapter, StyleMasterAdapter)
        style, picture = select_textures(
            adapter,
            features,
            prompt,
            mode,
            drop_rate=drop_rate,
            keep=keep,
            seed=selection_seed,
            several=several,
            clip_prompt=clip_prompt,
        )
        return io.NodeOutput(style, picture)


def _refuse_selection(mode: SelectionMode, keep: int, clip_prompt: Conditioning | None) -> None:
    if mode not in ("release", "all") or keep or clip_prompt is not None:
        given = f"mode {mode}, keep {keep}" + (", a clip_prompt" if clip_prompt else "")
        raise ConfigError(
            f"a StyleCrafter adapter reads all patches of a picture and chooses none, but got "
            f"{given}; use mode all, keep 0 and no clip_prompt"
        )


class BlendStyles(io.ComfyNode):
    """STYLEs -> STYLE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs: list[io.Input] = [
            io.Combo.Input(
                "mode",
                options=list(get_args(BlendMode)),
                default="mean",
                tooltip="mean is the weighted mean of the style tokens; concatenate lets the video "
                "choose among the tokens of all (all weights must be equal).",
            )
        ]
        for number in range(1, NUM_BLENDED + 1):
            inputs.append(
                StyleSocket.Input(
                    f"style_{number}", optional=number > 1, tooltip=f"Style {number}."
                )
            )
        for number in range(1, NUM_BLENDED + 1):
            inputs.append(
                io.Float.Input(
                    f"weight_{number}",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    optional=number > 1,
                    tooltip=f"Weight of style {number}; the weights are scaled to sum to 1. Not "
                    "used where no style is linked.",
                )
            )
        return schema(
            node_id="StyleMasterBlendStyles",
            display_name="Blend Styles",
            description="Mixes styles into one. Chain it for more than four.",
            search_aliases=["mix styles", "style interpolation", "merge styles"],
            inputs=inputs,
            outputs=[StyleSocket.Output(display_name="style", tooltip="The mixture.")],
        )

    @classmethod
    def execute(cls, mode: BlendMode, **numbered: Any) -> io.NodeOutput:
        given = [n for n in range(1, NUM_BLENDED + 1) if numbered.get(f"style_{n}") is not None]
        styles = [numbered[f"style_{n}"] for n in given]
        weights = [numbered.get(f"weight_{n}", 1.0) for n in given]
        return io.NodeOutput(blend_styles(styles, weights, mode))


class SaveStyle(io.ComfyNode):
    """STYLE -> models/stylemaster/styles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterSaveStyle",
            display_name="Save Style",
            description="Writes a style to models/stylemaster/styles, with a small picture and "
            "tags by which Load Style shows it. Nothing is overwritten: each file gets the next "
            "number.",
            search_aliases=["export style", "style file", "style library"],
            inputs=[
                StyleSocket.Input("style", tooltip="The style to keep."),
                io.String.Input(
                    "filename_prefix",
                    default="style",
                    tooltip="Name in models/stylemaster/styles, optionally with a sub-folder.",
                ),
                io.Image.Input(
                    "picture",
                    optional=True,
                    tooltip="What Load Style is to show: the style picture or a result, of several "
                    "the first. A copy of at most 256 pixels is kept in the file; nothing without.",
                ),
                io.String.Input(
                    "tags",
                    default="",
                    optional=True,  # workflows from before it do not name it
                    tooltip="Words to find the style by, separated by commas: oil, impasto, storm.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="file_name", tooltip="Name of the written file.")
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, style: Style, filename_prefix: str, picture: Tensor | None = None, tags: str = ""
    ) -> io.NodeOutput:
        words, thumbnail = parse_tags(tags), None
        if picture is not None:
            thumbnail = thumbnail_jpeg(image_to_frames(picture[:1], "the picture")[0])
        path = save_numbered(
            filename_prefix,
            lambda path: save_style(path, style, tags=words, thumbnail=thumbnail),
        )
        return io.NodeOutput(path.name, ui={"text": [path.name]})


class LoadStyle(io.ComfyNode):
    """models/stylemaster/styles -> STYLE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterLoadStyle",
            display_name="Load Style",
            description="Loads a saved style, chosen by its picture; neither the style picture nor "
            "CLIP is needed.",
            search_aliases=["import style", "style file", "style library"],
            inputs=[
                io.Combo.Input(
                    "style_name",
                    options=model_names(STYLES),
                    tooltip="Style in models/stylemaster/styles; refresh (R) shows new ones. Use "
                    "the adapter that it was made with.",
                )
            ],
            outputs=[
                StyleSocket.Output(display_name="style", tooltip="For Apply Style."),
                io.Image.Output(
                    display_name="picture",
                    tooltip="The small picture that is kept in the file; nothing without any.",
                ),
                io.String.Output(display_name="tags", tooltip="Its tags, separated by commas."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, style_name: str) -> str:
        return fingerprint(model_file(style_name, STYLES))

    @classmethod
    def execute(cls, style_name: str) -> io.NodeOutput:
        path = model_file(style_name, STYLES)
        style, tags, thumbnail = read_style(path)
        return io.NodeOutput(style, _picture_of(path, thumbnail), ", ".join(tags))


def _picture_of(path: Path, thumbnail: bytes | None) -> Tensor | None:
    if thumbnail is None:
        return None
    try:
        return pictures_to_image([read_thumbnail(thumbnail)])
    except LayoutError as error:
        logger.warning("%s: its picture is left out: %s", path.name, error)
        return None


NODES = [StyleEncoder, TextureSelector, BlendStyles, SaveStyle, LoadStyle]
