"""What the gates on real pictures are measured with: held-out paintings, photographs and clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from stylemaster_core.data.videos import probe_video, read_video
from stylemaster_core.errors import ConfigError
from stylemaster_core.metrics.baselines import reinhard
from stylemaster_core.metrics.colour import colour_signature, signature_distance
from stylemaster_core.metrics.retrieval import p_own_nearer
from stylemaster_core.metrics.texture import texture_signature

from . import judges
from .held_out import Clips
from .pictures import list_pictures, read_pictures, resized, with_short_side
from .teacher import Teacher

NUM_WORKS, CLIP_FRAMES = 24, 9
CLIP_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif"})
CLIP_EVERY = 4  # every fourth pair has a clip as its content


@dataclass(frozen=True)
class RealSet:
    """Style pictures, and contents that are to take their styles.

    Attributes:
        references: uint8 [H, W, 3] each, K works that no stage has learned from.
        contents: uint8 [T, H, W, 3] each, of one height and width; T is 1 or 9.
        own: the number of each content's reference.
    """

    references: Clips
    contents: Clips
    own: Sequence[int]

    def __len__(self) -> int:
        return len(self.contents)

    @property
    def moving(self) -> list[int]:
        """Numbers of the contents that are clips."""
        return [i for i, content in enumerate(self.contents) if len(content) > 1]


def draw_real_set(
    art: Path, photos: Path, clips: Path, num: int, *, side: int, works: int = NUM_WORKS
) -> RealSet:
    """Pair held-out works with contents.

    Args:
        art: paintings; those that `list_pictures` holds out are the works.
        photos: folder of photographs.
        clips: folder of videos.
        num: of pairs; one in four has a clip.
        side: short side of contents and references; contents are cut to 7 : 4.
        works: how many.

    Raises:
        ConfigError: for a place without pictures or clips, or too few works.
    """
    sources = list_pictures(art, held_out=True)[:works]
    references = [with_short_side(picture, side) for _, picture in read_pictures(sources)]
    if len(references) < works:
        raise ConfigError(
            f"{art} holds out {len(references)} pictures, the gates need {works}: of several tars "
            "the last, else every fiftieth picture"
        )
    shape = side, side * 7 // 4 // 16 * 16
    stills = [fitted(picture, *shape) for _, picture in read_pictures(list_pictures(photos))]
    videos = sorted(p for p in clips.rglob("*") if p.suffix.lower() in CLIP_SUFFIXES)
    if not videos:
        raise ConfigError(f"{clips} holds no clips ({', '.join(sorted(CLIP_SUFFIXES))})")
    rng = np.random.default_rng(0)
    contents: list[np.ndarray] = []
    for number in range(num):
        if number % CLIP_EVERY == CLIP_EVERY - 1:
            path = videos[number // CLIP_EVERY % len(videos)]
            contents.append(np.stack([fitted(f, *shape) for f in _excerpt(path, rng)]))
        else:
            contents.append(stills[(number - number // CLIP_EVERY) % len(stills)][None])
    # Whole rounds through the works, each in another order.
    rounds = [rng.permutation(works) for _ in range(-(-num // works))]
    return RealSet(references, contents, [int(i) for i in np.concatenate(rounds)[:num]])


def fitted(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of uint8 [H, W, 3] that fills another size."""
    scale = max(height / picture.shape[0], width / picture.shape[1])
    sides = [math.ceil(n * scale - 1e-6) for n in picture.shape[:2]]
    covering = resized(picture, *sides)
    y, x = (covering.shape[0] - height) // 2, (covering.shape[1] - width) // 2
    return covering[y : y + height, x : x + width]


def _excerpt(path: Path, rng: np.random.Generator) -> np.ndarray:
    last = probe_video(path).num_frames - CLIP_FRAMES
    if last < 0:
        raise ConfigError(f"{path} has fewer than {CLIP_FRAMES} frames; give longer clips")
    start = int(rng.integers(last + 1))
    return read_video(path, start_frame=start, max_frames=CLIP_FRAMES).frames


class RealJudges:
    """Both networks, and what they and the formulas say of the references."""

    def __init__(self, real: RealSet, teacher: Teacher, gram: judges.GramJudge) -> None:
        self.real, self.teacher, self.gram = real, teacher, gram

    @cached_property
    def references(self) -> dict[str, list[np.ndarray]]:
        """Signature of each reference, by measure."""
        return {name: [take(p) for p in self.real.references] for name, take in self.takes.items()}

    @property
    def takes(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """How each measure sees a picture."""
        return {
            "magenta": self.teacher.vector,
            "gram": self.gram.vector,
            "colour": lambda p: colour_signature(judges.small_colours(p)),
            "gabor": lambda p: texture_signature(p[None]),
            "patches": judges.patch_signature,
        }

    @cached_property
    def teacher_flicker(self) -> list[float]:
        """Flicker of Magenta per frame, of each moving content."""
        real = self.real
        return [
            judges.flicker(stylized(self.teacher, real, [i])[0], real.contents[i])
            for i in real.moving
        ]


@dataclass(frozen=True)
class RealScores:
    """What was measured on one result for each content.

    Attributes:
        similarity: of `magenta` and `gram`, cosines [N, K].
        distance: of `colour`, `gabor` and `patches`, [N, K].
        luma: correlation of each result with each content, [N, N].
        structure: correlation of the gradients with the own content, [N].
        seam: [N].
        chroma: over the reference's, [N].
        flicker: over Magenta's per frame and over the content's, of moving contents, [M, 2].
        own: number of each content's reference.
    """

    similarity: dict[str, np.ndarray]
    distance: dict[str, np.ndarray]
    luma: np.ndarray
    structure: np.ndarray
    seam: np.ndarray
    chroma: np.ndarray
    flicker: np.ndarray
    own: Sequence[int]

    def nearest(self, judge: str, own: Sequence[int] | None = None) -> float:
        """Share of results whose own reference a network finds the likest."""
        found = self.similarity[judge].argmax(1)
        return float(np.mean(found == np.asarray(self.own if own is None else own)))

    def colours(self, own: Sequence[int] | None = None) -> tuple[float, float]:
        """Share whose own reference is the nearest in colour, and the distance to it."""
        own = self.own if own is None else own
        distance = self.distance["colour"]
        nearest = float(np.mean(distance.argmin(1) == np.asarray(own)))
        return nearest, float(distance[np.arange(len(own)), own].mean())

    def texture(self, own: Sequence[int] | None = None) -> tuple[float, ...]:
        """P(own reference nearer) by Gabor energies and by patches."""
        own = self.own if own is None else own
        return tuple(p_own_nearer(self.distance[name], own) for name in ("gabor", "patches"))

    def content(self) -> tuple[float, float]:
        """Luma correlation with the own content and, in the mean, with the others."""
        own = self.luma.diagonal()
        others = (self.luma.sum(1) - own) / (len(own) - 1)
        return float(own.mean()), float(others.mean())

    @property
    def style_distance(self) -> float:
        """1 - cosine to the own reference, the mean of both networks."""
        rows = np.arange(len(self.own))
        found = [similarity[rows, self.own].mean() for similarity in self.similarity.values()]
        return 1 - float(np.mean(found))

    def summary(self) -> dict[str, float]:
        """A column of the table beside the baselines."""
        nearest, distance = self.colours()
        gabor, patches = self.texture()
        luma, other = self.content()
        flicker = self.flicker.mean(0) if len(self.flicker) else (float("nan"),) * 2
        return {
            "own style nearest, Magenta's vector": self.nearest("magenta"),
            "own style nearest, Gram of EfficientNet-Lite0": self.nearest("gram"),
            "own colours nearest": nearest,
            "colour distance": distance,
            "P(own nearer), Gabor": gabor,
            "P(own nearer), patches": patches,
            "style distance": self.style_distance,
            "luma correlation": luma,
            "luma correlation to other contents": other,
            "structure": float(self.structure.mean()),
            "seam": float(self.seam.mean()),
            "chroma over the reference's": float(self.chroma.mean()),
            "flicker over Magenta's per frame": float(flicker[0]),
            "flicker over the content's": float(flicker[1]),
        }


def measure_real(
    results: Clips, judged: RealJudges, chosen: Sequence[int] | None = None
) -> RealScores:
    """Score results, of all contents or of chosen ones; of a clip its middle frame is judged."""
    real = judged.real
    chosen = range(len(real)) if chosen is None else chosen
    contents, own = [real.contents[i] for i in chosen], [real.own[i] for i in chosen]
    middles = [clip[len(clip) // 2] for clip in results]
    found = {name: [take(p) for p in middles] for name, take in judged.takes.items()}
    networks, formulas = ("magenta", "gram"), ("colour", "gabor", "patches")
    lumas = [judges.small_luma(content[len(content) // 2]) for content in contents]
    pairs = list(zip(middles, contents, own, strict=True))
    flicker = []
    for place, (number, clip) in enumerate(zip(chosen, results, strict=True)):
        if len(clip) > 1:
            ours = judges.flicker(clip, contents[place])
            theirs = judged.teacher_flicker[real.moving.index(number)]
            own_error = judges.flicker(contents[place], contents[place])
            flicker.append((ours / max(theirs, 1e-6), ours / max(own_error, 1e-6)))
    return RealScores(
        {n: judges.similarities(found[n], judged.references[n]) for n in networks},
        {
            n: np.array(
                [[signature_distance(a, b) for b in judged.references[n]] for a in found[n]]
            )
            for n in formulas
        },
        np.array([[judges.correlation(judges.small_luma(m), c) for c in lumas] for m in middles]),
        np.array(
            [judges.correlation(judges.edges(m), judges.edges(c[len(c) // 2])) for m, c, _ in pairs]
        ),
        np.array([judges.seam(clip) for clip in results]),
        np.array(
            [
                judges.chroma(m)
                / max(judges.chroma(real.references[reference]), judges.LEAST_CHROMA)
                for m, _, reference in pairs
            ]
        ),
        np.array(flicker).reshape(-1, 2),
        own,
    )


def recoloured(real: RealSet) -> list[np.ndarray]:
    """Reinhard's formula on each content."""
    pairs = zip(real.contents, real.own, strict=True)
    return [reinhard(content, real.references[own]) for content, own in pairs]


def stylized(
    teacher: Teacher, real: RealSet, chosen: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Magenta on each frame of each content, or of chosen ones."""
    results = []
    for number in range(len(real)) if chosen is None else chosen:
        vector = teacher.vector(real.references[real.own[number]])
        frames = [teacher.stylize(frame, vector) for frame in real.contents[number]]
        results.append(np.stack(frames))
    return results
