"""`stylemaster stylize`: generate or restyle a video or image."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..errors import ConfigError
from ..sampling.samplers import SamplerName
from ..sampling.speed import SpeedName
from .model_options import (
    TINY,
    TINY_STYLECRAFTER,
    add_lora_option,
    add_model_options,
    open_models,
    parse_range,
    parse_size,
)
from .results import add_output_options, say, tell_result, write_clip

if TYPE_CHECKING:
    import numpy as np

    from ..data.videos import VideoClip, VideoInfo
    from ..pipelines.stylize import StylizeConfig

GENERATED_FPS = Fraction(16)  # Wan 2.1's frame rate
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TASKS = ("text-to-video", "video-to-video", "text-to-image", "image-to-image")


def add_parser(subparsers: Any) -> None:
    """Add `stylize` to the command line."""
    from ..data.videos import Codec
    from .film import add_film_options
    from .style_options import add_style_options

    parser = subparsers.add_parser("stylize", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument(
        "output",
        type=Path,
        help=".mp4, .mov, .mkv, .webm, .gif, .webp or frames/%%05d.png; image: .png, .jpg, .webp",
    )
    parser.add_argument("--task", choices=TASKS, help="default: follows from --video or --image")
    parser.add_argument("--video", type=Path, help="video to restyle; its times and audio are kept")
    parser.add_argument("--image", type=Path, help="image to restyle")
    parser.add_argument("--prompt", default="", help="what the result shows")
    parser.add_argument("--negative-prompt", default="")
    add_style_options(parser)
    group = parser.add_argument_group("generation")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--steps", type=int, help=_default("num_steps"))
    group.add_argument("--sampler", choices=get_args(SamplerName), help=_default("sampler"))
    group.add_argument(
        "--speed",
        choices=get_args(SpeedName),
        default="exact",
        help="balanced, fast and draft compute fewer and fewer of the steps, and guess the others "
        "from those; default exact",
    )
    group.add_argument("--shift", type=float, help=_default("shift"))
    group.add_argument(
        "--text-scale", type=float, help=f"guidance by the prompt; {_default('text_scale')}"
    )
    group.add_argument(
        "--style-scale",
        type=float,
        help="guidance by the style; default 4, with control 3" + _tiny("style_scale"),
    )
    group.add_argument("--denoise", type=float, default=1.0, help="below 1: start from the input")
    group.add_argument("--no-control", action="store_true", help="no gray-tile control")
    group.add_argument("--control-scale", type=float, default=1.0)
    group.add_argument(
        "--control-range", type=parse_range, metavar="START:END", help=_default("control_range")
    )
    group.add_argument("--tile-factor", type=int, help=_default("tile_factor"))
    group.add_argument(
        "--motion-scale",
        type=float,
        help="of --motion-adapter, default -0.3 (StyleCrafter's for videos: 1); of tiny's own one, "
        "which else does not act",
    )
    group.add_argument(
        "--size",
        type=parse_size,
        metavar="WxH",
        help="default: the input's, or 832x480; tiny: made smaller, to a short side of 128",
    )
    group.add_argument(
        "--frames", type=int, help="text-to-video: number of frames; default 81, tiny 17"
    )
    group.add_argument("--start-frame", type=int, default=0, help="of the input video")
    group.add_argument("--max-frames", type=int, help="of the input video")
    group.add_argument(
        "--fps",
        type=float,
        help="frames a second of the result; a given video is resampled in time, and --start-frame "
        "and --max-frames count its new frames; default: as the video, text-to-video 16",
    )
    group.add_argument(
        "--codec",
        choices=get_args(Codec),
        help="prores (422 HQ) or prores4444 in .mov, vp9 in .mkv",
    )
    group.add_argument(
        "--crf",
        type=int,
        default=16,
        help="of H.264 and VP9, 0 (best) to 51; default 16",
    )
    group.add_argument(
        "--quality", type=int, default=95, help="of .jpg and .webp, 1 to 100; default 95"
    )
    group.add_argument(
        "--keep-alpha",
        action="store_true",
        help="the result is as transparent as the input (.webm, .mov as prores4444, .webp, .gif, "
        ".png); else the input is put on white",
    )
    group.add_argument("--window", type=int, default=81, help="frames per window of long videos")
    group.add_argument("--window-overlap", type=int, default=28, help="frames")
    group.add_argument("--batch-branches", action="store_true", help="faster, more memory")
    group.add_argument(
        "--same-noise",
        action=argparse.BooleanOptionalAction,
        help="begin every frame from the same noise: less flicker in a restyled video, from models "
        f"that learned it (flow.same_noise); {_default('same_noise')}",
    )
    add_film_options(parser)
    add_output_options(parser)
    add_lora_option(add_model_options(parser), "Wan")


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster stylize`."""
    import numpy as np
    from tqdm import tqdm

    from ..data.videos import VideoClip, as_fps
    from ..pipelines.stylize import check_config, needed_files, result_size, stylize
    from ..writing import check_place, write_or_rescue
    from .film import can_stream, check_film_options, run_film
    from .preflight import check_room, stand_in, try_writing
    from .style_options import check_style_options, open_styles, style_regions

    started = time.perf_counter()
    task = _task(args)
    _check_output(args, task)
    check_film_options(args, task)
    fps = None if args.fps is None else as_fps(args.fps)
    if not args.stream:
        check_place(args.output, overwrite=args.overwrite)
    check_style_options(args)
    info = _probe_input(args, task)
    source = None if info is None else _source_size(args, info, fps)
    blank = None if source is None else stand_in(source)
    config = stylize_config(args, task, blank)
    check_config(config, blank)
    size = result_size(config, source)
    if args.stream and source is not None:
        return run_film(args, config, source, fps)
    check_room(
        args.output,
        size,
        source,
        device=args.device,
        video=task.endswith("video"),
        option="--frames" if source is None else "--max-frames",
        segment_frames=args.window if can_stream(args) else None,
    )

    clip = read_input(args, fps) or VideoClip(
        np.zeros((0, 0, 0, 3), np.uint8), fps or GENERATED_FPS
    )

    def write(path: Path, frames: np.ndarray) -> None:
        _write(args, path, frames, clip, task)

    try_writing(args.output, size, write)
    say(args, f"{task}: {args.output.name}")
    with tempfile.TemporaryDirectory() as scratch:
        models = open_models(args, Path(scratch))
        models.files.require(needed_files(config), task)
        say(args, "encoding prompt and style")
        models.encode_text([args.prompt, args.negative_prompt])
        style = style_regions(args, open_styles(args, models, args.prompt))
        bar = tqdm(total=config.num_steps, desc="sampling", unit="step", disable=args.json)
        try:
            result = stylize(
                models,
                style,
                config,
                frames=clip.frames if len(clip.frames) else None,
                callback=lambda _: bar.update(),
                stage=lambda name: say(args, name),
            )
        finally:
            bar.close()
    write_or_rescue(args.output, lambda path: write(path, result.frames))
    tell_result(args, result.frames, started, models.device, task=task)
    return 0


def _task(args: argparse.Namespace) -> str:
    """The task that the inputs mean; an explicit one must agree with them."""
    from ..data.videos import is_numbered

    if args.video and args.image:
        raise ConfigError("give a --video or an --image to restyle, not both")
    # .webp holds an image as well as a video.
    is_webp = args.output.suffix.lower() == ".webp" and args.task == "text-to-image"
    is_image = args.output.suffix.lower() in PICTURES[:-1] and not is_numbered(args.output)
    source = "video" if args.video else "image" if args.image else "text"
    implied = {
        "video": "video-to-video",
        "image": "image-to-image",
        "text": "text-to-image" if is_image or is_webp else "text-to-video",
    }[source]
    if args.task and args.task != implied:
        raise ConfigError(
            f"--task {args.task} does not fit the inputs, which mean {implied} "
            "(--video, --image and the ending of the output decide)"
        )
    return implied


def _check_output(args: argparse.Namespace, task: str) -> None:
    from ..data.videos import WRITTEN_ENDINGS, check_numbered, is_numbered

    if is_numbered(args.output) and task.endswith("video"):
        check_numbered(args.output)
        return
    wanted = PICTURES if task.endswith("image") else WRITTEN_ENDINGS
    if args.output.suffix.lower() not in wanted or is_numbered(args.output):
        raise ConfigError(f"{task} writes {', '.join(wanted)}; got {args.output.name!r}")


def _write(
    args: argparse.Namespace, path: Path, frames: np.ndarray, clip: VideoClip, task: str
) -> None:
    """Write the result with what belongs to its input."""
    import numpy as np
    from PIL import Image

    from ..data.gray_tile import cover_resize
    from ..data.images import write_image

    alpha = None
    if clip.alpha is not None:
        size = frames.shape[1:3]
        pictures = (Image.fromarray(opacity) for opacity in clip.alpha[: len(frames)])
        alpha = np.stack([np.asarray(cover_resize(picture, *size)) for picture in pictures])
    if task.endswith("image"):
        write_image(
            path,
            frames[0],
            alpha=None if alpha is None else alpha[0],
            quality=args.quality,
            overwrite=args.overwrite,
        )
        return
    write_clip(args, path, frames, clip, num_frames=len(frames), alpha=alpha)


def _probe_input(args: argparse.Namespace, task: str) -> VideoInfo | None:
    from ..data.videos import probe_video

    if not args.video and (args.start_frame or args.max_frames):
        raise ConfigError("--start-frame and --max-frames belong to --video")
    if args.fps is not None and task.endswith("image"):
        raise ConfigError(f"{task} makes a single picture; leave --fps out")
    path = args.video or args.image
    return None if path is None else probe_video(path)


def _source_size(
    args: argparse.Namespace, info: VideoInfo, fps: Fraction | None
) -> tuple[int, int, int]:
    """(frames, height, width) of what is read of the input."""
    if args.start_frame < 0 or (args.max_frames is not None and args.max_frames < 1):
        raise ConfigError(
            f"--start-frame {args.start_frame}, --max-frames {args.max_frames}; expected at least "
            "0 and 1"
        )
    count = info.num_frames if fps is None else math.ceil(info.duration_s * float(fps))
    num_frames = max(count - args.start_frame, 1)
    if args.image or args.max_frames is not None:
        num_frames = min(num_frames, args.max_frames or 1)
    return num_frames, info.height, info.width


def read_input(args: argparse.Namespace, fps: Fraction | None) -> VideoClip | None:
    """The --video or --image; None without.

    Raises:
        LayoutError: if it cannot be read.
    """
    from ..data.images import read_image
    from ..data.videos import VideoClip, read_video

    if args.video:
        return read_video(
            args.video,
            start_frame=args.start_frame,
            max_frames=args.max_frames,
            fps=fps,
            keep_alpha=args.keep_alpha,
        )
    if args.image:
        pixels = read_image(args.image, keep_alpha=args.keep_alpha)[None]
        alpha = pixels[..., 3] if pixels.shape[-1] == 4 else None
        return VideoClip(pixels[..., :3], GENERATED_FPS, alpha=alpha)
    return None


def stylize_config(args: argparse.Namespace, task: Any, frames: np.ndarray | None) -> StylizeConfig:
    """What the options mean for a task and its input.

    Args:
        args: parsed options of `stylize`.
        task: what is generated.
        frames: uint8 [T, H, W, 3] input; None without.

    Raises:
        ConfigError: for windows that cannot be.
    """
    from ..pipelines.stylize import StylizeConfig
    from ..pipelines.tiny import tiny_settings
    from ..sampling.windows import WindowConfig

    if args.window < 1 or args.window_overlap < 0:
        raise ConfigError("--window must be at least 1 frame and --window-overlap not negative")
    settings = {}
    if args.model in (TINY, TINY_STYLECRAFTER):
        settings = tiny_settings(frames, still=task == "text-to-image")
    given = {
        "size": args.size,
        "num_frames": args.frames,
        "num_steps": args.steps,
        "shift": args.shift,
        "sampler": args.sampler,
        "text_scale": args.text_scale,
        "style_scale": args.style_scale,
        "control_range": args.control_range,
        "tile_factor": args.tile_factor,
        "motion_scale": args.motion_scale,
        "same_noise": args.same_noise,
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    return StylizeConfig(
        task=task,
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        denoise=args.denoise,
        control=not args.no_control,
        control_scale=args.control_scale,
        windows=WindowConfig((args.window - 1) // 4 + 1, args.window_overlap // 4),
        batch_branches=args.batch_branches,
        speed=args.speed,
        **settings,
    )


def _default(field: str) -> str:
    """What an option is where it is not given, for its help."""
    from ..pipelines.stylize import StylizeConfig

    return f"default {getattr(StylizeConfig, field)}{_tiny(field)}"


def _tiny(field: str) -> str:
    from ..pipelines.tiny import SETTINGS

    return f", tiny {SETTINGS[field]}" if field in SETTINGS else ""
