"""What an image encoder sees in the pictures of a folder: read once, kept, and brought up to date.

An index is a safetensors file of its own. A picture is looked at again when its size or time of
change differs; entries of pictures that are gone are dropped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, LayoutError, WeightsError
from ..weights.files import read_state_dict, write_state_dict
from .images import check_aspect, read_image

logger = logging.getLogger("stylemaster")

FORMAT = "stylemaster-pictures-1"
BATCH = 8  # pictures that are encoded together

# Pictures, uint8 [H, W, 3] of any sizes, to embeddings [N, D] by name.
Encode = Callable[[Sequence[np.ndarray]], Mapping[str, Tensor]]
Stamp = tuple[int, int]  # size in bytes, time of the last change in ns


class PictureIndex(NamedTuple):
    """Embeddings of N pictures."""

    names: list[str]
    stamps: list[Stamp]
    features: dict[str, Tensor]  # by name: [N, D] of length 1, float16


class Found(NamedTuple):
    """A picture that is alike."""

    name: str
    similarity: float  # cosine, -1 to 1


def stamp_of(path: Path) -> Stamp:
    """Changes whenever the file does."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def update_index(
    path: Path,
    pictures: Sequence[Path],
    encoder: str,
    encode: Encode,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> PictureIndex:
    """Bring an index up to date with the pictures of a folder, and write it if it changed.

    Pictures that cannot be read are left out, and the log says which. What was looked at is
    written even if `encode` or `progress` ends the work.

    Args:
        path: of the index; made if it is missing, and made anew if it is damaged or of another
            encoder.
        pictures: files of one folder.
        encoder: by what the encoder is known: embeddings of another one are not comparable.
        encode: up to 8 pictures at a time.
        progress: called with the pictures that were looked at, and how many are to be.

    Returns:
        The pictures that can be read, in the order given.

    Raises:
        WeightsError: if the index cannot be written.
    """
    stamps = {picture.name: stamp_of(picture) for picture in pictures}
    kept = _read(path, encoder)
    known = {name: row for name, row in kept.items() if stamps.get(name) == row[0]}
    changed = len(known) != len(kept)
    missing = [picture for picture in pictures if picture.name not in known]
    done = 0
    try:
        for start in range(0, len(missing), BATCH):
            progress(done, len(missing))
            batch = [(file, _picture(file)) for file in missing[start : start + BATCH]]
            done += len(batch)
            seen = [(file.name, image) for file, image in batch if image is not None]
            if seen:
                features = encode([image for _, image in seen])
                unit = {key: F.normalize(x.float(), dim=-1).half() for key, x in features.items()}
                for row, (name, _) in enumerate(seen):
                    known[name] = (stamps[name], {key: x[row] for key, x in unit.items()})
                changed = True
    finally:
        if changed:
            _write(path, encoder, known)
    order = [picture.name for picture in pictures if picture.name in known]
    return _index({name: known[name] for name in order})


def most_alike(index: PictureIndex, feature: str, query: Tensor, count: int) -> list[Found]:
    """The pictures of an index that are most alike to others, the nearest first.

    Args:
        index: of at least one picture.
        feature: which embedding counts.
        query: [B, D] of one or several pictures; their mean direction counts.
        count: how many at most.

    Raises:
        ConfigError: for an empty index, a count below 1, or an embedding of another width.
    """
    if count < 1 or not index.names:
        raise ConfigError(f"{count} of {len(index.names)} pictures were asked for; give at least 1")
    rows = index.features[feature].float()
    if query.shape[-1] != rows.shape[-1]:
        raise ConfigError(
            f"the picture has {query.shape[-1]} numbers, those of the index {rows.shape[-1]}; "
            "use the same image encoder"
        )
    wanted = F.normalize(F.normalize(query.float(), dim=-1).mean(0), dim=0)
    similarity = rows @ wanted
    order = torch.sort(similarity, descending=True, stable=True).indices[:count].tolist()
    return [Found(index.names[n], float(similarity[n])) for n in order]


_Rows = dict[str, tuple[Stamp, dict[str, Tensor]]]


def _picture(path: Path) -> np.ndarray | None:
    try:
        return check_aspect(read_image(path))
    except LayoutError as error:
        logger.warning("%s is left out of the search: %s", path.name, error)
        return None


def _index(rows: _Rows) -> PictureIndex:
    keys: Iterable[str] = next(iter(rows.values()))[1] if rows else ()
    features = {key: torch.stack([row[key] for _, row in rows.values()]) for key in keys}
    return PictureIndex(list(rows), [stamp for stamp, _ in rows.values()], features)


def _write(path: Path, encoder: str, rows: _Rows) -> None:
    index = _index(rows)
    entries = [[name, *stamp] for name, stamp in zip(index.names, index.stamps, strict=True)]
    metadata = {"format": FORMAT, "encoder": encoder, "pictures": json.dumps(entries)}
    write_state_dict(path, index.features, metadata, overwrite=True)


def _read(path: Path, encoder: str) -> _Rows:
    """What an index holds; nothing of one that is of no use."""
    if not path.is_file():
        return {}
    try:
        file = read_state_dict(path)
        if file.metadata.get("format") != FORMAT or file.metadata.get("encoder") != encoder:
            return {}
        entries = json.loads(file.metadata.get("pictures", "[]"))
        sizes = {len(tensor) for tensor in file.tensors.values()}
        if sizes - {len(entries)} or not all(
            torch.isfinite(x).all() for x in file.tensors.values()
        ):
            raise ValueError("its parts do not belong together")
        return {
            str(name): ((int(size), int(time)), {key: x[n] for key, x in file.tensors.items()})
            for n, (name, size, time) in enumerate(entries)
        }
    except (WeightsError, ValueError, TypeError, RecursionError) as error:
        logger.warning("%s is damaged (%s); its pictures are looked at anew", path, error)
        return {}
