"""`stylemaster stylize-sdxl`: a picture in the style of others, by StyleCrafter on SDXL."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..errors import ConfigError, WeightsError
from .model_options import RANDOM, parse_range, parse_size

if TYPE_CHECKING:
    from ..models.decoupled_attention import StyleRegion
    from ..models.stylecrafter_sdxl import StyleCrafterSdxl

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
    from ..data.images import CropMode
    from ..pipelines.stylize_sdxl import SdxlConfig

    default = SdxlConfig()
    parser = subparsers.add_parser("stylize-sdxl", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("output", type=Path, help=".png, .jpg or .webp")
    parser.add_argument("--prompt", default="", help="of it, 77 tokens count")
    parser.add_argument("--negative-prompt", default=default.negative_prompt)
    parser.add_argument(
        "--style",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a style picture, or a saved style; several pictures are references of one style",
    )
    parser.add_argument(
        "--style-mask",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="where each --style acts, in their order: a gray picture, white for there",
    )
    parser.add_argument("--style-strength", type=float, default=0.5, help="0.5 is the release's")
    parser.add_argument("--style-range", type=parse_range, default=(0.0, 1.0), metavar="START:END")
    parser.add_argument("--crop", default="center", choices=get_args(CropMode))
    parser.add_argument("--save-style", type=Path, metavar="FILE", help="keep it as .safetensors")
    group = parser.add_argument_group("generation")
    group.add_argument("--seed", type=int, default=default.seed)
    group.add_argument("--steps", type=int, default=default.num_steps)
    group.add_argument("--text-scale", type=float, default=default.text_scale)
    group.add_argument("--style-scale", type=float, default=default.style_scale)
    group.add_argument("--size", type=parse_size, default=default.size, metavar="WxH")
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model",
        choices=("sdxl", RANDOM),
        default="sdxl",
        help=f"{RANDOM}: small random weights, for trying things out; the result is noise",
    )
    group.add_argument("--models-dir", type=Path, help="default: $COMFYUI_PATH/models or ./models")
    for name, text in HELP.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="PATH", help=text)
    group.add_argument(
        "--lora",
        action="append",
        type=parse_lora,
        default=[],
        metavar="FILE[:SCALE]",
        help="LoRA for SDXL, merged at this strength (1); may be given several times",
    )
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    group.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="result as one line of JSON")


def parse_lora(text: str) -> tuple[Path, float]:
    """Read FILE or FILE:SCALE; a colon that no number follows belongs to the path."""
    path, _, scale = text.rpartition(":")
    try:
        return Path(path or text), float(scale) if path else 1.0
    except ValueError:
        return Path(text), 1.0


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster stylize-sdxl`."""
    from tqdm import tqdm

    from ..data.images import write_image
    from ..dtypes import choose_dtype
    from ..pipelines.models import choose_device
    from ..pipelines.stylize_sdxl import (
        SdxlConfig,
        load_adapter,
        load_sdxl,
        prepare_styles,
        stylize_sdxl,
    )

    started = time.perf_counter()
    if args.output.exists() and not args.overwrite:
        raise ConfigError(f"{args.output} exists; choose another name, or pass --overwrite")
    if not args.style:
        raise ConfigError("give at least one --style: a picture, or a saved style")
    config = SdxlConfig(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        size=args.size,
        seed=args.seed,
        num_steps=args.steps,
        text_scale=args.text_scale,
        style_scale=args.style_scale,
    )
    device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        files = _files(args, Path(scratch))
        _say(args, "encoding the style")
        adapter = load_adapter(files["adapter"])
        styles = prepare_styles(adapter, _regions(args, adapter, files["image_encoder"], device))
        dtype = choose_dtype(args.dtype, device)
        pipe = load_sdxl(files["sdxl"], device=device, dtype=dtype, loras=args.lora)
        bar = tqdm(total=config.num_steps, desc="sampling", unit="step", disable=args.json)
        with bar:
            picture = stylize_sdxl(
                pipe,
                adapter,
                styles,
                config,
                callback=lambda _: bar.update(),
                stage=lambda name: _say(args, name),
            )
    write_image(args.output, picture, overwrite=args.overwrite)
    seconds = round(time.perf_counter() - started, 2)
    height, width, _ = picture.shape
    if args.json:
        report = {
            "output": str(args.output),
            "height": height,
            "width": width,
            "seed": config.seed,
            "device": str(device),
            "seconds": seconds,
        }
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        _say(args, f"wrote {args.output}: {width} x {height}, {seconds} s")
    return 0


def _regions(
    args: argparse.Namespace, adapter: StyleCrafterSdxl, image_encoder: Path, device: Any
) -> list[StyleRegion]:
    """Styles of the options; pictures without masks are references of a single one."""
    import torch

    from ..data.images import read_image
    from ..models.decoupled_attention import StyleRegion
    from ..models.style_tokens import load_style, save_style
    from ..pipelines.stylize_sdxl import encode_style

    saved = [path for path in args.style if path.suffix == ".safetensors"]
    masks = [torch.from_numpy(read_image(p)).float().mean(-1) / 255 for p in args.style_mask]
    if masks and len(masks) != len(args.style):
        raise ConfigError(
            f"got {len(masks)} --style-mask for {len(args.style)} --style; give one for each"
        )
    if saved and not masks and len(args.style) > 1:
        raise ConfigError(
            "a saved style cannot be read together with others; give its pictures again, or a "
            "--style-mask for each"
        )

    def encode(paths: list[Path]) -> Any:
        if paths[0] in saved:
            return load_style(paths[0])
        images, names = [read_image(path) for path in paths], [path.name for path in paths]
        return encode_style(
            adapter, image_encoder, images, crop=args.crop, device=device, names=names
        )

    styles = [encode([path]) for path in args.style] if masks else [encode(args.style)]
    if args.save_style is not None:
        if len(styles) > 1:
            raise ConfigError("--save-style keeps a single style; give it without --style-mask")
        save_style(args.save_style, styles[0], overwrite=args.overwrite)
    start, end = args.style_range
    return [
        StyleRegion(style.tokens, args.style_strength, mask=mask, start=start, end=end)
        for style, mask in zip(styles, masks or [None], strict=True)
    ]


def _files(args: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """Paths of the models; those that were not named are looked for."""
    given = {name: getattr(args, name) for name in DEFAULT_FILES}
    if args.model == RANDOM:
        from ..models.small_sdxl import write_small_sdxl

        _say(args, "Small RANDOM weights: every step runs, the result is noise, not a style.")
        return write_small_sdxl(scratch)._asdict() | {k: v for k, v in given.items() if v}
    root = os.environ.get("COMFYUI_PATH")
    folder = args.models_dir or (Path(root) / "models" if root else Path("models"))
    files = {name: given[name] or folder / path for name, path in DEFAULT_FILES.items()}
    for name, path in files.items():
        if not path.exists():
            raise WeightsError(
                f"{path} does not exist; give --{name.replace('_', '-')} ({HELP[name]}), or "
                "--models-dir"
            )
    return files


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        sys.stderr.write(text + "\n")
