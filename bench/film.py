"""What `stylize --stream` does to films: `python -m bench.film --out FILE.json --write`.

Films drawn by code, whose cuts are known, are restyled by stylemaster-tiny: how well cuts are
found, how much seams between segments show, whether the style drifts, what memory a long film
takes, and whether runs that were killed at random moments come to the same frames. A part that
--only leaves out keeps its numbers in FILE.json. `--write` puts the table into docs/films.md.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylemaster_core.cli import main as command_line
from stylemaster_core.data.demo_pictures import painted_styles
from stylemaster_core.data.images import write_image
from stylemaster_core.data.shots import CutFinder
from stylemaster_core.data.videos import VideoFrames, iter_video
from stylemaster_core.errors import ConfigError
from stylemaster_core.metrics.colour import colour_distance
from stylemaster_core.metrics.motion import warping_error
from stylemaster_core.metrics.texture import gabor_distance, texture_signature
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.pipelines import tiny
from stylemaster_core.pipelines.encode_style import encode_style
from stylemaster_core.pipelines.film import plan_segments, shots_of, stylize_film
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.stylize import StylizeConfig, stylize
from stylemaster_core.sampling.windows import WindowConfig
from stylemaster_core.writing import write_text

from .against_release import write_docs
from .drawn_film import FPS, DrawnFilm, cuts_by_chance
from .runner import Report, machine_facts, psnr, run_benchmark

DOCS = Path(__file__).parents[1] / "docs" / "films.md"
BEGIN, END = "<!-- films measured -->", "<!-- end of films measured -->"
STYLE = "impasto"
GROUP = 4  # frames of a latent frame, within which they resemble each other more
BOUNDS = {"warp": 1.05, "texture": 1.1, "drift": 1.05, "memory": 1.1, "cuts": 0.95}


def measure_cuts(args: argparse.Namespace, folder: Path) -> Report:
    """How many of a film's cuts are found at their very frame."""
    num_frames = round(args.long_s * FPS)
    cuts = cuts_by_chance(num_frames, args.seed)
    film = folder / "cuts.mp4"
    DrawnFilm(num_frames, *args.small, cuts, seed=args.seed).write(film)
    frames = VideoFrames(film)
    finder = CutFinder(frames.fps)
    for _ in finder.watch(frames):
        pass
    true, found = set(cuts), set(finder.cuts)
    right = len(true & found)
    return {
        "size": [num_frames, *args.small],
        "cuts": len(true),
        "found": len(found),
        "right": right,
        "precision": right / len(found) if found else 0.0,
        "recall": right / len(true) if true else 1.0,
    }


def measure_seams(args: argparse.Namespace, folder: Path) -> Report:
    """Seams and drift of one long shot, whose last tenth shows what its first tenth did."""
    num_frames = round(args.short_s * FPS) * 2
    period = num_frames - num_frames // 10
    drawn = DrawnFilm(num_frames, *args.size, period=period, seed=args.seed)
    source = np.stack(list(drawn.frames()))
    picture = painted_styles()[STYLE]
    models = Models(tiny.tiny_files(), device="cpu", dtype="float32", keep_loaded=True)
    style = [StyleRegion(encode_style(models, picture, "").style.tokens)]
    settings = tiny.tiny_settings(source) | {"num_steps": args.steps}
    windows = WindowConfig((args.window - 1) // 4 + 1, args.window_overlap // 4)
    config = StylizeConfig("video-to-video", windows=windows, **settings)
    segments = plan_segments(shots_of(num_frames, []), windows)
    if len(segments) < 2:
        raise ConfigError(f"a film of {num_frames} frames has no seam; make it longer")
    streamed = stylize_film(models, [style], config, segments, source)
    starts = [segment.start + segment.overlap for segment in segments]
    parts = np.split(source, starts[1:])
    clips = {
        "drawn": source,
        "streamed": np.concatenate([result.frames for result in streamed]),
        "whole": stylize(models, style, config, frames=source).frames,
        "apart": np.concatenate([stylize(models, style, config, frames=p).frames for p in parts]),
    }
    if args.keep:
        np.savez(args.keep, **clips, borders=starts[1:])
    seams = {
        name: seam_ratios(clip, source, starts[1:], starts if name == "apart" else [0])
        for name, clip in clips.items()
    }
    tenth = num_frames // 10
    streamed_frames = clips["streamed"]
    ends = (streamed_frames[:tenth], streamed_frames[-tenth:])
    drift = {}
    for name, distance in (("texture", gabor_distance), ("colours", colour_distance)):
        first, last = (distance(end, picture[None]) for end in ends)
        drift[name] = {"first": first, "last": last, "ratio": last / first}
    return {
        "size": [num_frames, *args.size],
        "segments": len(segments),
        "window": [args.window, args.window_overlap],
        "steps": args.steps,
        "seams": seams,
        "drift": drift,
        "psnr_to_whole_db": psnr(streamed_frames, clips["whole"]),
    }


def seam_ratios(
    clip: np.ndarray, source: np.ndarray, borders: Sequence[int], starts: Sequence[int]
) -> dict[str, float]:
    """Warp error and texture distance at borders, over those at other places.

    Args:
        clip: uint8 [T, H, W, 3], the result.
        source: uint8 of the same shape, where the motion is looked for.
        borders: the first frame of each segment but the first.
        starts: frames at which the counting of latent frames begins: one frame, then four each.

    Returns:
        `warp` and `texture` over all other places, `warp_alike` and `texture_alike` over those that
        begin a latent frame, too.
    """
    places = np.arange(1, len(clip))
    warp = [warping_error(clip[i - 1 : i + 1], source[i - 1 : i + 1]) for i in places]
    energies = np.stack([texture_signature(frame[None]) for frame in clip])
    texture = [
        np.abs(energies[max(i - GROUP, 0) : i].mean(0) - energies[i : i + GROUP].mean(0)).mean()
        for i in places
    ]
    begins = np.array([max(start for start in starts if start <= i) for i in places])
    is_border = np.isin(places, borders)
    alike = ~is_border & ((places - begins) % GROUP == 1)
    ratios = {}
    for name, values in (("warp", np.array(warp)), ("texture", np.array(texture))):
        border = values[is_border].mean()
        ratios[name] = float(border / values[~is_border].mean())
        ratios[f"{name}_alike"] = float(border / values[alike].mean())
    return ratios


def measure_memory(args: argparse.Namespace, folder: Path) -> Report:
    """Peak memory and time of the command line for a short film and a long one."""
    runs = []
    for number, length_s in enumerate((args.short_s, args.long_s)):
        num_frames = round(length_s * FPS)
        words = _job(args, folder, f"memory{number}", num_frames, args.small)
        note = folder / f"memory{number}.json"
        _run_child(words, note)
        runs.append({"frames": num_frames} | json.loads(note.read_text()))
    short, long = runs
    further = long["frames"] - short["frames"]
    return {
        "size": list(args.small),
        "window": [args.window, args.window_overlap],
        "steps": args.steps,
        "runs": runs,
        "ratio": long["peak_bytes"] / short["peak_bytes"],
        "bytes_per_further_frame": (long["peak_bytes"] - short["peak_bytes"]) / further,
        "cpu_s_per_further_frame": (long["cpu_s"] - short["cpu_s"]) / further,
    }


def measure_kills(args: argparse.Namespace, folder: Path) -> Report:
    """SIGKILL at random moments, then --resume: the same frames as without a stop."""
    num_frames = round(args.short_s * FPS) * 2
    words = _job(args, folder, "killed", num_frames, args.small)
    whole_note = folder / "whole.json"
    started = time.perf_counter()
    _run_child(words, whole_note)
    wall_s = time.perf_counter() - started
    output = Path(words[1])
    expected = _digest(output)
    output.unlink()
    moments, kills, films, equal = random.Random(args.seed), [], 0, 0
    words = [*words, "--resume"]
    while len(kills) < args.kills:
        finished = False
        while not finished and len(kills) < args.kills:
            delay_s = moments.uniform(0, 0.6 * wall_s)
            child = _start(words, folder / "killed.json")
            child.join(delay_s)
            if child.exitcode is None:
                child.kill()
                kills.append({"after_s": delay_s, "segments": len(list(folder.glob("*/*.mkv")))})
            child.join()
            finished = output.exists() and not list(folder.glob(f"{output.name}.segments-*"))
        if not finished:
            _run_child(words, folder / "killed.json")
        films += 1
        equal += _digest(output) == expected
        output.unlink()
    return {
        "size": [num_frames, *args.small],
        "window": [args.window, args.window_overlap],
        "steps": args.steps,
        "seed": args.seed,
        "without_a_stop_s": wall_s,
        "kills": kills,
        "films": films,
        "equal": equal,
    }


PARTS: dict[str, Callable[[argparse.Namespace, Path], Report]] = {
    "cuts": measure_cuts,
    "seams": measure_seams,
    "memory": measure_memory,
    "kills": measure_kills,
}


def _job(
    args: argparse.Namespace, folder: Path, name: str, num_frames: int, size: tuple[int, int]
) -> list[str]:
    """Draw a film and its style; the command that restyles it."""
    film, style = folder / f"{name}_film.mp4", folder / "style.png"
    cuts = cuts_by_chance(num_frames, args.seed)
    DrawnFilm(num_frames, *size, cuts, seed=args.seed).write(film)
    write_image(style, painted_styles()[STYLE], overwrite=True)
    options = {
        "--model": "tiny",
        "--video": film,
        "--style": style,
        "--steps": args.steps,
        "--window": args.window,
        "--window-overlap": args.window_overlap,
        "--device": "cpu",
        "--dtype": "float32",  # auto measures, and may find another the next time
    }
    words = [str(word) for option in options.items() for word in option]
    return ["stylize", str(folder / f"{name}.mp4"), *words, "--stream", "--json"]


def _start(words: Sequence[str], note: Path) -> Any:
    """A process that runs the command line; what it costs comes from a server with all imports."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stylemaster_core.cli.film", "bench.drawn_film"])
    process = context.Process(target=_child, args=(list(words), note, torch.get_num_threads()))
    process.start()
    return process


def _run_child(words: Sequence[str], note: Path) -> None:
    process = _start(words, note)
    process.join()
    if process.exitcode != 0:
        raise ConfigError(f"stylemaster {' '.join(words)} ended with {process.exitcode}")


def _child(words: list[str], note: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    code = command_line(words)
    if code == 0:
        facts = {
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "cpu_s": time.process_time(),
        }
        write_text(note, json.dumps(facts), overwrite=True)
    sys.exit(code)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for frame in iter_video(path):
        digest.update(frame.tobytes())
    return digest.hexdigest()


def benchmark(args: argparse.Namespace) -> Report:
    """Run it.

    Raises:
        ConfigError: for options that cannot work, or a FILE.json of something else.
    """
    report: Report = {"format": "stylemaster-bench-film-1", "parts": {}}
    if args.out is not None and args.out.exists():
        found = json.loads(args.out.read_text())
        if found.get("format") != report["format"]:
            raise ConfigError(f"{args.out} is no report of bench.film; choose another name")
        report = found
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {args.out} does not exist; make it first")
    for name in args.only:
        with tempfile.TemporaryDirectory() as scratch:
            facts = {
                "date": datetime.date.today().isoformat(),
                "machine": machine_facts(torch.device("cpu")),
            }
            report["parts"][name] = facts | PARTS[name](args, Path(scratch))
    if args.write:
        write_docs(DOCS, table(report), BEGIN, END)
    return report


def table(report: Report) -> str:
    """The report in Markdown."""
    parts = report["parts"]
    rows: list[tuple[str, str, str]] = []
    if "cuts" in parts:
        p = parts["cuts"]
        rows += [
            (f"{name} of {p['cuts']} cuts, to the frame", f"{p[name]:.3f}", _least("cuts", p[name]))
            for name in ("precision", "recall")
        ]
    if "seams" in parts:
        rows += _seam_rows(parts["seams"])
    if "memory" in parts:
        p = parts["memory"]
        short, long = p["runs"]
        rows += [
            (
                f"peak memory of {long['frames'] / FPS:.0f} s over that of "
                f"{short['frames'] / FPS:.0f} s",
                f"{long['peak_bytes'] / 1e6:.0f} / {short['peak_bytes'] / 1e6:.0f} MB = "
                f"{p['ratio']:.3f}",
                _most("memory", p["ratio"]),
            ),
            ("memory of each further frame", f"{p['bytes_per_further_frame'] / 1e3:.1f} kB", ""),
            ("CPU time of each further frame", f"{p['cpu_s_per_further_frame'] * 1e3:.0f} ms", ""),
        ]
    if "kills" in parts:
        p = parts["kills"]
        bound = "all" if p["equal"] == p["films"] else "all: **missed**"
        what = f"films equal bit for bit after {len(p['kills'])} kills and --resume"
        rows.append((what, f"{p['equal']} of {p['films']}", bound))
    lines = ["| measured | value | bound |", "|---|---:|---|"]
    lines += [f"| {what} | {value} | {bound} |" for what, value, bound in rows]
    return "\n".join([*lines, "", *_conditions(parts)])


def _seam_rows(part: Report) -> Iterable[tuple[str, str, str]]:
    seams = part["seams"]
    for name, what in (("warp", "warp error"), ("texture", "texture distance")):
        for key, place in ((name, "inside"), (f"{name}_alike", "inside, where latents begin")):
            value = seams["streamed"][key]
            others = ", ".join(f"{seams[n][key]:.2f}" for n in ("whole", "apart", "drawn"))
            yield (
                f"{what} at seams over {place} (in one piece, segments apart, drawn film)",
                f"{value:.3f} ({others})",
                _most(name, value),
            )
    for name, drift in part["drift"].items():
        what = f"distance of {name} to the style, last tenth over first"
        yield what, f"{drift['ratio']:.3f}", _most("drift", drift["ratio"])


def _most(bound: str, value: float) -> str:
    return f"<= {BOUNDS[bound]}" + ("" if value <= BOUNDS[bound] else ": **missed**")


def _least(bound: str, value: float) -> str:
    return f">= {BOUNDS[bound]}" + ("" if value >= BOUNDS[bound] else ": **missed**")


def _conditions(parts: Report) -> Iterable[str]:
    sizes = []
    for name, p in parts.items():
        *frames, height, width = p["size"]
        count = f"{frames[0]} frames of " if frames else ""
        window = f", windows of {p['window'][0]}, overlap {p['window'][1]}" if "window" in p else ""
        steps = f", {p['steps']} steps" if "steps" in p else ""
        sizes.append(f"{name}: {count}{width} x {height}{steps}{window}")
    first = next(iter(parts.values()))
    yield (
        f"stylemaster-tiny, drawn films of {FPS} frames a second ({'; '.join(sizes)}); "
        f"{first['machine']['name']}, {first['machine']['threads']} thread, float32, "
        f"{first['date']}, torch {first['machine']['torch']}."
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.film", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--short-s", type=float, default=30, help="of the shorter film")
    parser.add_argument("--long-s", type=float, default=600, help="of the longer film")
    parser.add_argument("--size", type=_size, default=(96, 160), help="WxH of the long shot")
    parser.add_argument("--small", type=_size, default=(48, 64), help="WxH of the other films")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--window", type=int, default=33, help="frames; default %(default)s")
    parser.add_argument("--window-overlap", type=int, default=12, help="default %(default)s")
    parser.add_argument("--kills", type=int, default=20, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, metavar="FILE.npz", help="frames of the long shot")
    parser.add_argument("--write", action="store_true", help="the table into docs/films.md")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers")
    return parser.parse_args(argv)


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected WxH, such as 160x96") from None
    return height, width


def main(argv: list[str] | None = None) -> int:
    def show(report: Report) -> None:
        sys.stdout.write(table(report) + "\n")

    return run_benchmark("bench.film", benchmark, show, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
