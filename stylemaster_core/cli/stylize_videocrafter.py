"""`stylemaster stylize-videocrafter`: a short video in a style, by StyleCrafter on VideoCrafter."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .model_options import add_lora_option, check_lora_files, parse_size
from .results import add_output_options, say, tell_result
from .stylecrafter_options import (
    add_model_files,
    add_style_options,
    check_style_options,
    find_models,
    style_regions,
)

SAVED_FPS = 10  # as the release saves its videos

# Below ComfyUI's models folder.
DEFAULT_FILES = {
    "unet": "diffusion_models/videocrafter_t2v_512_unet.safetensors",
    "vae": "vae/videocrafter_t2v_512_vae.safetensors",
    "text_encoder": "text_encoders/videocrafter_t2v_512_text_encoder.safetensors",
    "adapter": "stylecrafter/stylecrafter_adapter_v1.safetensors",
    "image_encoder": "clip_vision/clip_vision_h.safetensors",
}
HELP = {
    "unet": "VideoCrafter's UNet, which `stylemaster weights convert` makes of its model.ckpt",
    "vae": "SD's VAE, from the same checkpoint",
    "text_encoder": "SD 2's text encoder, from the same checkpoint",
    "adapter": "StyleCrafter's adapter for VideoCrafter (adapter_v1), converted",
    "image_encoder": "CLIP ViT-H/14 vision tower, file or folder",
}


def add_parser(subparsers: Any) -> None:
    """Add `stylize-videocrafter` to the command line."""
    from ..pipelines.stylize_videocrafter import IMAGE_SCALES, VIDEO_SCALES, VideoCrafterConfig

    default = VideoCrafterConfig()
    parser = subparsers.add_parser(
        "stylize-videocrafter",
        description=__doc__,
        epilog="VideoCrafter's and StyleCrafter's weights are for research and non-commercial use.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("output", type=Path, help=".mp4, ...; with --frames 1 .png, .jpg or .webp")
    parser.add_argument("--prompt", default="", help="of it, 77 tokens count")
    parser.add_argument("--negative-prompt", default=default.negative_prompt)
    add_style_options(parser, 1.0)
    group = parser.add_argument_group("generation")
    group.add_argument("--seed", type=int, default=default.seed)
    group.add_argument("--steps", type=int, default=default.num_steps)
    group.add_argument("--eta", type=float, default=default.eta, help="noise of each step, 0 to 1")
    for name, number in (("text", 0), ("style", 1)):
        group.add_argument(
            f"--{name}-scale",
            type=float,
            help=f"default: {VIDEO_SCALES[number]:g}, for a picture {IMAGE_SCALES[number]:g}",
        )
    group.add_argument("--size", type=parse_size, default=default.size, metavar="WxH")
    group.add_argument(
        "--frames", type=int, default=default.num_frames, help="trained with 16; 1: a picture"
    )
    group.add_argument(
        "--fps",
        type=float,
        default=default.fps,
        help="that VideoCrafter2 is told of; the first VideoCrafter knows none",
    )
    group.add_argument("--save-fps", type=float, default=SAVED_FPS, help="of the written video")
    group = parser.add_argument_group("models")
    add_model_files(group, HELP, "videocrafter")
    group.add_argument(
        "--temporal",
        type=Path,
        metavar="PATH",
        help="StyleCrafter's temporal layers (temporal_v1_1), in place of the UNet's",
    )
    add_lora_option(group, "VideoCrafter")
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster stylize-videocrafter`."""
    from tqdm import tqdm

    from ..pipelines.models import choose_device, choose_dtype
    from ..pipelines.stylize_sdxl import load_adapter, prepare_styles
    from ..pipelines.stylize_videocrafter import (
        check_videocrafter_config,
        load_videocrafter,
        stylize_videocrafter,
    )
    from ..weights.lora import check_videocrafter_loras
    from ..writing import check_place, write_or_rescue
    from .preflight import try_writing

    started = time.perf_counter()
    _check_output(args)
    check_style_options(args)
    check_lora_files(args.lora)
    config = _config(args)
    check_videocrafter_config(config)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    check_place(args.output, overwrite=args.overwrite)
    size = (args.frames, *config.size)
    try_writing(args.output, size, lambda path, frames: _write(args, path, frames))
    with tempfile.TemporaryDirectory() as scratch:
        files = find_models(args, DEFAULT_FILES, HELP, lambda: _random_files(Path(scratch)))
        check_videocrafter_loras(args.lora, files["unet"])
        say(args, "encoding the style")
        adapter = load_adapter(files["adapter"], skip_check=args.skip_weight_check)
        regions = style_regions(args, adapter, files["image_encoder"], device)
        styles = prepare_styles(adapter, regions)
        models = load_videocrafter(
            files["unet"],
            files["vae"],
            files["text_encoder"],
            temporal=args.temporal,
            device=device,
            dtype=dtype,
            loras=args.lora,
            skip_check=args.skip_weight_check,
        )
        bar = tqdm(total=config.num_steps, desc="sampling", unit="step", disable=args.json)
        with bar:
            frames = stylize_videocrafter(
                models,
                adapter,
                styles,
                config,
                callback=lambda _: bar.update(),
                stage=lambda name: say(args, name),
            )
    write_or_rescue(args.output, lambda path: _write(args, path, frames))
    tell_result(args, frames, started, device)
    return 0


def _config(args: argparse.Namespace) -> Any:
    from ..pipelines.stylize_videocrafter import VideoCrafterConfig

    return VideoCrafterConfig(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        size=args.size,
        num_frames=args.frames,
        seed=args.seed,
        num_steps=args.steps,
        eta=args.eta,
        text_scale=args.text_scale,
        style_scale=args.style_scale,
        fps=args.fps,
    )


def _check_output(args: argparse.Namespace) -> None:
    from ..data.videos import VIDEO_CODECS

    wanted = {".png", ".jpg", ".jpeg", ".webp"} if args.frames == 1 else set(VIDEO_CODECS)
    if args.output.suffix.lower() not in wanted:
        raise ConfigError(
            f"{args.frames} frames are written as {', '.join(sorted(wanted))}; got "
            f"{args.output.name!r}"
        )


def _write(args: argparse.Namespace, path: Path, frames: Any) -> None:
    from ..data.images import write_image
    from ..data.videos import write_video

    if args.frames == 1:
        write_image(path, frames[0], overwrite=args.overwrite)
    else:
        write_video(path, frames, fps=args.save_fps, overwrite=args.overwrite)


def _random_files(folder: Path) -> dict[str, Path]:
    from ..models.small_videocrafter import write_small_videocrafter
    from ..weights.convert import convert

    small = write_small_videocrafter(folder)
    unet, vae, text = convert(small.checkpoint, folder)
    (adapter,) = convert(small.adapter, folder)
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": text,
        "adapter": adapter,
        "image_encoder": small.image_encoder,
    }
