"""Options by which a style is given: pictures to encode, or a saved style."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from ..data.images import CropMode, read_image
from ..errors import ConfigError
from ..models.decoupled_attention import StyleRegion
from ..models.style_tokens import (
    BlendMode,
    Style,
    blend_styles,
    load_style,
    styles_over_time,
)
from ..models.texture_selector import SelectionMode, num_kept
from ..pipelines.encode_style import TextureConfig, encode_style, encode_stylecrafter
from ..pipelines.models import Models
from ..seeds import check_seed
from .model_options import add_style_files


def add_texture_options(parser: argparse.ArgumentParser) -> None:
    """Options of the style encoder."""
    group = parser.add_argument_group("style encoding")
    group.add_argument(
        "--selection",
        default="release",
        choices=get_args(SelectionMode),
        help="patches kept: most (release) or least (paper) similar to the prompt, all, random",
    )
    group.add_argument("--drop-rate", type=float, help="share of patches dropped; default 0.95")
    group.add_argument("--keep", type=int, help="number of patches kept, instead of a drop rate")
    group.add_argument("--no-cls", action="store_true", help="never keep the CLS token")
    group.add_argument("--crop", default="center", choices=get_args(CropMode))
    group.add_argument("--style-seed", type=int, default=0, help="of the content shuffle")


def texture_config(args: argparse.Namespace) -> TextureConfig:
    """Settings of the style encoder from parsed options."""
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
    add_style_files(parser, several="repeat it to blend several")
    parser.add_argument(
        "--style-weight",
        action="append",
        type=float,
        default=[],
        metavar="W",
        help="weight of each --style, in their order",
    )
    parser.add_argument(
        "--blend",
        default="mean",
        choices=(*get_args(BlendMode), "time"),
        help="how several styles act: mixed, side by side, or one after another over the video",
    )
    add_texture_options(parser)


def check_style_options(args: argparse.Namespace) -> None:
    """Refuse, before any model is loaded, what the options of the styles cannot mean.

    Every picture and saved style is read once.

    Raises:
        StyleMasterError: naming the option or the file.
    """
    start, end = args.style_range
    StyleRegion(torch.zeros(1, 1, 1), args.style_strength, start=start, end=end)
    check_texture_options(args)
    style_regions(args, [Style(torch.zeros(1, 1, 1))] * len(args.style))
    for path in args.style:
        load_style(path) if path.suffix == ".safetensors" else read_image(path)


def check_texture_options(args: argparse.Namespace) -> None:
    """Refuse settings of the style encoder that can never work.

    Raises:
        ConfigError: naming the setting.
    """
    check_seed(args.style_seed, "--style-seed")
    any_number = sys.maxsize if args.keep is None else max(args.keep, 1)
    num_kept(any_number, args.selection, args.drop_rate, args.keep)


def open_styles(args: argparse.Namespace, models: Models, prompt: str) -> list[Style]:
    """Encode or load each --style; with StyleCrafter, pictures to be mixed are read together."""
    styles = []
    has_stylecrafter = bool(args.style) and models.has_stylecrafter
    if has_stylecrafter:
        if texture_config(args) != TextureConfig(crop=args.crop, seed=args.style_seed):
            raise ConfigError(
                "StyleCrafter reads all of a picture; leave out --selection, --drop-rate, --keep "
                "and --no-cls"
            )
        is_picture = [path.suffix != ".safetensors" for path in args.style]
        apart = args.style_weight or args.style_mask or args.blend != "mean"
        if all(is_picture) and not apart:
            return [_encode_together(args, models, args.style)]
    for path in args.style:
        if path.suffix == ".safetensors":
            styles.append(load_style(path))
        elif has_stylecrafter:
            styles.append(_encode_together(args, models, [path]))
        else:
            image = read_image(path)
            encoded = encode_style(models, image, prompt, texture_config(args), name=path.name)
            styles.append(encoded.style)
    return styles


def _encode_together(args: argparse.Namespace, models: Models, paths: list[Path]) -> Style:
    images, names = [read_image(path) for path in paths], [path.name for path in paths]
    return encode_stylecrafter(models, images, crop=args.crop, names=names)


def blended(args: argparse.Namespace, styles: list[Style]) -> Style:
    """One style of all."""
    if args.blend == "time":
        raise ConfigError("--blend time is for a video; a single style is mean or concatenate")
    if len(styles) == 1 and not args.style_weight:
        return styles[0]
    return blend_styles(styles, args.style_weight or None, args.blend)


def style_regions(args: argparse.Namespace, styles: list[Style]) -> list[StyleRegion] | None:
    """What the styles mean for a generation; None without a style."""
    if not styles:
        if args.style_weight or args.style_mask:
            raise ConfigError("--style-weight and --style-mask need a --style each")
        return None
    if args.style_mask:
        if len(args.style_mask) != len(styles) or args.style_weight or args.blend == "time":
            raise ConfigError(
                f"got {len(args.style_mask)} --style-mask for {len(styles)} --style; give one for "
                "each, without --style-weight or --blend time"
            )
        regions = [
            StyleRegion(
                style.tokens, mask=torch.from_numpy(read_image(path)).float().mean(-1) / 255
            )
            for style, path in zip(styles, args.style_mask, strict=True)
        ]
    elif args.blend == "time":
        regions = styles_over_time(styles, args.style_weight or None)
    else:
        regions = [StyleRegion(blended(args, styles).tokens)]
    start, end = args.style_range
    strength = args.style_strength
    return [replace(region, scale=strength, start=start, end=end) for region in regions]
