"""`stylize --stream`: films of any length, segment by segment, in constant memory."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, LayoutError
from .results import say, tell_result, write_clip

if TYPE_CHECKING:
    import numpy as np

    from ..data.segment_files import SegmentFiles
    from ..data.videos import VideoClip, VideoFrames
    from ..models.decoupled_attention import StyleRegion
    from ..pipelines.film import Segment, Shot
    from ..pipelines.models import Models
    from ..pipelines.stylize import StylizeConfig

AUTO, NONE = "auto", "none"
_DTYPE = "the number type"  # of a job
# Options that say how and where something is written or read, and nothing of what the frames are.
_NOT_OF_THE_JOB = (
    *("run", "command", "verbose", "stop_with_stdin", "output", "overwrite", "json", "resume"),
    *("codec", "crf", "quality", "shots", "shots_sheet", "style_by_shot", "style", "models_dir"),
    *("device", "dtype", "offload", "skip_weight_check"),
)


def add_film_options(parser: argparse.ArgumentParser) -> None:
    """Options of films."""
    group = parser.add_argument_group("films")
    group.add_argument(
        "--stream",
        action="store_true",
        help="restyle a --video of any length in constant memory: segments of --window frames, "
        "each going on from the last --window-overlap frames of the one before",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with the segments that a stopped run finished"
    )
    group.add_argument(
        "--shots",
        default=AUTO,
        metavar="FILE",
        help="where shots begin: .csv with a column frame or time, or .edl (CMX 3600); none: the "
        "film is one shot; default auto: found in the pictures",
    )
    group.add_argument(
        "--style-by-shot",
        type=Path,
        metavar="FILE",
        help=".csv with the columns shot (1, or 3-5) and style (a file, beside the .csv); other "
        "shots have the --style",
    )
    group.add_argument(
        "--shots-sheet",
        type=Path,
        metavar="FILE.png",
        help="before the run, a picture of every shot beside its style",
    )


def can_stream(args: argparse.Namespace) -> bool:
    """Whether `--stream` could do what is asked for."""
    from ..data.videos import VIDEO_CODECS

    return bool(args.video) and args.output.suffix.lower() in VIDEO_CODECS


def check_film_options(args: argparse.Namespace, task: str) -> None:
    """Refuse options of films that contradict others, before anything is read.

    Raises:
        ConfigError: naming them.
    """
    from ..data.videos import VIDEO_CODECS

    if not args.stream:
        for name in ("resume", "shots", "style_by_shot", "shots_sheet"):
            if getattr(args, name) not in (None, False, AUTO):
                raise ConfigError(f"--{name.replace('_', '-')} belongs to --stream")
        return
    if task != "video-to-video":
        raise ConfigError(f"--stream restyles a --video; {task} has none")
    if args.output.suffix.lower() not in VIDEO_CODECS:
        raise ConfigError(f"--stream writes {', '.join(VIDEO_CODECS)}; got {args.output.name!r}")
    if args.keep_alpha:
        raise ConfigError("--stream puts transparency on white; leave --keep-alpha out")
    if args.blend == "time":
        raise ConfigError(
            "--blend time spans a whole video; with --stream, name styles with --style-by-shot"
        )
    if args.window_overlap < 4 or args.window <= args.window_overlap:
        raise ConfigError(
            f"--window {args.window}, --window-overlap {args.window_overlap}: segments go on from "
            "at least 4 frames of the one before, and are longer than that"
        )


def run_film(
    args: argparse.Namespace,
    config: StylizeConfig,
    source: tuple[int, int, int],
    fps: Fraction | None,
) -> int:
    """Run `stylize --stream`.

    Args:
        args: parsed options.
        config: of every segment.
        source: (frames, height, width) of the film, as its file announces.
        fps: to which it is resampled; None as it is.
    """
    from ..data.segment_files import check_leftovers, open_segments, stopped_job
    from ..data.videos import VideoFrames
    from ..pipelines.film import plan_segments
    from ..pipelines.stylize import needed_files, result_size
    from ..writing import check_place
    from .model_options import open_models
    from .preflight import stand_in

    started = time.perf_counter()
    if not check_leftovers(args.output, resume=args.resume):
        check_place(args.output, overwrite=args.overwrite)
    if args.dtype == AUTO:  # on some CPUs this is measured, and may come out otherwise now
        args.dtype = stopped_job(args.output).get(_DTYPE, AUTO).removeprefix("torch.")
    _check_room(args, config, source)
    film = VideoFrames(
        args.video, start_frame=args.start_frame, max_frames=args.max_frames, fps=fps
    )
    say(args, f"looking through {args.video.name}")
    shots, clip = _look_through(args, film)
    files_by_shot = _styles_by_shot(args, len(shots))
    assert config.windows is not None
    segments = plan_segments(shots, config.windows)
    size = (shots[-1].stop, *result_size(config, source)[1:])
    say(args, f"{size[0]} frames, {len(shots)} shots, {len(segments)} segments")
    if args.shots_sheet:
        _write_sheet(args, film, shots, files_by_shot)
    _try_writing(args, clip, size)
    with tempfile.TemporaryDirectory() as scratch:
        models = open_models(args, Path(scratch))
        models.files.require(needed_files(config), "video-to-video")
        job = _job(args, models, config, shots, files_by_shot)
        lengths = [segment.stop - segment.start - segment.overlap for segment in segments]
        finished = open_segments(args.output, job, lengths)
        try:
            if not finished.is_result(args.output):
                check_place(args.output, overwrite=args.overwrite)
                say(args, f"finished segments are kept in {finished.folder}")
                _restyle(args, config, models, film, files_by_shot, segments, finished)
                say(args, "writing")
                finished.begin_result()
                write_clip(args, args.output, finished.frames(), clip, num_frames=size[0])
        except KeyboardInterrupt:
            sys.stderr.write("stylemaster: interrupted; go on with --resume\n")
            return 130
        finally:
            finished.close()
        finished.remove()
    tell_result(args, stand_in(size), started, models.device, task="video-to-video")
    return 0


def _restyle(
    args: argparse.Namespace,
    config: StylizeConfig,
    models: Models,
    film: VideoFrames,
    files_by_shot: Sequence[tuple[Path, ...]],
    segments: Sequence[Segment],
    finished: SegmentFiles,
) -> None:
    """Restyle the segments that are left."""
    from tqdm import tqdm

    from ..pipelines.film import stylize_film

    left = segments[finished.done :]
    if not left:
        return
    models.encode_text([args.prompt, args.negative_prompt])
    styles = _open_styles(args, models, files_by_shot)
    models.keep_loaded = True  # not before: the encoders are done with
    total = len(segments) * config.num_steps
    done = finished.done * config.num_steps
    bar = tqdm(total=total, initial=done, desc="sampling", unit="step", disable=args.json)
    results = stylize_film(
        models, styles, config, left, film, lead=finished.lead(), callback=lambda _: bar.update()
    )
    try:
        for result in results:
            finished.add(result.frames, result.lead)
    finally:
        bar.close()


def _check_room(
    args: argparse.Namespace, config: StylizeConfig, source: tuple[int, int, int]
) -> None:
    """Memory for a segment, and disk for the result and all segments."""
    from ..pipelines.estimate import LOSSLESS_BYTES_PER_PX, VIDEO_BYTES_PER_PX
    from ..pipelines.stylize import result_size
    from ..writing import check_space
    from .preflight import check_room

    height, width = result_size(config, source)[1:]
    length = min(source[0], args.window)
    check_room(
        args.output,
        (length, height, width),
        (length, *source[1:]),
        device=args.device,
        video=True,
        option="--window",
    )
    needed = (LOSSLESS_BYTES_PER_PX + VIDEO_BYTES_PER_PX) * source[0] * height * width
    what = "the result with its segments"
    check_space(args.output, round(needed), what, "make room, or choose another place")


def _look_through(args: argparse.Namespace, film: VideoFrames) -> tuple[list[Shot], VideoClip]:
    """The shots of a film, and what belongs to it but its frames."""
    import numpy as np

    from ..data.shots import CutFinder, read_cuts
    from ..pipelines.film import shots_of

    given = None if args.shots in (AUTO, NONE) else Path(args.shots)
    if given is not None:
        if given.suffix.lower() == ".edl" and args.fps is not None:
            raise ConfigError(
                "an .edl counts the film's own frames, which --fps changes; use a .csv with times"
            )
        read_cuts(given, fps=film.fps)  # refuse what is no list at once
    finder = CutFinder(film.fps) if args.shots == AUTO else None
    count = sum(1 for _ in (film if finder is None else finder.watch(film)))
    clip = film.clip(np.empty((0, 0, 0, 3), np.uint8))
    cuts = [] if finder is None else finder.cuts
    if given is not None:
        cuts = read_cuts(given, fps=clip.fps, times_s=clip.times_s)
        cuts = [cut - args.start_frame for cut in cuts if cut > args.start_frame]
        if args.max_frames is not None:
            cuts = [cut for cut in cuts if cut < count]
    return shots_of(count, cuts), clip


def _styles_by_shot(args: argparse.Namespace, num_shots: int) -> list[tuple[Path, ...]]:
    """Style files of each shot.

    Raises:
        ConfigError, LayoutError: for a table that cannot be meant.
    """
    from .style_options import check_style_options

    found = [tuple(args.style)] * num_shots
    if args.style_by_shot is None:
        return found
    path = args.style_by_shot
    try:
        rows = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise LayoutError(f"--style-by-shot {path} cannot be read: {error}") from error
    if not {"shot", "style"} <= set(rows.fieldnames or ()):
        raise LayoutError(f"{path}: expected a first line with the columns shot,style")
    for row in rows:
        first, _, last = (row["shot"] or "").strip().partition("-")
        numbers = [first, last or first]
        if not all(n.isdecimal() for n in numbers) or not row["style"]:
            raise LayoutError(f"{path}, line {rows.line_num}: expected a shot (1, or 3-5), a style")
        start, stop = map(int, numbers)
        if not 1 <= start <= stop <= num_shots:
            raise ConfigError(
                f"{path}, line {rows.line_num}: shot {row['shot']}; the film has 1 to {num_shots}"
            )
        found[start - 1 : stop] = [(path.parent / row["style"].strip(),)] * (stop - start + 1)
    for files in dict.fromkeys(found):
        check_style_options(_with_style(args, files))
    return found


def _with_style(args: argparse.Namespace, files: tuple[Path, ...]) -> argparse.Namespace:
    """The options of a shot; weights and masks belong to the `--style` options."""
    options = vars(args) | {"style": list(files)}
    if files != tuple(args.style):
        options |= {"style_weight": [], "style_mask": []}
    return argparse.Namespace(**options)


def _open_styles(
    args: argparse.Namespace, models: Models, files_by_shot: Sequence[tuple[Path, ...]]
) -> list[list[StyleRegion] | None]:
    """The styles of each shot; each file is encoded once."""
    from .style_options import open_styles, style_regions

    opened = {}
    for files in dict.fromkeys(files_by_shot):
        options = _with_style(args, files)
        opened[files] = style_regions(options, open_styles(options, models, args.prompt))
    return [opened[files] for files in files_by_shot]


def _write_sheet(
    args: argparse.Namespace,
    film: VideoFrames,
    shots: Sequence[Shot],
    files_by_shot: Sequence[tuple[Path, ...]],
) -> None:
    """The middle frame of every shot beside its style pictures."""
    from ..data.images import read_image, write_image
    from ..pipelines.pictures import contact_sheet, fitted

    middles = {(shot.start + shot.stop) // 2: number for number, shot in enumerate(shots)}
    rows = []
    for index, frame in enumerate(film):
        if index not in middles:
            continue
        number = middles[index]
        shot, files = shots[number], files_by_shot[number]
        pictures = [read_image(path) for path in files if path.suffix != ".safetensors"]
        label = f"shot {number + 1}: frames {shot.start} to {shot.stop - 1}; " + (
            ", ".join(path.name for path in files) or "no style"
        )
        rows.append((label, [fitted(picture) for picture in (frame, *pictures)]))
    write_image(args.shots_sheet, contact_sheet(rows), overwrite=args.overwrite)
    say(args, f"wrote {args.shots_sheet}")


def _try_writing(args: argparse.Namespace, clip: VideoClip, size: tuple[int, int, int]) -> None:
    from .preflight import try_writing

    def write(path: Path, frames: np.ndarray) -> None:
        write_clip(args, path, frames, clip, num_frames=len(frames))

    try_writing(args.output, size, write)


def run_identity(args: argparse.Namespace, models: Models) -> dict[str, Any]:
    """Options, models and numbers that decide what `stylize` makes of an input, as JSON.

    Args:
        args: parsed options of `stylize`.
        models: that they name.

    Raises:
        LayoutError: if a file cannot be read.
    """
    from ..data.segment_files import file_identity
    from ..pipelines.models import ModelFiles

    weights = {field.name for field in dataclasses.fields(ModelFiles)}
    options = {
        f"--{name.replace('_', '-')}": _plain(value)
        for name, value in vars(args).items()
        if name not in (*_NOT_OF_THE_JOB, *weights)
    }
    models_used = {
        f"the {name.replace('_', ' ')}": file_identity(path)
        for name, path in vars(models.files).items()
        if path is not None
    }
    numbers = {"the device": models.device.type, _DTYPE: str(models.dtype)}
    return options | models_used | numbers


def _job(
    args: argparse.Namespace,
    models: Models,
    config: StylizeConfig,
    shots: Sequence[Shot],
    files_by_shot: Sequence[tuple[Path, ...]],
) -> dict[str, Any]:
    """Whatever decides the frames, as JSON; files by what is in them."""
    from ..data.segment_files import file_identity

    identities = {path: file_identity(path) for files in files_by_shot for path in files}
    return run_identity(args, models) | {
        "settings": _plain(dataclasses.asdict(config)),
        "the shots": [list(shot) for shot in shots],
        "the styles": [[identities[path] for path in files] for files in files_by_shot],
    }


def _plain(value: Any) -> Any:
    """JSON of an option; a file is what is in it."""
    from ..data.segment_files import file_identity

    if isinstance(value, Path):
        return file_identity(value)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value if isinstance(value, int | float | str | None) else str(value)
