"""Films of any length in constant memory: shots are restyled segment by segment, each on its own.

A segment is a clip of 4n+1 frames. Within a shot it begins with the last latent frames of the
segment before, which are known, so that it goes on from them; at a cut everything begins anew.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..layouts import TEMPORAL_STRIDE, padded_num_frames
from ..models.decoupled_attention import StyleRegion
from ..sampling.denoise import Callback
from ..sampling.windows import WindowConfig
from ..seeds import seed_of
from .models import Models
from .stylize import StylizeConfig, stylize


class Shot(NamedTuple):
    """Frames of a film between two cuts."""

    start: int
    stop: int  # not included


class Segment(NamedTuple):
    """Frames of a film that are sampled at once."""

    start: int
    stop: int  # not included
    overlap: int  # frames at the beginning that the segment before has, too
    shot: int  # from 0
    noise_frames: int  # latent frames of the shot's first segment


class RestyledSegment(NamedTuple):
    """Result of a segment."""

    frames: np.ndarray  # uint8 [T, H, W, 3] without the overlap
    lead: Tensor  # [1, 16, k, h, w] its last latents, from which the next one goes on


def shots_of(num_frames: int, cuts: Sequence[int]) -> list[Shot]:
    """Shots of a film.

    Args:
        num_frames: of the film.
        cuts: the first frame of each shot but the first one.

    Raises:
        ConfigError: if a cut lies outside of the film, or they are not in order.
    """
    borders = [0, *cuts, num_frames]
    for before, after in itertools.pairwise(borders):
        if before >= after:
            raise ConfigError(
                f"a cut at frame {after if after != num_frames else before} cannot be: cuts grow "
                f"from 1 to {num_frames - 1}, the last frame of the film"
            )
    return [Shot(*pair) for pair in itertools.pairwise(borders)]


def plan_segments(shots: Sequence[Shot], windows: WindowConfig) -> list[Segment]:
    """Segments of `windows.length` latent frames that cover every shot, the last one shorter.

    Args:
        shots: of the film.
        windows: how long a segment is, and by how much two of a shot overlap.

    Raises:
        ConfigError: without overlap.
    """
    if windows.overlap < 1:
        raise ConfigError(
            "segments go on from at least one latent frame of the one before: the overlap must be "
            f"at least {TEMPORAL_STRIDE} frames"
        )
    longest, overlap = (_num_frames(n) for n in (windows.length, windows.overlap))
    segments = []
    for number, shot in enumerate(shots):
        start, shared = shot.start, 0
        noise_frames = _num_latents(min(longest, shot.stop - shot.start))
        while True:
            stop = min(start + longest, shot.stop)
            segments.append(Segment(start, stop, shared, number, noise_frames))
            if stop == shot.stop:
                break
            start, shared = stop - overlap, overlap
    return segments


def stylize_film(
    models: Models,
    styles: Sequence[Sequence[StyleRegion] | None],
    config: StylizeConfig,
    segments: Sequence[Segment],
    frames: Iterable[np.ndarray],
    *,
    lead: Tensor | None = None,
    callback: Callback | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> Iterator[RestyledSegment]:
    """Restyle the segments of a film one by one.

    The same segments come out whether all are asked for at once or the rest of them later.

    Args:
        models: with `keep_loaded`, or they are read anew for every segment.
        styles: of each shot.
        config: of every segment; its windows are those of `plan_segments`.
        segments: from `plan_segments`; all of them, or those that are left.
        frames: uint8 [H, W, 3] of the whole film, one by one.
        lead: [1, 16, k, h, w] of the result before the first of `segments`, if that goes on.
        callback: as in `stylize`.
        stage: as in `stylize`.

    Raises:
        ConfigError, LayoutError, WeightsError: as `stylize`; if the film has too few frames.

    Source: own; known frames are noised to the level of each step as in RePaint (arXiv 2201.09865).
    """
    if config.windows is None:
        raise ConfigError("a film needs windows: their length is that of its segments")
    for segment, part in zip(segments, cut_segments(frames, segments), strict=True):
        if segment.overlap and lead is None:
            raise LayoutError(
                f"the segment at frame {segment.start} goes on from the one before, whose last "
                "latents are missing; begin with the first segment of its shot"
            )
        result = stylize(
            models,
            styles[segment.shot],
            replace(config, seed=_seed(config, segment), noise_frames=segment.noise_frames),
            frames=part,
            lead=lead if segment.overlap else None,
            callback=callback,
            stage=stage,
        )
        lead = result.latents[:, :, -config.windows.overlap :].clone()
        yield RestyledSegment(result.frames[segment.overlap :], lead)


def cut_segments(frames: Iterable[np.ndarray], segments: Sequence[Segment]) -> Iterator[np.ndarray]:
    """Collect uint8 [T, H, W, 3] of each segment; only frames that are still needed are kept.

    Raises:
        LayoutError: if the film ends before the last segment.
    """
    source, held, count = iter(frames), deque[np.ndarray](), 0
    for segment in segments:
        while count < segment.stop:
            frame = next(source, None)
            if frame is None:
                raise LayoutError(f"the film ends after {count} frames; it was longer before")
            count += 1
            held.append(frame)
            while held and count - len(held) < segment.start:
                held.popleft()
        while held and count - len(held) < segment.start:
            held.popleft()
        yield np.stack(held)


def _seed(config: StylizeConfig, segment: Segment) -> int:
    """A film of one segment is what `stylize` makes of it; others follow from where they begin."""
    if config.same_noise or segment.start == 0:
        return config.seed
    return seed_of(config.seed, segment.start)


def _num_frames(num_latents: int) -> int:
    return TEMPORAL_STRIDE * (num_latents - 1) + 1


def _num_latents(num_frames: int) -> int:
    return (padded_num_frames(num_frames) - 1) // TEMPORAL_STRIDE + 1
