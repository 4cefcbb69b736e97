"""What trainers of a denoiser share: noise levels, and conditions that are dropped at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..sampling.schedules import TIMESTEPS, same_in_every_frame
from .config import TrainConfig
from .precision import settle_precision
from .samples import Sample, TrainingData
from .trainer import Trainer


class DenoisingDraws:
    """Noise, timestep and dropout of each sample."""

    def __init__(self, config: TrainConfig, keys: Sequence[str], *, drop_style: bool) -> None:
        self.keys = tuple(keys)
        self.timesteps = config.flow.timesteps
        self.drop_text = config.flow.drop_text
        self.same_noise = config.flow.same_noise
        self.drop_style = config.style.drop_style if drop_style else 0.0
        self.drop_both = config.style.drop_both if drop_style else 0.0
        self.drop_control = config.control.drop_control if "control_latents" in keys else 0.0

    def __call__(
        self,
        dataset: TrainingData,
        index: int,
        generator: torch.Generator,
        position: float | None,
    ) -> Sample:
        """Tensors of the sample; `noise`, `level` (index of the noise level) and `drop_*` flags."""
        sample = dataset[index]
        tensors = self.read(sample)
        tensors["noise"] = torch.randn(tensors["latents"].shape, generator=generator)
        if self.timesteps == "uniform":
            drawn = torch.rand((), generator=generator).item()
        else:
            drawn = torch.randn((), generator=generator).sigmoid().item()
        place, control_place = torch.rand(2, generator=generator).tolist()
        both, text = self.drop_both, self.drop_both + self.drop_text
        dropping = position is None
        level = int((drawn if position is None else position) * TIMESTEPS)
        flags = {
            "drop_text": place < text,
            "drop_style": place < both or text <= place < text + self.drop_style,
            "drop_control": control_place < self.drop_control,
        }
        tensors |= {key: torch.tensor(dropping and flag) for key, flag in flags.items()}
        # Drawn last, and not at all where it is 0: the draws above stay what they are.
        if self.same_noise and dropping and torch.rand((), generator=generator) < self.same_noise:
            tensors["noise"] = same_in_every_frame(tensors["noise"])
        tensors["level"] = torch.tensor(min(level, TIMESTEPS - 1))
        return tensors

    def read(self, sample: Sample) -> Sample:
        """The tensors that the trainer reads, all float32."""
        return {key: sample[key].float() for key in self.keys}


class DenoisingTrainer(Trainer):
    """Trains a part of a denoiser; dropped text becomes the empty prompt."""

    draws: DenoisingDraws

    def __init__(
        self,
        config: TrainConfig,
        draws: DenoisingDraws,
        *,
        null_text: Tensor | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        """Set up.

        Args:
            config: of the run.
            draws: random choices of a sample.
            null_text: [L, Dt] features of the empty prompt, which dropped text becomes.
            provenance: hashes of the files that training starts from.

        Raises:
            ConfigError: if text is dropped and there is no `null_text`.
        """
        super().__init__()
        if null_text is None and draws.drop_text + draws.drop_both > 0:
            raise ConfigError(
                "text dropout needs the features of the empty prompt, and the data have none; "
                "encode the data again, or set flow.drop_text=0 and style.drop_both=0"
            )
        if null_text is None and config.run.sample_every and config.run.sample_text_scale != 1:
            raise ConfigError(
                "guided samples need the features of the empty prompt, and the data have none; "
                "encode the data again, or set run.sample_text_scale=1"
            )
        self.config = settle_precision(config)
        self.draws = draws
        self.provenance = dict(provenance or {})
        self.register_buffer("null_text", null_text, persistent=False)

    def text_of(self, batch: Sample) -> Tensor:
        """[B, L, Dt] text features of a batch, those of the empty prompt where text is dropped."""
        text = batch["text"]
        if not isinstance(self.null_text, Tensor):
            return text
        return torch.where(batch["drop_text"][:, None, None], self.null_text.to(text), text)
