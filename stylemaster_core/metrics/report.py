"""Every metric for results and baselines side by side, as numbers, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.images import read_image
from ..errors import ConfigError, LayoutError
from .colour import colour_signature, signature_distance
from .content import fit_frames, luma_correlation, ssim
from .intervals import mean_interval
from .motion import frame_difference, warping_error
from .perceptual import Lpips, art_fid, clip_text_score, csd_score, frechet_distance
from .retrieval import EmbedPictures, embed_clip, p_own_nearer, retrieved
from .scene import METHODS, TRUE_FILTER, UNCHANGED, Row, Scene, read_scene
from .texture import texture_signature

if TYPE_CHECKING:
    from ..models.clip_text import ClipText

# Metric: what it says, and which way is better.
METRICS = {
    "colour": ("colour distance to the style picture", "lower"),
    "colour_p": ("P(own style picture nearer), colour", "higher"),
    "gabor": ("Gabor distance to the style picture", "lower"),
    "gabor_p": ("P(own style picture nearer), Gabor", "higher"),
    "retrieval": ("style retrieval@1", "higher"),
    "luma": ("luma correlation to the content", "higher"),
    "luma_shuffled": ("luma correlation to another row's content", "far below the line above"),
    "ssim": ("SSIM to the content", "higher"),
    "difference": ("frame difference", ""),
    "difference_content": ("frame difference over the content's", "near 1"),
    "difference_true": ("frame difference over the true filter's", "near 1"),
    "warping": ("warping error", "lower"),
    "clip_t": ("CLIP-T", "higher"),
    "csd": ("CSD", "higher"),
    "lpips": ("LPIPS to the content", "lower"),
    "art_fid": ("ArtFID", "lower"),
}


class Missing(NamedTuple):
    """Why there is no number."""

    reason: str


Score = float | Missing


@dataclass(frozen=True)
class Networks:
    """Networks that some metrics need; None where they are not at hand.

    Attributes:
        clip: CLIP's image embeddings, for CLIP-T.
        clip_text: the text tower of the same CLIP model.
        csd: CSD's style embeddings.
        judge: embeddings of style for retrieval.
        lpips: distance of result and content.
        inception: ArtFID's features.
        missing: for a metric without network, what to do about it.
    """

    clip: EmbedPictures | None = None
    clip_text: ClipText | None = None
    csd: EmbedPictures | None = None
    judge: EmbedPictures | None = None
    lpips: Lpips | None = None
    inception: EmbedPictures | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def lacking(self, metric: str) -> Missing:
        return Missing(self.missing.get(metric, f"no network for {METRICS[metric][0]} was given"))


@dataclass(frozen=True)
class Report:
    """Scores of every row, method and metric, and over all rows.

    Attributes:
        rows: what was judged; those that could not be read are left out.
        scores: for each row, by method and metric.
        summary: by method and metric: means over the rows that have a number, or numbers that only
            all rows together have.
        intervals: by method and metric: 95 % intervals of the means, where there are two rows.
        num_measured: by method and metric, how many rows stand behind the summary.
        settings: seed and sizes.
    """

    rows: list[Row]
    scores: list[dict[str, dict[str, Score]]]
    summary: dict[str, dict[str, Score]]
    intervals: dict[str, dict[str, tuple[float, float]]]
    num_measured: dict[str, dict[str, int]]
    settings: dict[str, Any]


def evaluate(
    rows: Sequence[Row],
    networks: Networks | None = None,
    *,
    max_frames: int | None = None,
    num_candidates: int = 32,
    seed: int = 0,
    on_row: Callable[[int, Row, Scene], None] | None = None,
    on_problem: Callable[[str], None] | None = None,
) -> Report:
    """Measure results and baselines.

    Args:
        rows: what to judge.
        networks: for the metrics that need one; by default none.
        max_frames: how many frames of each clip to look at; None for all.
        num_candidates: among how many style pictures retrieval chooses.
        seed: of the choice of candidates.
        on_row: called with a row's number among those of the report, the row, and its clips, once
            it is measured.
        on_problem: told of a video that cannot be read or is shorter than its result; its row, or
            where it is one of the `others`, its column there, is left out. None raises.

    Raises:
        ConfigError: for no rows, a name that occurs twice, or a number out of range.
        LayoutError: if a file cannot be read, or a content is shorter than its result, and there is
            no `on_problem`; or if no row is left; or for a damaged style picture.
    """
    names = [row.name for row in rows]
    if not rows or len(set(names)) < len(names):
        raise ConfigError(f"rows named {names[:8]}; expected at least one, and no name twice")
    if num_candidates < 2:
        raise ConfigError(f"{num_candidates} candidates; expected at least 2")
    networks = networks or Networks()
    references = _References(rows, networks)
    scores: list[dict[str, dict[str, Score]]] = []
    measured: list[Row] = []
    others = dict.fromkeys(method for row in rows for method in row.others)
    gathered = {method: _Gathered() for method in (*METHODS, *others)}
    for number, row in enumerate(rows):
        try:
            scene = read_scene(rows, number, references.image(row), max_frames, on_problem)
        except LayoutError as error:
            if on_problem is None:
                raise
            on_problem(f"{row.name}: {error}")
            continue
        measured.append(row)
        scores.append({})
        for method, clip in scene.clips.items():
            distances = references.distances(clip)
            own = references.number(row)
            scores[-1][method] = {
                "colour": float(distances[0, own]),
                "gabor": float(distances[1, own]),
                **_nearer(distances, own),
                **_content_scores(scene, clip),
                **_motion_scores(scene, clip),
                **_network_scores(scene, clip, row.prompt, networks),
            }
            gathered[method].add(clip, scene.style_image, distances, own, networks)
        if on_row is not None:
            on_row(len(measured) - 1, row, scene)
    if not measured:
        raise LayoutError(f"none of {len(rows)} rows could be measured; each was named with why")
    for method, kept in gathered.items():
        found = _retrieval(kept, references, networks, num_candidates, seed)
        of_method = (row[method] for row in scores if method in row)
        for row_scores, score in zip(of_method, found, strict=True):
            row_scores["retrieval"] = score
    summary, intervals, num_measured = _summary(scores, gathered, networks, seed)
    settings = {"seed": seed, "num_candidates": num_candidates, "max_frames": max_frames}
    settings["num_style_pictures"] = len(references)
    return Report(measured, scores, summary, intervals, num_measured, settings)


class _References:
    """The style pictures of all rows, each once."""

    def __init__(self, rows: Sequence[Row], networks: Networks) -> None:
        self.paths = list(dict.fromkeys(row.style.resolve() for row in rows))
        self.images = [read_image(path) for path in self.paths]
        self.embeddings: Tensor | None = None
        if networks.judge is not None:
            self.embeddings = torch.stack(
                [embed_clip(networks.judge, i[None]) for i in self.images]
            )
        self._signatures: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def number(self, row: Row) -> int:
        return self.paths.index(row.style.resolve())

    def image(self, row: Row) -> np.ndarray:
        return self.images[self.number(row)]

    def distances(self, clip: np.ndarray) -> np.ndarray:
        """Colour and Gabor distance to each picture, [2, pictures].

        Textures are compared in pixels, so the pictures are brought to the clip's size.
        """
        size = (clip.shape[1], clip.shape[2])
        if size not in self._signatures:
            fitted = [fit_frames(image[None], *size) for image in self.images]
            self._signatures[size] = [(colour_signature(f), texture_signature(f)) for f in fitted]
        own = colour_signature(clip), texture_signature(clip)
        return np.array(
            [[signature_distance(own[i], s[i]) for s in self._signatures[size]] for i in (0, 1)]
        )


class _Gathered:
    """What has to be kept of a method's clips for numbers that only all rows together have."""

    def __init__(self) -> None:
        self.own: list[int] = []
        self.distances: list[np.ndarray] = []
        self.embeddings: list[Tensor] = []
        self.features: list[Tensor] = []
        self.style_features: list[Tensor] = []

    def add(
        self,
        clip: np.ndarray,
        style_image: np.ndarray,
        distances: np.ndarray,
        own: int,
        networks: Networks,
    ) -> None:
        self.own.append(own)
        self.distances.append(distances)
        if networks.judge is not None:
            self.embeddings.append(embed_clip(networks.judge, clip))
        if networks.inception is not None:
            self.features.append(networks.inception(clip[len(clip) // 2][None]))
            self.style_features.append(networks.inception(style_image[None]))


NO_CONTENT = Missing("the row names no content")
ONE_FRAME = Missing("one frame has no motion")


def _content_scores(scene: Scene, clip: np.ndarray) -> dict[str, Score]:
    content, shuffled = scene.clips.get(UNCHANGED), scene.shuffled
    if content is None:
        return dict.fromkeys(("luma", "luma_shuffled", "ssim"), NO_CONTENT)
    no_other = Missing("no other row has another content")
    return {
        "luma": luma_correlation(clip, content),
        "luma_shuffled": no_other if shuffled is None else luma_correlation(clip, shuffled),
        "ssim": ssim(clip, content),
    }


def _motion_scores(scene: Scene, clip: np.ndarray) -> dict[str, Score]:
    names = ("difference", "difference_content", "difference_true", "warping")
    if len(clip) < 2:
        return dict.fromkeys(names, ONE_FRAME)
    content = scene.clips.get(UNCHANGED)
    difference = frame_difference(clip)
    return {
        "difference": difference,
        "difference_content": _ratio(difference, content, "content"),
        "difference_true": _ratio(difference, scene.clips.get(TRUE_FILTER), "true filter"),
        "warping": warping_error(clip, content),
    }


def _ratio(difference: float, other: np.ndarray | None, what: str) -> Score:
    if other is None:
        return Missing(f"the row names no {what}")
    reference = frame_difference(other)
    return difference / reference if reference else Missing(f"the {what} stands still")


def _network_scores(
    scene: Scene, clip: np.ndarray, prompt: str, networks: Networks
) -> dict[str, Score]:
    scores: dict[str, Score] = {n: networks.lacking(n) for n in ("clip_t", "csd", "lpips")}
    if networks.clip is not None and networks.clip_text is not None:
        no_prompt = Missing("the row has no prompt")
        scores["clip_t"] = (
            clip_text_score(networks.clip, networks.clip_text, clip, prompt)
            if prompt.strip()
            else no_prompt
        )
    if networks.csd is not None:
        scores["csd"] = csd_score(networks.csd, clip, scene.style_image)
    if networks.lpips is not None:
        content = scene.clips.get(UNCHANGED)
        scores["lpips"] = (
            NO_CONTENT if content is None else float(networks.lpips(clip, content).mean())
        )
    return scores


def _summary(
    scores: list[dict[str, dict[str, Score]]],
    gathered: dict[str, _Gathered],
    networks: Networks,
    seed: int,
) -> tuple[
    dict[str, dict[str, Score]],
    dict[str, dict[str, tuple[float, float]]],
    dict[str, dict[str, int]],
]:
    summary: dict[str, dict[str, Score]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for method, kept in gathered.items():
        rows = [row[method] for row in scores if method in row]
        summary[method], intervals[method], counts[method] = {}, {}, {}
        for metric in METRICS:
            values = [row[metric] for row in rows if metric in row]
            numbers = [value for value in values if not isinstance(value, Missing)]
            counts[method][metric] = len(numbers)
            if not rows:
                summary[method][metric] = Missing(f"no row has a clip for {method}")
            elif numbers:
                summary[method][metric] = float(np.mean(numbers))
                if (interval := mean_interval(numbers, seed=seed)) is not None:
                    intervals[method][metric] = interval
            elif values:
                summary[method][metric] = values[0]
        if rows:
            score = _art_fid(kept, summary[method]["lpips"], networks)
            summary[method]["art_fid"] = score
            counts[method]["art_fid"] = 0 if isinstance(score, Missing) else len(rows)
    return summary, intervals, counts


SAME_STYLE = Missing("all rows have the same style picture")


def _nearer(distances: np.ndarray, own: int) -> dict[str, Score]:
    """Of one clip; all clips have as many others, so that the mean is that of all pairs."""
    if distances.shape[1] < 2:
        return dict.fromkeys(("colour_p", "gabor_p"), SAME_STYLE)
    return {
        name: p_own_nearer(distances[i][None], [own])
        for i, name in enumerate(("colour_p", "gabor_p"))
    }


def _retrieval(
    kept: _Gathered, references: _References, networks: Networks, num_candidates: int, seed: int
) -> list[Score]:
    """Of each clip of a method, 1 where its own style picture was found."""
    if len(references) < 2:
        return [SAME_STYLE] * len(kept.own)
    if references.embeddings is None or not kept.own:
        return [networks.lacking("retrieval")] * len(kept.own)
    found = retrieved(
        torch.stack(kept.embeddings),
        references.embeddings,
        kept.own,
        num_candidates=num_candidates,
        seed=seed,
    )
    return [float(right) for right in found]


def _art_fid(kept: _Gathered, lpips: Score, networks: Networks) -> Score:
    if networks.inception is None:
        return networks.lacking("art_fid")
    if isinstance(lpips, Missing):
        return Missing(f"ArtFID needs LPIPS, which was not measured: {lpips.reason}")
    if len(kept.features) < 2:
        return Missing("a Fréchet distance needs at least two rows")
    return art_fid(
        lpips, frechet_distance(torch.cat(kept.features), torch.cat(kept.style_features))
    )
