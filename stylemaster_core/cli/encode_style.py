"""`stylemaster encode-style`: save a picture's style, to use or share it without the picture."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .model_options import add_model_options, open_models


def add_parser(subparsers: Any) -> None:
    """Add `encode-style` to the command line."""
    from .style_options import add_style_options

    parser = subparsers.add_parser("encode-style", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("output", type=Path, help=".safetensors")
    parser.add_argument("--prompt", default="", help="of the generation; the selection ranks by it")
    add_style_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help="result as one line of JSON")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster encode-style`."""
    from ..models.style_tokens import save_style
    from ..writing import check_place, write_or_rescue
    from .style_options import blended, check_style_options, open_styles

    if args.output.suffix != ".safetensors":
        raise ConfigError(f"a style is saved as .safetensors, got {args.output.name!r}")
    if not args.style:
        raise ConfigError("give at least one --style picture")
    check_place(args.output, overwrite=args.overwrite)
    check_style_options(args)
    with tempfile.TemporaryDirectory() as scratch:
        styles = open_styles(args, open_models(args, Path(scratch)), args.prompt)
    style = blended(args, styles)
    write_or_rescue(args.output, lambda path: save_style(path, style, overwrite=args.overwrite))
    report = {"output": str(args.output), "tokens": list(style.tokens.shape[1:])}
    line = json.dumps(report) if args.json else f"wrote {args.output}: {report['tokens']} tokens"
    sys.stdout.write(line + "\n")
    return 0
