"""Nodes for many videos: a folder of them one by one, and a sheet that compares results."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
from comfy_api.latest import io
from torch import Tensor

from ..stylemaster_core.data.media_files import MOVING_ENDINGS, is_hidden, media_files
from ..stylemaster_core.errors import ConfigError
from ..stylemaster_core.pipelines.pictures import contact_sheet
from .layouts import frames_to_image, image_to_frames, sound_to_audio
from .paths import find_inside, fingerprint
from .sockets import schema

logger = logging.getLogger("stylemaster")

NUM_RESULTS = 4


def media_folders(endings: Collection[str]) -> list[str]:
    """The input folder (".") and its sub-folders that hold files with these endings."""
    root = folder_paths.get_input_directory()
    found = [
        os.path.relpath(folder, root)
        for folder, _, names in os.walk(root)
        if not is_hidden(Path(folder), Path(root)) and any(_ends(name, endings) for name in names)
    ]
    return [".", *sorted(name for name in found if name != ".")]


def _ends(name: str, endings: Collection[str]) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in endings


def media_of_folder(folder: str, endings: Collection[str], what: str) -> list[Path]:
    """The files of a folder of ComfyUI's input folder, in the order of their names.

    Links that lead out of ComfyUI's input folder are refused when they are opened by name.

    Raises:
        ConfigError: if it is none.
    """
    root = folder_paths.get_input_directory()
    place = find_inside(folder, [root])
    if place is None or not place.is_dir():
        raise ConfigError(f"there is no folder {folder!r} in {root}; put the {what} there")
    return sorted(media_files(place, endings), key=lambda path: path.name.lower())


def video_of_folder(folder: str, index: int) -> Path:
    """The video of this number, from 0, in the order of the names.

    Raises:
        ConfigError: if the folder or the video is none of ComfyUI's input folder, or there is no
            such number.
    """
    videos = media_of_folder(folder, MOVING_ENDINGS, "videos")
    if not 0 <= index < len(videos):
        raise ConfigError(
            f"there is no video {index} in {folder!r} of ComfyUI's input folder: it holds "
            f"{len(videos)} ({', '.join(sorted(MOVING_ENDINGS))}), counted from 0"
            + ("; set the index to 0 to begin again" if videos else "; put videos there")
        )
    video = find_inside(f"{folder}/{videos[index].name}", [folder_paths.get_input_directory()])
    assert video is not None
    return video


class FolderVideo(io.ComfyNode):
    """A folder of the input folder and a number -> IMAGE, AUDIO."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterFolderVideo",
            display_name="Folder Video",
            description="One video of a folder after the other: set the number of queued runs to "
            "the number of videos.",
            search_aliases=["batch videos", "load video folder", "video list"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=media_folders(MOVING_ENDINGS),
                    default=".",
                    tooltip="Folder inside ComfyUI's input folder; '.' is that folder itself.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=1000000,
                    control_after_generate=True,
                    tooltip="Number of the video, from 0, in the order of the names. With "
                    "'increment' each queued run takes the next.",
                ),
                io.Int.Input(
                    "first_frame",
                    default=0,
                    min=0,
                    max=1000000,
                    tooltip="How many frames to leave out at the beginning.",
                ),
                io.Int.Input(
                    "max_frames",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="How many frames to take at most; 0 takes all.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="frames", tooltip="The frames."),
                io.Float.Output(display_name="fps", tooltip="Frames a second."),
                io.String.Output(display_name="name", tooltip="File name without its ending."),
                io.Audio.Output(
                    display_name="audio",
                    tooltip="The sound that belongs to the frames; nothing without any.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, index: int, **_others: Any) -> str:
        return fingerprint(video_of_folder(folder, index))

    @classmethod
    def execute(cls, folder: str, index: int, first_frame: int, max_frames: int) -> io.NodeOutput:
        from ..stylemaster_core.data.picture_sequences import square_pixels
        from ..stylemaster_core.data.sound import read_sound
        from ..stylemaster_core.data.timing import steady_fps
        from ..stylemaster_core.data.videos import probe_video, read_video

        path = video_of_folder(folder, index)
        times_s = probe_video(path).times_s
        fps = None if times_s is None else steady_fps(times_s)
        if fps is not None:
            logger.warning("%s: its frame rate varies, resampled to %.5g", path.name, float(fps))
        clip = read_video(path, start_frame=first_frame, max_frames=max_frames or None, fps=fps)
        sound = None
        if clip.audio_from is not None:
            end_s = clip.start_s + clip.duration_s
            sound = read_sound(clip.audio_from, start_s=clip.start_s, end_s=end_s)
        frames = clip.frames
        if clip.pixel_aspect != 1:
            frames = np.stack([square_pixels(frame, clip.pixel_aspect) for frame in frames])
        return io.NodeOutput(
            frames_to_image(frames),
            float(clip.fps),
            path.stem,
            None if sound is None else sound_to_audio(sound.samples, sound.sample_rate),
        )


def some_frames(image: Tensor, what: str, count: int) -> list[np.ndarray]:
    """At most `count` frames, evenly from the first to the last."""
    frames = image_to_frames(image, what)
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return [frames[i] for i in chosen]


class CompareStyles(io.ComfyNode):
    """IMAGEs -> one IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        results: list[io.Input] = [
            io.Image.Input(f"result_{n}", optional=n > 1, tooltip=f"Result {n}: frames.")
            for n in range(1, NUM_RESULTS + 1)
        ]
        return schema(
            node_id="StyleMasterCompareStyles",
            display_name="Compare Styles",
            description="A labelled sheet: reference, content and results, some frames of each.",
            search_aliases=["contact sheet", "image grid", "comparison"],
            inputs=[
                io.Image.Input("reference", optional=True, tooltip="Style pictures."),
                io.Image.Input("content", optional=True, tooltip="The video before."),
                *results,
                io.String.Input(
                    "labels",
                    default="",
                    tooltip="Labels of the results, separated by commas; else they are numbered.",
                ),
                io.Int.Input(
                    "columns",
                    default=5,
                    min=1,
                    max=32,
                    tooltip="How many frames of each, evenly from first to last.",
                ),
                io.Int.Input(
                    "side",
                    default=192,
                    min=32,
                    max=1024,
                    tooltip="Side of the square that each frame is fitted into, in pixels.",
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="For Save Image.")],
        )

    @classmethod
    def execute(cls, labels: str, columns: int, side: int, **images: Tensor) -> io.NodeOutput:
        names = {"reference": "reference", "content": "content"}
        words = [word.strip() for word in labels.split(",")]
        for n in range(1, NUM_RESULTS + 1):
            given = words[n - 1] if n <= len(words) else ""
            names[f"result_{n}"] = given or f"result {n}"
        rows = [
            (label, some_frames(images[key], f"{key} of the comparison", columns))
            for key, label in names.items()
            if images.get(key) is not None
        ]
        return io.NodeOutput(frames_to_image(contact_sheet(rows, side)[None]))


NODES = [FolderVideo, CompareStyles]
