"""From the folders of the stages to the files of the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from stylemaster_core.weights.files import read_state_dict, write_state_dict
from stylemaster_core.weights.int8_rows import pack_rows

from .samples import TEXT_LENGTH, TEXT_WIDTH

SHIPPED = Path(__file__).parents[2] / "stylemaster_core" / "tiny"


def ship(out: Path, folder: Path) -> None:
    """Write the weights of a run's stages where the pack looks for them.

    In 8 bits with a scale for each row; the VAE, whose errors would be seen, and the two encoders
    in float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "transformer": "joint/transformer",
        "style_adapter": "style/style_adapter",
        "controlnet": "control/controlnet",
        "motion_adapter": "motion/motion_adapter",
        "vae": "refiner/vae",
        "stylecrafter_adapter": "stylecrafter-scales/stylecrafter_adapter",
        "stylecrafter_video_lora": "stylecrafter-video/stylecrafter_video_lora",
    }
    for name, source in files.items():
        tensors, metadata = read_state_dict(out / f"{source}.safetensors")
        half = {key: value.half().contiguous() for key, value in tensors.items()}
        packed = half if name == "vae" else pack_rows(half)
        write_state_dict(folder / f"{name}.safetensors", packed, metadata, overwrite=True)
    for name, source in (("image_encoder", "encoder"), ("judge", "judge")):
        (folder / name).mkdir(exist_ok=True)
        copy_encoder(out / source, folder / name)
    settings = {"kind": "hashed_words", "width": TEXT_WIDTH, "max_length": TEXT_LENGTH}
    settings["seed"] = 0
    (folder / "text_encoder.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


def copy_encoder(source: Path, folder: Path) -> None:
    """Copy the two files of an encoder."""
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(source / file, folder / file)
