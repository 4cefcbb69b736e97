"""What the commands that generate tell their user."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..data.videos import VideoClip


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """`--overwrite` and `--json`."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="result as one line of JSON")


def say(args: argparse.Namespace, text: str) -> None:
    """Tell the user, unless the result is to be JSON."""
    if not args.json:
        sys.stderr.write(text + "\n")


def tell_result(
    args: argparse.Namespace,
    frames: np.ndarray,
    started_s: float,
    device: torch.device,
    **more: str,
) -> None:
    """Say what was written, in words or as JSON.

    Args:
        args: with `output`, `seed` and `json`.
        frames: [T, H, W, 3] that were written.
        started_s: `time.perf_counter()` of the start.
        device: that it ran on.
        more: of the JSON alone.
    """
    seconds = round(time.perf_counter() - started_s, 2)
    num_frames, height, width, _ = frames.shape
    if not args.json:
        what = "" if num_frames == 1 else f"{num_frames} frames of "
        say(args, f"wrote {args.output}: {what}{width} x {height}, {seconds} s")
        return
    report = {
        **more,
        "output": str(args.output),
        "frames": num_frames,
        "height": height,
        "width": width,
        "seed": args.seed,
        "device": str(device),
        "seconds": seconds,
    }
    sys.stdout.write(json.dumps(report) + "\n")


def write_clip(
    args: argparse.Namespace,
    path: Path,
    frames: np.ndarray | Iterable[np.ndarray],
    clip: VideoClip,
    *,
    num_frames: int,
    alpha: np.ndarray | None = None,
) -> None:
    """Write a video with what belongs to its input.

    Args:
        args: with the options of writing.
        path: the new file.
        frames: uint8 [T, H, W, 3], or an iterable of such chunks.
        clip: the input; its frames are not looked at.
        num_frames: how many there are.
        alpha: uint8 [T, H, W] opacity of the frames.
    """
    from ..data.videos import write_video

    write_video(
        path,
        frames,
        fps=clip.fps,
        times_s=None if clip.times_s is None else clip.times_s[: num_frames + 1],
        pixel_aspect=clip.pixel_aspect,
        alpha=alpha,
        tags=clip.tags,
        audio_from=clip.audio_from,
        audio_start_s=clip.start_s,
        codec=args.codec,
        crf=args.crf,
        quality=args.quality,
        overwrite=args.overwrite,
    )
