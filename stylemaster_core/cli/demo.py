"""`stylemaster demo`: the whole pipeline on a clip and style pictures drawn by code."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .model_options import parse_size

FPS = 16


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser("demo", help="try the whole pipeline", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=parse_size, default=(96, 144), metavar="WxH")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace results of an earlier run"
    )


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster demo`: three stylized videos, a contact sheet and the time taken."""
    from tqdm import tqdm

    from ..data.demo_scene import demo_clip, demo_styles
    from ..data.images import write_image
    from ..data.videos import write_video
    from ..models.small import write_small_models
    from ..pipelines.encode_style import encode_style
    from ..pipelines.models import ModelFiles, Models
    from ..pipelines.pictures import contact_sheet
    from ..pipelines.stylize import StylizeConfig, stylize

    if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
        raise ConfigError(f"{args.out} is not empty; choose another --out, or pass --overwrite")
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    _say(
        "These are small RANDOM weights: every step of the method runs, but the result is noise, "
        "not a style. For real results see `stylemaster weights download`."
    )
    clip, styles = demo_clip(args.frames, *args.size), demo_styles()
    write_video(args.out / "input.mp4", clip, fps=FPS, overwrite=args.overwrite)
    shown = slice(0, None, 4)
    rows = [("input", list(clip[shown]))]
    with tempfile.TemporaryDirectory() as scratch:
        small = write_small_models(scratch)
        files = ModelFiles(
            transformer=small.stylemaster,
            controlnet=small.controlnet,
            vae=small.vae,
            text_encoder=small.text_encoder,
            image_encoder=small.image_encoder,
            motion_adapter=small.motion_adapter,
        )
        models = Models(files, keep_loaded=True)
        prompt = "a sailing boat in a bay at sunset"
        config = StylizeConfig("video-to-video", prompt=prompt, num_steps=args.steps)
        for name, picture in styles.items():
            write_image(args.out / f"style_{name}.png", picture, overwrite=args.overwrite)
            style = encode_style(models, picture, prompt, name=name).style
            with tqdm(total=args.steps, desc=name, unit="step") as bar:
                result = stylize(
                    models, style, config, frames=clip, callback=lambda _, bar=bar: bar.update()
                )
            output = args.out / f"{name}.mp4"
            write_video(output, result.frames, fps=FPS, overwrite=args.overwrite)
            rows.append((name, [picture, *result.frames[shown]]))
    rows[0] = ("input", [rows[0][1][0], *rows[0][1]])
    write_image(args.out / "contact_sheet.png", contact_sheet(rows), overwrite=args.overwrite)
    seconds = time.perf_counter() - started
    _say(f"{len(styles)} videos and contact_sheet.png in {args.out}/, {seconds:.0f} s")
    _say(
        "Your own video: "
        "stylemaster stylize out.mp4 --video in.mp4 --style picture.png --prompt '...'\n"
        "Real weights:   stylemaster weights download --for video-to-video"
    )
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
