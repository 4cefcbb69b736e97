"""Trainer of the gray-tile ControlNet: control blocks and zero convolutions, style if wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.gray_tile_controlnet import (
    GrayTileControlNet,
    copy_from_transformer,
    load_gray_tile_controlnet,
)
from ..models.style_projector import StyleProjector
from ..weights.convert import CONTROLNET_FORMAT, CUSTOM_BASE, KNOWN_BASE, ControlNetSizes
from ..weights.shapes import controlnet_sizes
from ..weights.state_dict import (
    diffusers_block_key_to_native,
    diffusers_to_native,
    shapes_of,
    split_release,
    strip_prefix,
)
from .config import TrainConfig
from .flow_matching import FlowDraws, FlowMatchTrainer, StateDict, frozen_transformer, trainable
from .gradient_checkpointing import CheckpointedHost
from .samples import Sample
from .style_branch import adapter_file, style_branch, style_keys, style_tokens
from .trainer import TrainedFile, stored


class GrayTileTrainer(FlowMatchTrainer):
    """Flow matching with control states of the gray tile.

    Source: StyleMaster, sec. 3.4, and its released training code. Deviations: dropout of the
    control as an option; text is dropped in the transformer and the control network alike.
    """

    name = "control"

    def __init__(
        self,
        config: TrainConfig,
        transformer: Any,
        controlnet: GrayTileControlNet,
        projector: StyleProjector | None,
        **more: Any,
    ) -> None:
        """Set up.

        Args:
            config: of the run; `control.style` says what becomes of the style branch.
            transformer: with a style branch if there is a `projector`.
            controlnet: is trained.
            projector: the style model, or None for no style branch.
            more: `null_text` and `provenance` of `FlowMatchTrainer`.
        """
        keys: tuple[str, ...] = ("latents", "text", "control_latents")
        self_embeds_key = ""
        if projector is not None:
            found = style_keys(config.style, has_contrastive=projector.contrastive is not None)
            keys, self_embeds_key = (*keys, *found), found[1]
        draws = FlowDraws(config, keys, drop_style=projector is not None)
        super().__init__(config, transformer, draws, **more)
        self.embeds_key = self_embeds_key
        self.controlnet = trainable(controlnet)
        self.projector = projector
        if projector is not None and config.control.style == "train":
            trainable(transformer.style_attention)
            trainable(projector)
            if projector.contrastive is not None:
                projector.contrastive.requires_grad_(False)

    def velocity(self, noisy: Tensor, timestep: Tensor, text: Tensor, batch: Sample) -> Tensor:
        states = self.controlnet(batch["control_latents"], timestep, text)
        keep = (~batch["drop_control"]).to(noisy.dtype)[:, None, None]
        control = [state * keep for state in states]
        return self.transformer(noisy, timestep, text, style=self._tokens(batch), control=control)

    def _tokens(self, sample: Sample) -> Tensor | None:
        if self.projector is None:
            return None
        return style_tokens(self.projector, self.config.style, self.embeds_key, sample)

    def conditions(self, sample: Sample) -> dict[str, Any]:
        return {
            "style": self._tokens(sample),
            "controlnet": self.controlnet,
            "control_latents": sample["control_latents"],
        }

    def outputs(self) -> list[TrainedFile]:
        weights = controlnet_state_dict(self.controlnet)
        tensors = stored(weights, self.config)
        sizes = controlnet_sizes(shapes_of(tensors))
        metadata = self.metadata(
            CONTROLNET_FORMAT,
            base_model=KNOWN_BASE if sizes == ControlNetSizes() else CUSTOM_BASE,
            num_blocks=str(sizes.num_blocks),
        )
        files = [TrainedFile("controlnet.safetensors", tensors, metadata)]
        if self.projector is not None and self.config.control.style == "train":
            files.append(adapter_file(self, self.transformer, self.projector, self.embeds_key))
        return files

    def blocks(self) -> Sequence[nn.Module]:
        control = self.controlnet.control_blocks
        return [*self.transformer.blocks, *control]  # type: ignore[misc]


def controlnet_state_dict(controlnet: nn.Module) -> dict[str, Tensor]:
    """Weights of a control network of diffusers' blocks, under the release's names."""
    weights = {}
    for key, value in controlnet.state_dict().items():
        if key.startswith("control_blocks."):
            prefix, index, rest = key.split(".", 2)
            key = f"{prefix}.{index}.{diffusers_block_key_to_native(rest)}"
        weights[key] = value
    return weights


def create_control_trainer(
    config: TrainConfig,
    base: StateDict,
    features: Mapping[str, tuple[int, ...]],
    *,
    controlnet: StateDict | None = None,
    adapter: StateDict | None = None,
    contrastive: StateDict | None = None,
    num_heads: int | None = None,
    **more: Any,
) -> GrayTileTrainer:
    """The trainer on a base model; see `create_style_trainer`.

    Args:
        config: of the run.
        base: Wan transformer under any of its names.
        features: shapes of a sample.
        controlnet: to start from; None for copies of the base's blocks.
        adapter: style adapter, for `control.style` frozen or train.
        contrastive: file of the global projection's trainer, for a new style branch.
        num_heads: of the transformer; None for width / 128.
        more: `null_text` and `provenance` of `FlowMatchTrainer`.

    Raises:
        ConfigError: if the style branch is to be frozen and there is no adapter.
    """
    transformer = frozen_transformer(base, config, num_heads)
    if controlnet is None:
        native = split_release(strip_prefix(base))[0]
        if "condition_embedder.time_proj.weight" in native:
            native = diffusers_to_native(native)
        controlnet = copy_from_transformer(native, stride=config.control.stride)
    host = CheckpointedHost()
    float32 = {key: value.to(torch.float32) for key, value in controlnet.items()}
    network = load_gray_tile_controlnet(float32, num_heads=num_heads, host=host)
    host.choose(list(network.control_blocks), config.run.checkpoint_blocks)
    projector = None
    if config.control.style != "none":
        if adapter is None and config.control.style == "frozen":
            raise ConfigError(
                "control.style=frozen needs a style adapter; give one, or set control.style=none"
            )
        projector = style_branch(
            transformer,
            config.style,
            features=features,
            adapter=adapter,
            contrastive=contrastive,
            seed=config.run.seed,
        )
        transformer.style_attention.requires_grad_(False)
        projector.requires_grad_(False)
    return GrayTileTrainer(config, transformer, network, projector, **more)
