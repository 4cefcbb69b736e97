"""Options by which every subcommand finds its models."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeightsError
from ..pipelines.models import ModelFiles, Models
from ..pipelines.tiny import tiny_files

RANDOM = "small-random"
VIDEOCRAFTER = "videocrafter"
TINY, TINY_STYLECRAFTER = "tiny", "tiny-stylecrafter"
# Where ComfyUI users already have the files; the first that exists is taken.
DEFAULT_FILES: dict[str, tuple[str, ...]] = {
    "transformer": ("diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",),
    "adapter": ("stylemaster/stylemaster_adapter.safetensors",),
    "controlnet": (
        "controlnet/stylemaster_controlnet.safetensors",
        "stylemaster/controlnet.safetensors",
    ),
    "vae": ("vae/wan_2.1_vae.safetensors",),
    "text_encoder": (
        "text_encoders/umt5_xxl_fp16.safetensors",
        "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    ),
    "image_encoder": ("clip_vision/clip_vision_h.safetensors",),
}


def add_model_options(parser: argparse.ArgumentParser, *others: str) -> argparse._ArgumentGroup:
    """Options for files, device and memory; returns the group of the files.

    Args:
        parser: gets them.
        others: choices of `--model` beside those that `open_models` knows.
    """
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model",
        choices=("wan2.1-1.3b", TINY, TINY_STYLECRAFTER, RANDOM, *others),
        default="wan2.1-1.3b",
        help=f"{TINY}: the small trained model that comes with this package, for small videos; "
        f"{TINY_STYLECRAFTER}: the same with StyleCrafter's adapter; "
        f"{RANDOM}: small random weights, for trying things out; the result is noise",
    )
    group.add_argument(
        "--models-dir",
        type=Path,
        help="folder laid out as ComfyUI's models; default: $COMFYUI_PATH/models or ./models",
    )
    for field in fields(ModelFiles):
        option = "--" + field.name.replace("_", "-")
        group.add_argument(option, type=Path, metavar="PATH", help="file or folder")
    memory = parser.add_argument_group("device and memory")
    add_device_options(memory)
    memory.add_argument(
        "--offload", default="none", choices=("none", "layers"), help="move layers as needed"
    )
    memory.add_argument(
        "--storage", default="compute", choices=("compute", "float8"), help="of the transformer"
    )
    memory.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    return group


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """Where and in which numbers is computed, and whether weights are looked at before."""
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    group.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    group.add_argument(
        "--skip-weight-check", action="store_true", help="do not look for NaN in the weights"
    )


def add_style_files(
    parser: argparse.ArgumentParser, *, several: str, strength: float = 1.0
) -> None:
    """Options that name styles, and say where, when and how strongly they act.

    Args:
        parser: gets them.
        several: what several pictures mean.
        strength: the release's.
    """
    repeated: dict[str, Any] = {"action": "append", "type": Path, "default": [], "metavar": "FILE"}
    parser.add_argument(
        "--style", help=f"a style picture, or a saved style (.safetensors); {several}", **repeated
    )
    parser.add_argument(
        "--style-mask",
        help="where each --style acts, in their order: a gray picture, white for there",
        **repeated,
    )
    parser.add_argument(
        "--style-strength",
        type=float,
        default=strength,
        help=f"of the style branch; {strength:g} is the release's",
    )
    parser.add_argument("--style-range", type=parse_range, default=(0.0, 1.0), metavar="START:END")


def open_models(args: argparse.Namespace, random_dir: Path | None = None) -> Models:
    """The models that the options name; those that were not named are looked for.

    A file that is named takes the place of the one that `--model` means.

    Args:
        args: parsed options.
        random_dir: where small random weights are written, if they are asked for.
    """
    given = {f.name: getattr(args, f.name) for f in fields(ModelFiles)}
    for name, path in given.items():
        if path is not None and not path.exists():
            raise WeightsError(f"--{name.replace('_', '-')}: {path} does not exist")
    if args.model == RANDOM:
        found = _random_files(random_dir)
    elif args.model == TINY:
        found = _tiny_files(motion=getattr(args, "motion_scale", None) is not None)
    elif args.model == TINY_STYLECRAFTER:
        found = vars(tiny_files(stylecrafter=True))
    else:
        found = _find(_models_dir(args), given)
    files = ModelFiles(**(found | {k: v for k, v in given.items() if v is not None}))
    return Models(
        files,
        device=args.device,
        dtype=args.dtype,
        offload=args.offload,
        storage=args.storage,
        compile_blocks=args.compile,
        loras=_check_loras(getattr(args, "lora", []), files),
        check_weights=not args.skip_weight_check,
    )


def _check_loras(loras: list[tuple[Path, float]], files: ModelFiles) -> list[tuple[Path, float]]:
    """The LoRAs of `--lora`, which must fit the transformer: known before anything is loaded."""
    if loras:
        from ..weights.lora import check_wan_loras

        check_wan_loras(loras, files.need("transformer", "A LoRA"))
    return loras


def _models_dir(args: argparse.Namespace) -> Path:
    if args.models_dir is not None:
        if not args.models_dir.is_dir():
            raise WeightsError(f"--models-dir: {args.models_dir} is no folder")
        return args.models_dir
    root = os.environ.get("COMFYUI_PATH")
    return Path(root) / "models" if root else Path("models")


def _find(folder: Path, given: dict[str, Path | None]) -> dict[str, Path]:
    found = {}
    for name, candidates in DEFAULT_FILES.items():
        if given[name] is None:
            existing = [folder / path for path in candidates if (folder / path).exists()]
            if existing:
                found[name] = existing[0]
    return found


def _tiny_files(motion: bool) -> dict[str, Path]:
    files = {name: path for name, path in vars(tiny_files()).items() if path is not None}
    if not motion:  # it acts only where it is asked for, as with other models
        del files["motion_adapter"]
    return files


def _random_files(folder: Path | None) -> dict[str, Path]:
    from ..models.small import write_small_models

    if folder is None:
        raise WeightsError(f"this command needs real weights, not --model {RANDOM}")
    sys.stderr.write("Small RANDOM weights: every step runs, the result is noise, not a style.\n")
    small = write_small_models(folder)
    return {
        "transformer": small.stylemaster,
        "controlnet": small.controlnet,
        "vae": small.vae,
        "text_encoder": small.text_encoder,
        "image_encoder": small.image_encoder,
    }


def add_lora_option(group: argparse._ArgumentGroup, model: str) -> None:
    """`--lora`, several times."""
    group.add_argument(
        "--lora",
        action="append",
        type=parse_lora,
        default=[],
        metavar="FILE[:SCALE]",
        help=f"LoRA for {model}, merged at this strength (1); may be given several times",
    )


def check_lora_files(loras: list[tuple[Path, float]]) -> None:
    """Refuse LoRAs that are not there.

    Raises:
        ConfigError: naming the option.
    """
    for path, scale in loras:
        if not path.is_file():
            raise ConfigError(f"--lora {path}:{scale}: there is no such file")


def parse_lora(text: str) -> tuple[Path, float]:
    """Read FILE or FILE:SCALE; a colon that no number follows belongs to the path."""
    path, _, scale = text.rpartition(":")
    try:
        strength = float(scale) if path else 1.0
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"a strength of {scale} is not a finite number")
    return Path(path or text), strength


def parse_size(text: str) -> tuple[int, int]:
    """`832x480` -> (height, width)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT, e.g. 832x480")
    return int(match[2]), int(match[1])


def parse_range(text: str) -> tuple[float, float]:
    """`0.0:0.7` -> (start, end)."""
    match = re.fullmatch(r"([0-9.]+):([0-9.]+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no range; write START:END, e.g. 0.0:0.7")
    return float(match[1]), float(match[2])
