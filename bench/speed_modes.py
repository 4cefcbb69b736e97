"""What the modes of `stylize --speed` cost and change: `python -m bench.speed_modes`.

stylemaster-tiny restyles a video in every mode, at equal seeds. Without --video and --style these
are the demo's: a drawn boat and a photograph that moves, each in painted styles. The style distance
is that of Gabor energies to the style picture. `--write` puts the table into docs/speed.md.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylemaster_core.data.demo_pictures import painted_styles, photograph_clip
from stylemaster_core.data.demo_scene import demo_clip
from stylemaster_core.data.images import read_image
from stylemaster_core.data.videos import read_video
from stylemaster_core.errors import ConfigError
from stylemaster_core.metrics.colour import colour_distance
from stylemaster_core.metrics.texture import gabor_distance
from stylemaster_core.pipelines import tiny
from stylemaster_core.pipelines.encode_style import encode_style
from stylemaster_core.pipelines.models import ModelFiles, Models
from stylemaster_core.pipelines.stylize import StylizeConfig, stylize
from stylemaster_core.sampling.speed import GAPS

from .against_release import write_docs
from .runner import Report, add_output, check_output, machine_facts, psnr, run_benchmark

DOCS = Path(__file__).parents[1] / "docs" / "speed.md"
BEGIN, END = "<!-- speed modes -->", "<!-- end of speed modes -->"
HEIGHT, WIDTH = 192, 256
PAIRS = (("photograph", "impasto"), ("boat", "ink_wash"))


def materials(args: argparse.Namespace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Clip and style picture by name.

    Raises:
        ConfigError: for one of --video and --style without the other.
    """
    if (args.video is None) != (args.style is None):
        raise ConfigError("--video and --style belong together; give both, or none for the demo's")
    if args.video is not None:
        clip = read_video(args.video, max_frames=args.frames).frames
        return {f"{args.video.name} in {args.style.name}": (clip, read_image(args.style))}
    size = args.frames, HEIGHT, WIDTH
    clips = {"photograph": photograph_clip(*size), "boat": demo_clip(*size)}
    styles = painted_styles()
    return {f"{clip} in {style}": (clips[clip], styles[style]) for clip, style in PAIRS}


class Calls:
    """Counts passes of the transformer, branches singly, and of the control network."""

    def __init__(self, models: Models) -> None:
        self.passes = self.controls = 0
        with models.transformer() as transformer, models.controlnet() as controlnet:
            velocities: Any = transformer.velocities

            def counted(latents: Any, timestep: Any, branches: Any, **options: Any) -> Any:
                self.passes += len(branches)
                return velocities(latents, timestep, branches, **options)

            transformer.velocities = counted
            controlnet.register_forward_pre_hook(self._control)

    def _control(self, *_: object) -> None:
        self.controls += 1


def benchmark(args: argparse.Namespace) -> Report:
    """Run it.

    Raises:
        ConfigError: for options that cannot work.
    """
    check_output(args)
    if args.frames < 1:
        raise ConfigError(f"--frames {args.frames}; expected 1 or more")
    found = materials(args)
    files = vars(tiny.tiny_files()) | {"motion_adapter": None}
    models = Models(ModelFiles(**files), device="cpu", keep_loaded=True)
    calls = Calls(models)
    machine, rows = machine_facts(torch.device("cpu")), []
    for name, (clip, picture) in found.items():
        style = encode_style(models, picture, "").style
        settings = tiny.tiny_settings(clip) | ({"num_steps": args.steps} if args.steps else {})
        exact = clip
        for mode in GAPS:
            calls.passes = calls.controls = 0
            started: list[float] = []

            def stage(name: str, started: list[float] = started) -> None:
                if name in ("sampling", "decoding"):
                    started.append(time.process_time())

            config = StylizeConfig("video-to-video", speed=mode, **settings)
            frames = stylize(models, style, config, frames=clip, stage=stage).frames
            exact = frames if mode == "exact" else exact
            rows.append(
                {
                    "material": name,
                    "mode": mode,
                    "steps": config.num_steps,
                    "passes": calls.passes,
                    "controls": calls.controls,
                    "cpu_s": started[1] - started[0],
                    "psnr_db": None if mode == "exact" else psnr(frames, exact),
                    "texture": gabor_distance(frames, picture[None]),
                    "colour": colour_distance(frames, picture[None]),
                }
            )
    report = {
        "format": "stylemaster-bench-speed-modes-1",
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "size": [min(args.frames, len(clip)), *settings["size"]],
        "rows": rows,
    }
    if args.write:
        write_docs(DOCS, table(report), BEGIN, END)
    return report


def table(report: Report) -> str:
    """The report in Markdown."""
    machine, exact = report["machine"], report["rows"][0]
    lines = [
        "| | mode | passes + of the control network | CPU seconds | times as fast | PSNR | "
        "texture | colours |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        exact = row if row["mode"] == "exact" else exact
        near = "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        lines.append(
            f"| {row['material']} | {row['mode']} | {row['passes']} + {row['controls']} | "
            f"{row['cpu_s']:.1f} | {exact['cpu_s'] / row['cpu_s']:.1f} | {near} | "
            f"{row['texture']:.3f} | {row['colour']:.2f} |"
        )
    frames, height, width = report["size"]
    lines += [
        "",
        f"stylemaster-tiny, {exact['steps']} steps, {frames} frames of {width} x {height}; "
        f"sampling alone, on a core of {machine['name']}, float32. PSNR is to the exact result; "
        "texture (Gabor) and colours are distances to the style picture, which should stay those "
        f"of exact. On Wan's weights the modes have not been measured. {report['date']}, torch "
        f"{machine['torch']}.",
    ]
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speed_modes", description=__doc__)
    parser.add_argument("--video", type=Path, help="to restyle; default the demo's clips")
    parser.add_argument("--style", type=Path, help="style picture of --video")
    parser.add_argument("--frames", type=int, default=9, help="of each clip; default %(default)s")
    parser.add_argument("--steps", type=int, help="default that of stylemaster-tiny")
    parser.add_argument("--write", action="store_true", help="the table into docs/speed.md")
    add_output(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    def show(report: Report) -> None:
        sys.stdout.write(table(report) + "\n")

    return run_benchmark("bench.speed_modes", benchmark, show, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
