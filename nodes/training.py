"""Nodes that train: each starts `stylemaster train` and ends with a file that a loader lists."""

from __future__ import annotations

import dataclasses
import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..stylemaster_core.training.checkpoint import latest_checkpoint
from ..stylemaster_core.training.config import PRESETS
from ..stylemaster_core.training.stats import read_stats
from ..stylemaster_core.training.stop import STOP_FILE
from .paths import ADAPTERS, check_choice, model_file, model_names
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
from .training_monitor import curve_image, picture_image, run_picture, watcher

NEW = "new"  # no weights to start from
CHECKPOINTS = "checkpoints"
# Where the weights that training starts from are, by input.
FOLDERS = {
    "base_model": ["diffusion_models"],
    "adapter": [ADAPTERS],
    "global_projection": [ADAPTERS],
    "motion_adapter": ["loras", ADAPTERS],
    "controlnet": ["controlnet", ADAPTERS],
}


@dataclass(frozen=True)
class Trainer:
    """What the nodes know about a trainer."""

    name: str  # as `stylemaster train` calls it
    preset: str  # its settings
    trained: str  # the file that it writes into the folder of its run
    folder: str  # of models, for that file


GLOBAL_PROJECTION = Trainer(
    "global-projection", "global-projection", "global_projection.safetensors", ADAPTERS
)
STYLE = Trainer("style", "style-images", "style_adapter.safetensors", ADAPTERS)
STYLE_STAGES = ["style-images", "style-clips"]  # presets
MOTION = Trainer("motion", "motion", "motion_adapter.safetensors", "loras")
CONTROL = Trainer("control", "control", "controlnet.safetensors", "controlnet")
STYLECRAFTER_FILE = "stylecrafter_adapter.safetensors"
STYLECRAFTER = {  # by its preset
    trainer.preset: trainer
    for trainer in (
        Trainer("stylecrafter", "stylecrafter-images", STYLECRAFTER_FILE, ADAPTERS),
        Trainer("stylecrafter", "stylecrafter-scales", STYLECRAFTER_FILE, ADAPTERS),
        Trainer(
            "stylecrafter-video",
            "stylecrafter-clips",
            "stylecrafter_video_lora.safetensors",
            "loras",
        ),
    )
}


@dataclass(frozen=True)
class RunSettings:
    """The inputs that all trainers share; `_trainer_schema` explains them."""

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


def _trainer_schema(
    trainer: Trainer,
    file_name: str,
    *,
    cache: str,
    own: Sequence[io.Input] = (),
    folder: str | None = None,
    **texts: Any,
) -> io.Schema:
    """Schema of a trainer's node.

    Args:
        trainer: whose preset has the defaults.
        file_name: default.
        cache: what it is to hold.
        own: inputs that not all trainers have.
        folder: what to say of it where it depends on other inputs.
        texts: of the node.
    """
    run, optimizer = PRESETS[trainer.preset].run, PRESETS[trainer.preset].optimizer
    inputs = [
        CacheSocket.Input("cache", tooltip=cache),
        *own,
        io.String.Input(
            "file_name",
            default=file_name,
            tooltip=f"Name of the trained file in models/{folder or trainer.folder}; an existing "
            "one is never overwritten.",
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
            control_after_generate=False,  # a run goes on with its own seed alone
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
            tooltip="Steps between sample pictures, which this node shows while it runs, and "
            "Training Monitor; 0 makes none. The global projection has none.",
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
    outputs = [
        io.String.Output(display_name="file_name", tooltip="Name of the trained file."),
        io.String.Output(display_name="run_name", tooltip="For Training Monitor."),
        io.Image.Output(display_name="loss_curve", tooltip="Loss over the steps."),
    ]
    return schema(inputs=inputs, outputs=outputs, is_output_node=True, **texts)


def _base_input() -> io.Input:
    return io.Combo.Input(
        "base_model",
        options=model_names(*FOLDERS["base_model"]),
        tooltip="Wan 2.1 text-to-video model in models/diffusion_models; it stays as it is.",
    )


def _start_input(name: str, what: str) -> io.Input:
    return io.Combo.Input(
        name,
        options=[NEW, *model_names(*FOLDERS[name])],
        default=NEW,
        tooltip=f"{what} to start from; '{NEW}' begins with new weights.",
    )


def run_training(
    cls: type[io.ComfyNode],
    trainer: Trainer,
    cache: Cache,
    run: RunSettings,
    start: Mapping[str, str] | None = None,
    settings: Sequence[str] = (),
) -> io.NodeOutput:
    """Train, and put the trained file where the loaders look.

    Args:
        cls: the node.
        trainer: to run.
        cache: what to train on.
        run: the inputs that all trainers share.
        start: names of the weights to start from, by input.
        settings: of this trainer alone.
    """
    out = work_folder("runs", run.run_name)
    target = new_model_file(trainer.folder, run.file_name)
    trained = out / trainer.trained
    finished = run.resume and _steps_done(out) >= run.steps
    if not (finished and target.is_file() and _same(trained, target)):
        refuse_existing(target)
        words = _command(trainer, cache, out, run, start or {}, settings)
        run_core(words, watcher(out), stop_file=out / STOP_FILE)
        place_model(trained, target)
    stats = read_stats(out)
    shown = ui.PreviewImage(picture_image(run_picture(out, stats)), cls=cls)
    return io.NodeOutput(target.name, run.run_name, curve_image(stats), ui=shown)


def _steps_done(out: Path) -> int:
    latest = latest_checkpoint(out / CHECKPOINTS)
    return 0 if latest is None else int(latest.name.removeprefix("step-"))


def _same(a: Path, b: Path) -> bool:
    return a.is_file() and filecmp.cmp(a, b, shallow=False)


def _command(
    trainer: Trainer,
    cache: Cache,
    out: Path,
    run: RunSettings,
    start: Mapping[str, str],
    settings: Sequence[str],
) -> list[str]:
    options: dict[str, Any] = {
        "data": cache.path,
        "out": out,
        "steps": run.steps,
        "batch-size": run.batch_size,
        "accumulation": run.accumulation,
        "lr": run.learning_rate,
        "seed": run.seed,
    }
    for name, chosen in start.items():
        if chosen != NEW:
            option = "base" if name == "base_model" else name.replace("_", "-")
            options[option] = model_file(chosen, *FOLDERS[name])
    if trainer is not GLOBAL_PROJECTION:  # its cache holds pairs, of which CLIP alone made features
        options |= {"text-encoder": cache.text_encoder, "vae": cache.vae}
    more = [line.strip() for line in run.settings.splitlines() if line.strip()]
    settings = [
        f"run.save_every={run.save_every}",
        f"run.sample_every={run.sample_every}",
        *settings,
        *more,
    ]
    words = ["train", trainer.name, trainer.preset]
    words += [f"--{name}={value}" for name, value in options.items()]
    words += [f"--set={setting}" for setting in settings]
    words += ["--resume"] if run.resume else []
    words += ["--cpu"] if device_is_cpu() else []
    return [*words, "--no-progress"]


class TrainGlobalProjection(io.ComfyNode):
    """STYLE_CACHE of pairs -> a file in models/stylemaster."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _trainer_schema(
            GLOBAL_PROJECTION,
            "global_projection",
            node_id="StyleMasterTrainGlobalProjection",
            display_name="Train Global Projection",
            description="Trains the projection of CLIP's image embedding on illusion pairs: "
            "pictures of one style come near each other, those of others go apart.",
            search_aliases=["contrastive training", "style embedding training"],
            cache="Encoded pairs of Illusion Dataset.",
        )

    @classmethod
    def execute(cls, cache: Cache, **run: Any) -> io.NodeOutput:
        return run_training(cls, GLOBAL_PROJECTION, cache, RunSettings(**run))


class TrainStyle(io.ComfyNode):
    """STYLE_CACHE -> a style adapter in models/stylemaster."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _trainer_schema(
            STYLE,
            "style_adapter",
            node_id="StyleMasterTrainStyle",
            display_name="Train Style",
            description="Trains a style adapter: the style model, and K and V of every block.",
            search_aliases=["train ip adapter", "style adapter training"],
            cache="Encoded pictures, or clips for the 2nd stage.",
            own=[
                _base_input(),
                io.Combo.Input(
                    "stage",
                    options=STYLE_STAGES,
                    tooltip="Preset: first on pictures, then, from that adapter, on clips.",
                ),
                _start_input("adapter", "Style adapter"),
                _start_input("global_projection", "Global projection of its own trainer"),
            ],
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
        check_choice(stage, STYLE_STAGES, "stage")
        trainer = dataclasses.replace(STYLE, preset=stage)
        start = {
            "base_model": base_model,
            "adapter": adapter,
            "global_projection": global_projection,
        }
        return run_training(cls, trainer, cache, RunSettings(**run), start)


class TrainMotionAdapter(io.ComfyNode):
    """STYLE_CACHE of still clips -> a LoRA in models/loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _trainer_schema(
            MOTION,
            "motion_adapter",
            node_id="StyleMasterTrainMotionAdapter",
            display_name="Train Motion Adapter",
            description="Trains a motion adapter, a LoRA on the self-attention, on still clips.",
            search_aliases=["train lora", "still video training", "motion lora training"],
            cache="Encoded still clips: Dataset with still_frames above 0.",
            own=[
                _base_input(),
                _start_input("motion_adapter", "Motion adapter"),
                io.Int.Input(
                    "rank",
                    default=PRESETS["motion"].motion.rank,
                    min=1,
                    max=1024,
                    tooltip="Of the LoRA; one to start from has its own.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, cache: Cache, base_model: str, motion_adapter: str, rank: int, **run: Any
    ) -> io.NodeOutput:
        start = {"base_model": base_model, "motion_adapter": motion_adapter}
        return run_training(cls, MOTION, cache, RunSettings(**run), start, [f"motion.rank={rank}"])


class TrainGrayTileControl(io.ComfyNode):
    """STYLE_CACHE with gray tiles -> a ControlNet in models/controlnet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _trainer_schema(
            CONTROL,
            "gray_tile_controlnet",
            node_id="StyleMasterTrainGrayTileControl",
            display_name="Train Gray-Tile Control",
            description="Trains the gray-tile ControlNet, which keeps the content of a video.",
            search_aliases=["train controlnet", "tile controlnet training"],
            cache="Encoded clips, with gray_tile.",
            own=[_base_input(), _start_input("controlnet", "Gray-tile ControlNet")],
        )

    @classmethod
    def execute(cls, cache: Cache, base_model: str, controlnet: str, **run: Any) -> io.NodeOutput:
        start = {"base_model": base_model, "controlnet": controlnet}
        return run_training(cls, CONTROL, cache, RunSettings(**run), start)


class TrainStyleCrafter(io.ComfyNode):
    """STYLE_CACHE -> a StyleCrafter adapter for Wan in models/stylemaster, or its LoRA in loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _trainer_schema(
            STYLECRAFTER["stylecrafter-images"],
            "stylecrafter_adapter",
            folder="stylemaster, of the 3rd stage in models/loras",
            node_id="StyleMasterTrainStyleCrafter",
            display_name="Train StyleCrafter",
            description="Trains a StyleCrafter adapter for Wan on pictures, then its predicted "
            "scales, then a LoRA by which it serves videos.",
            search_aliases=["train stylecrafter", "train ip adapter", "scale predictor training"],
            cache="Encoded pictures (other ones for the 2nd stage), or clips and pictures for the "
            "3rd.",
            own=[
                _base_input(),
                io.Combo.Input(
                    "stage",
                    options=list(STYLECRAFTER),
                    tooltip="Preset: first the adapter on pictures, then, from that adapter, its "
                    "scales, then the LoRA on clips.",
                ),
                _start_input("adapter", "StyleCrafter adapter"),
            ],
        )

    @classmethod
    def execute(
        cls, cache: Cache, base_model: str, stage: str, adapter: str, **run: Any
    ) -> io.NodeOutput:
        check_choice(stage, STYLECRAFTER, "stage")
        start = {"base_model": base_model, "adapter": adapter}
        return run_training(cls, STYLECRAFTER[stage], cache, RunSettings(**run), start)


NODES = [
    TrainGlobalProjection,
    TrainStyle,
    TrainMotionAdapter,
    TrainGrayTileControl,
    TrainStyleCrafter,
]
