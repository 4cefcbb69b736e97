"""What is compared for one result: its clips and baselines, brought to one size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..data.videos import read_video
from ..errors import LayoutError
from .baselines import reinhard
from .content import fit_frames

RESULT, UNCHANGED, REINHARD, TRUE_FILTER = "result", "content unchanged", "Reinhard", "true filter"
METHODS = (RESULT, UNCHANGED, REINHARD, TRUE_FILTER)
WITHOUT_STYLE = "without style"  # of text alone: what the model makes of the prompt


@dataclass(frozen=True)
class Row:
    """One result to judge.

    Attributes:
        name: unique among the rows.
        style: the style picture.
        result: video or folder of images.
        content: the video it was made of; None for text-to-video.
        prompt: what was asked for; empty where unknown.
        true_filter: the style applied to the content by a formula, where there is one.
        others: further results by the name of their method. Reinhard is made of the one "without
            style" where there is no content.
    """

    name: str
    style: Path
    result: Path
    content: Path | None = None
    prompt: str = ""
    true_filter: Path | None = None
    others: Mapping[str, Path] = field(default_factory=dict)


@dataclass
class Scene:
    """The clips of a row, all of the result's size and length.

    Attributes:
        style_image: uint8 [H, W, 3].
        clips: uint8 [T, H, W, 3] by method; methods that the row has no clip for are left out.
        shuffled: the content of another row; None without.
    """

    style_image: np.ndarray
    clips: dict[str, np.ndarray]
    shuffled: np.ndarray | None


def read_scene(
    rows: Sequence[Row],
    number: int,
    style_image: np.ndarray,
    max_frames: int | None = None,
    on_problem: Callable[[str], None] | None = None,
) -> Scene:
    """Read the clips of a row and make its baselines; all get the result's size and length.

    Args:
        rows: all rows.
        number: of the row that is read.
        style_image: uint8 [H, W, 3].
        max_frames: how many frames to read; None for all.
        on_problem: told of one of the `others` that cannot be read or is too short, which is then
            left out; None raises.

    Raises:
        LayoutError: if a file cannot be read, or a clip is shorter than the result.
    """
    row = rows[number]
    result = read_video(row.result, max_frames=max_frames).frames
    length, height, width, _ = result.shape
    clips = {RESULT: result}
    if row.content is not None:
        clips[UNCHANGED] = _beside(row.content, length, height, width)
    if row.true_filter is not None:
        clips[TRUE_FILTER] = _beside(row.true_filter, length, height, width)
    for method, path in row.others.items():
        try:
            clips[method] = _beside(path, length, height, width)
        except LayoutError as error:
            if on_problem is None:
                raise
            on_problem(f"{row.name}, {method}: {error}")
    if (source := clips.get(UNCHANGED, clips.get(WITHOUT_STYLE))) is not None:
        clips[REINHARD] = reinhard(source, style_image)
    # Whose content stands for "another": the next row's that shows something else.
    later = [*rows[number + 1 :], *rows[:number]]
    own = None if row.content is None else row.content.resolve()
    others = [r.content for r in later if r.content is not None and r.content.resolve() != own]
    shuffled = None
    for path in others if own is not None else []:
        try:
            other = read_video(path, max_frames=length).frames
        except LayoutError:
            if on_problem is None:
                raise
            continue  # its own row names it
        shuffled = fit_frames(other[np.arange(length) % len(other)], height, width)
        break
    return Scene(fit_frames(style_image[None], height, width)[0], clips, shuffled)


def _beside(path: Path, length: int, height: int, width: int) -> np.ndarray:
    frames = read_video(path, max_frames=length).frames
    if len(frames) < length:
        raise LayoutError(
            f"{path} has {len(frames)} frames, its result {length}; they are compared frame by "
            "frame: cut the result, or look at fewer frames"
        )
    return fit_frames(frames, height, width)
