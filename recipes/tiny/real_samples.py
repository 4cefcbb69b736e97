"""Training samples of real pictures: the teacher's pairs, and paintings as their own targets.

Content and stylized canvas are cut by the same windows. In a clip the window pans, zooms and
shears over both, so that a texture sticks to the scene and no flicker can be learned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stylemaster_core.data.images import clip_pixels
from stylemaster_core.metrics.baselines import lab_to_rgb, rgb_to_lab
from stylemaster_core.models.image_encoder import ImageEncoder
from stylemaster_core.models.patch_vae import PatchVAE
from stylemaster_core.models.vae import WanVAE

from .pictures import PAINTING_PX
from .samples import REFERENCE_PX, ClipSize, TinySamples, encode_clips
from .teacher import Pairs, tile_pixels

# With how many windows of each size a pair is shown; fractions are drawn. The tile is the pair's.
REAL_SIZES: dict[ClipSize, float] = {
    ClipSize(1, 96, 96): 2.5,
    ClipSize(1, 128, 128): 2.0,
    ClipSize(9, 64, 64): 1.0,
    ClipSize(9, 96, 96): 0.7,
}
OWN_SHARE = 0.1  # of the windows: a painting from its own gray tile, another part as reference
SMALLEST_REFERENCE = 0.8  # of the painting's side
# Gray style pictures ask for gray results, and those of one colour for that colour.
LOOKS = {"as it is": 0.84, "gray": 0.08, "one colour": 0.08}
ONE_COLOUR_CONTRAST = 0.15
# Magenta's results have other colours than its style pictures. Of the latter's light and shade half
# is taken, as all of it costs texture.
LIGHT_SHARE, LARGEST_GAIN = 0.5, 3.0
CAPTIONS = ("", "a painting", "a picture", "a photograph as a painting")


class Motion(NamedTuple):
    """How a window lies on a canvas, and how it changes from frame to frame."""

    middle: np.ndarray  # x, y in pixels
    zoom: float
    angle: float  # radians
    shear: float
    velocity: np.ndarray
    growth: float
    spin: float


def draw_motion(rng: np.random.Generator, canvas: int, side: int) -> Motion:
    """A window of `side` pixels that stays on the canvas for some frames."""
    free = max(canvas - side, 0) / 2
    middle = canvas / 2 + rng.uniform(-free, free, 2)
    return Motion(
        middle,
        float(rng.uniform(0.95, 1.1)),
        float(rng.normal(0, 0.05)),
        float(rng.normal(0, 0.03)),
        rng.normal(0, 1.5, 2),
        float(np.exp(rng.normal(0, 0.012))),
        float(rng.normal(0, 0.008)),
    )


def window(canvas: np.ndarray, motion: Motion, frames: int, height: int, width: int) -> np.ndarray:
    """What the window shows of uint8 [S, S, 3]: uint8 [T, H, W, 3]."""
    shown = []
    for number in range(frames):
        zoom, angle = motion.zoom * motion.growth**number, motion.angle + motion.spin * number
        cosine, sine = np.cos(angle) / zoom, np.sin(angle) / zoom
        turn = np.array([[cosine, -sine + motion.shear], [sine, cosine]])
        middle = motion.middle + number * motion.velocity
        offset = middle - turn @ np.array([width / 2, height / 2])
        shown.append(
            cv2.warpAffine(
                canvas,
                np.column_stack([turn, offset]),
                (width, height),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REFLECT,
            )
        )
    return np.stack(shown)


def draw_real_samples(
    pairs: Pairs,
    paintings: np.ndarray,
    vae: WanVAE | PatchVAE,
    encoder: ImageEncoder,
    *,
    seed: int,
    sizes: Mapping[ClipSize, float] = REAL_SIZES,
) -> TinySamples:
    """Cut windows out of the pairs and encode them.

    Args:
        pairs: of the teacher.
        paintings: uint8 [N, 160, 160, 3] whose styles they have.
        vae: of the latents.
        encoder: of the references.
        seed: of everything.
        sizes: with how many windows of each size a pair is shown.
    """
    jobs: dict[ClipSize, list[tuple[np.ndarray, np.ndarray, int]]] = defaultdict(list)
    references: list[Tensor] = []
    for number, style in enumerate(tqdm(pairs.styles, desc="windows", disable=None)):
        rng = np.random.default_rng([seed, 13, number])
        look = str(rng.choice(list(LOOKS), p=list(LOOKS.values())))
        colour = rng.uniform(15, 240, 3)
        own_look = with_look(paintings[style], look, colour, contrast=0)
        stylized = in_colours_of(pairs.stylized[number], paintings[style])
        references += [_reference(rng, picture) for picture in (paintings[style], own_look)]
        for size, count in sizes.items():
            for _ in range(int(count + rng.random())):
                own = rng.random() < OWN_SHARE and size.height <= PAINTING_PX
                target = paintings[style] if own else stylized
                content = target if own else pairs.contents[number]
                content, target = _cut(rng, content, target, size)
                second = int(rng.integers(2))
                if second:
                    target = with_look(target, look, colour, contrast=ONE_COLOUR_CONTRAST)
                tiled = size._replace(tile=int(pairs.tiles[number]))
                jobs[tiled].append((content, target, 2 * number + second))
    latents, controls, owners, captions = [], [], [], []
    rng = np.random.default_rng([seed, 14])
    for size, items in jobs.items():
        for first in tqdm(range(0, len(items), 32), desc=f"latents of {size}", disable=None):
            part = items[first : first + 32]
            latents += list(encode_clips(vae, np.stack([target for _, target, _ in part])))
            tiles = [tile_pixels(content, size.tile) for content, _, _ in part]
            controls += list(encode_clips(vae, np.stack(tiles)))
            owners += [owner for _, _, owner in part]
            captions += [str(rng.choice(CAPTIONS)) for _ in part]
    patches, embeds = [], []
    for first in range(0, len(references), 32):
        features = encoder.encode(torch.stack(references[first : first + 32]))
        patches.append(features.patch_features.half())
        embeds.append(features.image_embeds.half())
    return TinySamples(
        latents, controls, captions, owners, torch.cat(patches), torch.cat(embeds), {}
    )


def in_colours_of(picture: np.ndarray, painting: np.ndarray) -> np.ndarray:
    """Uint8 [H, W, 3] with the mean and spread of chroma of a painting, and half-way of its light.

    Source: Reinhard et al. 2001, Color Transfer between Images, in CIE L*a*b*.
    """
    found, wanted = rgb_to_lab(picture), rgb_to_lab(painting)
    mean, spread = found.mean((0, 1)), found.std((0, 1))
    gain = np.minimum(wanted.std((0, 1)) / (spread + 1e-3), LARGEST_GAIN)
    recoloured = (found - mean) * gain + wanted.mean((0, 1))
    return lab_to_rgb(found + (recoloured - found) * (LIGHT_SHARE, 1, 1))


def with_look(pixels: np.ndarray, look: str, colour: np.ndarray, *, contrast: float) -> np.ndarray:
    """Pixels as they are, in gray, or of one colour with a trace of their light and shade.

    Args:
        pixels: uint8 [..., 3].
        look: one of `LOOKS`.
        colour: float [3], 0..255, that "one colour" takes.
        contrast: share of light and shade that is left there.
    """
    if look == "as it is":
        return pixels
    luma = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
    if look == "gray":
        return np.broadcast_to(luma, pixels.shape).round().astype(np.uint8)
    shade = contrast * (luma - luma.mean())
    return (colour + shade).round().clip(0, 255).astype(np.uint8)


def same_part(
    rng: np.random.Generator, height: int, width: int, *pictures: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The same part of pictures, uint8 [S, S, 3] each: [1, H, W, 3]."""
    side = len(pictures[0])
    y, x = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    return tuple(picture[None, y : y + height, x : x + width] for picture in pictures)


def _cut(
    rng: np.random.Generator, content: np.ndarray, target: np.ndarray, size: ClipSize
) -> tuple[np.ndarray, np.ndarray]:
    """The same window of both; a still is cut pixel by pixel, so that nothing is blurred."""
    side = len(target)
    if size.num_frames == 1:
        both = same_part(rng, size.height, size.width, content, target)
    else:
        motion = draw_motion(rng, side, max(size.height, size.width))
        shape = size.num_frames, size.height, size.width
        both = window(content, motion, *shape), window(target, motion, *shape)
    return both if rng.random() < 0.5 else (both[0][:, :, ::-1], both[1][:, :, ::-1])


def _reference(rng: np.random.Generator, painting: np.ndarray) -> Tensor:
    side = int(len(painting) * rng.uniform(SMALLEST_REFERENCE, 1))
    y, x = rng.integers(0, len(painting) - side + 1, 2)
    part = painting[y : y + side, x : x + side]
    part = part[:, ::-1] if rng.random() < 0.5 else part
    return clip_pixels(np.ascontiguousarray(part), size=REFERENCE_PX)
