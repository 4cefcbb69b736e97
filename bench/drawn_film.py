"""A film drawn by code, whose cuts are known: each shot a scene of moving shapes of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from stylemaster_core.data.videos import write_video

FPS = 6
SHORTEST_S, LONGEST_S = 2.0, 20.0  # of a shot
_NUM_SHAPES, _NUM_WAVES = 5, 3
_SUBPIXEL_BITS = 4
_CHUNK_FRAMES = 16


@dataclass(frozen=True)
class DrawnFilm:
    """A film of `num_frames`, whose shots begin at 0 and at `cuts`."""

    num_frames: int
    height: int
    width: int
    cuts: tuple[int, ...] = ()
    period: int | None = None  # frames after which a scene is what it was; None: the film's length
    seed: int = 0

    def frames(self) -> Iterator[np.ndarray]:
        """Its pictures, uint8 [H, W, 3]."""
        borders = [0, *self.cuts, self.num_frames]
        for number, (start, stop) in enumerate(zip(borders, borders[1:], strict=False)):
            place = number - (number % 3 == 2)  # every third shot stays where the one before was
            chances = (
                np.random.default_rng([self.seed, n, i]) for i, n in ((0, place), (1, number))
            )
            scene = _Scene(*chances, self.height, self.width)
            for index in range(start, stop):
                yield scene.at((index - start) / (self.period or self.num_frames))

    def write(self, path: Path) -> None:
        """Write it as H.264, `FPS` frames a second."""
        write_video(path, _chunks(self.frames()), fps=Fraction(FPS))


def cuts_by_chance(num_frames: int, seed: int) -> tuple[int, ...]:
    """Where shots of 2 to 20 s begin that fill a film of so many frames."""
    rng = np.random.default_rng(seed)
    cuts, place = [], 0
    while True:
        place += round(float(rng.uniform(SHORTEST_S, LONGEST_S)) * FPS)
        if place > num_frames - SHORTEST_S * FPS:
            return tuple(cuts)
        cuts.append(place)


class _Scene:
    """A gradient with waves that pans, and shapes that go round before it.

    Args:
        colours: what draws its colours.
        rng: what draws all else.
        height: pixels.
        width: pixels.
    """

    def __init__(
        self, colours: np.random.Generator, rng: np.random.Generator, height: int, width: int
    ) -> None:
        self.size = np.array([width, height])
        y, x = np.mgrid[0:height, 0:width].astype(np.float32) / height
        angle = rng.uniform(0, 2 * math.pi)
        self.slope = math.cos(angle) * x + math.sin(angle) * y
        self.place = x, y
        self.ends = colours.uniform(30, 226, (2, 3))
        self.waves = rng.normal(0, 6, (_NUM_WAVES, 2))
        self.pan = rng.uniform(0.05, 0.25, 2)
        self.turns = rng.integers(2, 7, (_NUM_SHAPES, 2))
        self.phases = rng.uniform(0, 2 * math.pi, (_NUM_SHAPES, 2))
        self.middles = rng.uniform(0.2, 0.8, (_NUM_SHAPES, 2))
        self.swings = rng.uniform(0.05, 0.35, (_NUM_SHAPES, 2))
        self.radii = rng.uniform(0.06, 0.2, _NUM_SHAPES) * height
        self.corners = rng.choice([3, 4, 5, 24], _NUM_SHAPES)
        self.colours = colours.uniform(0, 256, (_NUM_SHAPES, 3))

    def at(self, time: float) -> np.ndarray:
        """The picture at a time; that of 1 is that of 0."""
        x, y = self.place
        shift = self.pan * np.sin(2 * math.pi * time + np.array([0, 1.5]))
        waves = sum(np.sin(u * (x + shift[0]) + v * (y + shift[1])) for u, v in self.waves)
        share = np.clip(0.5 + 0.4 * self.slope + 0.12 * waves, 0, 1)[..., None]
        picture = (self.ends[0] * (1 - share) + self.ends[1] * share).astype(np.uint8)
        shapes = zip(
            self.turns, self.phases, self.middles, self.swings, self.radii, self.corners,
            self.colours, strict=True,
        )  # fmt: skip
        for turns, phases, middle, swing, radius, corners, colour in shapes:
            centre = (middle + swing * np.sin(2 * math.pi * turns * time + phases)) * self.size
            angles = 2 * math.pi * (np.arange(corners) / corners + turns[0] * time)
            outline = centre + radius * np.stack([np.cos(angles), np.sin(angles)], -1)
            points = np.round(outline * 2**_SUBPIXEL_BITS).astype(np.int32)
            cv2.fillConvexPoly(picture, points, colour.tolist(), cv2.LINE_AA, _SUBPIXEL_BITS)
        return picture


def _chunks(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    chunk = []
    for frame in frames:
        chunk.append(frame)
        if len(chunk) == _CHUNK_FRAMES:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)
