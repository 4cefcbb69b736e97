"""How much a clip moves, and how steadily its pixels follow the motion."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ConfigError, LayoutError, UnsupportedHostError
from ..layouts import check_frames
from .content import luma


def frame_difference(frames: np.ndarray) -> float:
    """Mean absolute difference of successive frames, colours in 0..1; 0 for a still clip.

    Args:
        frames: uint8 [T, H, W, 3].

    Raises:
        LayoutError: for fewer than two frames.
    """
    _moving(frames)
    differences = [
        np.abs(after.astype(np.float32) - before.astype(np.float32)).mean()
        for before, after in zip(frames[:-1], frames[1:], strict=True)
    ]
    return float(np.mean(differences) / 255)


def frame_difference_ratio(frames: np.ndarray, other: np.ndarray) -> float:
    """Frame difference of a clip over that of another, such as the true filter's.

    Raises:
        LayoutError: for fewer than two frames.
        ConfigError: if the other clip stands still.
    """
    reference = frame_difference(other)
    if reference == 0:
        raise ConfigError("the clip to compare the motion with stands still; give one that moves")
    return frame_difference(frames) / reference


def warping_error(frames: np.ndarray, flow_from: np.ndarray | None = None) -> float:
    """Mean absolute difference of each frame and the next one warped back onto it.

    Args:
        frames: uint8 [T, H, W, 3].
        flow_from: uint8 of the same shape, where the motion is looked for (the content);
            by default `frames` itself.

    Returns:
        0 to 1; pixels that come from outside the picture do not count.

    Raises:
        LayoutError: for fewer than two frames, or another shape.
        UnsupportedHostError: if OpenCV is not installed.

    Source: StyleCrafter, supplement B; deviation: DIS flow instead of RAFT, and pixels from
    outside the picture are left out.
    """
    flow_from = frames if flow_from is None else flow_from
    _moving(frames)
    if check_frames(flow_from).shape != frames.shape:
        raise LayoutError(
            f"frames of shape {list(frames.shape)}, motion from {list(flow_from.shape)}; "
            "expected the same shape"
        )
    try:
        import cv2
    except ImportError as error:
        raise UnsupportedHostError(
            "the warping error needs OpenCV; run pip install opencv-python-headless"
        ) from error
    gray = (luma(flow_from) * 255).round().astype(np.uint8)
    estimator: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    height, width = gray.shape[1:]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    errors = []
    for index in range(len(frames) - 1):
        flow = estimator.calc(gray[index], gray[index + 1], None)
        to_x, to_y = x + flow[..., 0], y + flow[..., 1]
        inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
        after = frames[index + 1].astype(np.float32)
        warped = cv2.remap(after, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        difference = np.abs(frames[index].astype(np.float32) - warped).mean(-1)
        # A flow that leaves the picture everywhere explains nothing.
        errors.append(difference[inside].mean() if inside.any() else difference.mean())
    return float(np.mean(errors) / 255)


def _moving(frames: np.ndarray) -> None:
    if len(check_frames(frames)) < 2:
        raise LayoutError("one frame has no motion; give a clip of at least two")
