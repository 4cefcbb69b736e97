"""`stylemaster train`: train a part of StyleMaster from a cache of encoded samples."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedHostError, WeightsError

TRAINERS = {
    "global-projection": "the MLP on CLIP's image embedding, on illusion pairs",
    "style": "k_img, v_img, norm_k_img and the style model, on pictures, then on clips",
    "motion": "the motion adapter, a LoRA, on still clips",
    "control": "the gray-tile ControlNet",
    "base": "a small base transformer, from text alone",
    "stylecrafter": "a StyleCrafter adapter for Wan, on pictures",
    "stylecrafter-video": "a LoRA by which a StyleCrafter adapter serves videos, on clips",
    "videocrafter-adapter": "a StyleCrafter adapter for VideoCrafter, on pictures",
    "videocrafter-temporal": "VideoCrafter's layers of time, under a StyleCrafter adapter",
}
SHORT = {"steps": "run.num_steps", "batch_size": "run.batch_size", "seed": "run.seed"}
SHORT |= {"lr": "optimizer.lr", "accumulation": "run.accumulation"}
FILES = ("base", "adapter", "controlnet", "motion_adapter", "temporal", "global_projection")
NEVER_DROP_STYLE = ("global-projection", "motion", "base")
STOPPED = 130


def add_parser(subparsers: Any) -> None:
    """Add `train` to the command line."""
    parser = subparsers.add_parser("train", description=__doc__)
    trainers = parser.add_subparsers(dest="trainer", required=True, metavar="TRAINER")
    for name, what in TRAINERS.items():
        _add_trainer(trainers.add_parser(name, help=what, description=f"Train {what}."))


def _add_trainer(parser: argparse.ArgumentParser) -> None:
    kept = "checkpoints that are whole stay; --resume goes on from the latest"
    parser.set_defaults(run=run, kept=kept)
    parser.add_argument("config", nargs="?", help="preset or JSON file; default: the preset")
    parser.add_argument("--data", type=Path, required=True, metavar="CACHE", help="encoded samples")
    parser.add_argument("--validation-data", type=Path, metavar="CACHE", help="held-out samples")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--cpu", action="store_true", help="stay off the GPU")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument(
        "--skip-weight-check", action="store_true", help="do not look for NaN in the weights"
    )
    settings = parser.add_argument_group("settings")
    for option in SHORT:
        settings.add_argument(f"--{option.replace('_', '-')}", metavar="N")
    settings.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="any setting, such as optimizer.ema_decay=0.999; may be given several times",
    )
    weights = parser.add_argument_group("weights to start from")
    weights.add_argument(
        "--model",
        choices=("tiny", "tiny-stylecrafter"),
        help="go on from the small model that comes with this package, trained as it was; files "
        "that are named take the place of its own",
    )
    for option in FILES:
        weights.add_argument(f"--{option.replace('_', '-')}", type=Path, metavar="PATH")
    encoders = parser.add_argument_group("encoders")
    encoders.add_argument("--vae", type=Path, help="for samples (run.sample_every)")
    encoders.add_argument(
        "--text-encoder", type=Path, help="for the empty prompt, where the cache lacks it"
    )
    encoders.add_argument("--tokenizer", type=Path, help="of the text encoder")


def run(args: argparse.Namespace) -> int:
    """Run `stylemaster train`; 130 if it was asked to stop before the end."""
    from ..training.checks import check_hashes
    from ..training.config import DEFAULT_PRESET, override, read_config
    from ..training.dry_run import describe
    from ..training.loop import train
    from ..training.setup import TrainingFiles, create_trainer
    from .small_model import small_model_files, small_model_settings

    name: Any = args.config or DEFAULT_PRESET.get(args.trainer, args.trainer)
    config = read_config(name)
    if config.trainer != args.trainer:
        raise ConfigError(
            f"{args.config} is a config for the trainer {config.trainer!r}, not {args.trainer!r}; "
            "name a config for it"
        )
    small = []
    if args.model:
        for option, path in small_model_files(args.trainer, args.model).items():
            if getattr(args, option) is None:
                setattr(args, option, path)
        # A config that is named says all by itself.
        small = [] if args.config else small_model_settings(args.trainer)
    shortcuts = [f"{n}={getattr(args, o)}" for o, n in SHORT.items() if getattr(args, o)]
    config = override(config, [*small, *shortcuts, *args.set])
    for option in (*FILES, "vae", "text_encoder", "tokenizer"):
        path = getattr(args, option)
        if path is not None and not path.exists():
            raise WeightsError(f"--{option.replace('_', '-')}: {path} does not exist")
    _quiet_other_processes()
    _check_launch(args.cpu)
    config = _settle(config, args)
    data = _open(args.data, args.trainer)
    validation = None if args.validation_data is None else _open(args.validation_data, args.trainer)
    encoders = {"vae": args.vae, "text_encoder": args.text_encoder}
    data.check_encoders({name: path for name, path in encoders.items() if path})
    if validation is not None:
        check_hashes(data.hashes, validation.hashes, "the validation data")
    drops_text = config.trainer != "global-projection" and (
        config.flow.drop_text > 0
        or (config.trainer not in NEVER_DROP_STYLE and config.style.drop_both > 0)
        or (config.run.sample_every > 0 and config.run.sample_text_scale != 1)
    )
    null_text = _null_text(args, data) if drops_text else None
    files = TrainingFiles(**{name: getattr(args, name) for name in FILES})
    if args.dry_run:
        trainer = create_trainer(config, files, data, null_text=null_text, meta=True)
        sys.stdout.write(describe(trainer, data, _num_processes()) + "\n")
        return 0
    trainer = create_trainer(
        config, files, data, null_text=null_text, skip_check=args.skip_weight_check
    )
    result = train(
        trainer,
        data,
        args.out,
        validation=validation,
        resume=args.resume,
        cpu=args.cpu,
        decode=_decoder(config.trainer, args.vae, args.cpu) if config.run.sample_every else None,
        progress=not args.no_progress,
    )
    return 0 if result.finished else STOPPED


def _settle(config: Any, args: argparse.Namespace) -> Any:
    """The config with a precision of its own, the same in all processes."""
    from accelerate.utils import broadcast_object_list

    from ..pipelines.models import choose_device
    from ..training.precision import settle_precision

    device = choose_device("cpu" if args.cpu else "auto")
    config = settle_precision(config, device, args.out if args.resume else None)
    return broadcast_object_list([config])[0] if _num_processes() > 1 else config


def _open(path: Path, trainer: str) -> Any:
    from ..data.cache import CachedDataset

    kind = "pairs" if trainer == "global-projection" else "samples"
    return CachedDataset(path, kind=kind, bucket=True)


def _null_text(args: argparse.Namespace, data: Any) -> Any:
    """Features of the empty prompt: of the cache, or made once and kept beside the run."""
    import torch

    from ..dtypes import choose_dtype
    from ..models.text_encoder import load_text_encoder
    from ..weights.files import read_state_dict, write_state_dict

    found = getattr(data, "null_text", None)
    if found is not None:
        return found
    kept = args.out / "null_text.safetensors"
    expected = {"text_encoder": data.hashes.get("text_encoder", "")}
    if kept.is_file():
        file = read_state_dict(kept)
        if file.metadata == expected:
            return file.tensors["null_text"]
    if args.text_encoder is None:
        raise ConfigError(
            "text dropout needs the features of the empty prompt, and the cache lacks them; give "
            "--text-encoder (it is used once), or set flow.drop_text=0 and style.drop_both=0"
        )
    dtype = choose_dtype("auto", torch.device("cpu"))
    encoder = load_text_encoder(args.text_encoder, args.tokenizer, dtype=dtype)
    features = encoder.encode([""])[0]
    length = int(features.ne(0).any(-1).nonzero().max()) + 1 if features.any() else 1
    features = features[:length].float().contiguous()
    if not args.dry_run:
        write_state_dict(kept, {"null_text": features}, expected, overwrite=True)
    return features


def _decoder(trainer: str, vae: Path | None, cpu: bool) -> Callable[[Any], Any] | None:
    if vae is None:
        return None
    from ..layouts import video_to_frames
    from ..pipelines.models import choose_device

    device = choose_device("cpu" if cpu else "auto")
    model = _open_vae(trainer, vae, device)

    def decode(latents: Any) -> Any:
        # Only for the moment on the GPU, whose memory the training needs.
        model.to(device)
        try:
            return video_to_frames(model.decode(latents.to(device)))
        finally:
            model.to("cpu")

    return decode


def _open_vae(trainer: str, path: Path, device: Any) -> Any:
    from ..dtypes import choose_dtype
    from ..models.vae import load_vae

    if trainer.startswith("videocrafter"):
        from ..pipelines.stylize_videocrafter import load_frame_vae

        return load_frame_vae(path)
    return load_vae(path, device="cpu", dtype=choose_dtype("auto", device))


def _num_processes() -> int:
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_launch(cpu: bool) -> None:
    """Refuse what accelerate would quietly do in another way than its config says.

    Raises:
        UnsupportedHostError: if it would not spread the weights, or lets every process train alone.
    """
    import os

    from accelerate import PartialState

    from ..training.sharding import knows_fsdp_2

    spreads = any(os.environ.get(f"ACCELERATE_USE_{k}") == "true" for k in ("FSDP", "DEEPSPEED"))
    if spreads and cpu:
        raise UnsupportedHostError(
            "accelerate spreads weights (FSDP, DeepSpeed) over GPUs alone; leave out --cpu, or use "
            "a config of plain data parallelism"
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not knows_fsdp_2():
        raise UnsupportedHostError(
            "FSDP 2 needs PyTorch 2.6 and accelerate 1.6 or newer; update them, or use a config of "
            "plain data parallelism"
        )
    wanted = _num_processes()
    if wanted > 1 and PartialState(cpu=cpu).num_processes != wanted:
        raise UnsupportedHostError(
            f"{wanted} processes were started, and accelerate finds no GPUs for them; give --cpu, "
            "or start one process"
        )


def _quiet_other_processes() -> None:
    """Let only the first of several processes say what is being done."""
    import os

    if int(os.environ.get("RANK", "0")) > 0:
        logging.getLogger("stylemaster").setLevel(logging.WARNING)
