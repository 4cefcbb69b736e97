"""What all trainers of the video transformer share: flow matching with per-sample timesteps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LayoutError
from ..sampling.denoise import Callback, denoise
from ..sampling.schedules import add_noise, flow_match_sigmas
from .config import TrainConfig
from .denoising import DenoisingDraws, DenoisingTrainer
from .gradient_checkpointing import checkpoint_transformer
from .losses import flow_match_losses, training_schedule
from .precision import settle_precision
from .samples import Sample, TrainingData, generator_of

StateDict = Mapping[str, Tensor]
STYLE_KEYS = ("patch_features", "image_embeds", "shuffled_embeds")


class FlowDraws(DenoisingDraws):
    """Noise, timestep and dropout of each sample; the text is padded."""

    def __init__(self, config: TrainConfig, keys: Sequence[str], *, drop_style: bool) -> None:
        super().__init__(config, keys, drop_style=drop_style)
        self.text_length = config.flow.text_length

    def read(self, sample: Sample) -> Sample:
        """The tensors that the trainer reads, the text padded, all float32."""
        tensors = super().read(sample)
        return tensors | {"text": pad_text(tensors["text"], self.text_length)}


def pad_text(text: Tensor, length: int) -> Tensor:
    """[L, Dt] -> [length, Dt], zeros after the prompt's end, which the model does attend to.

    Raises:
        LayoutError: if the prompt is longer.
    """
    if text.ndim != 2 or text.shape[0] > length:
        raise LayoutError(
            f"text features are {list(text.shape)}, expected at most {length} tokens; set "
            "flow.text_length to the text encoder's (512 for UMT5)"
        )
    return F.pad(text, (0, 0, 0, length - text.shape[0]))


class FlowMatchTrainer(DenoisingTrainer):
    """Trains a part of the video transformer by flow matching.

    Subclasses say how the velocity is predicted (`velocity`) and what is written (`outputs`).
    """

    _no_split_modules = ["StyledWanBlock"]  # what FSDP gathers at a time, by accelerate's default
    sigmas: Tensor
    timesteps: Tensor
    weights: Tensor

    def __init__(
        self,
        config: TrainConfig,
        transformer: Any,
        draws: FlowDraws,
        *,
        null_text: Tensor | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        """Set up.

        Args:
            config: of the run.
            transformer: `StyledWanTransformer`.
            draws: random choices of a sample.
            null_text: [L, Dt] features of the empty prompt, which dropped text becomes.
            provenance: hashes of the files that training starts from.

        Raises:
            ConfigError: if text is dropped and there is no `null_text`.
        """
        if null_text is not None:
            null_text = pad_text(null_text.float(), config.flow.text_length)
        super().__init__(config, draws, null_text=null_text, provenance=provenance)
        config = self.config
        self.flow_draws = draws
        self.transformer = transformer
        checkpoint_transformer(transformer, config.run.checkpoint_blocks)
        if config.run.compile_blocks:
            transformer.compile_repeated_blocks()
        schedule = training_schedule(shift=config.flow.shift)
        weights = schedule.weights
        if config.flow.weighting == "none":
            weights = torch.ones_like(weights)
        self.register_buffer("sigmas", schedule.sigmas, persistent=False)
        self.register_buffer("timesteps", schedule.timesteps, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    def velocity(self, noisy: Tensor, timestep: Tensor, text: Tensor, batch: Sample) -> Tensor:
        """Predicted velocity [B, 16, t, h, w] of noisy latents."""
        raise NotImplementedError

    def forward(self, batch: Sample) -> Tensor:
        """Weighted flow-matching loss of each sample."""
        level, clean, noise = batch["level"], batch["latents"], batch["noise"]
        noisy = add_noise(clean, noise, self.sigmas[level])
        velocity = self.velocity(noisy, self.timesteps[level], self.text_of(batch), batch)
        return self.losses(velocity, clean, noise, level)

    def losses(self, velocity: Tensor, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Loss [B] of velocities predicted at noise levels [B]; see `flow_match_losses`."""
        return flow_match_losses(velocity, clean, noise, self.weights[level])

    def check(self, shapes: Mapping[str, tuple[int, ...]], num_samples: int) -> None:
        """Latents, text and control of a sample against the transformer."""
        latents, text = shapes["latents"], shapes["text"]
        channels, width = self.transformer.config.in_channels, self.transformer.config.text_dim
        if len(latents) != 4 or latents[0] != channels or latents[2] % 2 or latents[3] % 2:
            raise LayoutError(
                f"latents must be [{channels}, t, h, w] with even h and w, got {list(latents)}; "
                "encode the videos at sides that are multiples of 16"
            )
        if len(text) != 2 or text[1] != width:
            raise LayoutError(
                f"text features must be [L, {width}] for this transformer, got {list(text)}; "
                "encode the data with its text encoder"
            )
        null = self.null_text
        if isinstance(null, Tensor) and null.shape[1] != width:
            raise LayoutError(
                f"the features of the empty prompt are {null.shape[1]} wide, those of a caption "
                f"{width}; make them with the same text encoder"
            )
        if "control_latents" in self.draws.keys and shapes["control_latents"] != latents:
            raise LayoutError(
                f"control latents are {list(shapes['control_latents'])}, the latents "
                f"{list(latents)}; make the gray tile at the size of the clip"
            )

    def conditions(self, sample: Sample) -> dict[str, Any]:
        """Arguments of `denoise` beside the text, from a sample with a batch axis."""
        return {}

    @torch.no_grad()
    def sample(self, dataset: TrainingData, index: int, callback: Callback | None = None) -> Tensor:
        """Generate under the conditions of a sample, from noise that is always the same."""
        device = self.sigmas.device
        sample = {k: v[None].to(device) for k, v in self.flow_draws.read(dataset[index]).items()}
        noise = torch.randn(
            sample["latents"].shape, generator=generator_of(self.config.run.seed, "sample", index)
        )
        run = self.config.run
        negative = self.null_text[None] if isinstance(self.null_text, Tensor) else None
        return denoise(
            self.transformer,
            noise.to(device),
            sigmas=flow_match_sigmas(run.sample_steps, shift=self.config.flow.shift),
            text=sample["text"],
            negative_text=negative,
            text_scale=run.sample_text_scale,
            style_scale=run.sample_style_scale,
            callback=callback,
            **{"style": None, **self.conditions(sample)},
        )

    def tokens_per_sample(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return math.prod(shapes["latents"][1:]) // 4

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer.blocks)


def frozen_transformer(base: StateDict, config: TrainConfig, num_heads: int | None) -> Any:
    """The base model, frozen, in the dtype that it computes in."""
    from ..models.wan_transformer import load_transformer

    precision = settle_precision(config).run.precision
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = load_transformer({k: v.to(dtype) for k, v in base.items()}, num_heads=num_heads)
    model.style_attention = None  # a style branch comes from an adapter, or is made new
    return model


def trainable(module: nn.Module) -> nn.Module:
    """A module with float32 weights of its own that require gradients."""
    for parameter in module.parameters():
        parameter.data = parameter.data.float().clone()
    return module.requires_grad_(True)
