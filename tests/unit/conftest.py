"""Tiny random Wan transformers in float64, where equality can be asked for to 1e-10."""

import pytest
import torch
from torch import Tensor

from stylemaster_core import load_transformer
from stylemaster_core.models.small import draw_weights
from stylemaster_core.weights.shapes import (
    AdapterSizes,
    WanSizes,
    expected_adapter_shapes,
    expected_base_shapes,
)


def _weights(num_blocks: int = 4, *, style: bool = True, seed: int = 0) -> dict[str, Tensor]:
    shapes = expected_base_shapes(
        WanSizes(width=24, ffn_width=32, num_blocks=num_blocks, text_width=10, freq_width=8)
    )
    if style:
        adapter = expected_adapter_shapes(
            AdapterSizes(
                width=24,
                num_blocks=num_blocks,
                style_width=10,
                patch_width=16,
                num_layers=1,
                global_tokens=3,
                global_width=8,
            )
        )
        shapes |= {key: shape for key, shape in adapter.items() if "_img." in key}
    return {key: value.double() for key, value in draw_weights(shapes, seed).items()}


class TinyInputs:
    """Inputs that fit the tiny transformer: 3 x 4 x 6 latents, 6 text and 5 style tokens of 10."""

    def __init__(self, batch: int = 1, frames: int = 3, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.latents = draw(batch, 16, frames, 4, 6)
        self.control_latents = draw(1, 16, frames, 4, 6)
        self.text, self.negative = draw(1, 6, 10), draw(1, 6, 10)
        self.tokens, self.other_tokens = draw(1, 5, 10), draw(1, 5, 10)
        self.timestep = torch.tensor([700.0])


@pytest.fixture(scope="session")
def tiny_weights():
    return _weights


@pytest.fixture
def tiny_transformer():
    def build(num_blocks: int = 4, *, style: bool = True):
        return load_transformer(_weights(num_blocks, style=style), num_heads=2)

    return build


@pytest.fixture(scope="session")
def tiny_inputs():
    return TinyInputs
