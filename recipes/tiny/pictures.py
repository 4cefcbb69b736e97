"""Real pictures to learn from and to measure on: paintings and photographs that the user names.

None of them is part of this repository, and none is ever copied into it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from stylemaster_core.data.images import to_rgb
from stylemaster_core.errors import ConfigError
from stylemaster_core.writing import written_beside

logger = logging.getLogger("stylemaster")

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
PAINTING_PX, PHOTO_PX = 160, 512
HELD_OUT_EVERY = 50  # of the pictures of a folder; of tars the last is held out
MIN_SPREAD = 18.0  # standard deviation of a painting's numbers, 0..255: else it is a blank page


class Source(NamedTuple):
    """One picture: a file, or a member of a tar."""

    path: Path
    member: str | None = None


def list_pictures(place: Path, *, held_out: bool | None = None) -> list[Source]:
    """Name the pictures of a folder, of the tars in it, or of one tar, in a fixed order.

    Args:
        place: folder (searched with its sub-folders) or tar.
        held_out: True for those that no stage may learn from (the last tar; without several tars
            every fiftieth picture), False for the others, None for all.

    Raises:
        ConfigError: if there is nothing, or no picture.
    """
    if not place.exists():
        raise ConfigError(
            f"there is no {place}; expected a folder of pictures or of tars, or a tar"
        )
    tars = [place] if place.is_file() else sorted(place.rglob("*.tar"))
    if len(tars) > 1 and held_out is not None:
        tars = tars[-1:] if held_out else tars[:-1]
        sources = [source for tar in tars for source in _members(tar)]
    else:
        sources = [source for tar in tars for source in _members(tar)]
        if place.is_dir():
            sources += [Source(p) for p in sorted(place.rglob("*")) if p.suffix.lower() in SUFFIXES]
        if held_out is not None:
            sources = [s for i, s in enumerate(sources) if (i % HELD_OUT_EVERY == 0) == held_out]
    if not sources:
        raise ConfigError(
            f"{place} holds no pictures ({', '.join(sorted(SUFFIXES))}), nor tars of them"
        )
    return sources


def read_pictures(sources: list[Source]) -> Iterator[tuple[Source, np.ndarray]]:
    """Read pictures one after another, uint8 [H, W, 3]; what is no picture is named and left out.

    Members of one tar must stand beside each other.
    """
    for place, group in itertools.groupby(sources, lambda s: s.path if s.member else None):
        with contextlib.ExitStack() as stack:
            tar = stack.enter_context(tarfile.open(place)) if place else None
            for source in group:
                try:
                    with Image.open(io.BytesIO(_bytes(source, tar))) as image:
                        yield source, to_rgb(image)
                except OSError as error:
                    logger.warning("%s is left out: %s", source.member or source.path, error)


def _bytes(source: Source, tar: tarfile.TarFile | None) -> bytes:
    if tar is None or source.member is None:
        return source.path.read_bytes()
    file = tar.extractfile(source.member)
    assert file is not None  # only files are listed
    return file.read()


def square(picture: np.ndarray, side: int) -> np.ndarray:
    """The middle square of uint8 [H, W, 3], brought to `side` pixels."""
    height, width = picture.shape[:2]
    short = min(height, width)
    y, x = (height - short) // 2, (width - short) // 2
    return resized(picture[y : y + short, x : x + short], side, side)


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] at another size."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def with_short_side(picture: np.ndarray, side: int, multiple: int = 1) -> np.ndarray:
    """uint8 [H, W, 3] with its short side at `side`, both sides multiples of a number."""
    height, width = picture.shape[:2]
    scale = side / min(height, width)
    sides = [max(round(n * scale / multiple), 1) * multiple for n in (height, width)]
    return resized(picture, *sides)


def load_or_read_paintings(folder: Path, art: Path, limit: int | None = None) -> np.ndarray:
    """Squares of all paintings that may be learned from, uint8 [N, 160, 160, 3], shuffled.

    Args:
        folder: where they are kept as `paintings.npy`.
        art: where they come from.
        limit: how many at most.
    """
    path = folder / "paintings.npy"
    if not path.exists():
        sources = list_pictures(art, held_out=False)
        order = np.random.default_rng(0).permutation(len(sources))[:limit]
        chosen = [sources[i] for i in sorted(order)]  # a tar is read from its beginning to its end
        squares = []
        for _, picture in tqdm(read_pictures(chosen), total=len(chosen), desc="paintings"):
            if min(picture.shape[:2]) >= PAINTING_PX // 2 and picture.std() >= MIN_SPREAD:
                squares.append(square(picture, PAINTING_PX))
        if not squares:
            raise ConfigError(
                f"of {len(chosen)} pictures in {art} each is blank or small: less than "
                f"{PAINTING_PX // 2} pixels wide or high; give others"
            )
        shuffled = np.random.default_rng(1).permutation(len(squares))
        save(path, np.stack([squares[i] for i in shuffled]))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def read_photos(photos: Path, *, held_out: bool | None = None) -> list[np.ndarray]:
    """Photographs in memory, uint8 [H, W, 3], the short side at most 512 pixels."""
    return [
        with_short_side(picture, min(PHOTO_PX, *picture.shape[:2]))
        for _, picture in read_pictures(list_pictures(photos, held_out=held_out))
    ]


def save(path: Path, values: np.ndarray) -> None:
    """Write an array as a whole or not at all."""
    with written_beside(path) as part, part.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def _members(tar: Path) -> list[Source]:
    with tarfile.open(tar) as file:
        names = [m.name for m in file if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES]
    return [Source(tar, name) for name in sorted(names)]
