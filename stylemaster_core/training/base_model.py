"""Trainer of the base: plain text-to-video flow matching of the whole transformer.

The released base is never trained here; this is for small models of the same architecture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.wan_transformer import load_transformer
from ..weights.convert import BASE_FORMAT, CUSTOM_BASE
from ..weights.shapes import WanSizes, expected_base_shapes
from ..weights.state_dict import diffusers_to_native
from .config import BaseConfig, TrainConfig
from .flow_matching import FlowDraws, FlowMatchTrainer, StateDict, trainable
from .samples import Sample, generator_of
from .trainer import TrainedFile, stored


class BaseTrainer(FlowMatchTrainer):
    """Flow matching of every weight under text.

    Source: Wan 2.1, technical report (flow matching); deviation: the weight of the noise levels is
    this project's own choice in the config.
    """

    name = "base"

    def __init__(self, config: TrainConfig, transformer: Any, **more: Any) -> None:
        """Set up.

        Args:
            config: of the run.
            transformer: is trained as a whole.
            more: `null_text` and `provenance` of `FlowMatchTrainer`.
        """
        draws = FlowDraws(config, ("latents", "text"), drop_style=False)
        super().__init__(config, transformer, draws, **more)
        trainable(transformer)

    def velocity(self, noisy: Tensor, timestep: Tensor, text: Tensor, batch: Sample) -> Tensor:
        return self.transformer(noisy, timestep, text)

    def outputs(self) -> list[TrainedFile]:
        weights = diffusers_to_native(self.transformer.state_dict())
        tensors = stored(weights, self.config)
        metadata = self.metadata(
            BASE_FORMAT, base_model=CUSTOM_BASE, num_blocks=str(len(self.transformer.blocks))
        )
        return [TrainedFile("base.safetensors", tensors, metadata)]


def new_base_weights(config: BaseConfig, seed: int) -> dict[str, Tensor]:
    """Weights of a new transformer, under the release's names, float32.

    Linear layers are Xavier-uniform, embeddings normal with 0.02, the last layer zero.

    Source: Wan 2.1's own initialisation (`WanModel.init_weights`).
    """
    sizes = WanSizes(
        width=config.width,
        ffn_width=config.ffn_width,
        num_blocks=config.num_blocks,
        text_width=config.text_width,
    )
    generator = generator_of(seed, "base")
    weights = {}
    for name, shape in expected_base_shapes(sizes).items():
        value = torch.zeros(shape)
        if name.endswith("modulation"):
            value = torch.randn(shape, generator=generator) * config.width**-0.5
        elif "norm" in name and name.endswith(".weight"):
            value = torch.ones(shape)
        elif name.startswith(("text_embedding.", "time_embedding.")) and len(shape) == 2:
            value = torch.randn(shape, generator=generator) * 0.02
        elif len(shape) > 1 and not name.startswith("head.head"):
            fan_out, fan_in = shape[0], torch.Size(shape[1:]).numel()
            bound = (6 / (fan_in + fan_out)) ** 0.5
            value = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        weights[name] = value
    return weights


def create_base_trainer(
    config: TrainConfig,
    base: StateDict | None = None,
    *,
    num_heads: int | None = None,
    **more: Any,
) -> BaseTrainer:
    """The trainer of a base model.

    Args:
        config: of the run; `config.base` has the sizes of a new model.
        base: weights to start from; None for a new model.
        num_heads: of the transformer; None for width / 128.
        more: `null_text` and `provenance` of `FlowMatchTrainer`.
    """
    weights = base or new_base_weights(config.base, config.run.seed)
    model = load_transformer({k: v.float() for k, v in weights.items()}, num_heads=num_heads)
    model.style_attention = None
    return BaseTrainer(config, model, **more)
