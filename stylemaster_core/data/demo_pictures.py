"""What `stylemaster demo` shows: a moved photograph, and style pictures painted by code."""

from __future__ import annotations

import cv2
import numpy as np

from ..errors import UnsupportedHostError

SEED = 0


def photograph_clip(num_frames: int, height: int, width: int) -> np.ndarray:
    """A slow zoom into NASA's portrait of Eileen Collins (public domain), from scikit-image.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        UnsupportedHostError: if scikit-image is not installed.
    """
    try:
        from skimage.data import astronaut
    except ImportError as error:
        raise UnsupportedHostError(
            "the demo's photograph is part of scikit-image, which is not installed; run "
            "pip install 'stylemaster[demo]'"
        ) from error
    photograph = astronaut()
    side = len(photograph)
    # The widest part of the frame's shape, then four fifths of it, nearer to the face.
    part = np.array([min(side, side * width / height), min(side, side * height / width)])
    clip = []
    for number in range(num_frames):
        done = number / max(num_frames - 1, 1)
        shown = part * (1 - 0.2 * done)
        middle = (1 - done) * part / 2 + done * np.array([0.46, 0.36]) * side
        left, top = np.clip(middle - shown / 2, 0, side - shown)
        matrix = np.array([[shown[0] / width, 0, left], [0, shown[1] / height, top]])
        flags = cv2.INTER_AREA | cv2.WARP_INVERSE_MAP
        source = cv2.GaussianBlur(photograph, (0, 0), max(0.4 * shown[0] / width, 0.01))
        clip.append(cv2.warpAffine(source, matrix, (width, height), flags=flags))
    return np.stack(clip)


def painted_styles(size: int = 256) -> dict[str, np.ndarray]:
    """Style pictures, each uint8 [size, size, 3]: impasto, ink wash and stained glass."""
    return {
        "impasto": _impasto(size),
        "ink_wash": _ink_wash(size),
        "stained_glass": _stained_glass(size),
    }


def _impasto(size: int) -> np.ndarray:
    """Short thick strokes around whirls in the sky above a field, coarse ones first.

    After Hertzmann, "Painterly Rendering with Curved Brush Strokes of Multiple Sizes", 1998.
    """
    rng = np.random.default_rng([SEED, 1])
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    whirls = [(0.3, 0.3, 0.22, 1.0), (0.72, 0.2, 0.15, -1.0), (0.85, 0.5, 0.12, 1.0)]
    flow_x, flow_y = np.full_like(x, 0.5), 0.15 * np.sin(6 * x)
    glow = np.zeros_like(x)
    for middle_x, middle_y, radius, sense in whirls:
        weight = np.exp(-((x - middle_x) ** 2 + (y - middle_y) ** 2) / (2 * radius**2))
        flow_x = flow_x - sense * weight * (y - middle_y) / radius * 2
        flow_y = flow_y + sense * weight * (x - middle_x) / radius * 2
        glow = np.maximum(glow, weight**6)
    ground = y > 0.68 + 0.05 * np.sin(7 * x)
    sky = _mix((28, 52, 120), (96, 150, 196), np.clip(y / 0.7 + 0.15 * np.sin(9 * x + 7 * y), 0, 1))
    sky = sky + (np.array([250, 214, 92]) - sky) * glow[..., None]
    field = _mix((58, 92, 50), (206, 160, 52), np.clip((y - 0.7) / 0.3, 0, 1))
    picture = np.where(ground[..., None], field, sky).astype(np.float32)
    canvas = picture.copy()
    for width, spacing in ((11, 7), (6, 4), (3, 4)):
        blurred = cv2.GaussianBlur(picture, (0, 0), width / 2)
        places = np.stack(np.meshgrid(*[np.arange(0, size, spacing)] * 2), -1).reshape(-1, 2)
        places = places + rng.integers(-spacing, spacing + 1, places.shape)
        for px, py in rng.permutation(places).clip(0, size - 1):
            along = np.array([flow_x[py, px], flow_y[py, px]])
            along = along / (np.linalg.norm(along) + 1e-6) * width * rng.uniform(1.2, 2.4)
            colour = blurred[py, px] * rng.uniform(0.8, 1.18) + rng.normal(0, 9, 3)
            middle = np.array([px, py])
            _stroke(canvas, middle, along, colour, width)
            light = colour * 1.18 + 10
            _stroke(canvas, middle - (1, width // 3 + 1), along, light, max(width // 4, 1))
    return canvas.round().clip(0, 255).astype(np.uint8)


def _stroke(
    canvas: np.ndarray, middle: np.ndarray, along: np.ndarray, colour: np.ndarray, width: int
) -> None:
    """Draw a straight stroke into float32 [H, W, 3]."""
    (x1, y1), (x2, y2) = (int(v) for v in middle - along / 2), (int(v) for v in middle + along / 2)
    shown = colour.clip(0, 255).tolist()
    cv2.line(canvas, (x1, y1), (x2, y2), shown, width, cv2.LINE_AA)


def _ink_wash(size: int) -> np.ndarray:
    """Gray hills in mist on warm paper, wet edges and dry speckles."""
    rng = np.random.default_rng([SEED, 2])
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    paper = np.array([238, 231, 214], np.float32)
    grain = cv2.GaussianBlur(rng.normal(0, 1, (size, size)).astype(np.float32), (0, 0), 1.2)
    cloud = cv2.GaussianBlur(rng.normal(0, 1, (size, size)).astype(np.float32), (0, 0), 9)
    cloud = cloud / cloud.std()
    ink = np.zeros_like(x)
    for number, (base, tall, dark) in enumerate(
        ((0.34, 0.12, 0.22), (0.5, 0.16, 0.4), (0.72, 0.13, 0.72))
    ):
        ridge = base - tall * (
            np.sin(4.1 * x + 2 * number) * 0.6 + np.abs(np.sin(9.7 * x + number)) * 0.5
        )
        below = y - ridge - 0.008 * cloud
        wash = np.clip(below / 0.012, 0, 1) * np.exp(-np.clip(below, 0, None) / 0.13)
        edge = np.exp(-((below - 0.008) ** 2) / (2 * 0.006**2))
        ink = np.maximum(ink * 0.96, dark * (wash * (0.85 + 0.15 * cloud) + 0.35 * edge))
    for _ in range(30):  # a bamboo's leaves
        middle = [int(v * size) for v in (rng.uniform(0.6, 0.98), rng.uniform(0.55, 0.98))]
        axes = int(rng.uniform(8, 16)), int(rng.uniform(1, 3))
        leaf = np.zeros((size, size), np.float32)
        cv2.ellipse(leaf, middle, axes, rng.normal(-62, 22), 0, 360, 1.0, -1, cv2.LINE_AA)
        ink = np.maximum(ink, rng.uniform(0.5, 0.95) * cv2.GaussianBlur(leaf, (0, 0), 0.7))
    ink = np.clip(ink + 0.05 * grain / grain.std() * (ink > 0.05), 0, 1)[..., None]
    picture = paper * (1 - ink) + np.array([34, 36, 42], np.float32) * ink
    picture = picture + 2.5 * (grain / grain.std())[..., None]
    return picture.round().clip(0, 255).astype(np.uint8)


def _stained_glass(size: int) -> np.ndarray:
    """Panes of strong colours between dark leads, lighter in their middles."""
    rng = np.random.default_rng([SEED, 3])
    count = max((size // 28) ** 2, 4)
    middles = rng.uniform(0, size, (count, 2)).astype(np.float32)
    place = np.moveaxis(np.mgrid[0:size, 0:size], 0, -1).astype(np.float32)
    distances = np.linalg.norm(place[:, :, None] - middles, axis=-1)
    nearest = distances.argmin(-1)
    distances = np.partition(distances, 1, axis=-1)[..., :2]  # of the nearest two panes
    palette = np.array(
        [[24, 60, 150], [186, 30, 44], [236, 176, 30], [30, 124, 84], [110, 40, 128]]
    )
    panes = palette[rng.choice(len(palette), count, p=(0.32, 0.22, 0.2, 0.16, 0.1))]
    panes = panes * rng.uniform(0.75, 1.25, (count, 1))
    light = np.clip(1.25 - distances[..., 0] / 34, 0.65, 1.25)[..., None]
    ripple = cv2.GaussianBlur(rng.normal(0, 1, (size, size)).astype(np.float32), (0, 0), 2)
    picture = panes[nearest] * light + 9 * (ripple / ripple.std())[..., None]
    lead = np.clip((distances[..., 1] - distances[..., 0]) / 2 - 1.6, 0, 1)[..., None]
    picture = picture * lead + np.array([22, 20, 24]) * (1 - lead)
    return picture.round().clip(0, 255).astype(np.uint8)


def _mix(first: tuple, second: tuple, share: np.ndarray) -> np.ndarray:
    low, high = np.array(first, np.float32), np.array(second, np.float32)
    return low + (high - low) * share[..., None]
