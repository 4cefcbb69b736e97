"""Pictures that the style encoder learns from: styles on contents, with what is known of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from stylemaster_core.metrics.texture import texture_signature

SIZE_PX = 128
COLOUR_LEVELS = np.linspace(0.05, 0.95, 7)


class Pool(NamedTuple):
    """Pictures of styles. With siblings, styles 2k and 2k + 1 differ in their texture only."""

    pictures: np.ndarray  # uint8 [S, P, 128, 128, 3], P contents of each style
    families: np.ndarray  # int64 [S]
    textures: np.ndarray  # float32 [S, P, 25] texture signatures
    colours: np.ndarray  # float32 [S, P, 21] quantiles of red, green and blue, 0..1


def draw_pool(
    seed: int,
    *,
    num_styles: int,
    pictures: int,
    contents: int,
    siblings: bool = True,
    held_out: bool = False,
    progress: bool = True,
) -> Pool:
    """Draw styles and apply each to some contents.

    Args:
        seed: of the styles, the contents and which meet.
        num_styles: S, even with siblings.
        pictures: P of each style, on different contents; siblings share their contents.
        contents: size of the bank of contents.
        siblings: every second style has the palette of the one before it and another texture.
        held_out: draw styles and contents that training never sees.
        progress: show a bar.
    """
    # Not at the top: the training code is tested without them.
    from .contents import draw_clip
    from .styles import draw_style, with_other_texture

    rng = np.random.default_rng([seed, held_out])
    bank = [
        draw_clip(rng, 1, SIZE_PX, SIZE_PX, held_out=held_out)[0]
        for _ in tqdm(range(contents), desc="contents", disable=not progress, mininterval=10)
    ]
    shape = (num_styles, pictures)
    pool = Pool(
        np.empty((*shape, SIZE_PX, SIZE_PX, 3), np.uint8),
        np.empty(num_styles, np.int64),
        np.empty((*shape, 25), np.float32),
        np.empty((*shape, 3 * len(COLOUR_LEVELS)), np.float32),
    )
    style, chosen = None, np.arange(pictures)
    for index in tqdm(range(num_styles), desc="styles", disable=not progress, mininterval=10):
        if siblings and index % 2 and style is not None:
            style = with_other_texture(style, rng)
        else:
            style = draw_style(rng, held_out=held_out)
            chosen = rng.choice(contents, pictures, replace=False)
        pool.families[index] = style.family
        for place, content in enumerate(chosen):
            picture = style.apply(bank[content])
            pool.pictures[index, place] = picture[0]
            pool.textures[index, place] = texture_signature(picture)
            pool.colours[index, place] = colour_quantiles(picture)
    return pool


def colour_quantiles(frames: np.ndarray) -> np.ndarray:
    """Seven quantiles of each channel of uint8 [T, H, W, 3]: float32 [21], 0..1."""
    pixels = frames[:, ::2, ::2].reshape(-1, 3).astype(np.float32) / 255
    return np.quantile(pixels, COLOUR_LEVELS, axis=0).T.reshape(-1).astype(np.float32)


def load_or_draw_pool(folder: Path, seed: int, **sizes: int | bool) -> Pool:
    """The pool kept in `folder`, else a new one that is kept there."""
    if not folder.is_dir():
        pool = draw_pool(seed, **sizes)  # type: ignore[arg-type]
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        part.mkdir(parents=True)
        for name, values in pool._asdict().items():
            np.save(part / f"{name}.npy", values, allow_pickle=False)
        part.rename(folder)
    return Pool(*[np.load(folder / f"{name}.npy", allow_pickle=False) for name in Pool._fields])
