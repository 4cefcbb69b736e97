"""What a run has done so far: its loss curve and sample frames, live in a node and as IMAGEs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comfy import model_management
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker
from PIL import Image

from ..stylemaster_core.data.images import read_image
from ..stylemaster_core.data.jsonl import read_json
from ..stylemaster_core.errors import ConfigError
from ..stylemaster_core.training.run_lock import is_running
from ..stylemaster_core.training.stats import NAME as STATS
from ..stylemaster_core.training.stats import read_stats, sample_file
from .layouts import frames_to_image, pictures_to_image
from .loss_curve import draw_loss_curve, draw_run
from .paths import fingerprint
from .sockets import schema
from .training_files import work_folder

POLL_S = 0.5


def watcher(out: Path) -> Callable[[], None]:
    """A function that shows step, loss curve and newest sample frames in the node that runs.

    Args:
        out: folder of the run, maybe not made yet.
    """
    bar, seen = ProgressBar(1), [""]

    def watch() -> None:
        path = out / STATS
        state = fingerprint(path) if path.is_file() else ""
        if state != seen[0]:
            seen[0] = state
            stats = read_stats(out)
            step = max((line["step"] for line in stats), default=0)
            picture = run_picture(out, stats)
            bar.update_absolute(step, _num_steps(out), ("JPEG", picture, max(picture.size)))

    return watch


def run_picture(out: Path, stats: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Loss curve, with the newest sample frames below it if there are any."""
    paths = _sample_paths(out, stats)
    return draw_run(stats, Image.fromarray(read_image(paths[-1])) if paths else None)


def curve_image(stats: Sequence[Mapping[str, Any]]) -> Any:
    """Loss curve as an IMAGE."""
    return picture_image(draw_loss_curve(stats))


def picture_image(picture: Image.Image) -> Any:
    """A picture as an IMAGE."""
    return frames_to_image(np.array(picture)[None])


def _num_steps(out: Path) -> int:
    config = read_json(out / "config.json")
    try:
        return int(config["run"]["num_steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{out / 'config.json'} says no run.num_steps ({error!r})") from error


def _sample_paths(out: Path, stats: Sequence[Mapping[str, Any]]) -> list[Path]:
    paths = [sample_file(out, line) for line in stats]
    return [path for path in paths if path is not None and path.is_file()]


def _samples_image(out: Path, stats: Sequence[Mapping[str, Any]]) -> Any:
    """Sheets of sample frames [N, H, W, 3] of the size of the latest, or None."""
    sheets = [read_image(path) for path in _sample_paths(out, stats)]
    if not sheets:
        return None
    height, width = sheets[-1].shape[:2]
    return pictures_to_image(
        [np.array(Image.fromarray(sheet).resize((width, height))) for sheet in sheets]
    )


def _report(stats: Sequence[Mapping[str, Any]]) -> str:
    latest: dict[str, Any] = {}
    for line in stats:
        latest |= {key: value for key, value in line.items() if value is not None}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in latest.items()
    )


def _follow(out: Path) -> None:
    """Show a run until it ends; it is another process's, and an interrupt leaves it alone."""
    watch = watcher(out)
    while is_running(out):
        model_management.throw_exception_if_processing_interrupted()
        watch()
        time.sleep(POLL_S)


class TrainingMonitor(io.ComfyNode):
    """The files of a run -> IMAGEs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterTrainingMonitor",
            display_name="Training Monitor",
            description="Loss curve and sample frames of a training run; one that runs is shown "
            "live.",
            search_aliases=["loss curve", "training progress"],
            inputs=[
                io.String.Input(
                    "run_name",
                    tooltip="From a trainer, or the name of a folder in output/stylemaster/runs.",
                ),
                io.Boolean.Input(
                    "follow",
                    default=True,
                    optional=True,
                    tooltip="Show a run of another process live until it ends; off takes it as it "
                    "is now.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="loss_curve", tooltip="Loss over the steps."),
                io.Image.Output(
                    display_name="samples",
                    tooltip="Sample pictures, the oldest first; nothing runs after it if there "
                    "are none.",
                ),
                io.String.Output(display_name="report", tooltip="The latest numbers."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, run_name: str | None, **_others: Any) -> str | float:
        if run_name is None:  # it comes through a link, and is not known yet
            return math.nan
        out = work_folder("runs", run_name)
        stats = out / STATS
        return fingerprint(stats) if stats.is_file() and not is_running(out) else math.nan

    @classmethod
    def execute(cls, run_name: str, follow: bool = True) -> io.NodeOutput:
        out = work_folder("runs", run_name)
        if follow:
            _follow(out)
        stats = read_stats(out)
        if not stats:
            raise ConfigError(f"{out} holds no {STATS}; give the run_name of a trainer")
        samples = _samples_image(out, stats)
        return io.NodeOutput(
            curve_image(stats),
            ExecutionBlocker(None) if samples is None else samples,
            _report(stats),
            ui=ui.PreviewImage(picture_image(run_picture(out, stats)), cls=cls),
        )


NODES = [TrainingMonitor]
