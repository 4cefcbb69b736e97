"""The held-out set of the gates: styles and contents that no training has seen, and its scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from stylemaster_core.metrics.colour import colour_signature, signature_distance
from stylemaster_core.metrics.content import luma_correlation
from stylemaster_core.metrics.motion import frame_difference
from stylemaster_core.metrics.retrieval import (
    EmbedPictures,
    embed_clip,
    p_own_nearer,
    retrieval_at_1,
)
from stylemaster_core.metrics.texture import texture_signature

from .contents import draw_clip
from .styles import draw_style

SIDE_PX, NUM_FRAMES = 128, 9
NUM_CANDIDATES = 32
SEED = 20260

Clips = Sequence[np.ndarray]  # uint8 [T, H, W, 3] each


@dataclass(frozen=True)
class HeldOut:
    """N styles, each with a picture of it and a clip of another content.

    Attributes:
        references: uint8 [1, 128, 128, 3] each.
        contents: uint8 [9, 128, 128, 3] each.
        captions: of the contents.
        true_filter: the contents in the styles.
        judge: the encoder that says which style a clip has.
    """

    references: Clips
    contents: Clips
    captions: Sequence[str]
    true_filter: Clips
    judge: EmbedPictures

    def __len__(self) -> int:
        return len(self.references)

    @cached_property
    def colours(self) -> list[np.ndarray]:
        """Colour signature of each reference."""
        return [colour_signature(reference) for reference in self.references]

    @cached_property
    def textures(self) -> list[np.ndarray]:
        """Texture signature of each reference."""
        return [texture_signature(reference) for reference in self.references]

    @cached_property
    def embeddings(self) -> Tensor:
        """What the judge makes of each reference, [N, D]."""
        return torch.stack([embed_clip(self.judge, reference) for reference in self.references])

    def colour_distance(self, clip: np.ndarray, reference: int) -> float:
        """Of a clip and one of the references."""
        return signature_distance(colour_signature(clip), self.colours[reference])


def draw_held_out(num: int, judge: EmbedPictures, seed: int = SEED) -> HeldOut:
    """Draw `num` styles and what belongs to them; a larger set begins with the smaller one."""
    references, contents, captions, true_filter = [], [], [], []
    for index in range(num):
        rng = np.random.default_rng([seed, index])
        style = draw_style(rng, held_out=True)
        picture, _ = draw_clip(rng, 1, SIDE_PX, SIDE_PX, held_out=True)
        clip, caption = draw_clip(rng, NUM_FRAMES, SIDE_PX, SIDE_PX, held_out=True)
        references.append(style.apply(picture))
        contents.append(clip)
        captions.append(caption)
        true_filter.append(style.apply(clip))
    return HeldOut(references, contents, captions, true_filter, judge)


@dataclass(frozen=True)
class Scores:
    """What was measured on one clip for each style of the held-out set.

    Attributes:
        colour: distances of clips and references, [N, N].
        gabor: the same of textures.
        embeddings: of the clips, [N, D].
        references: of the references, [N, D].
        luma: correlation to a clip's own content, the mean.
        luma_shuffled: to the next clip's.
        difference: from `relative_difference`.
    """

    colour: np.ndarray
    gabor: np.ndarray
    embeddings: Tensor
    references: Tensor
    luma: float
    luma_shuffled: float
    difference: float

    def p_nearer(self, own: Sequence[int]) -> tuple[float, float]:
        """P(own reference nearer), by colours and by texture."""
        return p_own_nearer(self.colour, own), p_own_nearer(self.gabor, own)

    def retrieval(self, own: Sequence[int]) -> float:
        """Style retrieval@1 of 32."""
        return retrieval_at_1(
            self.embeddings, self.references, own, num_candidates=NUM_CANDIDATES, seed=SEED
        )

    def summary(self) -> dict[str, float]:
        """A row of the report's table, by the names of the metrics there."""
        own = range(len(self.colour))
        colour_p, gabor_p = self.p_nearer(own)
        return {
            "colour": float(self.colour.diagonal().mean()),
            "colour_p": colour_p,
            "gabor": float(self.gabor.diagonal().mean()),
            "gabor_p": gabor_p,
            "retrieval": self.retrieval(own),
            "luma": self.luma,
            "luma_shuffled": self.luma_shuffled,
            "difference_true": self.difference,
        }


def measure(clips: Clips, held_out: HeldOut) -> Scores:
    """Score one clip for each style, in the order of the held-out set."""
    contents = held_out.contents
    shuffled = [*contents[1:], contents[0]]
    return Scores(
        colour=_distances([colour_signature(clip) for clip in clips], held_out.colours),
        gabor=_distances([texture_signature(clip) for clip in clips], held_out.textures),
        embeddings=torch.stack([embed_clip(held_out.judge, clip) for clip in clips]),
        references=held_out.embeddings,
        luma=_mean(luma_correlation(*pair) for pair in zip(clips, contents, strict=True)),
        luma_shuffled=_mean(luma_correlation(*pair) for pair in zip(clips, shuffled, strict=True)),
        difference=relative_difference(clips, held_out),
    )


def relative_difference(clips: Clips, held_out: HeldOut) -> float:
    """Mean frame difference over that of the true filter.

    Not a mean of ratios: a palette of few colours can still a clip altogether.
    """
    difference, true = (_mean(map(frame_difference, c)) for c in (clips, held_out.true_filter))
    return difference / true


def _distances(clips: list[np.ndarray], references: list[np.ndarray]) -> np.ndarray:
    return np.array([[signature_distance(c, r) for r in references] for c in clips])


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
