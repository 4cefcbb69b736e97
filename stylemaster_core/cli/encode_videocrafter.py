"""`stylemaster data encode --model videocrafter`: samples for the trainers on VideoCrafter."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .stylecrafter_options import find_models
from .stylize_videocrafter import DEFAULT_FILES, HELP

if TYPE_CHECKING:
    from ..data.cache_writer import CachePlan
    from ..data.samples import Sample

SIZE = (320, 512)
FPS = 8.0  # that the release tells its UNet
ENCODERS = ("vae", "text_encoder", "image_encoder")


def videocrafter_plan(args: argparse.Namespace, samples: list[Sample]) -> CachePlan[Any, Any]:
    """What goes into the cache; the encoders are loaded.

    Raises:
        ConfigError: for options that mean nothing here.
        WeightsError: for missing or unfitting files.
    """
    from ..data.cache import hash_models
    from ..data.cache_writer import CachePlan, Entry
    from ..data.clips import ClipConfig
    from ..data.encode import EncodeConfig
    from ..data.encode_videocrafter import (
        VideoCrafterEncoders,
        encode_empty_prompt,
        encode_videocrafter_sample,
        load_videocrafter_pixels,
        videocrafter_sample_bytes,
    )
    from ..models.image_encoder import load_image_encoder
    from ..pipelines.models import choose_device
    from ..pipelines.stylize_videocrafter import NUM_FRAMES, load_frame_vae, load_text_encoder
    from ..weights.numbers import check_module

    if args.tile or args.tile_factor is not None or args.crop != "center":
        raise ConfigError(
            "--tile, --tile-factor and --crop mean nothing with --model videocrafter, which has no "
            "gray tile and prepares style pictures in a way of its own; leave them out"
        )
    clip = ClipConfig(
        sizes=tuple(args.size or [SIZE]),
        num_frames=NUM_FRAMES if args.frames is None else args.frames,
        fps=(FPS if args.fps is None else args.fps) or None,
        short=args.short,
        frame_stride=1,
    )
    config = EncodeConfig(clip, seed=args.seed, dtype=args.store_dtype)
    files = find_models(args, {n: DEFAULT_FILES[n] for n in ENCODERS}, HELP, dict)
    device = choose_device(args.device)
    skip = args.skip_weight_check
    image_encoder = load_image_encoder(files["image_encoder"], device=device)
    if not skip:
        check_module(image_encoder.model, files["image_encoder"])
    encoders = VideoCrafterEncoders(
        load_frame_vae(files["vae"], skip_check=skip).to(device),
        load_text_encoder(files["text_encoder"], device=device, skip_check=skip),
        image_encoder,
    )
    settings = asdict(clip) | {"model": args.model, "seed": args.seed, "dtype": args.store_dtype}
    return CachePlan(
        kind="samples",
        items=[(Entry(s.id, str(s.media), s.description), s) for s in samples],
        load=lambda sample: load_videocrafter_pixels(sample, config),
        encode=lambda sample, pixels: encode_videocrafter_sample(
            sample, pixels, encoders, config.dtype
        ),
        hashes=hash_models(files),
        settings=settings,
        shard_size=args.shard_size,
        bytes_of=lambda sample: videocrafter_sample_bytes(sample, config),
        null_text=lambda: encode_empty_prompt(encoders.text_encoder, config.dtype),
    )
