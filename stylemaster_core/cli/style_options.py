"""Options by which a style is given: pictures to encode, or a saved style."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from ..data.images import CropMode, read_image
from ..errors import ConfigError
from ..models.style_tokens import BlendMode, Style, blend_styles, load_style
from ..models.texture_selector import SelectionMode
from ..pipelines.encode_style import TextureConfig, encode_style
from ..pipelines.models import Models


def add_texture_options(parser: argparse.ArgumentParser) -> None:
    """Options of the style encoder."""
    group = parser.add_argument_group("style encoding")
    group.add_argument(
        "--selection",
        default="release",
        choices=get_args(SelectionMode),
        help="patches kept: most similar to the prompt (release), least similar (paper), all, random",
    )
    group.add_argument("--drop-rate", type=float, help="share of patches dropped; default 0.95")
    group.add_argument("--keep", type=int, help="number of patches kept, instead of a drop rate")
    group.add_argument("--no-cls", action="store_true", help="never keep the CLS token")
    group.add_argument("--crop", default="center", choices=get_args(CropMode))
    group.add_argument("--style-seed", type=int, default=0, help="of the content shuffle")


def texture_config(args: argparse.Namespace) -> TextureConfig:
    return TextureConfig(
        selection=args.selection,
        drop_rate=args.drop_rate,
        keep=args.keep,
        include_cls=not args.no_cls,
        crop=args.crop,
        seed=args.style_seed,
    )


def add_style_options(parser: argparse.ArgumentParser) -> None:
    """Options that name the style."""
    parser.add_argument(
        "--style",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a style picture, or a saved style (.safetensors); repeat it to blend several",
    )
    parser.add_argument(
        "--style-weight",
        action="append",
        type=float,
        default=[],
        metavar="W",
        help="weight of each --style, in their order",
    )
    parser.add_argument("--blend", default="mean", choices=get_args(BlendMode))
    add_texture_options(parser)


def open_style(args: argparse.Namespace, models: Models, prompt: str) -> Style | None:
    """Encode or load what --style names; None if there is none."""
    if not args.style:
        if args.style_weight:
            raise ConfigError("--style-weight needs a --style each")
        return None
    styles = []
    for path in args.style:
        if path.suffix == ".safetensors":
            styles.append(load_style(path))
        else:
            image = read_image(path)
            encoded = encode_style(models, image, prompt, texture_config(args), name=path.name)
            styles.append(encoded.style)
    if len(styles) == 1 and not args.style_weight:
        return styles[0]
    return blend_styles(styles, args.style_weight or None, args.blend)
