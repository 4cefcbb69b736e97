"""`python -m tests.fuzz`: attack what reads, names, answers and can be killed, and count."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import sys
import tempfile
import warnings
from pathlib import Path

from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import Budget, run, table

REPORT = Path("docs") / "reliability.md"


def main() -> int:
    """Run the attacks; 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="for all kinds together")
    parser.add_argument("--long", action="store_true", help="by count, however long it takes")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds play equal cases")
    parser.add_argument("--only", action="append", metavar="KIND[/ENDPOINT]", default=[])
    parser.add_argument("--report", action="store_true", help=f"write {REPORT}")
    args = parser.parse_args()
    logging.getLogger("stylemaster").setLevel(logging.CRITICAL)
    faulthandler.enable()
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than cores
    budget = Budget(None if args.long else args.seconds, args.seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        tallies = run(KINDS, budget, Path(scratch), only=args.only, say=sys.stdout.write)
    words = table(tallies)
    sys.stdout.write(words)
    faults = sum(tally.faults for tally in tallies)
    if args.report:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(_report(words, args), encoding="utf-8")
    sys.stdout.write(f"{sum(t.cases for t in tallies)} cases, {faults} faults\n")
    return int(faults > 0)


def _report(words: str, args: argparse.Namespace) -> str:
    setting = "--long" if args.long else f"--seconds {args.seconds:g}"
    return f"""# Reliability

What happens when files are damaged, names are hostile, processes are killed and servers misbehave.
A case counts as a fault if it ends in anything but a clear refusal or a right result: another
exception, a hang, a crash, a file outside of its folder, a half-written file, a lost result.

Made by `python -m tests.fuzz {setting} --seed {args.seed} --report`. `make fuzz` plays a few
minutes of it, `make test` one.

{words}"""


if __name__ == "__main__":
    sys.exit(main())
