"""Time and memory of reading a video, of this tree and of another: python -m bench.reading.

A clip of 600 frames of 1280 x 720 (H.264, synthetic) is made in a temporary folder and read in
processes of their own, in turn. Peak memory is that of the process less what it holds before
reading. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylemaster_core.data.videos import write_video

from .runner import add_output, check_output, machine_facts, run_benchmark

ROOT = Path(__file__).resolve().parent.parent
INSIDE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import av, numpy
from stylemaster_core.data import videos
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
videos.read_video(sys.argv[2], max_frames=1)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
wall, cpu = time.perf_counter(), time.process_time()
clip = videos.read_video(sys.argv[2])
print(json.dumps({
    "seconds": time.perf_counter() - wall,
    "cpu_seconds": time.process_time() - cpu,
    "peak_over_clip": (peak() - before) / clip.frames.nbytes,
    "frames": len(clip.frames),
}))
"""


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, to compare")
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--runs", type=int, default=5, help="of each tree, interleaved")
    add_output(parser)
    return run_benchmark("bench.reading", _benchmark, _show, parser.parse_args())


def _benchmark(args: argparse.Namespace) -> dict[str, Any]:
    check_output(args)
    trees = {"this": ROOT} | ({"against": args.against} if args.against else {})
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, _frames(args.frames), fps=Fraction(30), crf=20)
        for _ in range(args.runs):
            for name, tree in trees.items():
                command = [sys.executable, "-c", INSIDE, str(tree), str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[name].append(json.loads(done.stdout))
    return {
        "what": f"read_video of {args.frames} frames of 1280 x 720, H.264; medians of {args.runs}",
        "machine": machine_facts(torch.device("cpu")),
        "trees": {
            name: {key: round(statistics.median(run[key] for run in found), 3) for key in found[0]}
            for name, found in runs.items()
        },
    }


def _frames(num_frames: int) -> Any:
    """Noise that moves: something to decode in every frame."""
    texture = np.random.default_rng(0).integers(0, 256, (90, 240, 3)).astype(np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    for index in range(num_frames):
        yield np.roll(texture, 5 * index, axis=1)[None, :, :1280]


def _show(report: dict[str, Any]) -> None:
    for name, numbers in report["trees"].items():
        sys.stdout.write(f"{name}: {numbers}\n")


if __name__ == "__main__":
    sys.exit(main())
