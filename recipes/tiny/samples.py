"""Training samples of the transformer: a clip in a style, its gray tile, caption and reference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stylemaster_core.data.gray_tile import gray_tile
from stylemaster_core.data.images import clip_pixels
from stylemaster_core.models.image_encoder import ImageEncoder
from stylemaster_core.models.patch_vae import PatchVAE
from stylemaster_core.models.text_encoder import HashedWordsTextEncoder
from stylemaster_core.models.vae import WanVAE
from stylemaster_core.training.samples import Sample
from stylemaster_core.weights.files import read_state_dict, write_state_dict

from .contents import draw_clip
from .styles import StyleFilter, draw_style

REFERENCE_PX = 128
MIN_CROP = 0.64  # StyleCrafter's references are 512 px out of 800
TEXT_WIDTH, TEXT_LENGTH = 4096, 24
# What the words of a caption do not say is left to chance: the model meets unknown words, too.
UNKNOWN_WORDS = 0.1
ENCODE_BATCH = 32


class ClipSize(NamedTuple):
    """Frames and pixels of a training clip, and the gray tile's factor."""

    num_frames: int
    height: int
    width: int
    tile: int = 2


# With how many clips of each size a style is shown; fractions are drawn.
SIZES: dict[ClipSize, float] = {
    ClipSize(9, 64, 64): 0.8,
    ClipSize(1, 128, 128): 0.7,
    ClipSize(5, 128, 128): 0.25,
    ClipSize(5, 96, 96): 0.35,
    ClipSize(5, 64, 96): 0.2,
    ClipSize(1, 128, 128, 4): 0.2,
}
PICTURES: dict[ClipSize, float] = {ClipSize(1, 128, 128): 1.0}


@dataclass
class TinySamples:
    """Samples in memory; references are shared by the clips of a style.

    Attributes:
        latents: of the stylised clips, float16 [16, t, h, w] each.
        controls: of the gray tiles of their contents.
        captions: of their contents.
        references: number of each clip's reference.
        patch_features: float16 [R, N, C].
        image_embeds: float16 [R, D].
        hashes: of the models that encoded them.
    """

    latents: list[Tensor]
    controls: list[Tensor]
    captions: list[str]
    references: list[int]
    patch_features: Tensor
    image_embeds: Tensor
    hashes: dict[str, str]

    def __post_init__(self) -> None:
        self.ids = [str(i) for i in range(len(self.latents))]
        self.groups = [str(reference) for reference in self.references]
        self.sizes = [tuple(latents.shape) for latents in self.latents]
        self.words = words_encoder()

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> Sample:
        reference = self.references[index]
        return {
            "latents": self.latents[index],
            "control_latents": self.controls[index],
            "text": encode_words(self.words, self.captions[index]),
            "patch_features": self.patch_features[reference],
            "image_embeds": self.image_embeds[reference],
        }


_WORDS: dict[str, Tensor] = {}


def words_encoder() -> HashedWordsTextEncoder:
    """The text encoder of the small model."""
    return HashedWordsTextEncoder(TEXT_WIDTH, TEXT_LENGTH)


def encode_words(encoder: HashedWordsTextEncoder, caption: str) -> Tensor:
    """[24, 4096]; words are drawn once, as that takes longer than a training step's share."""
    words = [*caption.split()[: TEXT_LENGTH - 1], "</s>"]
    text = torch.zeros(TEXT_LENGTH, TEXT_WIDTH)
    for row, word in enumerate(words):
        if word not in _WORDS:
            _WORDS[word] = encoder._vector(word)
        text[row] = _WORDS[word]
    return text


def draw_samples(
    numbers: range,
    vae: WanVAE | PatchVAE,
    encoder: ImageEncoder,
    *,
    seed: int,
    held_out: bool = False,
    sizes: Mapping[ClipSize, float] = SIZES,
    cropped_references: float = 0.0,
    name: str = "samples",
) -> TinySamples:
    """Draw styles, apply them to clips and references, and encode all.

    Args:
        numbers: of the styles; each has a reference, and clips of other contents.
        vae: of the latents.
        encoder: of the references.
        seed: of everything.
        held_out: draw from the styles and contents that are left out otherwise.
        sizes: with how many clips of each size a style is shown.
        cropped_references: share of which a part is shown, enlarged, its texture with it.
        name: for the progress bar.
    """
    latents: list[Tensor] = []
    controls: list[Tensor] = []
    captions: list[str] = []
    references: list[int] = []
    pictures: list[np.ndarray] = []
    patches, embeds = [], []
    waiting: dict[ClipSize, list[tuple[int, np.ndarray, np.ndarray]]] = {}

    def flush(size: ClipSize) -> None:
        items = waiting.pop(size)
        both = [np.stack([item[i] for item in items]) for i in (1, 2)]
        encoded = [encode_clips(vae, clips) for clips in both]
        for row, (index, _, _) in enumerate(items):
            latents[index], controls[index] = encoded[0][row], encoded[1][row]

    for number in tqdm(numbers, desc=name, unit="style", mininterval=5):
        rng = np.random.default_rng([seed, int(held_out), number])
        style = draw_style(rng, held_out=held_out)
        picture = _reference(rng, style, held_out)
        # Without any, nothing is drawn for them, and samples are what they were.
        if cropped_references and rng.random() < cropped_references:
            picture = _cropped(rng, picture)
        pictures.append(picture)
        for size, count in sizes.items():
            for _ in range(int(count + rng.random())):
                clip, caption = draw_clip(
                    rng, size.num_frames, size.height, size.width, held_out=held_out
                )
                tile = gray_tile(clip, size.height, size.width, factor=size.tile)
                tile_frames = ((tile.permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()
                waiting.setdefault(size, []).append((len(latents), style.apply(clip), tile_frames))
                latents.append(torch.empty(0))
                controls.append(torch.empty(0))
                captions.append(_with_unknown_words(rng, caption))
                references.append(number - numbers.start)
                if len(waiting[size]) == ENCODE_BATCH:
                    flush(size)
        if len(pictures) == ENCODE_BATCH or number + 1 == numbers.stop:
            features = encoder.encode(torch.stack([_pixels(p) for p in pictures]))
            patches.append(features.patch_features.half())
            embeds.append(features.image_embeds.half())
            pictures = []
    for size in list(waiting):
        flush(size)
    return TinySamples(
        latents, controls, captions, references, torch.cat(patches), torch.cat(embeds), {}
    )


def encode_clips(vae: WanVAE | PatchVAE, clips: np.ndarray) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float16 latents [B, 16, t, h, w]."""
    video = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    return vae.encode(video).half()


def _pixels(picture: np.ndarray) -> Tensor:
    return clip_pixels(picture, size=REFERENCE_PX)


def _reference(rng: np.random.Generator, style: StyleFilter, held_out: bool) -> np.ndarray:
    picture, _ = draw_clip(rng, 1, REFERENCE_PX, REFERENCE_PX, held_out=held_out)
    return style.apply(picture)[0]


def _cropped(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    side = round(REFERENCE_PX * rng.uniform(MIN_CROP, 1))
    y, x = rng.integers(0, REFERENCE_PX - side + 1, 2)
    part = picture[y : y + side, x : x + side]
    return cv2.resize(part, (REFERENCE_PX, REFERENCE_PX), interpolation=cv2.INTER_CUBIC)


def _with_unknown_words(rng: np.random.Generator, caption: str) -> str:
    words = caption.split()
    unknown = rng.random(len(words)) < UNKNOWN_WORDS
    pairs = zip(words, unknown, strict=True)
    return " ".join(f"w{rng.integers(500)}" if is_unknown else word for word, is_unknown in pairs)


def still_samples(samples: TinySamples, num_frames: int) -> TinySamples:
    """The pictures among samples as clips without motion, of `num_frames` latent frames.

    This VAE's latents of a constant clip are those of its picture again (4e-4 apart, where they
    deviate by 0.5), so nothing needs to be encoded.
    """
    pictures = [i for i, size in enumerate(samples.sizes) if size[1] == 1]
    return dataclasses.replace(
        samples,
        latents=[samples.latents[i].expand(-1, num_frames, -1, -1) for i in pictures],
        controls=[samples.controls[i].expand(-1, num_frames, -1, -1) for i in pictures],
        captions=[samples.captions[i] for i in pictures],
        references=[samples.references[i] for i in pictures],
    )


def write_samples(path: Path, samples: TinySamples) -> None:
    """Write samples to one safetensors file."""
    tensors = {"patch_features": samples.patch_features, "image_embeds": samples.image_embeds}
    groups = _by_size(samples.sizes)
    for number, indices in enumerate(groups):
        tensors[f"latents.{number}"] = torch.stack([samples.latents[i] for i in indices])
        tensors[f"controls.{number}"] = torch.stack([samples.controls[i] for i in indices])
    metadata = {
        "captions": json.dumps(samples.captions),
        "references": json.dumps(samples.references),
        "groups": json.dumps(groups),
        "hashes": json.dumps(samples.hashes),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state_dict(path, tensors, metadata, overwrite=True)


def read_samples(path: Path) -> TinySamples:
    """Read what `write_samples` wrote."""
    tensors, metadata = read_state_dict(path)
    captions = json.loads(metadata["captions"])
    latents, controls = [torch.empty(0)] * len(captions), [torch.empty(0)] * len(captions)
    for number, indices in enumerate(json.loads(metadata["groups"])):
        for row, index in enumerate(indices):
            latents[index] = tensors[f"latents.{number}"][row]
            controls[index] = tensors[f"controls.{number}"][row]
    return TinySamples(
        latents,
        controls,
        captions,
        json.loads(metadata["references"]),
        tensors["patch_features"],
        tensors["image_embeds"],
        json.loads(metadata["hashes"]),
    )


def join_samples(parts: Sequence[TinySamples]) -> TinySamples:
    """Samples of several draws as one dataset."""
    offsets = np.cumsum([0, *[len(part.patch_features) for part in parts]])
    return TinySamples(
        [latents for part in parts for latents in part.latents],
        [controls for part in parts for controls in part.controls],
        [caption for part in parts for caption in part.captions],
        [
            reference + int(offset)
            for part, offset in zip(parts, offsets, strict=False)
            for reference in part.references
        ],
        torch.cat([part.patch_features for part in parts]),
        torch.cat([part.image_embeds for part in parts]),
        parts[0].hashes,
    )


def _by_size(sizes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return list(groups.values())
