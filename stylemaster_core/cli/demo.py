"""`stylemaster demo`: restyle a moving photograph and a drawn boat, and measure the results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

FRAMES, SIZE, FPS = 17, (256, 256), 16
# The style picture, and what takes its style, by the file names of both.
PAIRS = {"impasto": "photograph", "stained_glass": "photograph", "ink_wash": "boat"}
SHOWN = 4  # frames of each clip in the contact sheet
ENDING = """
Your own video:  stylemaster stylize out.mp4 --model tiny --video in.mp4 --style picture.png
In ComfyUI:      make comfy
Real quality:    stylemaster weights download --for video-to-video      (about 20 GB)
                 then the same commands without --model tiny
"""


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser("demo", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--frames", type=int, help=f"of each clip; default {FRAMES}")
    parser.add_argument("--steps", type=int, help="default as --model tiny")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace results of an earlier run"
    )


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster demo`: three videos, a contact sheet, a table and the time taken."""
    from tqdm import tqdm

    from ..data.demo_pictures import painted_styles, photograph_clip
    from ..data.demo_scene import demo_clip
    from ..data.images import write_image
    from ..data.videos import write_video
    from ..pipelines import tiny
    from ..pipelines.encode_style import encode_style
    from ..pipelines.models import ModelFiles, Models
    from ..pipelines.pictures import contact_sheet
    from ..pipelines.stylize import StylizeConfig, stylize

    files = vars(tiny.tiny_files()) | {"motion_adapter": None}
    if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
        raise ConfigError(f"{args.out} is not empty; choose another --out, or pass --overwrite")
    started = time.perf_counter()
    count = FRAMES if args.frames is None else args.frames
    _check_size(args.out, count)
    clips = {"photograph": photograph_clip(count, *SIZE), "boat": demo_clip(count, *SIZE)}
    styles = painted_styles()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, clip in clips.items():
        write_video(args.out / f"{name}.mp4", clip, fps=FPS, overwrite=args.overwrite)
    models = Models(ModelFiles(**files), device="cpu", keep_loaded=True)
    settings = tiny.tiny_settings(clips["boat"])
    if args.steps is not None:
        settings["num_steps"] = args.steps
    config = StylizeConfig("video-to-video", **settings)
    results = {}
    for name, content in PAIRS.items():
        write_image(args.out / f"style_{name}.png", styles[name], overwrite=args.overwrite)
        style = encode_style(models, styles[name], "", name=name).style
        with tqdm(total=config.num_steps, desc=name, unit="step") as bar:
            result = stylize(
                models,
                style,
                config,
                frames=clips[content],
                callback=lambda _, bar=bar: bar.update(),
            )
        output = args.out / f"{name}.mp4"
        write_video(output, result.frames, fps=FPS, overwrite=args.overwrite)
        results[name] = result.frames
    rows = []
    for name, content in PAIRS.items():
        title = name.replace("_", " ")
        if content not in [row[0] for row in rows]:
            rows.append((content, [_beside(None, clips[content]), *_some(clips[content])]))
        rows.append((title, [_beside(styles[name], clips[content]), *_some(results[name])]))
    sheet = contact_sheet(rows, SIZE[1] + 4)  # frames pixel by pixel
    write_image(args.out / "contact_sheet.png", sheet, overwrite=args.overwrite)
    seconds = time.perf_counter() - started
    _say("\n" + "\n".join(_table(clips, styles, results)))
    _say(f"\n{len(results)} videos and contact_sheet.png in {args.out}/, {seconds:.0f} s")
    _say(ENDING.rstrip())
    return 0


def _some(frames: np.ndarray) -> list[np.ndarray]:
    count = min(SHOWN, len(frames))
    return [frames[round(i * (len(frames) - 1) / max(count - 1, 1))] for i in range(count)]


def _check_size(out: Path, count: int) -> None:
    """Refuse, before anything is drawn, clips that memory or disk cannot hold."""
    from ..data.memory import free_main_memory
    from ..pipelines.estimate import estimate_needs
    from ..writing import check_space

    if count < 1:
        raise ConfigError(f"--frames {count}; expected 1 or more")
    clips = len(set(PAIRS.values())) + len(PAIRS)  # all are kept for the contact sheet
    needs = estimate_needs((count, *SIZE), (clips * count, *SIZE), gpu=False, video=True)
    free = free_main_memory()
    if needs.main > free:
        raise ConfigError(
            f"clips of {count} frames need at least {needs.main / 1e9:.1f} GB of main memory, "
            f"{free / 1e9:.1f} GB are free; pass --frames {max(count * free // needs.main, 1)} or "
            "less"
        )
    check_space(out, clips * needs.disk, "the clips", "pass fewer --frames, or another --out")


def _beside(picture: np.ndarray | None, clip: np.ndarray) -> np.ndarray:
    """A style picture in the middle of a white frame; none is left white."""
    import numpy as np

    canvas = np.full_like(clip[0], 255)
    if picture is not None:
        height, width = picture.shape[:2]
        top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
        canvas[top : top + height, left : left + width] = picture
    return canvas


def _table(
    clips: dict[str, np.ndarray], styles: dict[str, np.ndarray], results: dict[str, np.ndarray]
) -> Sequence[str]:
    """Measures of each result, beside those of its clip as it was."""
    from ..metrics.colour import colour_distance
    from ..metrics.content import luma_correlation
    from ..metrics.motion import frame_difference_ratio
    from ..metrics.texture import gabor_distance

    lines = [
        "               distance to the style picture             of the content, in the result",
        "style          colours            texture (Gabor)        luma correlation   motion",
    ]
    for name, frames in results.items():
        picture, clip = styles[name][None], clips[PAIRS[name]]
        colours = [colour_distance(x, picture) for x in (clip, frames)]
        textures = [gabor_distance(x, picture) for x in (clip, frames)]
        numbers = [f"{before:.3f} -> {after:.3f}" for before, after in (colours, textures)]
        kept, motion = luma_correlation(frames, clip), frame_difference_ratio(frames, clip)
        lines.append(f"{name:14} {numbers[0]:18} {numbers[1]:22} {kept:<18.2f} {motion:.2f} x")
    return [*lines, "Left: before -> after, less is nearer to the style. Motion: change per frame."]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
