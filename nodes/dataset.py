"""Nodes that prepare what is trained on: samples, illusion pairs, and their encoded form."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..stylemaster_core.data.images import read_image
from ..stylemaster_core.data.media_files import IMAGE_ENDINGS, VIDEO_ENDINGS, is_hidden
from ..stylemaster_core.data.pairs import RECORDS, read_pairs
from ..stylemaster_core.data.samples import (
    Sample,
    find_pictures,
    read_samples,
    write_samples,
)
from ..stylemaster_core.data.still_videos import still_samples
from .layouts import pictures_to_image
from .paths import check_choice, fingerprint, new_inside
from .sockets import schema
from .subprocesses import device_is_cpu, run_core
from .training_files import (
    TABLES_SUBFOLDER,
    Cache,
    CacheSocket,
    Dataset,
    DatasetSocket,
    encoder_names,
    encoder_path,
    input_path,
    work_folder,
    work_root,
)

TABLES = (".csv", ".jsonl")
MEDIA = VIDEO_ENDINGS | IMAGE_ENDINGS
SHORT_VIDEOS = ["reject", "trim"]
SHOWN_PAIRS = 8
SHARD_SIZE = 8  # samples between two signs of progress


def media_folders() -> list[str]:
    """Folders of the input folder that hold pictures or videos; "." is that folder itself."""
    root = folder_paths.get_input_directory()
    return [os.path.relpath(f, root) for f, names in _walk(root) if _any_ends(names, MEDIA)]


def sources() -> list[str]:
    """Folders of media, and tables of samples, of the input folder."""
    root = folder_paths.get_input_directory()
    tables = [
        os.path.relpath(os.path.join(folder, name), root)
        for folder, names in _walk(root)
        for name in names
        if name.lower().endswith(TABLES)
    ]
    return [*media_folders(), *tables]


def _walk(root: str) -> list[tuple[str, list[str]]]:
    return sorted(
        (folder, sorted(name for name in names if not name.startswith(".")))
        for folder, _, names in os.walk(root)
        if not is_hidden(Path(folder), Path(root))
    )


def _any_ends(names: Iterable[str], endings: Iterable[str]) -> bool:
    return any(name.lower().endswith(tuple(endings)) for name in names)


def samples_of(
    source: str, still_frames: int, caption: str, strip_style_words: bool
) -> list[Sample]:
    """Samples of a folder or table of the input folder.

    Raises:
        ConfigError: if there are none, one has no caption, or a file lies elsewhere.
    """
    samples = read_samples(
        input_path(source),
        caption=caption or None,
        strip_style=strip_style_words,
        within=[Path(folder_paths.get_input_directory())],
    )
    return still_samples(samples, still_frames) if still_frames else samples


class DatasetNode(io.ComfyNode):
    """A folder or table of the input folder -> STYLE_DATASET."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterDataset",
            display_name="Dataset",
            description="Pictures or videos with captions to train on: a folder inside ComfyUI's "
            "input, or a table (.csv, .jsonl) there.",
            search_aliases=["training data", "image folder", "captions"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=sources(),
                    tooltip="Folder inside ComfyUI's input ('.' is input itself), with a .txt "
                    "caption beside each file; or a table with the columns file and caption.",
                ),
                io.Int.Input(
                    "still_frames",
                    default=0,
                    min=0,
                    max=1001,
                    tooltip="Make a still clip of so many frames (4n+1) of each picture, as the "
                    "motion adapter needs; 0 takes pictures as pictures and videos as clips.",
                ),
                io.String.Input(
                    "caption", default="", tooltip="Caption of samples that have none of their own."
                ),
                io.Boolean.Input(
                    "strip_style_words",
                    default=False,
                    tooltip="Take words about style out of the captions: 'a painting of a cat' "
                    "becomes 'a cat'.",
                ),
            ],
            outputs=[
                DatasetSocket.Output(display_name="dataset", tooltip="For Encode Dataset."),
                io.Int.Output(display_name="count", tooltip="Number of samples."),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, source: str, still_frames: int, caption: str, strip_style_words: bool
    ) -> str:
        samples = samples_of(source, still_frames, caption, strip_style_words)
        files = [fingerprint(s.media) for s in samples if s.media.is_file()]
        return _digest([*files, *(s.description for s in samples)])

    @classmethod
    def execute(
        cls, source: str, still_frames: int, caption: str, strip_style_words: bool
    ) -> io.NodeOutput:
        samples = samples_of(source, still_frames, caption, strip_style_words)
        name = _digest([source, *(s.description for s in samples)])
        table = new_inside(work_root("datasets"), f"{TABLES_SUBFOLDER}/{name}.jsonl")
        table.parent.mkdir(parents=True, exist_ok=True)
        write_samples(table, samples, overwrite=True)  # the name says what is in it
        return io.NodeOutput(Dataset(table, len(samples)), len(samples))


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


class IllusionDataset(io.ComfyNode):
    """Pictures of the input folder -> STYLE_DATASET of pairs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterIllusionDataset",
            display_name="Illusion Dataset",
            description="Pairs of pictures of exactly one style, made by rearranging the pixels "
            "of given pictures. For Train Global Projection.",
            search_aliases=["style pairs", "model illusion", "contrastive data"],
            inputs=[
                io.Combo.Input(
                    "pictures",
                    options=media_folders(),
                    tooltip="Folder of style pictures inside ComfyUI's input ('.' is input itself)"
                    "; the more different styles, the better.",
                ),
                io.String.Input(
                    "name",
                    default="pairs",
                    tooltip="Folder in output/stylemaster/datasets; a run that was interrupted "
                    "goes on there.",
                ),
                io.Int.Input(
                    "num_pairs", default=10000, min=1, max=10000000, tooltip="How many pairs."
                ),
                io.Int.Input(
                    "size", default=256, min=16, max=2048, step=8, tooltip="Their side in pixels."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,  # an interrupted run goes on with its own seed
                    tooltip="Of the choice of pictures and rearrangements.",
                ),
            ],
            outputs=[
                DatasetSocket.Output(display_name="dataset", tooltip="For Encode Dataset."),
                io.Image.Output(
                    display_name="pairs", tooltip="The first pairs, side by side, to look at."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, pictures: str, name: str, num_pairs: int, size: int, seed: int
    ) -> io.NodeOutput:
        source, out = input_path(pictures), work_folder("datasets", name)
        within = folder_paths.get_input_directory()
        find_pictures(source, within=[Path(within)])
        bar = ProgressBar(num_pairs)
        records = out / RECORDS

        def watch() -> None:
            done = records.read_bytes().count(b"\n") if records.is_file() else 0
            if done != bar.current:
                bar.update_absolute(done)

        options = {"--pictures": source, "--num": num_pairs, "--size": size, "--seed": seed}
        options["--within"] = within
        run_core(["data", "illusion", str(out), *_words(options)], watch)
        pairs = read_pairs(out)
        shown = [
            np.concatenate([read_image(pair.first), read_image(pair.second)], axis=1)
            for pair in pairs[:SHOWN_PAIRS]
        ]
        return io.NodeOutput(Dataset(out, len(pairs)), pictures_to_image(shown))


class EncodeDataset(io.ComfyNode):
    """STYLE_DATASET -> STYLE_CACHE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterEncodeDataset",
            display_name="Encode Dataset",
            description="Runs VAE, text encoder and CLIP over a dataset once, so that training "
            "needs none of them.",
            search_aliases=["latent cache", "precompute", "training cache"],
            inputs=[
                DatasetSocket.Input("dataset", tooltip="From Dataset or Illusion Dataset."),
                io.String.Input(
                    "name",
                    default="cache",
                    tooltip="Folder in output/stylemaster/caches; what is there is not encoded "
                    "again.",
                ),
                io.Combo.Input("vae_name", options=encoder_names("vae"), tooltip="Wan 2.1 VAE."),
                io.Combo.Input(
                    "text_encoder_name",
                    options=encoder_names("text_encoders"),
                    tooltip="UMT5-XXL in models/text_encoders.",
                ),
                io.Combo.Input(
                    "clip_vision_name",
                    options=encoder_names("clip_vision"),
                    tooltip="CLIP ViT-H in models/clip_vision.",
                ),
                io.Int.Input(
                    "width", default=832, min=16, max=4096, step=16, tooltip="Of all samples."
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=4096, step=16, tooltip="Of all samples."
                ),
                io.Int.Input(
                    "num_frames",
                    default=81,
                    min=1,
                    max=1001,
                    step=4,
                    tooltip="Frames of a clip, 4n+1; pictures stay pictures.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=0.0,
                    max=240.0,
                    step=0.1,
                    tooltip="Frames a second that are taken of a video; 0 takes every frame.",
                ),
                io.Combo.Input(
                    "short_videos",
                    options=SHORT_VIDEOS,
                    default="reject",
                    tooltip="Videos that are too short: leave them out, or cut them to the next "
                    "smaller length.",
                ),
                io.Boolean.Input(
                    "gray_tile",
                    default=False,
                    tooltip="Also encode each sample's gray tile, for Train Gray-Tile Control.",
                ),
            ],
            outputs=[
                CacheSocket.Output(display_name="cache", tooltip="For the trainers."),
                io.String.Output(
                    display_name="report",
                    tooltip="What was encoded, and what was left out and why.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        dataset: Dataset,
        name: str,
        vae_name: str,
        text_encoder_name: str,
        clip_vision_name: str,
        width: int,
        height: int,
        num_frames: int,
        fps: float,
        short_videos: str,
        gray_tile: bool,
    ) -> io.NodeOutput:
        check_choice(short_videos, SHORT_VIDEOS, "short_videos")
        out = work_folder("caches", name)
        vae = encoder_path("vae", vae_name)
        text_encoder = encoder_path("text_encoders", text_encoder_name)
        options = {
            "--vae": vae,
            "--text-encoder": text_encoder,
            "--image-encoder": encoder_path("clip_vision", clip_vision_name),
            "--size": f"{width}x{height}",
            "--frames": num_frames,
            "--fps": fps,
            "--short": short_videos,
            "--shard-size": SHARD_SIZE,
            # The table lies where uploads reach it, and may have been changed meanwhile.
            "--within": folder_paths.get_input_directory(),
        }
        words = ["data", "encode", str(dataset.source), str(out), *_words(options)]
        words += ["--tile"] if gray_tile else []
        words += ["--device=cpu"] if device_is_cpu() else []
        bar = ProgressBar(dataset.count)

        def watch() -> None:
            done = SHARD_SIZE * len(list(out.glob("shard_*.safetensors")))
            if min(done, dataset.count) != bar.current:
                bar.update_absolute(done)

        said = json.loads(run_core(words, watch))
        report = f"{said['encoded']} samples encoded, {said['skipped']} were there"
        report += "".join(f"\nleft out: {bad['path']}: {bad['error']}" for bad in said["bad"])
        return io.NodeOutput(Cache(out, vae, text_encoder), report, ui={"text": [report]})


def _words(options: dict[str, Any]) -> list[str]:
    """Options as one word each, so that no value is taken for an option."""
    return [*(f"{name}={value}" for name, value in options.items()), "--json"]


NODES = [DatasetNode, IllusionDataset, EncodeDataset]
