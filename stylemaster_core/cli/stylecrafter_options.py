"""Options that the commands of StyleCrafter on UNets share: styles, and where the models are."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..errors import ConfigError, WeightsError
from .model_options import RANDOM, add_device_options, add_style_files
from .results import say

if TYPE_CHECKING:
    from ..models.decoupled_attention import StyleRegion
    from ..models.stylecrafter_sdxl import StyleCrafterSdxl


def add_style_options(parser: argparse.ArgumentParser, strength: float) -> None:
    """Options of the styles; `strength` is the release's."""
    from ..data.images import CropMode

    several = "several pictures are references of one style"
    add_style_files(parser, several=several, strength=strength)
    parser.add_argument("--crop", default="center", choices=get_args(CropMode))
    parser.add_argument("--save-style", type=Path, metavar="FILE", help="keep it as .safetensors")


def add_model_files(group: Any, help_of: Mapping[str, str], base: str) -> None:
    """Options that name the files of the models, or small random ones, and where they run."""
    group.add_argument(
        "--model",
        choices=(base, RANDOM),
        default=base,
        help=f"{RANDOM}: small random weights, for trying things out; the result is noise",
    )
    group.add_argument("--models-dir", type=Path, help="default: $COMFYUI_PATH/models or ./models")
    for name, text in help_of.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="PATH", help=text)
    add_device_options(group)


def find_models(
    args: argparse.Namespace,
    defaults: Mapping[str, str],
    help_of: Mapping[str, str],
    write_random: Callable[[], Mapping[str, Path]],
) -> dict[str, Path]:
    """Paths of the models; those that were not named are looked for below the models folder.

    Raises:
        WeightsError: if one does not exist.
    """
    given = {name: getattr(args, name) for name in defaults}
    if args.model == RANDOM:
        say(args, "Small RANDOM weights: every step runs, the result is noise, not a style.")
        return {**write_random(), **{k: v for k, v in given.items() if v}}
    root = os.environ.get("COMFYUI_PATH")
    folder = args.models_dir or (Path(root) / "models" if root else Path("models"))
    files = {name: given[name] or folder / path for name, path in defaults.items()}
    for name, path in files.items():
        if not path.exists():
            raise WeightsError(
                f"{path} does not exist; give --{name.replace('_', '-')} ({help_of[name]}), or "
                "--models-dir"
            )
    return files


def check_style_options(args: argparse.Namespace) -> None:
    """Refuse, before any model is loaded, what the options of the styles cannot mean.

    Every picture and saved style is read once.

    Raises:
        StyleMasterError: naming the option or the file.
    """
    import torch

    from ..data.images import read_image
    from ..models.decoupled_attention import StyleRegion
    from ..models.style_tokens import load_style
    from ..writing import check_place

    if not args.style:
        raise ConfigError("give at least one --style: a picture, or a saved style")
    start, end = args.style_range
    StyleRegion(torch.zeros(1, 1, 1), args.style_strength, start=start, end=end)
    if args.style_mask and len(args.style_mask) != len(args.style):
        raise ConfigError(
            f"got {len(args.style_mask)} --style-mask for {len(args.style)} --style; give one for "
            "each"
        )
    saved = [path for path in args.style if path.suffix == ".safetensors"]
    if saved and not args.style_mask and len(args.style) > 1:
        raise ConfigError(
            "a saved style cannot be read together with others; give its pictures again, or a "
            "--style-mask for each"
        )
    for path in (*args.style, *args.style_mask):
        load_style(path) if path in saved else read_image(path)
    if args.save_style is not None:
        if len(args.style_mask) > 1:
            raise ConfigError("--save-style keeps a single style; give it without --style-mask")
        check_place(args.save_style, overwrite=args.overwrite)


def style_regions(
    args: argparse.Namespace, adapter: StyleCrafterSdxl, image_encoder: Path, device: Any
) -> list[StyleRegion]:
    """Styles of checked options; pictures without masks are references of a single one."""
    import torch

    from ..data.images import read_image
    from ..models.decoupled_attention import StyleRegion
    from ..models.style_tokens import load_style, save_style
    from ..pipelines.stylize_sdxl import encode_style

    saved = [path for path in args.style if path.suffix == ".safetensors"]
    masks = [torch.from_numpy(read_image(p)).float().mean(-1) / 255 for p in args.style_mask]

    def encode(paths: list[Path]) -> Any:
        if paths[0] in saved:
            return load_style(paths[0])
        images, names = [read_image(path) for path in paths], [path.name for path in paths]
        return encode_style(
            adapter,
            image_encoder,
            images,
            crop=args.crop,
            device=device,
            names=names,
            skip_check=args.skip_weight_check,
        )

    styles = [encode([path]) for path in args.style] if masks else [encode(args.style)]
    if args.save_style is not None:
        save_style(args.save_style, styles[0], overwrite=args.overwrite)
    start, end = args.style_range
    return [
        StyleRegion(style.tokens, args.style_strength, mask=mask, start=start, end=end)
        for style, mask in zip(styles, masks or [None], strict=True)
    ]
