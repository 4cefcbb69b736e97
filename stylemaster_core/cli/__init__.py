"""The command line `stylemaster`: one module per subcommand."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from ..errors import DiskError, StyleMasterError
from .stop_with_stdin import stop_with_stdin

# What `stylemaster --help` says of each subcommand: only the one that is called gets imported.
SUBCOMMANDS = {
    "stylize": "generate or restyle a video or image",
    "stylize-sdxl": "a picture in a style, by StyleCrafter on SDXL",
    "stylize-videocrafter": "a short video in a style, by StyleCrafter on VideoCrafter",
    "encode-style": "save the style of a picture",
    "inspect-style": "a PNG that shows which patches were kept",
    "weights": "list, download, verify and convert weight files",
    "queue": "run a ComfyUI workflow over many videos, styles and prompts",
    "data": "make, encode and check training data",
    "train": "train a part of the model",
    "evaluate": "measure style, content and motion of results",
    "info": "versions, device, dtype",
    "demo": "try it, without downloads",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None for those of the process.

    Returns:
        0, or 2 if the input cannot work (the message says why), or what the subcommand returns.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    called = next((word for word in argv if not word.startswith("-")), None)
    kept = ""
    try:
        args = create_parser(called).parse_args(argv)
        kept = f"; {args.kept}" if "kept" in args else ""
        logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
        logging.getLogger("stylemaster").setLevel(logging.DEBUG if args.verbose else logging.INFO)
        if args.stop_with_stdin:
            stop_with_stdin()
        return args.run(args)
    except StyleMasterError as error:
        of_disk = any(isinstance(e, OSError | DiskError) for e in (error, error.__cause__))
        sys.stderr.write(f"stylemaster: {error}{kept if of_disk else ''}\n")
        return 2
    except ImportError as error:
        sys.stderr.write(
            f"stylemaster: a library that `{called}` needs cannot be imported here: {error}; "
            'install the command line with its libraries: pip install -e ".[cli]" (for `train`: '
            '".[train]")\n'
        )
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"stylemaster: {place}{error.strerror or error}{kept}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stylemaster: interrupted, nothing was written\n")
        return 130


def create_parser(called: str | None) -> argparse.ArgumentParser:
    """The whole command line, with the options of the subcommand that is called."""
    parser = argparse.ArgumentParser(
        prog="stylemaster",
        description="Reference-style video generation and restyling: StyleMaster on Wan 2.1.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    parser.add_argument(
        "--stop-with-stdin",
        action="store_true",
        help="stop as at Ctrl-C once the standard input closes: with the process that started this",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in SUBCOMMANDS.items():
        if name == called:
            module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


__all__ = ["main"]
