"""Views of a picture that lose nothing: the same pixels in another order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from .images import check_image

ViewName = Literal[
    "identity",
    "rotate90",
    "rotate180",
    "rotate270",
    "flip_horizontal",
    "flip_vertical",
    "patches",
    "jigsaw",
    "pixels",
]
_NAMES: tuple[str, ...] = get_args(ViewName)
# Of a piece's side: how far a jigsaw's knob lies in the neighbour, and its radius.
KNOB_CENTRE, KNOB_RADIUS = 0.1, 0.18


@dataclass(frozen=True)
class View:
    """A rearrangement of the pixels of a picture, the same one at every call.

    Attributes:
        name: `patches` permutes square cells, `jigsaw` turns and permutes interlocking pieces,
            `pixels` permutes single pixels; the others are what they are called, turning
            counterclockwise.
        seed: of the permutation, 0 to 2**32 - 1.
        grid: cells a side. None: 4 for `patches` and `jigsaw`; every pixel by itself for `pixels`.
    """

    name: ViewName
    seed: int = 0
    grid: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _NAMES:
            known = ", ".join(_NAMES)
            raise ConfigError(f"there is no view {self.name!r}; use one of {known}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"view seed {self.seed}; expected 0 to {2**32 - 1}")
        if self.grid is not None and self.grid < 2:
            raise ConfigError(f"a view of {self.grid} cells a side; expected 2 or more")
        if self.name == "jigsaw" and (self.grid or 4) % 2:
            raise ConfigError(f"a jigsaw of {self.grid} pieces a side; expected an even number")

    def apply(self, picture: Tensor) -> Tensor:
        """Rearrange the pixels of `picture` [..., H, W] (quarter turns swap H and W).

        Raises:
            LayoutError: for a size that the view cannot cut: `patches` and `jigsaw` need sides
                divisible by `grid`, `jigsaw` a square.
        """
        height, width = _size(picture)
        index = _index(self, height, width).to(picture.device)
        return picture.flatten(-2)[..., index]

    def invert(self, picture: Tensor) -> Tensor:
        """Undo `apply`, bit for bit; `picture` [..., H', W'] has the size that `apply` returned."""
        height, width = _size(picture)
        if self.name in ("rotate90", "rotate270"):
            height, width = width, height
        index = torch.argsort(_index(self, height, width).flatten()).view(height, width)
        return picture.flatten(-2)[..., index.to(picture.device)]

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Rearrange the pixels of a uint8 [H, W, 3] image."""
        pixels = torch.from_numpy(np.ascontiguousarray(check_image(image))).permute(2, 0, 1)
        return self.apply(pixels).permute(1, 2, 0).contiguous().numpy()


def _size(picture: Tensor) -> tuple[int, int]:
    if picture.ndim < 2 or 0 in picture.shape:
        raise LayoutError(f"a picture of shape {list(picture.shape)}; expected [..., H, W]")
    return picture.shape[-2], picture.shape[-1]


@lru_cache(maxsize=64)
def _index(view: View, height: int, width: int) -> Tensor:
    """Which pixel of the picture, counted row by row, goes to each place: [H', W']."""
    pixels = np.arange(height * width).reshape(height, width)
    generator = np.random.RandomState(view.seed)
    match view.name:
        case "identity":
            index = pixels
        case "rotate90" | "rotate180" | "rotate270":
            index = np.rot90(pixels, int(view.name.removeprefix("rotate")) // 90)
        case "flip_horizontal":
            index = pixels[:, ::-1]
        case "flip_vertical":
            index = pixels[::-1]
        case "jigsaw":
            index = _jigsaw(pixels, view.grid or 4, generator)
        case "patches":
            index = _cells(pixels, view.grid or 4, view.grid or 4, generator)
        case "pixels":
            index = _cells(pixels, view.grid or height, view.grid or width, generator)
    return torch.from_numpy(np.ascontiguousarray(index))


def _cells(
    pixels: np.ndarray, rows: int, columns: int, generator: np.random.RandomState
) -> np.ndarray:
    height, width = pixels.shape
    if height % rows or width % columns:
        raise LayoutError(
            f"a picture of {width} x {height} pixels cannot be cut into {rows} x {columns} equal "
            "cells; choose another size or grid"
        )
    cells = pixels.reshape(rows, height // rows, columns, width // columns).swapaxes(1, 2)
    cells = cells.reshape(rows * columns, height // rows, width // columns)
    cells = cells[_shuffled(rows * columns, generator)]
    cells = cells.reshape(rows, columns, height // rows, width // columns).swapaxes(1, 2)
    return cells.reshape(height, width)


def _shuffled(number: int, generator: np.random.RandomState) -> np.ndarray:
    """A permutation of `number` things that moves something, where there is something to move."""
    order = generator.permutation(number)
    while number > 1 and (order == np.arange(number)).all():
        order = generator.permutation(number)
    return order


def _jigsaw(pixels: np.ndarray, grid: int, generator: np.random.RandomState) -> np.ndarray:
    """Swap the pieces of a jigsaw.

    The puzzle looks the same after a quarter turn, so the four pieces that such turns carry into
    each other have one shape, and any order of the four fits if each piece is turned on the way.
    """
    pieces = _jigsaw_pieces(pixels.shape, grid, generator)
    places = np.arange(grid * grid).reshape(grid, grid)
    # turned_x[k] holds, at every place, what lies there once the whole was turned k times.
    turned_places = [np.rot90(places, turns) for turns in range(4)]
    turned_pixels = [np.rot90(pixels, turns) for turns in range(4)]
    index = pixels.copy()
    for piece in places[: grid // 2, : grid // 2].flatten():
        orbit = [int(places[turned == piece][0]) for turned in turned_places]
        for start, end in enumerate(_shuffled(4, generator)):
            source = turned_pixels[(end - start) % 4]
            there = pieces == orbit[end]
            index[there] = source[there]
    return index


def _jigsaw_pieces(
    shape: tuple[int, ...], grid: int, generator: np.random.RandomState
) -> np.ndarray:
    """Number of the piece at every pixel, [N, N]: square cells with knobs, alike at every turn."""
    size = shape[0]
    if shape[0] != shape[1] or size % grid:
        raise LayoutError(
            f"a picture of {shape[0]} x {shape[1]} pixels is no jigsaw of {grid} pieces a side; "
            f"expected a square with sides divisible by {grid}"
        )
    side = size // grid
    places = np.arange(grid * grid).reshape(grid, grid)
    pieces = np.repeat(np.repeat(places, side, 0), side, 1)
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / side
    for row in range(grid // 2):
        for column in range(grid - 1):
            owner = column + int(generator.randint(2))
            into = KNOB_CENTRE if owner == column else -KNOB_CENTRE
            distance = np.hypot(y - row - 0.5, x - column - 1 - into)
            knob = distance < KNOB_RADIUS
            for turns in range(4):
                # The same knob at the other three sides of the puzzle.
                turned_owner = np.flatnonzero(
                    np.rot90(places, turns).flatten() == places[row, owner]
                )[0]
                pieces[np.rot90(knob, turns)] = turned_owner
    return pieces
