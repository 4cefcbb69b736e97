"""Train stylemaster-tiny: `python -m recipes.tiny --profile cpu`.

Every stage leaves its files in a folder of its own and is skipped once they are there, so the same
command goes on after an interruption. `--minutes` ends a call in time; call again until it says
that all is done (exit status 0; 3 while there is more to do). `--art` and `--photos` name real
pictures to learn from beside the drawings; training_log.jsonl counts what each stage cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

from stylemaster_core.errors import StyleMasterError

from .bundle import write_bundle
from .limit import TimeOver
from .profiles import PROFILES
from .recipe import Recipe
from .shipping import SHIPPED, ship

logger = logging.getLogger("stylemaster")

UNFINISHED = 3  # exit status


def main() -> int:
    """Run the recipe; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny", description=__doc__)
    parser.add_argument("--profile", choices=PROFILES, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of the stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="end this call after so many minutes")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument(
        "--ship",
        type=Path,
        nargs="?",
        const=SHIPPED,
        metavar="FOLDER",
        help="write the weights as float16 to a folder; without its name, into the package",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="pack code and latents for a machine without a network, instead of training",
    )
    parser.add_argument("--art", type=Path, help="paintings to learn from: folder, or tars")
    parser.add_argument("--photos", type=Path, help="folder of photographs, contents for them")
    parser.add_argument(
        "--from-shipped",
        action="store_true",
        help="go on from the weights in the package; of the VAE only the decoder learns then",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=NUMBER", help="change the profile"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    changes = {
        k: type(getattr(PROFILES["cpu"], k))(v) for k, v in (s.split("=") for s in options.set)
    }
    profile = dataclasses.replace(PROFILES[options.profile], **changes)
    if (options.art is None) != (options.photos is None):
        parser.error("--art and --photos belong together: give both, or none")
    recipe = Recipe(
        options.out,
        profile,
        seed=options.seed,
        minutes=options.minutes,
        art=options.art,
        photos=options.photos,
        start=SHIPPED if options.from_shipped else None,
    )
    try:
        if options.bundle:
            paths = write_bundle(options.out, options.bundle, weights=options.from_shipped)
            logger.info("wrote %d archives to %s", len(paths), options.bundle)
            return 0
        recipe.run(options.until)
    except TimeOver:
        logger.info("the time is over; call again to go on")
        return UNFINISHED
    except StyleMasterError as error:
        logger.error("%s", error)
        return 2
    if options.ship:
        ship(options.out, options.ship)
    return 0
