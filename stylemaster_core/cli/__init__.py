"""The command line `stylemaster`: one module per subcommand."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from ..errors import StyleMasterError

SUBCOMMANDS = (
    "stylize",
    "stylize_sdxl",
    "encode_style",
    "inspect_style",
    "weights",
    "queue",
    "data",
    "train",
    "evaluate",
    "info",
    "demo",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None for those of the process.

    Returns:
        0, or 2 if the input cannot work (the message says why), or what the subcommand returns.
    """
    parser = argparse.ArgumentParser(
        prog="stylemaster",
        description="Reference-style video generation and restyling: StyleMaster on Wan 2.1.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in SUBCOMMANDS:
        importlib.import_module(f".{name}", __name__).add_parser(subparsers)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("stylemaster").setLevel(logging.DEBUG if args.verbose else logging.INFO)
    try:
        return args.run(args)
    except StyleMasterError as error:
        sys.stderr.write(f"stylemaster: {error}\n")
        return 2
    except ImportError as error:
        sys.stderr.write(
            f"stylemaster: a library that `{args.command}` needs cannot be imported here: {error}; "
            'install the command line with its libraries: pip install -e ".[cli]" (for `train`: '
            '".[train]")\n'
        )
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("stylemaster: interrupted, nothing was written\n")
        return 130


__all__ = ["main"]
