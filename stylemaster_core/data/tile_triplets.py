"""Gray-tile triplets: clip, its gray tile, and caption, which the ControlNet learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .samples import Sample


def tile_samples(samples: Sequence[Sample]) -> list[Sample]:
    """Ask for each sample's gray tile; it is made of the clip when the clip is encoded.

    Source: StyleMaster, sec. 3.4.
    """
    return [replace(sample, tile=True) for sample in samples]
