"""Samples in several files, drawn on all cores; what is there already is not drawn again."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.vae import load_vae

from .samples import (
    TinySamples,
    draw_samples,
    join_samples,
    read_samples,
    write_samples,
)

logger = logging.getLogger("stylemaster")

SHARD_STYLES = 250


def draw_shards(prefix: Path, numbers: range, models: Path, **options: Any) -> None:
    """Draw samples into files `PREFIX-000250.safetensors` and so on.

    Args:
        prefix: folder, and how the names begin.
        numbers: of the styles, by which the files are named.
        models: folder of the recipe, whose `vae` and `encoder` encode the samples.
        options: of `draw_samples`.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    starts = numbers[::SHARD_STYLES]
    jobs = [
        (_path(prefix, start), models, range(start, end), options)
        for start, end in zip(starts, [*starts[1:], numbers.stop], strict=True)
        if not _path(prefix, start).exists()
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for path in pool.map(_draw, jobs):
            logger.info("drew %s", path.name)


def read_shards(prefix: Path) -> TinySamples:
    """The samples of all files of a prefix."""
    paths = sorted(prefix.parent.glob(f"{prefix.name}-*.safetensors"))
    return join_samples([read_samples(path) for path in paths])


def _path(prefix: Path, start: int) -> Path:
    return prefix.with_name(f"{prefix.name}-{start:06d}.safetensors")


def _draw(job: tuple[Path, Path, range, dict[str, Any]]) -> Path:
    path, models, numbers, options = job
    torch.set_num_threads(1)
    samples = draw_samples(
        numbers,
        load_vae(models / "vae" / "vae.safetensors"),
        load_image_encoder(models / "encoder"),
        name=path.stem,
        **options,
    )
    write_samples(path, samples)
    return path
