"""What the recipe's stages take from real pictures, prepared once in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.vae import load_vae

from .encoder_paintings import Paintings, num_held_out, whitened
from .limit import TimeLimit
from .made import Made, draw_made
from .pictures import load_or_read_paintings, resized, save
from .real_samples import Motion, draw_motion, draw_real_samples, window
from .samples import REFERENCE_PX, write_samples
from .teacher import SHARD_PAIRS, Pairs, draw_pairs, load_or_draw_vectors, num_shards, read_pairs
from .vae import CLIP_FRAMES, ClipPool

LAYER_SHARE, CUT_SHARE, NOISE_SHARE = 0.5, 0.15, 0.3
CANVAS_SHARES = (0.35, 0.35, 0.3)  # of clips: stylized, contents, paintings


@dataclass(frozen=True)
class RealData:
    """Paintings, photographs, and what was made of them.

    Attributes:
        folder: where it is kept.
        art: paintings, read by `list_pictures`; those that it holds out are not used.
        photos: contents beside the paintings.
        num_pairs: how many the teacher makes; those of the last file only validate.
        num_vectors: of how many paintings it says the style.
        num_clips: by side in pixels, for the VAE.
        seed: of all draws.
        limit: of this call.
    """

    folder: Path
    art: Path
    photos: Path
    num_pairs: int
    num_vectors: int
    num_clips: Mapping[int, int]
    seed: int = 0
    limit: TimeLimit = field(default_factory=TimeLimit)

    def prepare(self) -> None:
        """Read the paintings, and let the teacher work.

        Raises:
            TimeOver: when the limit is reached; what was done is kept.
        """
        load_or_read_paintings(self.folder, self.art)
        draw_pairs(
            self.folder,
            self.art,
            self.photos,
            self.num_pairs + SHARD_PAIRS,
            seed=self.seed,
            limit=self.limit,
        )
        load_or_draw_vectors(self.folder, self.art, self.num_vectors, self.limit)

    @cached_property
    def pictures(self) -> np.ndarray:
        """All paintings, uint8 [N, 160, 160, 3]."""
        return load_or_read_paintings(self.folder, self.art)

    @property
    def paintings(self) -> Paintings:
        """Paintings with the teacher's numbers."""
        vectors = load_or_draw_vectors(self.folder, self.art, self.num_vectors, self.limit)
        return Paintings(self.pictures, whitened(vectors))

    def reference(self, rng: np.random.Generator, *, held_out: bool) -> np.ndarray:
        """A painting as the style encoder sees it, uint8 [128, 128, 3]."""
        first = num_held_out(len(self.pictures))
        low, high = (0, first) if held_out else (first, len(self.pictures))
        return resized(self.pictures[rng.integers(low, high)], REFERENCE_PX, REFERENCE_PX)

    def draw_samples(self, folder: Path, models: Path) -> None:
        """Write the training samples of each file of pairs; the last file's are held out.

        Args:
            folder: of the recipe's samples.
            models: folder whose `vae` and `encoder` encode them.
        """
        last = num_shards(self.folder, self.seed) - 1
        missing = [n for n in range(last + 1) if not self._shard(folder, n, last).exists()]
        if not missing:
            return
        vae = load_vae(models / "vae" / "vae.safetensors")
        encoder = load_image_encoder(models / "encoder")
        for number in missing:
            self.limit.check()
            pairs = read_pairs(self.folder, self.seed, number)
            if number == last:
                pairs = Pairs(*(values[:8] for values in pairs))
            seed = self.seed + number
            samples = draw_real_samples(pairs, self.pictures, vae, encoder, seed=seed)
            write_samples(self._shard(folder, number, last), samples)

    def draw_made(self, model: Path, count: int, *, device: str = "cpu") -> Made:
        """What a model, given by the folder of its files, makes of so many of the pairs."""
        last, parts = num_shards(self.folder, self.seed) - 1, []
        for number in range(min(max(last, 1), -(-count // SHARD_PAIRS))):
            parts.append(read_pairs(self.folder, self.seed, number))
        pairs = Pairs(*(np.concatenate(values)[:count] for values in zip(*parts, strict=True)))
        self.limit.check()
        return draw_made(model, pairs, self.pictures, seed=self.seed, device=device)

    def _shard(self, folder: Path, number: int, last: int) -> Path:
        # Beside the drawings' files, which are read by the same beginning of their names.
        name = "held_out" if number == last else "train"
        return folder / f"{name}-real-{number:06d}.safetensors"

    def with_clips(self, drawn: ClipPool) -> ClipPool:
        """The drawn clips with real ones of the same sizes beside them."""
        clips = dict(drawn.clips)
        for size, count in self.num_clips.items():
            path = self.folder / f"clips-{size}px-{count}-seed{self.seed}.npy"
            if not path.exists():
                self.limit.check()
                save(path, self._draw_clips(size, count))
            real = np.load(path, allow_pickle=False)
            clips[size] = np.concatenate([clips[size], real]) if size in clips else real
        return ClipPool(clips)

    def _draw_clips(self, size: int, count: int) -> np.ndarray:
        """uint8 [N, 9, S, S, 3]: moving windows over canvases, some with a layer before them."""
        shards = max(num_shards(self.folder, self.seed) - 1, 1)
        clips = np.empty((count, CLIP_FRAMES, size, size, 3), np.uint8)
        for shard in tqdm(range(shards), desc=f"real clips of {size} px", disable=None):
            pairs = read_pairs(self.folder, self.seed, shard)
            for index in range(shard, count, shards):
                rng = np.random.default_rng([self.seed, 15, size, index])
                clips[index] = draw_real_clip(rng, size, pairs, self.pictures)
        return clips


def draw_real_clip(
    rng: np.random.Generator, size: int, pairs: Pairs, paintings: np.ndarray
) -> np.ndarray:
    """A clip for the VAE, uint8 [9, S, S, 3]: it pans, zooms and turns, may be cut and noisy."""

    def canvas() -> np.ndarray:
        kind = rng.choice(3, p=CANVAS_SHARES)
        if kind == 2:
            return paintings[rng.integers(len(paintings))]
        return (pairs.stylized, pairs.contents)[kind][rng.integers(len(pairs.styles))]

    def shown(picture: np.ndarray) -> np.ndarray:
        motion = draw_motion(rng, len(picture), size)
        return window(picture, motion, CLIP_FRAMES, size, size)

    clip = shown(canvas()).astype(np.float32)
    if rng.random() < LAYER_SHARE:
        side = 2 * size
        cloud = rng.normal(0, 1, (side, side)).astype(np.float32)
        cloud = cv2.GaussianBlur(cloud, (0, 0), size / 6)
        hard = (cloud > np.quantile(cloud, 0.7)).astype(np.float32)
        soft = (cv2.GaussianBlur(hard, (0, 0), 0.8) * 255).astype(np.uint8)
        motion: Motion = draw_motion(rng, side, size)
        cover = window(soft[..., None].repeat(3, -1), motion, CLIP_FRAMES, size, size) / 255
        clip = clip * (1 - cover) + shown(canvas()) * cover
    if rng.random() < CUT_SHARE:
        at = int(rng.integers(1, CLIP_FRAMES))
        clip[at:] = shown(canvas())[at:]
    if rng.random() < NOISE_SHARE:
        clip = clip + rng.normal(0, rng.uniform(0, 4), clip.shape)
    return clip.round().clip(0, 255).astype(np.uint8)
