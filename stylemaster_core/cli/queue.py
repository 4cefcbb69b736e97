"""`stylemaster queue`: run a ComfyUI workflow over many inputs, on several servers."""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
from collections.abc import Iterable
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..queue.client import ComfyClient
    from ..queue.jobs import Job
    from ..queue.listener import OnStep
    from ..queue.runner import JobResult

logger = logging.getLogger("stylemaster")

_INTERRUPTED = 130  # what a shell reports for Ctrl-C


def add_parser(subparsers: Any) -> None:
    """Add `queue` to the command line.

    Args:
        subparsers: what `ArgumentParser.add_subparsers()` returned.
    """
    parser = subparsers.add_parser("queue", description=__doc__)
    parser.set_defaults(
        run=run, kept="results that are done stay, and the same command goes on from there"
    )
    parser.add_argument("workflow", type=Path, help="workflow, exported in API format")
    parser.add_argument("--videos", type=Path, help="folder of videos, or one video")
    parser.add_argument("--styles", type=Path, help="folder of style images, or one image")
    parser.add_argument("--prompts", type=Path, help="text file with a prompt a line")
    parser.add_argument(
        "--csv",
        type=Path,
        help="table with a job a line instead of the cross product; columns video, style, prompt "
        "and NODE.input; files are relative to --videos and --styles, or to the table",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NODE.input=value",
        help="set an input of a node, named by id or title, for every job; value is JSON or text",
    )
    parser.add_argument(
        "--map",
        dest="role_keys",
        action="append",
        default=[],
        metavar="ROLE=NODE.input",
        help="which input takes the video, style or prompt, if it is not clear by itself",
    )
    parser.add_argument("--seed", type=int, help="for every seed in the workflow; default: its own")
    parser.add_argument(
        "--server",
        dest="servers",
        action="append",
        default=[],
        metavar="URL",
        help="a ComfyUI server, such as http://127.0.0.1:8188; may be repeated",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results and journal")
    parser.add_argument(
        "--per-server",
        type=int,
        default=2,
        help="jobs at a server at a time, one runs and the others wait there; default: 2",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds without an answer after which a server's jobs go to others; default: 60",
    )
    parser.add_argument(
        "--give-up",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds for which a lost or sick server is asked again; default: 600",
    )
    parser.add_argument(
        "--attempts", type=int, default=3, help="how often a job may lose its server; default: 3"
    )
    parser.add_argument(
        "--max-result",
        type=float,
        default=8.0,
        metavar="GIB",
        help="largest result file that is fetched, in GiB; default: 8",
    )
    parser.add_argument(
        "--max-jobs",
        type=int,
        metavar="N",
        help="run the first N that are not done; the same command goes on from there",
    )
    parser.add_argument(
        "--skip-space-check",
        action="store_true",
        help="begin although the disk of --out has less room than the inputs of the jobs take",
    )
    parser.add_argument(
        "--redo",
        action="store_true",
        help="run all jobs again; without it, those whose results are still there are left out",
    )
    parser.add_argument("--dry-run", action="store_true", help="only list the jobs")
    parser.add_argument("--json", action="store_true", help="a JSON line for each job, for scripts")


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster queue`.

    Args:
        args: parsed arguments.

    Returns:
        0 if all jobs are done, 1 if some failed, 130 after Ctrl-C.

    Raises:
        StyleMasterError: if an option, the workflow or an input cannot work, or no server answers.
    """
    from ..queue.journal import Journal, is_done, read_journal
    from ..queue.workflow import server_address

    _check(args)
    urls = [server_address(url) for url in args.servers]
    if len(set(urls)) < len(urls):
        raise ConfigError("--server names the same server twice; see --per-server instead.")
    jobs = _jobs(args)
    if args.dry_run:
        records = {} if args.redo else read_journal(args.out)
        _list_jobs(jobs, {key for key in records if is_done(records[key], args.out)}, args.json)
        return 0

    from ..queue.client import ComfyClient
    from ..queue.runner import RunConfig

    config = RunConfig(
        per_server=args.per_server,
        timeout_s=args.timeout,
        give_up_s=args.give_up,
        max_attempts=args.attempts,
    )
    max_bytes = int(args.max_result * (1 << 30))
    clients = [ComfyClient(url, config.timeout_s, max_bytes) for url in urls]
    with closing(Journal(args.out)) as journal:
        return _run(jobs, clients, journal, config, args)


def _run(
    jobs: list[Job], clients: list[ComfyClient], journal: Any, config: Any, args: argparse.Namespace
) -> int:
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ..queue.runner import run_jobs

    open_jobs = [job for job in jobs if args.redo or not journal.is_done(job.id)]
    earlier = len(jobs) - len(open_jobs)
    if left := {job.id for job in open_jobs[args.max_jobs :]} if args.max_jobs else set():
        logger.info("%d jobs are left for a later run of the same command", len(left))
        open_jobs = open_jobs[: args.max_jobs]
        jobs = [job for job in jobs if job.id not in left]
    _check_space(args, open_jobs)
    if earlier:
        logger.info("%d of %d jobs were done earlier: %s", earlier, len(jobs), journal.path)
    failed = 0
    with (
        tqdm(total=len(jobs), initial=earlier, unit="job", disable=None) as bar,
        logging_redirect_tqdm([logger if logger.handlers else logging.root]),
        closing(
            run_jobs(jobs, clients, journal, args.out, config, _step_shower(bar), redo=args.redo)
        ) as results,
    ):
        try:
            for result in results:
                failed += result.status == "failed"
                bar.update()
                tqdm.write(_result_line(result, args.json), file=sys.stdout)
                sys.stdout.flush()
        except KeyboardInterrupt:
            logger.warning("Stopped; the same command continues where it was.")
            return _INTERRUPTED
    return int(failed > 0)


def _check_space(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Refuse where the disk has less room than results as large as the jobs' inputs would take."""
    from ..writing import check_space

    if args.skip_space_check:
        return
    sizes = [
        max((file.path.stat().st_size for file in job.uploads.values()), default=0) for job in jobs
    ]
    free = shutil.disk_usage(args.out).free
    fitting = sum(total <= free for total in accumulate(sizes))
    fewer = f"--max-jobs {fitting} for the first ones, " if fitting else ""
    advice = (
        f"pass {fewer}--out on another disk, or --skip-space-check if the results are smaller "
        "than the inputs"
    )
    check_space(args.out, sum(sizes), f"Results as large as the inputs of {len(jobs)} jobs", advice)


def _check(args: argparse.Namespace) -> None:
    if not args.servers and not args.dry_run:
        raise ConfigError("Name a ComfyUI server with --server, such as http://127.0.0.1:8188.")
    if args.csv and args.prompts:
        raise ConfigError("Give --csv or --prompts, not both; a table has a column prompt.")
    for option in ("per_server", "timeout", "give_up", "attempts", "max_result"):
        if not 0 < getattr(args, option) < math.inf:
            raise ConfigError(f"--{option.replace('_', '-')} must be a number above 0.")
    if args.max_jobs is not None and args.max_jobs < 1:
        raise ConfigError("--max-jobs must be a number above 0.")


def _jobs(args: argparse.Namespace) -> list[Job]:
    from ..queue.jobs import cross_product, make_jobs, read_csv
    from ..queue.workflow import ROLES, load_workflow, parse_value
    from ..seeds import check_seed

    if args.seed is not None:
        check_seed(args.seed, "--seed")
    role_keys = _pairs(args.role_keys, "--map", "ROLE=NODE.input")
    if unknown := set(role_keys) - set(ROLES):
        raise ConfigError(f"--map {', '.join(sorted(unknown))}: expected {', '.join(ROLES)}.")
    settings = _pairs(args.settings, "--set", "NODE.input=value")
    if args.csv:
        rows = read_csv(args.csv, args.videos, args.styles)
    else:
        rows = cross_product(args.videos, args.styles, args.prompts)
    return make_jobs(
        load_workflow(args.workflow),
        rows,
        settings={key: parse_value(text) for key, text in settings.items()},
        role_keys=role_keys,
        seed=args.seed,
        default_name=args.workflow.stem,
    )


def _pairs(texts: Iterable[str], option: str, form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or key in pairs:
            raise ConfigError(f"{option} {text!r}: expected {form}, each name once.")
        pairs[key] = value
    return pairs


def _list_jobs(jobs: list[Job], done: set[str], as_json: bool) -> None:
    for job in jobs:
        is_done = job.id in done
        if as_json:
            row = {"job": job.id, "name": job.name, "done": is_done, "values": dict(job.values)}
            _say(json.dumps(row))
            continue
        _say(f"{job.id}  {job.name}{'  (done earlier)' if is_done else ''}")
        for target, value in job.values.items():
            _say(f"  {target} = {value}")
    if not as_json:
        _say(f"{len(jobs)} jobs")


def _result_line(result: JobResult, as_json: bool) -> str:
    job = result.job
    if as_json:
        row = {
            "job": job.id,
            "name": job.name,
            "status": result.status,
            "files": list(result.files),
            "server": result.server,
            "seconds": round(result.seconds, 1),
            "error": result.error,
            "values": dict(job.values),
        }
        return json.dumps(row)
    if result.status == "failed":
        return f"failed: {job.name} ({job.id}): {result.error}"
    return f"done: {', '.join(result.files)} ({result.seconds:.0f} s, {result.server})"


def _step_shower(bar: Any) -> OnStep | None:
    """Show each server's current step beside the bar."""
    steps: dict[str, str] = {}

    def show(url: str, step: int, total: int) -> None:
        steps[url] = f"{url.partition('://')[2]} {step}/{total}"
        bar.set_postfix_str(", ".join(steps.values()))

    return None if bar.disable else show


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
