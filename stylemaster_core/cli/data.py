"""`stylemaster data`: make, encode and check what the trainers learn from."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .model_options import (
    TINY,
    TINY_STYLECRAFTER,
    VIDEOCRAFTER,
    add_model_options,
    open_models,
    parse_size,
)

if TYPE_CHECKING:
    from ..data.cache_writer import CachePlan
    from ..data.encode import EncodeConfig
    from ..data.illusion import Score
    from ..data.pairs import NewPair
    from ..data.samples import Sample
    from ..pipelines.models import Models

_INTERRUPTED = 130  # what a shell reports for Ctrl-C


_GOES_ON = "what is finished stays, and the same command goes on from there"


def add_parser(subparsers: Any) -> None:
    """Add `data` to the command line.

    Args:
        subparsers: what `ArgumentParser.add_subparsers()` returned.
    """
    parser = subparsers.add_parser("data", description=__doc__)
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_illusion(actions)
    for name, what in (("still", "pictures as clips without motion"), ("tile", "gray tiles")):
        action = actions.add_parser(name, help=f"a table of samples: {what}")
        action.set_defaults(kept="nothing was written")
        _add_source(action)
        action.add_argument("--out", type=Path, required=True, help="table to write, .jsonl")
        if name == "still":
            action.add_argument("--frames", type=int, default=81, help="4n+1")
        _add_common(action)
    _add_encode(actions)
    check = actions.add_parser("check", help="find damaged shards or pairs")
    check.add_argument("folder", type=Path, help="cache, or folder of pairs")
    check.add_argument("--json", action="store_true", help="result as one line of JSON")


def _add_illusion(actions: Any) -> None:
    illusion = actions.add_parser("illusion", help="pairs of pictures of exactly one style")
    illusion.set_defaults(kept=_GOES_ON)
    illusion.add_argument("out", type=Path, help="folder for the pairs")
    illusion.add_argument("--num", type=int, default=10_000, help="of pairs, of all processes")
    illusion.add_argument("--seed", type=int, default=0)
    illusion.add_argument("--views", help="comma-separated; default: all that suit the source")
    illusion.add_argument("--base", type=Path, help="pixel-space diffusers pipeline, a folder")
    illusion.add_argument("--upscaler", type=Path, help="its second stage, a folder")
    illusion.add_argument("--steps", type=int, default=30, help="of each stage")
    illusion.add_argument("--guidance", type=float, default=10.0)
    illusion.add_argument("--noise-level", type=int, default=50, help="on what the upscaler sees")
    illusion.add_argument("--min-score", type=float, help="CLIP cosine that both pictures need")
    illusion.add_argument("--pictures", type=Path, help="rearrange these instead of painting")
    illusion.add_argument("--size", type=int, default=256, help="of pairs made of --pictures")
    _add_within(illusion)
    _add_process(illusion)
    _add_common(illusion)
    add_model_options(illusion)


def _add_encode(actions: Any) -> None:
    encode = actions.add_parser("encode", help="make a cache of latents and features")
    encode.set_defaults(kept=_GOES_ON)
    _add_source(encode)
    encode.add_argument("out", type=Path, help="folder of the cache")
    encode.add_argument(
        "--size",
        type=parse_size,
        action="append",
        metavar="WxH",
        help="may be repeated: each clip gets the most similar one; default 832x480, of the small "
        "model 128x128, of VideoCrafter 512x320",
    )
    encode.add_argument(
        "--frames",
        type=int,
        help="of clips, 4n+1; default 81, small model 17; VideoCrafter: any number, default 16",
    )
    encode.add_argument(
        "--fps", type=float, help="of clips, 0 takes every frame; default 16, VideoCrafter 8"
    )
    encode.add_argument("--short", default="reject", choices=("reject", "trim"))
    encode.add_argument("--tile", action="store_true", help="gray tile of every sample")
    encode.add_argument("--tile-factor", type=int, help="default 8, of the small model 2")
    encode.add_argument("--crop", default="center", choices=("center", "pad", "squash"))
    encode.add_argument("--seed", type=int, default=0, help="of the content shuffle")
    encode.add_argument(
        "--store-dtype", default="float16", choices=("float32", "float16", "bfloat16")
    )
    encode.add_argument("--shard-size", type=int, default=64, help="samples a file")
    encode.add_argument("--workers", type=int, default=2, help="threads that read ahead")
    encode.add_argument("--retry-bad", action="store_true", help="try bad samples again")
    _add_within(encode)
    _add_process(encode)
    _add_common(encode)
    add_model_options(encode, VIDEOCRAFTER)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="folder of clips or pictures, each with a .txt; .csv or .jsonl"
    )
    parser.add_argument("--caption", help="for samples without one")
    parser.add_argument(
        "--strip-style-words", action="store_true", help='"a painting of a cat" becomes "a cat"'
    )


def _add_within(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--within",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="refuse pictures, videos and captions that lie elsewhere, links followed",
    )


def _add_process(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--process",
        type=_parse_process,
        default=(0, 1),
        metavar="I/N",
        help="this is process I of N, counted from 0, e.g. 0/4",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace results of other settings"
    )
    parser.add_argument("--json", action="store_true", help="result as one line of JSON")


def _parse_process(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no process; write I/N, e.g. 0/4 to 3/4")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster data`.

    Args:
        args: parsed arguments.

    Returns:
        0; 1 if `check` found something; 130 if it was interrupted.

    Raises:
        StyleMasterError: if something could not be done.
    """
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "illusion": _illusion,
        "still": _table,
        "tile": _table,
        "encode": _encode,
        "check": _check,
    }
    try:
        return actions[args.action](args)
    except KeyboardInterrupt:
        sys.stderr.write("stylemaster: stopped; the same command continues where it was\n")
        return _INTERRUPTED


def _illusion(args: argparse.Namespace) -> int:
    from ..data.illusion import PAINTED_VIEWS, REARRANGED_VIEWS
    from ..data.pairs import make_pairs, open_pair_folder

    if (args.base is None) == (args.pictures is None):
        raise ConfigError("give --base, a diffusion pipeline, or --pictures; one of the two")
    if args.num < 1:
        raise ConfigError(f"{args.num} pairs; expected at least 1")
    default = PAINTED_VIEWS if args.pictures is None else REARRANGED_VIEWS
    views = _parse_views(args.views) if args.views else list(default)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = _painter if args.pictures is None else _rearranger
        make, settings = source(args, views, stack, scratch)
        settings |= {"seed": args.seed, "views": views}
        finished = open_pair_folder(args.out, settings, overwrite=args.overwrite)
        counts = {"kept": 0, "rejected": 0}
        number, count = args.process
        own = range(number, args.num, count)
        skipped = sum(index in finished for index in own)
        bar = stack.enter_context(_bar("pairs", len(own), skipped))
        for record in make_pairs(args.out, args.num, make, finished, process=args.process):
            counts["kept" if record["kept"] else "rejected"] += 1
            bar.update()
    report = {"folder": str(args.out), **counts, "done_earlier": skipped}
    _say(
        args,
        report,
        f"{args.out}: {counts['kept']} pairs made, {counts['rejected']} rejected, {skipped} were "
        "there",
    )
    return 0


MakePair = Callable[[int], "NewPair"]


def _painter(
    args: argparse.Namespace, views: list[Any], stack: ExitStack, scratch: Path
) -> tuple[MakePair, dict[str, Any]]:
    from ..data.illusion import load_pixel_diffusion, painted_pair, plan_pair

    models = open_models(args, scratch)
    score = _score(models, stack) if args.min_score is not None else None
    diffusion = load_pixel_diffusion(
        args.base,
        args.upscaler,
        device=models.device,
        dtype=models.dtype,
        num_steps=args.steps,
        guidance_scale=args.guidance,
        noise_level=args.noise_level,
    )

    def make(index: int) -> NewPair:
        plan = plan_pair(index, seed=args.seed, views=views, pixel_grid=diffusion.size)
        threshold = args.min_score or 0.0
        return painted_pair(index, diffusion.paint, plan, score=score, min_score=threshold)

    return make, {
        "base": args.base.name,
        "upscaler": args.upscaler and args.upscaler.name,
        "steps": args.steps,
        "guidance": args.guidance,
        "noise_level": args.noise_level,
        "min_score": args.min_score,
    }


def _score(models: Models, stack: ExitStack) -> Score:
    from ..data.illusion import clip_score

    clip_text = stack.enter_context(models.clip_text())
    return clip_score(stack.enter_context(models.image_encoder()), clip_text)


def _rearranger(
    args: argparse.Namespace, views: list[Any], stack: ExitStack, scratch: Path
) -> tuple[MakePair, dict[str, Any]]:
    import numpy as np

    from ..data.illusion import rearranged_pair
    from ..data.samples import find_pictures
    from ..data.views import View

    if args.size < 1:
        raise ConfigError(f"pictures of {args.size} pixels; expected at least 1")
    for name in views:
        # A size that a view cannot cut is an error of the command, not of every picture.
        View(name).apply_image(np.zeros((args.size, args.size, 3), np.uint8))
    pictures = find_pictures(args.pictures, within=args.within)
    names = sorted(picture.name for picture in pictures)

    def make(index: int) -> NewPair:
        return rearranged_pair(index, pictures, size=args.size, seed=args.seed, views=views)

    return make, {"pictures": names, "size": args.size}


def _parse_views(text: str) -> list[str]:
    from ..data.views import View

    names = [name.strip() for name in text.split(",")]
    for name in names:
        View(name)  # type: ignore[arg-type]  # says which names there are
    return names


def _table(args: argparse.Namespace) -> int:
    from ..data.samples import write_samples
    from ..data.still_videos import still_samples
    from ..data.tile_triplets import tile_samples

    samples = _read_samples(args)
    if args.action == "still":
        samples = still_samples(samples, args.frames)
    else:
        samples = tile_samples(samples)
    write_samples(args.out, samples, overwrite=args.overwrite)
    report = {"table": str(args.out), "samples": len(samples)}
    _say(args, report, f"wrote {args.out}: {len(samples)} samples")
    return 0


def _read_samples(args: argparse.Namespace) -> list[Sample]:
    from ..data.samples import read_samples

    return read_samples(
        args.source,
        caption=args.caption,
        strip_style=args.strip_style_words,
        within=getattr(args, "within", None),
    )


def _encode(args: argparse.Namespace) -> int:
    from ..data.cache_writer import write_cache

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plan = _plan(args, scratch, stack)
        number, count = args.process
        own = sum(len(plan.shard(i)) for i in range(number, plan.num_shards, count))
        bar = stack.enter_context(_bar("encode", own, 0))
        report = write_cache(
            args.out,
            plan,
            process=args.process,
            workers=args.workers,
            overwrite=args.overwrite,
            retry_bad=args.retry_bad,
            on_sample=lambda path, problem: bar.update(),
        )
    if report.complete and len(report.bad) == len(plan.items):
        raise ConfigError(
            f"no sample of {args.source} could be encoded; the first: {report.bad[0]['error']}"
        )
    result = {"cache": str(args.out), **report._asdict()}
    words = [f"{args.out}: {report.encoded} samples encoded, {report.skipped} were there"]
    words += [f"left out: {bad['path']}: {bad['error']}" for bad in report.bad]
    if not report.complete:
        words.append("shards of other processes are still missing")
    _say(args, result, "\n".join(words))
    return 0


def _plan(args: argparse.Namespace, scratch: Path, stack: ExitStack) -> CachePlan[Any, Any]:
    pairs = (args.source / "pairs.jsonl").is_file()
    if args.model != VIDEOCRAFTER:
        models = open_models(args, scratch)
        return (_pair_plan if pairs else _sample_plan)(args, models, stack)
    from .encode_videocrafter import videocrafter_plan

    if pairs:
        raise ConfigError(
            f"{args.source} holds illusion pairs, on which nothing of VideoCrafter is trained; "
            "encode them without --model videocrafter, or give samples"
        )
    return videocrafter_plan(args, _read_samples(args))


def _sample_plan(args: argparse.Namespace, models: Models, stack: ExitStack) -> CachePlan[Any, Any]:
    from ..data.cache import hash_models
    from ..data.cache_writer import CachePlan, Entry
    from ..data.clips import ClipConfig
    from ..data.encode import (
        EncodeConfig,
        Encoders,
        encode_null_text,
        encode_sample,
        load_pixels,
        sample_bytes,
    )
    from .small_model import encode_settings

    wanted: dict[str, Any] = {"size": [(480, 832)], "frames": 81, "tile_factor": 8}
    if args.model in (TINY, TINY_STYLECRAFTER):
        wanted = encode_settings()
    wanted |= {name: getattr(args, name) for name in wanted if getattr(args, name) is not None}
    clip = ClipConfig(
        sizes=tuple(wanted["size"]),
        num_frames=wanted["frames"],
        fps=(16.0 if args.fps is None else args.fps) or None,
        short=args.short,
    )
    config = EncodeConfig(
        clip, args.tile, wanted["tile_factor"], args.crop, args.seed, args.store_dtype
    )
    samples = _read_samples(args)
    encoders = Encoders(
        stack.enter_context(models.vae()),
        stack.enter_context(models.text_encoder()),
        stack.enter_context(models.image_encoder()),
    )
    image_size = encoders.image_encoder.image_size
    return CachePlan(
        kind="samples",
        items=[(Entry(s.id, str(s.media), s.description), s) for s in samples],
        load=lambda sample: load_pixels(sample, config, image_size),
        encode=lambda sample, pixels: encode_sample(sample, pixels, encoders, config),
        hashes=hash_models(_files(models, "vae", "text_encoder", "image_encoder")),
        settings=_settings(config),
        shard_size=args.shard_size,
        bytes_of=lambda sample: sample_bytes(sample, config),
        null_text=lambda: encode_null_text(encoders.text_encoder, config.dtype),
    )


def _pair_plan(args: argparse.Namespace, models: Models, stack: ExitStack) -> CachePlan[Any, Any]:
    from ..data.cache import hash_models
    from ..data.cache_writer import CachePlan, Entry
    from ..data.encode import encode_pair, load_pair_pixels
    from ..data.pairs import read_pairs

    pairs = read_pairs(args.source)
    encoder = stack.enter_context(models.image_encoder())
    return CachePlan(
        kind="pairs",
        items=[
            (Entry(f"{p.index:06d}", str(p.first), json.dumps(p.record), p.group), p) for p in pairs
        ],
        load=lambda pair: load_pair_pixels(pair, encoder.image_size, args.crop),
        encode=lambda pair, pixels: encode_pair(pixels, encoder, args.store_dtype),
        hashes=hash_models(_files(models, "image_encoder")),
        settings={"crop": args.crop, "dtype": args.store_dtype},
        shard_size=args.shard_size,
    )


def _files(models: Models, *names: str) -> dict[str, Path]:
    return {name: models.files.need(name, "Encoding") for name in names}


def _settings(config: EncodeConfig) -> dict[str, Any]:
    settings = asdict(config)
    clip = settings.pop("clip")
    del clip["frame_stride"]  # always Wan's; caches of earlier versions do not name it
    return clip | settings


def _check(args: argparse.Namespace) -> int:
    from ..data.cache import check_cache
    from ..data.pairs import check_pair, read_pairs

    if (args.folder / "pairs.jsonl").is_file():
        pairs = read_pairs(args.folder)
        with _bar("check", len(pairs), 0) as bar:
            found = [(check_pair(pair), bar.update())[0] for pair in pairs]
        problems = [problem for problem in found if problem]
    else:
        with _bar("check", None, 0) as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            problems = check_cache(args.folder, advance)
    report = {"folder": str(args.folder), "problems": problems}
    _say(args, report, "\n".join(problems) or f"{args.folder} is whole")
    return int(bool(problems))


@contextmanager
def _bar(name: str, total: int | None, done: int) -> Iterator[Any]:
    import logging

    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    logger = logging.getLogger("stylemaster")
    with (
        tqdm(desc=name, total=total, initial=done, disable=None) as bar,
        logging_redirect_tqdm([logger if logger.handlers else logging.root]),
    ):
        yield bar


def _say(args: argparse.Namespace, report: dict[str, Any], words: str) -> None:
    sys.stdout.write((json.dumps(report, ensure_ascii=False) if args.json else words) + "\n")
