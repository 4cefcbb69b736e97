"""Nodes that train: each starts `stylemaster train` and ends with a file that a loader lists."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker
from PIL import Image

from ..stylemaster_core.data.images import read_image
from ..stylemaster_core.errors import ConfigError
from ..stylemaster_core.training.checkpoint import latest_checkpoint
from ..stylemaster_core.training.config import PRESETS
from ..stylemaster_core.training.stats import NAME as STATS
from ..stylemaster_core.training.stats import read_stats
from ..stylemaster_core.training.stop import STOP_FILE
from .layouts import frames_to_image, pictures_to_image
from .loss_curve import draw_loss_curve
from .paths import ADAPTERS, fingerprint, model_file, model_names
from .sockets import schema
from .subprocesses import device_is_cpu, run_core
from .training_files import (
    Cache,
    CacheSocket,
    new_model_file,
    place_model,
    refuse_existing,
    work_folder,
)

NEW = "new"  # no weights to start from
BASE_FOLDER = "diffusion_models"
CHECKPOINTS = "checkpoints"
PREVIEW_PX = 640


@dataclass(frozen=True)
class RunSettings:
    """The inputs that all trainers share; `_run_inputs` explains them."""

    file_name: str
    run_name: str
    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    seed: int
    save_every: int
    sample_every: int
    resume: bool
    settings: str


def _run_inputs(preset: str, file_name: str, folder: str) -> list[io.Input]:
    run, optimizer = PRESETS[preset].run, PRESETS[preset].optimizer
    return [
        io.String.Input(
            "file_name",
            default=file_name,
            tooltip=f"Name of the trained file in models/{folder}; an existing one is never "
            "overwritten.",
        ),
        io.String.Input(
            "run_name",
            default=file_name,
            tooltip="Folder of checkpoints and losses in output/stylemaster/runs.",
        ),
        io.Int.Input(
            "steps",
            default=run.num_steps,
            min=1,
            max=10000000,
            tooltip="Optimiser steps in all, those before a resume included.",
        ),
        io.Int.Input(
            "batch_size", default=run.batch_size, min=1, max=4096, tooltip="Samples at once."
        ),
        io.Int.Input(
            "accumulation",
            default=run.accumulation,
            min=1,
            max=4096,
            tooltip="Passes of so many samples before each optimiser step.",
        ),
        io.Float.Input(
            "learning_rate",
            default=optimizer.lr,
            min=1e-8,
            max=1.0,
            step=1e-6,
            round=False,
            tooltip="Highest learning rate of AdamW.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31 - 1,
            tooltip="Of new weights, order of samples, noise and dropout.",
        ),
        io.Int.Input(
            "save_every",
            default=run.save_every,
            min=1,
            max=10000000,
            tooltip="Steps between checkpoints; an interrupt writes one, too.",
        ),
        io.Int.Input(
            "sample_every",
            default=0,
            min=0,
            max=10000000,
            tooltip="Steps between sample pictures, which Training Monitor shows; 0 makes none. "
            "The global projection has none.",
        ),
        io.Boolean.Input(
            "resume",
            default=True,
            tooltip="Go on from the latest checkpoint of the run, or begin if there is none.",
        ),
        io.String.Input(
            "settings",
            default="",
            multiline=True,
            tooltip="More settings, one a line, such as optimizer.ema_decay=0.999 or "
            "run.precision=float32. Others are the preset's.",
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.String.Output(display_name="file_name", tooltip="Name of the trained file."),
        io.String.Output(display_name="run_name", tooltip="For Training Monitor."),
        io.Image.Output(display_name="loss_curve", tooltip="Loss over the steps."),
    ]


def _base_input() -> io.Input:
    return io.Combo.Input(
        "base_model",
        options=model_names(BASE_FOLDER),
        tooltip="Wan 2.1 text-to-video model in models/diffusion_models; it stays as it is.",
    )


def _start_input(name: str, categories: Sequence[str], what: str) -> io.Input:
    return io.Combo.Input(
        name,
        options=[NEW, *model_names(*categories)],
        default=NEW,
        tooltip=f"{what} to start from; '{NEW}' begins with new weights.",
    )


def _start_files(**chosen: tuple[str, Sequence[str]]) -> dict[str, Path]:
    """Paths of weights by option, those that are to be new left out."""
    return {
        option: model_file(name, *categories)
        for option, (name, categories) in chosen.items()
        if name != NEW
    }


def run_training(
    cls: type[io.ComfyNode],
    trainer: str,
    preset: str,
    cache: Cache,
    trained: str,
    category: str,
    files: Mapping[str, Path],
    run: RunSettings,
    more: Sequence[str] = (),
) -> io.NodeOutput:
    """Train, and put the trained file where the loaders look.

    Args:
        cls: the node.
        trainer: as `stylemaster train` calls it.
        preset: its settings.
        cache: what to train on.
        trained: name of the file that the trainer writes into its run.
        category: model folder for that file.
        files: weights to start from, by option.
        run: the node's inputs.
        more: settings of this trainer.
    """
    out = work_folder("runs", run.run_name)
    target = new_model_file(category, run.file_name)
    finished = run.resume and _steps_done(out) >= run.steps
    if not (finished and target.is_file() and _same(out / trained, target)):
        refuse_existing(target)
        words = _command(trainer, preset, cache, out, files, run, more)
        run_core(words, _watcher(out, run.steps), stop_file=out / STOP_FILE)
        place_model(out / trained, target)
    curve = _curve_image(read_stats(out))
    return io.NodeOutput(target.name, run.run_name, curve, ui=ui.PreviewImage(curve, cls=cls))


def _steps_done(out: Path) -> int:
    latest = latest_checkpoint(out / CHECKPOINTS)
    return 0 if latest is None else int(latest.name.removeprefix("step-"))


def _same(a: Path, b: Path) -> bool:
    return a.is_file() and filecmp.cmp(a, b, shallow=False)


def _command(
    trainer: str,
    preset: str,
    cache: Cache,
    out: Path,
    files: Mapping[str, Path],
    run: RunSettings,
    more: Sequence[str],
) -> list[str]:
    options: dict[str, Any] = {
        "data": cache.path,
        "out": out,
        "steps": run.steps,
        "batch-size": run.batch_size,
        "accumulation": run.accumulation,
        "lr": run.learning_rate,
        "seed": run.seed,
        **{name.replace("_", "-"): path for name, path in files.items()},
    }
    if trainer != "global-projection":  # its cache holds pairs, of which CLIP alone made features
        options |= {"text-encoder": cache.text_encoder, "vae": cache.vae}
    settings = [f"run.save_every={run.save_every}", f"run.sample_every={run.sample_every}", *more]
    settings += [line.strip() for line in run.settings.splitlines() if line.strip()]
    words = ["train", trainer, preset, *(f"--{name}={value}" for name, value in options.items())]
    words += [f"--set={setting}" for setting in settings]
    words += ["--resume"] if run.resume else []
    words += ["--cpu"] if device_is_cpu() else []
    return [*words, "--no-progress"]


def _watcher(out: Path, steps: int) -> Any:
    """Shows the step and the loss curve in the node whenever there is a new line of numbers."""
    bar, seen = ProgressBar(steps), [""]

    def watch() -> None:
        path = out / STATS
        state = fingerprint(path) if path.is_file() else ""
        if state != seen[0]:
            seen[0] = state
            stats = read_stats(out)
            step = max((line["step"] for line in stats), default=0)
            bar.update_absolute(step, steps, ("JPEG", draw_loss_curve(stats), PREVIEW_PX))

    return watch


def _curve_image(stats: Sequence[Mapping[str, Any]]) -> Any:
    return frames_to_image(np.array(draw_loss_curve(stats))[None])


class TrainGlobalProjection(io.ComfyNode):
    """STYLE_CACHE of pairs -> a file in models/stylemaster."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterTrainGlobalProjection",
            display_name="Train Global Projection",
            description="Trains the projection of CLIP's image embedding on illusion pairs: "
            "pictures of one style come near each other, those of others go apart.",
            search_aliases=["contrastive training", "style embedding training"],
            inputs=[
                CacheSocket.Input("cache", tooltip="Encoded pairs of Illusion Dataset."),
                *_run_inputs("global-projection", "global_projection", ADAPTERS),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, cache: Cache, **run: Any) -> io.NodeOutput:
        trainer = "global-projection"
        trained = "global_projection.safetensors"
        return run_training(cls, trainer, trainer, cache, trained, ADAPTERS, {}, RunSettings(**run))


class TrainStyle(io.ComfyNode):
    """STYLE_CACHE -> a style adapter in models/stylemaster."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterTrainStyle",
            display_name="Train Style",
            description="Trains a style adapter: the style model, and K and V of every block.",
            search_aliases=["train ip adapter", "style adapter training"],
            inputs=[
                CacheSocket.Input("cache", tooltip="Encoded pictures, or clips for the 2nd stage."),
                _base_input(),
                io.Combo.Input(
                    "stage",
                    options=["style-images", "style-clips"],
                    tooltip="Preset: first on pictures, then, from that adapter, on clips.",
                ),
                _start_input("adapter", [ADAPTERS], "Style adapter"),
                _start_input(
                    "global_projection", [ADAPTERS], "Global projection of its own trainer"
                ),
                *_run_inputs("style-images", "style_adapter", ADAPTERS),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        cache: Cache,
        base_model: str,
        stage: str,
        adapter: str,
        global_projection: str,
        **run: Any,
    ) -> io.NodeOutput:
        files = _start_files(
            base=(base_model, [BASE_FOLDER]),
            adapter=(adapter, [ADAPTERS]),
            global_projection=(global_projection, [ADAPTERS]),
        )
        trained = "style_adapter.safetensors"
        return run_training(
            cls, "style", stage, cache, trained, ADAPTERS, files, RunSettings(**run)
        )


class TrainMotionAdapter(io.ComfyNode):
    """STYLE_CACHE of still clips -> a LoRA in models/loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterTrainMotionAdapter",
            display_name="Train Motion Adapter",
            description="Trains a motion adapter, a LoRA on the self-attention, on still clips.",
            search_aliases=["train lora", "still video training", "motion lora training"],
            inputs=[
                CacheSocket.Input(
                    "cache", tooltip="Encoded still clips: Dataset with still_frames above 0."
                ),
                _base_input(),
                _start_input("motion_adapter", ["loras", ADAPTERS], "Motion adapter"),
                io.Int.Input(
                    "rank",
                    default=PRESETS["motion"].motion.rank,
                    min=1,
                    max=1024,
                    tooltip="Of the LoRA; one to start from has its own.",
                ),
                *_run_inputs("motion", "motion_adapter", "loras"),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, cache: Cache, base_model: str, motion_adapter: str, rank: int, **run: Any
    ) -> io.NodeOutput:
        files = _start_files(
            base=(base_model, [BASE_FOLDER]), motion_adapter=(motion_adapter, ["loras", ADAPTERS])
        )
        trained, rank_setting = "motion_adapter.safetensors", [f"motion.rank={rank}"]
        return run_training(
            cls,
            "motion",
            "motion",
            cache,
            trained,
            "loras",
            files,
            RunSettings(**run),
            rank_setting,
        )


class TrainGrayTileControl(io.ComfyNode):
    """STYLE_CACHE with gray tiles -> a ControlNet in models/controlnet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterTrainGrayTileControl",
            display_name="Train Gray-Tile Control",
            description="Trains the gray-tile ControlNet, which keeps the content of a video.",
            search_aliases=["train controlnet", "tile controlnet training"],
            inputs=[
                CacheSocket.Input("cache", tooltip="Encoded clips, with gray_tile."),
                _base_input(),
                _start_input("controlnet", ["controlnet", ADAPTERS], "Gray-tile ControlNet"),
                *_run_inputs("control", "gray_tile_controlnet", "controlnet"),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, cache: Cache, base_model: str, controlnet: str, **run: Any) -> io.NodeOutput:
        files = _start_files(
            base=(base_model, [BASE_FOLDER]), controlnet=(controlnet, ["controlnet", ADAPTERS])
        )
        trained = "controlnet.safetensors"
        return run_training(
            cls, "control", "control", cache, trained, "controlnet", files, RunSettings(**run)
        )


class TrainingMonitor(io.ComfyNode):
    """The files of a run -> IMAGEs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterTrainingMonitor",
            display_name="Training Monitor",
            description="Loss curve and sample pictures of a training run, finished or not.",
            search_aliases=["loss curve", "training progress"],
            inputs=[
                io.String.Input(
                    "run_name", tooltip="From a trainer, or the name of a run that was interrupted."
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
    def fingerprint_inputs(cls, run_name: str | None) -> str | float:
        if run_name is None:  # it comes through a link, and is not known yet
            return math.nan
        stats = work_folder("runs", run_name) / STATS
        return fingerprint(stats) if stats.is_file() else math.nan

    @classmethod
    def execute(cls, run_name: str) -> io.NodeOutput:
        out = work_folder("runs", run_name)
        stats = read_stats(out)
        if not stats:
            raise ConfigError(f"{out} holds no {STATS}; give the run_name of a trainer")
        curve = _curve_image(stats)
        samples = _samples(out, stats)
        shown = curve if samples is None else samples[-1:]
        return io.NodeOutput(
            curve,
            ExecutionBlocker(None) if samples is None else samples,
            _report(stats),
            ui=ui.PreviewImage(shown, cls=cls),
        )


def _samples(out: Path, stats: Sequence[Mapping[str, Any]]) -> Any:
    """Sheets of sample frames [N, H, W, 3] of the size of the latest, or None."""
    paths = [out / line["sample"] for line in stats if "sample" in line]
    sheets = [read_image(path) for path in paths if path.is_file()]
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
    return ", ".join(f"{key} {value}" for key, value in latest.items())


NODES = [
    TrainGlobalProjection,
    TrainStyle,
    TrainMotionAdapter,
    TrainGrayTileControl,
    TrainingMonitor,
]
