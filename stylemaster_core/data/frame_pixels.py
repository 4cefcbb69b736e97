"""Decoded frames to upright SDR pixels: orientation, colour and transparency."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LayoutError
from .picture_pixels import on_white

if TYPE_CHECKING:
    import av

logger = logging.getLogger("stylemaster")

# Codes of ITU-T H.273, which files and FFmpeg use.
_UNSPECIFIED = 2
_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
_PQ, _HLG = 16, 18
# Untagged pictures from here on are BT.709, as players take them; below, BT.601.
_HD_LINES = 720
# Nits of white where SDR pictures are put into HDR. Source: ITU-R BT.2408-7, sec. 2.2.
_WHITE_NITS = 203.0
_HLG_PEAK_NITS = 1000.0
# Linear RGB of wider primaries to BT.709's. Source: ITU-R BT.2087-0 (BT.2020); for P3 from the
# chromaticities of SMPTE EG 432-1, white D65.
_TO_BT709 = {
    9: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    12: ((1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979)),
}
_TO_BT709[11] = _TO_BT709[12]
# Highlights above this share of white are compressed instead of clipped, so that they keep their
# hue and some of their detail. White itself comes out at 249 of 255.
_KNEE = 0.9


class FrameConverter:
    """Makes uint8 [H, W, 3] of a video's frames, or [H, W, 4] to keep transparency.

    Attributes:
        keep_alpha: whether frames with transparency keep it.
        turned: whether the last frame was turned by a quarter, so that its sides are swapped.
    """

    def __init__(self, path: Path, *, keep_alpha: bool = False) -> None:
        self.turned = False
        self._path = path
        self.keep_alpha = keep_alpha
        self._said = False
        self._reformatter: Any = None
        self._rotation: int | None = None
        self._matrix: tuple[float, float, float, float] | None = None

    def __call__(self, frame: av.VideoFrame, context: Any) -> np.ndarray:
        """Convert a frame; `context` is what decoded it.

        Raises:
            LayoutError: if the frame is turned by other than quarters.
        """
        # On the frame since PyAV 15.
        transfer = int(getattr(frame, "color_trc", context.color_trc))
        primaries = int(getattr(frame, "color_primaries", context.color_primaries))
        has_alpha = any(component.is_alpha for component in frame.format.components)
        if transfer in (_PQ, _HLG) or primaries in _TO_BT709:
            pixels = self._sdr(frame, transfer, primaries, has_alpha)
        else:
            pixels = self._pixels(frame, "rgba" if has_alpha else "rgb24")
        if has_alpha and not self.keep_alpha:
            pixels = on_white(pixels)[..., :3]
        elif has_alpha:
            pixels = on_white(pixels)
        return self._upright(pixels, frame)

    def _sdr(
        self, frame: av.VideoFrame, transfer: int, primaries: int, has_alpha: bool
    ) -> np.ndarray:
        if not self._said:
            kind = {_PQ: "HDR (PQ)", _HLG: "HDR (HLG)"}.get(transfer, _PRIMARIES.get(primaries))
            logger.warning("%s is %s; its colours are converted to SDR, BT.709", self._path, kind)
            self._said = True
        codes = self._pixels(frame, "rgba64le" if has_alpha else "rgb48le")
        pixels = wide_to_bt709(codes[..., :3], transfer, primaries)
        return np.dstack([pixels, (codes[..., 3] >> 8).astype(np.uint8)]) if has_alpha else pixels

    def _pixels(self, frame: av.VideoFrame, pix_fmt: str) -> np.ndarray:
        # A frame's own one would be made anew, and held, for every frame.
        if self._reformatter is None:
            from av.video.reformatter import VideoReformatter

            self._reformatter = VideoReformatter()
        is_hd = int(frame.colorspace) == _UNSPECIFIED and frame.height >= _HD_LINES
        standard = "ITU709" if is_hd else None
        converted = self._reformatter.reformat(frame, format=pix_fmt, src_colorspace=standard)
        return converted.to_ndarray()

    def _upright(self, pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
        if frame.rotation != self._rotation:
            # Not of every frame: its side data refers back to it, which keeps it in memory.
            self._rotation, self._matrix = frame.rotation, _display_matrix(frame)
        self.turned = False
        if self._matrix is None:
            return pixels
        a, b, c, d = self._matrix
        # A point (x, y) is shown at (a x + c y, b x + d y).
        if max(abs(b), abs(c)) < 0.01 * min(abs(a), abs(d)):
            x_sign, y_sign = a, d
        elif max(abs(a), abs(d)) < 0.01 * min(abs(b), abs(c)):
            self.turned = True
            pixels = pixels.swapaxes(0, 1)
            x_sign, y_sign = c, b
        else:
            raise LayoutError(
                f"{self._path} is turned by {frame.rotation} degrees; only quarters are known"
            )
        return pixels[:: -1 if y_sign < 0 else 1, :: -1 if x_sign < 0 else 1]


def _display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float] | None:
    """The upper left of the matrix (a, b, c, d) by which a frame is shown; None for as it is."""
    side_data: Any = frame.side_data
    for data in side_data:
        if data.type.name == "DISPLAYMATRIX":
            values = np.frombuffer(bytes(data), np.int32).astype(np.float64)
            a, b, c, d = values[[0, 1, 3, 4]].tolist()
            return (a, b, c, d) if any((a, b, c, d)) else None
    return None


def wide_to_bt709(pixels: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Convert HDR or wide-gamut pixels to SDR BT.709 as screens show it (sRGB's curve).

    Args:
        pixels: uint16 [H, W, 3], non-linear, full range.
        transfer: code of H.273: 16 PQ, 18 HLG; others are taken for SDR.
        primaries: code of H.273; those of BT.709 stay.

    Returns:
        uint8 [H, W, 3].

    Source: PQ and HLG: ITU-R BT.2100-2, tables 4 and 5 (HLG shown at 1000 nits); white: BT.2408;
    highlights: curve mobius of FFmpeg's tonemap filter, on the largest of R, G, B; sRGB: IEC
    61966-2-1. Deviation: colours outside of BT.709 are clipped.
    """
    linear = _linear(transfer)[pixels]
    if transfer == _HLG:
        luma = linear @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        linear *= (_HLG_PEAK_NITS / _WHITE_NITS * np.power(luma, 0.2))[..., None]
    if primaries in _TO_BT709:
        linear = linear @ np.array(_TO_BT709[primaries], np.float32).T
    np.maximum(linear, 0, out=linear)
    if transfer in (_PQ, _HLG):
        brightest = linear.max(axis=-1, keepdims=True)
        linear *= _compressed(brightest) / np.maximum(brightest, 1e-6)
    return _encoded()[(np.minimum(linear, 1) * 65535 + 0.5).astype(np.uint16)]


def _compressed(value: np.ndarray) -> np.ndarray:
    """Leave what is below the knee, and bend what is above so that the peak is 1."""
    j, peak = _KNEE, _HLG_PEAK_NITS / _WHITE_NITS
    a = -j * j * (peak - 1) / (j * j - 2 * j + peak)
    b = (j * j - 2 * j * peak + peak) / max(peak - 1, 1e-6)
    above = np.maximum(value, j)
    bent = (b * b + 2 * b * j + j * j) / (b - a) * (above + a) / (above + b)
    return np.where(value > j, bent, value).astype(np.float32)


@cache
def _linear(transfer: int) -> np.ndarray:
    """Light of each 16-bit code, float32 [65536]: 1 is white; for HLG, of the scene."""
    code = np.arange(65536) / 65535
    if transfer == _PQ:
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        power = np.power(code, 1 / m2)
        nits = 10000 * np.power(np.maximum(power - c1, 0) / (c2 - c3 * power), 1 / m1)
        return (nits / _WHITE_NITS).astype(np.float32)
    if transfer == _HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        low, high = code * code / 3, (np.exp((code - c) / a) + b) / 12
        return np.where(code <= 0.5, low, high).astype(np.float32)
    low, high = code / 12.92, np.power((code + 0.055) / 1.055, 2.4)
    return np.where(code <= 0.04045, low, high).astype(np.float32)


@cache
def _encoded() -> np.ndarray:
    """SRGB's code of each light 0..1 in 65535 steps, uint8 [65536]."""
    light = np.arange(65536) / 65535
    code = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.power(light, 1 / 2.4) - 0.055)
    return np.rint(code * 255).astype(np.uint8)
