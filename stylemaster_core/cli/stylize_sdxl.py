"""`stylemaster stylize-sdxl`: a picture in the style of others, by StyleCrafter on SDXL."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_options import add_lora_option, check_lora_files, parse_size
from .results import add_output_options, say, tell_result
from .stylecrafter_options import (
    add_model_files,
    add_style_options,
    check_style_options,
    find_models,
    style_regions,
)

if TYPE_CHECKING:
    import numpy as np

# Below ComfyUI's models folder.
DEFAULT_FILES = {
    "sdxl": "checkpoints/sd_xl_base_1.0.safetensors",
    "adapter": "stylecrafter/stylecrafter_sdxl.safetensors",
    "image_encoder": "clip_vision/clip_vision_h.safetensors",
}
HELP = {
    "sdxl": "SDXL: a single checkpoint file, or a folder in diffusers' format",
    "adapter": "StyleCrafter's adapter for SDXL",
    "image_encoder": "CLIP ViT-H/14 vision tower, file or folder",
}


def add_parser(subparsers: Any) -> None:
    """Add `stylize-sdxl` to the command line."""
    from ..pipelines.stylize_sdxl import SdxlConfig

    default = SdxlConfig()
    parser = subparsers.add_parser("stylize-sdxl", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("output", type=Path, help=".png, .jpg or .webp")
    parser.add_argument("--prompt", default="", help="of it, 77 tokens count")
    parser.add_argument("--negative-prompt", default=default.negative_prompt)
    add_style_options(parser, 0.5)
    group = parser.add_argument_group("generation")
    group.add_argument("--seed", type=int, default=default.seed)
    group.add_argument("--steps", type=int, default=default.num_steps)
    group.add_argument("--text-scale", type=float, default=default.text_scale)
    group.add_argument("--style-scale", type=float, default=default.style_scale)
    group.add_argument("--size", type=parse_size, default=default.size, metavar="WxH")
    group = parser.add_argument_group("models")
    add_model_files(group, HELP, "sdxl")
    add_lora_option(group, "SDXL")
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster stylize-sdxl`."""
    from tqdm import tqdm

    from ..data.images import write_image
    from ..dtypes import choose_dtype
    from ..pipelines.models import choose_device
    from ..pipelines.stylize_sdxl import (
        SdxlConfig,
        check_sdxl_config,
        load_adapter,
        load_sdxl,
        prepare_styles,
        stylize_sdxl,
    )
    from ..writing import check_place, write_or_rescue
    from .preflight import check_room, try_writing

    started = time.perf_counter()
    config = SdxlConfig(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        size=args.size,
        seed=args.seed,
        num_steps=args.steps,
        text_scale=args.text_scale,
        style_scale=args.style_scale,
    )
    check_sdxl_config(config)
    check_style_options(args)
    check_lora_files(args.lora)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    check_place(args.output, overwrite=args.overwrite)
    size = (1, *config.size)
    check_room(args.output, size, None, device=args.device, video=False, option=None)

    def write(path: Path, frames: np.ndarray) -> None:
        write_image(path, frames[0], overwrite=args.overwrite)

    try_writing(args.output, size, write)
    with tempfile.TemporaryDirectory() as scratch:
        files = find_models(args, DEFAULT_FILES, HELP, lambda: _random_files(Path(scratch)))
        say(args, "encoding the style")
        adapter = load_adapter(files["adapter"], skip_check=args.skip_weight_check)
        styles = prepare_styles(
            adapter, style_regions(args, adapter, files["image_encoder"], device)
        )
        pipe = load_sdxl(
            files["sdxl"],
            device=device,
            dtype=dtype,
            loras=args.lora,
            skip_check=args.skip_weight_check,
        )
        bar = tqdm(total=config.num_steps, desc="sampling", unit="step", disable=args.json)
        with bar:
            picture = stylize_sdxl(
                pipe,
                adapter,
                styles,
                config,
                callback=lambda _: bar.update(),
                stage=lambda name: say(args, name),
            )
    write_or_rescue(args.output, lambda path: write(path, picture[None]))
    tell_result(args, picture[None], started, device)
    return 0


def _random_files(folder: Path) -> dict[str, Path]:
    from ..models.small_sdxl import write_small_sdxl

    return write_small_sdxl(folder)._asdict()
