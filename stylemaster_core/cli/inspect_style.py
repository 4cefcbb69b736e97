"""`stylemaster inspect-style`: a picture of what the style encoder sees and keeps."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from .model_options import add_model_options, open_models


def add_parser(subparsers: Any) -> None:
    """Add `inspect-style` to the command line."""
    from .style_options import add_texture_options

    parser = subparsers.add_parser("inspect-style", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("image", type=Path, help="style picture")
    parser.add_argument("output", type=Path, help=".png")
    parser.add_argument("--prompt", default="", help="of the generation; the selection ranks by it")
    add_texture_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help="result as one line of JSON")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster inspect-style`."""
    from ..data.images import read_image, write_image
    from ..pipelines.encode_style import encode_style
    from ..pipelines.pictures import selection_picture
    from ..writing import check_place, write_or_rescue
    from .style_options import check_texture_options, texture_config

    check_place(args.output, overwrite=args.overwrite)
    check_texture_options(args)
    image, config = read_image(args.image), texture_config(args)
    with tempfile.TemporaryDirectory() as scratch:
        models = open_models(args, Path(scratch))
        encoded = encode_style(models, image, args.prompt, config, name=args.image.name)
    picture = selection_picture(
        image, encoded.similarity[0], encoded.kept[0], encoded.shuffled, crop=config.crop
    )
    write_or_rescue(args.output, lambda path: write_image(path, picture, overwrite=args.overwrite))
    kept, patches = int(encoded.kept.sum()), encoded.kept.numel()
    if args.json:
        report = {"output": str(args.output), "kept": kept, "patches": patches}
        sys.stdout.write(json.dumps(report) + "\n")
        return 0
    sys.stdout.write(
        f"wrote {args.output}: {kept} of {patches} patches kept; from left: what CLIP sees, "
        "similarity to the prompt (bright: similar), kept patches lit, shuffled picture\n"
    )
    return 0
