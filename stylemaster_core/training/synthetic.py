"""Samples made of numbers alone, in which style, text, control and motion each explain a part.

For tests and benchmarks: what a trainer should learn is known, and no file is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .samples import MemoryDataset, Sample, generator_of

NUM_STYLES = 6  # numbers that make up a style
NUM_TEXTS = 4


class SyntheticWorld:
    """Fixed random maps from styles, texts and contents to latents and features.

    Latents are a blob that moves over the frame (in still clips: stays), in a colour that the text
    tells, on a ground whose channels the style tells.
    """

    def __init__(
        self,
        *,
        size: tuple[int, int, int] = (2, 4, 4),
        channels: int = 16,
        text_length: int = 5,
        text_width: int = 10,
        patches: int = 17,
        patch_width: int = 16,
        embed_width: int = 8,
        seed: int = 0,
    ) -> None:
        """Draw the maps.

        Args:
            size: t, h, w of the latents.
            channels: of the latents.
            text_length: tokens of a text.
            text_width: of text features.
            patches: number of patch features.
            patch_width: of patch features.
            embed_width: of image embeddings.
            seed: of the maps.
        """
        self.size, self.seed = size, seed
        self.text_length, self.patches = text_length, patches

        def draw(name: str, *shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator_of(seed, name))

        self.texts = draw("texts", NUM_TEXTS, text_length, text_width)
        self.null_text = draw("null text", 1, text_width)
        self.colours = draw("colours", NUM_TEXTS, channels)
        self.to_latents = draw("to latents", NUM_STYLES, channels) * 1.5 * NUM_STYLES**-0.5
        self.to_patches = draw("to patches", NUM_STYLES, patch_width) * NUM_STYLES**-0.5
        self.to_embeds = draw("to embeds", NUM_STYLES, embed_width) * NUM_STYLES**-0.5
        self.content_to_embeds = draw("content", NUM_STYLES, embed_width) * NUM_STYLES**-0.5

    def sample(self, name: object, *, still: bool = False, style: bool = True) -> Sample:
        """A sample that its name decides."""
        draws = generator_of(self.seed, "sample", name)
        text = int(torch.randint(NUM_TEXTS, (), generator=draws))
        vector = torch.randn(NUM_STYLES, generator=draws) * style
        blob = self._blob(draws, still)
        latents = blob * self.colours[text][:, None, None, None]
        latents = latents + (vector @ self.to_latents)[:, None, None, None]
        noise = torch.randn(2, self.to_embeds.shape[1], generator=draws) * 0.05
        patches = torch.randn(self.patches, self.to_patches.shape[1], generator=draws) * 0.1
        return {
            "latents": latents,
            "text": self.texts[text],
            "patch_features": vector @ self.to_patches + patches,
            "image_embeds": vector @ self.to_embeds + noise[0],
            "shuffled_embeds": vector @ self.to_embeds + noise[1],
            "control_latents": blob.expand(self.colours.shape[1], -1, -1, -1).contiguous(),
        }

    def pair(self, name: object) -> Sample:
        """Embeddings of an illusion pair: one style, two contents that weigh more than it."""
        draws = generator_of(self.seed, "pair", name)
        style = torch.randn(NUM_STYLES, generator=draws) @ self.to_embeds
        contents = torch.randn(2, NUM_STYLES, generator=draws) @ self.content_to_embeds
        first, second = style + 1.5 * contents
        return {"first_embeds": first, "second_embeds": second}

    def dataset(
        self, count: int, name: str = "train", *, still: bool = False, style: bool = True
    ) -> MemoryDataset:
        """Several samples."""
        samples = [self.sample(f"{name} {i}", still=still, style=style) for i in range(count)]
        return MemoryDataset(samples, ids=[f"{name}-{i}" for i in range(count)])

    def pairs(self, count: int, name: str = "train") -> MemoryDataset:
        """Several illusion pairs, each of a style of its own."""
        pairs = [self.pair(f"{name} {i}") for i in range(count)]
        return MemoryDataset(pairs, ids=[f"{name}-{i}" for i in range(count)])

    def _blob(self, draws: torch.Generator, still: bool) -> Tensor:
        """[1, t, h, w]: a bright spot that wanders around the frame, which wraps."""
        t, h, w = self.size
        start = torch.rand(2, generator=draws) * torch.tensor([h, w])
        speed = (torch.rand(2, generator=draws) - 0.5) * 2 * torch.tensor([h, w]) / 2
        time = torch.zeros(t) if still else torch.arange(t, dtype=torch.float32)
        y = (torch.arange(h)[None] - start[0] - time[:, None] * speed[0]) * (2 * torch.pi / h)
        x = (torch.arange(w)[None] - start[1] - time[:, None] * speed[1]) * (2 * torch.pi / w)
        return (y.cos()[:, :, None] + x.cos()[:, None, :])[None]
