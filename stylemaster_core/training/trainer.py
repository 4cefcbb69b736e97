"""What the loop asks of a trainer: its data, its loss, its trained weights."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..sampling.denoise import Callback
from .config import TrainConfig, TrainerName, config_to_dict
from .samples import Draws, TrainingData


class TrainedFile(NamedTuple):
    """A file that a run ends with."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class Trainer(nn.Module, ABC):
    """One stage: a module whose forward pass gives the loss of each sample of a batch.

    What it trains are its parameters that require gradients; they are float32. Everything else is
    frozen and may be of a smaller type.
    """

    name: ClassVar[TrainerName]
    draws: Draws
    config: TrainConfig
    provenance: dict[str, str]  # hashes of the files that training starts from

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Tensors that `draws` gave, stacked -> [B] losses, float32."""

    @abstractmethod
    def outputs(self) -> list[TrainedFile]:
        """The trained files, with the weights as they are now, under the release's names."""

    def check(self, shapes: Mapping[str, tuple[int, ...]], num_samples: int) -> None:
        """Raise a `StyleMasterError` if samples of these shapes cannot be trained on."""

    def arrange(self, data: TrainingData) -> TrainingData:
        """The samples of an epoch; a trainer may repeat some of them."""
        return data

    def metrics(self, dataset: TrainingData) -> dict[str, float]:
        """More numbers about held-out samples than their loss."""
        return {}

    def sample(
        self, dataset: TrainingData, index: int, callback: Callback | None = None
    ) -> Tensor | None:
        """Latents [1, 16, t, h, w] generated under the conditions of a sample, or None.

        Args:
            dataset: where the sample is.
            index: which sample.
            callback: called after each step; an exception from it ends the generation.
        """
        return None

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def tokens_per_sample(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Length of the transformer's sequence for a sample; 0 where there is none."""
        return 0

    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks through which gradients flow; for the memory estimate."""
        return ()

    def metadata(self, file_format: str, **more: str) -> dict[str, str]:
        """Header of a trained file."""
        config = json.dumps(config_to_dict(self.config))
        header = {"format": file_format, "trainer": self.name, "config": config}
        return header | self.provenance | more


def stored(tensors: Mapping[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """Weights as they are written: whole, in main memory, in the config's dtype."""
    dtype = OUTPUT_DTYPES[config.run.output_dtype]
    return {key: _whole(value.detach()).to("cpu", dtype) for key, value in tensors.items()}


def _whole(value: Tensor) -> Tensor:
    """A tensor that FSDP has spread over processes, gathered."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[attr-defined]


OUTPUT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
