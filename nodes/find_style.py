"""The node that finds pictures of a like style in a folder."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..stylemaster_core.data.images import read_image
from ..stylemaster_core.data.media_files import IMAGE_ENDINGS
from ..stylemaster_core.data.picture_index import most_alike, stamp_of, update_index
from ..stylemaster_core.errors import ConfigError
from .folders import media_folders, media_of_folder
from .layouts import image_to_frames, pictures_to_image
from .paths import check_choice, find_inside, new_inside
from .sockets import schema
from .style_encoding import encoder_identity, search_embeds

BY = {"style": "style", "whole picture": "whole"}
INDEX_FOLDER = "stylemaster/indexes"  # in ComfyUI's output


def pictures_of(folder: str) -> list[Path]:
    """The pictures of a folder of ComfyUI's input folder; links that lead out are left out.

    Raises:
        ConfigError: if it is none, or holds none.
    """
    root = Path(os.path.realpath(folder_paths.get_input_directory()))
    found = media_of_folder(folder, IMAGE_ENDINGS, "pictures")
    pictures = [path for path in found if root in Path(os.path.realpath(path)).parents]
    if not pictures:
        raise ConfigError(
            f"there are no pictures in {folder!r} of ComfyUI's input folder "
            f"({', '.join(sorted(IMAGE_ENDINGS))}); put some there, or choose another folder"
        )
    return pictures


def index_file(folder: str) -> Path:
    """Where the index of a folder of ComfyUI's input folder is kept."""
    place = find_inside(folder, [folder_paths.get_input_directory()])
    name = hashlib.sha256(str(place).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    output = Path(os.path.realpath(folder_paths.get_output_directory()))
    return new_inside(output, f"{INDEX_FOLDER}/{name}.safetensors")


class _Progress:
    """A bar on the node, at which ComfyUI's interrupt is heeded."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar = self.bar or comfy.utils.ProgressBar(total)
        self.bar.update_absolute(done, total)


class FindStyle(io.ComfyNode):
    """CLIP_VISION, IMAGE and a folder -> the pictures that are most alike."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterFindStyle",
            display_name="Find Style",
            description="Finds the pictures of a folder whose style is most like that of a given "
            "picture. The folder is read once; later only what was added or changed is looked at.",
            search_aliases=["search pictures", "similar images", "style library", "retrieval"],
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip="The vision model of the style adapter, CLIP ViT-H/14."
                ),
                io.Image.Input(
                    "picture", tooltip="What to look for; of several, what they have in common."
                ),
                io.Combo.Input(
                    "folder",
                    options=media_folders(IMAGE_ENDINGS),
                    default=".",
                    tooltip="Folder of pictures inside ComfyUI's input folder; '.' is that folder "
                    "itself. Its sub-folders are not searched.",
                ),
                io.Int.Input(
                    "count", default=4, min=1, max=64, tooltip="How many pictures to find at most."
                ),
                io.Combo.Input(
                    "compare",
                    options=list(BY),
                    default="style",
                    tooltip="style compares the pictures shuffled, as the style adapter sees them, "
                    "so that what they show counts less; whole picture compares them as they are.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="pictures",
                    is_output_list=True,
                    tooltip="The pictures, the most alike first; a list, as their sizes differ.",
                ),
                io.String.Output(
                    display_name="names",
                    is_output_list=True,
                    tooltip="Their file names without ending, for Style Grid.",
                ),
                io.Float.Output(
                    display_name="similarity",
                    is_output_list=True,
                    tooltip="How much alike: 1 is the same, 0 nothing in common.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_others: Any) -> str:
        stamps = [(path.name, *stamp_of(path)) for path in pictures_of(folder)]
        return hashlib.sha256(repr(stamps).encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def execute(
        cls, clip_vision: Any, picture: Tensor, folder: str, count: int, compare: str
    ) -> io.NodeOutput:
        check_choice(compare, BY, "compare")
        pictures = pictures_of(folder)
        query = search_embeds(clip_vision, list(image_to_frames(picture, "the picture")))
        encode = functools.partial(search_embeds, clip_vision)
        encoder = encoder_identity(clip_vision)
        index = update_index(index_file(folder), pictures, encoder, encode, _Progress())
        if not index.names:
            raise ConfigError(
                f"none of the {len(pictures)} pictures in {folder!r} can be read; ComfyUI's log "
                "says why"
            )
        found = most_alike(index, BY[compare], query[BY[compare]], count)
        place = pictures[0].parent
        images = [pictures_to_image([read_image(place / name)]) for name, _ in found]
        names = [Path(name).stem for name, _ in found]
        return io.NodeOutput(images, names, [similarity for _, similarity in found])


NODES = [FindStyle]
