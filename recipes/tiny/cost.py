"""What a command costs: `python -m recipes.tiny.cost LIMIT_S COMMAND...` prints it as JSON."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Print seconds, the peak of the memory in GB, and seconds of all threads.

    Args:
        argv: after how many seconds the command is ended, and the command.

    Returns:
        What the command returns, or 0 if it was ended at the limit.
    """
    began = time.monotonic()
    child = subprocess.Popen(argv[1:], stdout=subprocess.DEVNULL)
    try:
        code = child.wait(float(argv[0]))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        code = 0
    seconds = time.monotonic() - began
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    cost = seconds, usage.ru_maxrss * unit / 1e9, usage.ru_utime + usage.ru_stime
    sys.stdout.write(json.dumps(cost) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
