"""What a run generates at intervals: a sheet of frames, a clip, and numbers about it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.images import write_image
from ..data.videos import write_video
from ..metrics.colour import colour_distance
from ..metrics.content import luma_correlation
from ..metrics.motion import frame_difference
from ..metrics.texture import gabor_distance

SAMPLES = "samples"
SHEET_FRAMES = 5
FPS = 16.0  # of Wan


class References(NamedTuple):
    """What a generated clip is compared with, uint8 [T, H, W, 3] of its size."""

    truth: np.ndarray  # the held-out sample whose conditions were used, decoded
    content: np.ndarray | None = None  # its gray tile, where the trainer is given one


def write_preview(
    out: Path, step: int, frames: np.ndarray, references: References
) -> dict[str, str | float]:
    """Write a sheet of frames and, of a clip, a video; and measure.

    Args:
        out: folder of the run.
        step: by which the files are called.
        frames: uint8 [T, H, W, 3], the generated clip.
        references: what to compare it with.

    Returns:
        `sample` and `sample_video`, paths in `out`; `sample_colour` and `sample_gabor`, distances
        of the sheet's frames to the held-out sample, which has the style that they were generated
        with (a cache holds no style pictures); `sample_luma`, correlation to the gray tile;
        `sample_difference` and `truth_difference`, frame differences. What a single picture or a
        trainer without control has not is left out.
    """
    chosen = np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round().astype(int)
    path = out / SAMPLES / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    write_image(path, np.concatenate(list(frames[chosen]), axis=1), overwrite=True)
    sheet, truth = frames[chosen], references.truth[chosen]
    values: dict[str, str | float] = {
        "sample": path.relative_to(out).as_posix(),
        "sample_colour": colour_distance(sheet, truth),
        "sample_gabor": gabor_distance(sheet, truth),
    }
    if references.content is not None:
        values["sample_luma"] = luma_correlation(frames, references.content)
    if len(frames) > 1:
        video = path.with_suffix(".mp4")
        write_video(video, frames, fps=FPS, overwrite=True)
        values["sample_video"] = video.relative_to(out).as_posix()
        values["sample_difference"] = frame_difference(frames)
        values["truth_difference"] = frame_difference(references.truth)
    return values
