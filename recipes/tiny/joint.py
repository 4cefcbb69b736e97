"""Trainer of the whole small model at once: base, style branch and control from nothing.

The released adapters were trained on a base that had seen millions of videos. Beside a base this
small, adapters alone could change little; so it learns to listen to them first, and the paper's
stages follow from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stylemaster_core.models.gray_tile_controlnet import (
    copy_from_transformer,
    load_gray_tile_controlnet,
)
from stylemaster_core.models.wan_transformer import load_transformer
from stylemaster_core.training.base_model import new_base_weights
from stylemaster_core.training.config import TrainConfig
from stylemaster_core.training.flow_matching import StateDict, trainable
from stylemaster_core.training.gradient_checkpointing import CheckpointedHost
from stylemaster_core.training.gray_tile_controlnet import GrayTileTrainer
from stylemaster_core.training.style_branch import (
    load_contrastive,
    new_style_attention,
    new_style_projector,
    style_branch,
)
from stylemaster_core.training.trainer import TrainedFile, stored
from stylemaster_core.weights.convert import BASE_FORMAT, CUSTOM_BASE
from stylemaster_core.weights.files import read_state_dict
from stylemaster_core.weights.state_dict import diffusers_to_native

from .picture_loss import PictureLoss

TOKEN_WIDTH = 128  # of style tokens; the release's are as wide as its text features


class JointTrainer(GrayTileTrainer):
    """Flow matching of base, style branch and control, each condition dropped at random."""

    def __init__(
        self, config: TrainConfig, transformer: Any, *parts: Any, loss: PictureLoss, **more: Any
    ) -> None:
        super().__init__(config, transformer, *parts, **more)
        trainable(transformer)
        self.loss = loss

    def losses(self, velocity: Tensor, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return self.loss(velocity - (noise - clean), clean, self.sigmas[level])

    def outputs(self) -> list[TrainedFile]:
        state = self.transformer.state_dict()
        base = {k: v for k, v in state.items() if not k.startswith("style_attention.")}
        metadata = self.metadata(
            BASE_FORMAT, base_model=CUSTOM_BASE, num_blocks=str(len(self.transformer.blocks))
        )
        tensors = stored(diffusers_to_native(base), self.config)
        return [TrainedFile("transformer.safetensors", tensors, metadata), *super().outputs()]


def create_joint_trainer(
    config: TrainConfig,
    features: Mapping[str, tuple[int, ...]],
    *,
    contrastive: StateDict,
    null_text: Tensor,
    loss: PictureLoss,
) -> JointTrainer:
    """The trainer of a new model.

    Args:
        config: sizes and the run.
        features: shapes of a sample.
        contrastive: file of the global projection's trainer.
        null_text: [L, Dt] features of the empty prompt.
        loss: of the latents' VAE.
    """
    seed = config.run.seed
    weights = new_base_weights(config.base, seed)
    transformer = load_transformer(weights)
    transformer.style_attention = new_style_attention(
        config.base.num_blocks, TOKEN_WIDTH, config.base.width, seed
    )
    projector = new_style_projector(
        config.style,
        patch_width=features["patch_features"][-1],
        embed_width=features["image_embeds"][-1],
        style_width=TOKEN_WIDTH,
        seed=seed,
    )
    projector.contrastive = load_contrastive(contrastive).float()
    host = CheckpointedHost()
    control = copy_from_transformer(weights, stride=config.control.stride)
    network = load_gray_tile_controlnet(control, host=host)
    host.choose(list(network.control_blocks), 0)
    return JointTrainer(config, transformer, network, projector, null_text=null_text, loss=loss)


def continue_joint_trainer(
    config: TrainConfig,
    features: Mapping[str, tuple[int, ...]],
    start: Path,
    *,
    contrastive: StateDict,
    null_text: Tensor,
    loss: PictureLoss,
) -> JointTrainer:
    """The trainer of a model that exists.

    Args:
        config: of the run; sizes are those of the files.
        features: shapes of a sample.
        start: folder with `transformer`, `style_adapter` and `controlnet`, laid out as the shipped.
        contrastive: file of the global projection's trainer.
        null_text: [L, Dt] features of the empty prompt.
        loss: of the latents' VAE.

    Raises:
        WeightsError: for files that are missing or do not belong together.
    """
    base, adapter, control = (
        {key: value.float() for key, value in read_state_dict(start / name).tensors.items()}
        for name in (
            "transformer.safetensors",
            "style_adapter.safetensors",
            "controlnet.safetensors",
        )
    )
    transformer = load_transformer(base)
    projector = style_branch(
        transformer,
        config.style,
        features=features,
        adapter=adapter,
        contrastive=None,
        seed=config.run.seed,
    )
    projector.contrastive = load_contrastive(contrastive).float()
    host = CheckpointedHost()
    network = load_gray_tile_controlnet(control, host=host)
    host.choose(list(network.control_blocks), 0)
    return JointTrainer(config, transformer, network, projector, null_text=null_text, loss=loss)
