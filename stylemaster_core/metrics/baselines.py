"""What needs no model: every result is to be seen beside these."""

from __future__ import annotations

import numpy as np

from ..data.images import check_image
from ..layouts import check_frames

# Linear sRGB to XYZ and the white point D65 (IEC 61966-2-1).
RGB_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
WHITE = RGB_TO_XYZ.sum(1)
LAB_KNEE = 6 / 29


def reinhard(frames: np.ndarray, style_image: np.ndarray) -> np.ndarray:
    """Give each frame the mean and standard deviation that the style picture has in Lab.

    Args:
        frames: uint8 [T, H, W, 3], the content.
        style_image: uint8 [H, W, 3].

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        LayoutError: if one has another type or shape.

    Source: Reinhard et al. 2001, Color Transfer between Images; deviation: CIE L*a*b* instead of
    their l-alpha-beta.
    """
    wanted = rgb_to_lab(check_image(style_image))
    mean, spread = wanted.mean((0, 1)), wanted.std((0, 1))
    result = np.empty_like(check_frames(frames))
    for index, frame in enumerate(frames):
        lab = rgb_to_lab(frame)
        normal = (lab - lab.mean((0, 1))) / (lab.std((0, 1)) + 1e-6)
        result[index] = lab_to_rgb(normal * spread + mean)
    return result


def rgb_to_lab(image: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB pixels.

    Args:
        image: uint8 [..., 3].

    Returns:
        float64 [..., 3]; L in 0..100.

    Source: IEC 61966-2-1 (sRGB) and CIE 15 (L*a*b*); deviation: none.
    """
    rgb = image.astype(np.float64) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ RGB_TO_XYZ.T / WHITE
    f = np.where(xyz > LAB_KNEE**3, np.cbrt(xyz), xyz / (3 * LAB_KNEE**2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """Undo `rgb_to_lab`; colours that sRGB cannot show are clipped.

    Args:
        lab: float [..., 3].

    Returns:
        uint8 [..., 3].
    """
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > LAB_KNEE, f**3, 3 * LAB_KNEE**2 * (f - 4 / 29)) * WHITE
    linear = (xyz @ np.linalg.inv(RGB_TO_XYZ).T).clip(0, 1)
    rgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (rgb * 255).round().clip(0, 255).astype(np.uint8)
