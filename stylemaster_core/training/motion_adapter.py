"""Trainer of the motion adapter: a LoRA on self-attention that learns what still videos are.

It is trained at scale 1 on pictures as constant clips. Used below 0 it moves away from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import LayoutError
from ..models.motion_adapter import (
    MOTION_FORMAT,
    MotionAdapter,
    load_motion_adapter,
    motion_adapter_state_dict,
)
from .config import TrainConfig
from .flow_matching import FlowDraws, FlowMatchTrainer, StateDict, frozen_transformer, trainable
from .samples import Sample, generator_of
from .trainer import TrainedFile, stored


class MotionAdapterTrainer(FlowMatchTrainer):
    """Flow matching on still clips, through the LoRA alone.

    Source: StyleMaster, sec. 3.3. Deviation: Wan has no temporal attention, so the LoRA sits on q,
    k, v and o of its 3D self-attention.
    """

    name = "motion"

    def __init__(
        self, config: TrainConfig, transformer: Any, adapter: MotionAdapter, **more: Any
    ) -> None:
        """Set up.

        Args:
            config: of the run.
            transformer: stays frozen; the adapter is attached to it for good.
            adapter: is trained, at scale 1.
            more: `null_text` and `provenance` of `FlowMatchTrainer`.
        """
        draws = FlowDraws(config, ("latents", "text"), drop_style=False)
        super().__init__(config, transformer, draws, **more)
        self.adapter = trainable(adapter)
        adapter.scale = 1.0
        adapter.attach(transformer)

    def velocity(self, noisy: Tensor, timestep: Tensor, text: Tensor, batch: Sample) -> Tensor:
        return self.transformer(noisy, timestep, text)

    def outputs(self) -> list[TrainedFile]:
        weights = motion_adapter_state_dict(self.adapter)  # type: ignore[arg-type]
        tensors = stored(weights, self.config)
        rank = weights["diffusion_model.blocks.0.self_attn.q.lora_A.weight"].shape[0]
        metadata = self.metadata(
            MOTION_FORMAT, rank=str(rank), num_blocks=str(len(self.transformer.blocks))
        )
        return [TrainedFile("motion_adapter.safetensors", tensors, metadata)]

    def check(self, shapes: Any, num_samples: int) -> None:
        super().check(shapes, num_samples)
        if shapes["latents"][1] < 2:
            raise LayoutError(
                f"the motion adapter learns from still CLIPS, and these latents are "
                f"{list(shapes['latents'])}, a single frame; make still clips of the pictures"
            )

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer.blocks)


def create_motion_trainer(
    config: TrainConfig,
    base: StateDict,
    *,
    adapter: StateDict | None = None,
    num_heads: int | None = None,
    **more: Any,
) -> MotionAdapterTrainer:
    """The trainer on a base model; see `create_style_trainer`.

    Args:
        config: of the run.
        base: Wan transformer under any of its names.
        adapter: LoRA to start from; None for a new one.
        num_heads: of the transformer; None for width / 128.
        more: `null_text` and `provenance` of `FlowMatchTrainer`.
    """
    transformer = frozen_transformer(base, config, num_heads)
    if adapter is None:
        width = transformer.proj_out.in_features
        module = MotionAdapter(len(transformer.blocks), width, config.motion.rank)
        module.reset_for_training(generator_of(config.run.seed, "motion adapter"))
    else:
        module = load_motion_adapter(adapter)
    return MotionAdapterTrainer(config, transformer, module, **more)
