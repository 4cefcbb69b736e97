"""Trainer of the style modulation: k_img, v_img and norm_k_img of each block, and the style model.

Stage A trains on still images (t = 1 latents), stage B on clips, from the adapter of stage A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.style_projector import StyleProjector
from .config import TrainConfig
from .flow_matching import FlowDraws, FlowMatchTrainer, StateDict, frozen_transformer, trainable
from .samples import Sample
from .style_branch import adapter_file, style_branch, style_keys, style_tokens
from .trainer import TrainedFile


class StyleModulationTrainer(FlowMatchTrainer):
    """Weighted flow matching under text and style, each dropped at random, singly and jointly.

    Source: StyleMaster, sec. 3.2, and its released training code. Deviations: dropout of the
    conditions, and initial weights that learn (the release's k_img and norm_k_img never move).
    """

    name = "style"

    def __init__(
        self, config: TrainConfig, transformer: Any, projector: StyleProjector, **more: Any
    ) -> None:
        """Set up.

        Args:
            config: of the run.
            transformer: with a style branch (`style_branch`); the rest of it stays frozen.
            projector: the style model; a contrastive projection in it stays frozen.
            more: `null_text` and `provenance` of `FlowMatchTrainer`.
        """
        has_contrastive = projector.contrastive is not None
        keys = style_keys(config.style, has_contrastive=has_contrastive)
        draws = FlowDraws(config, ("latents", "text", *keys), drop_style=True)
        super().__init__(config, transformer, draws, **more)
        self.embeds_key = keys[1]
        trainable(transformer.style_attention)
        self.projector = trainable(projector)
        if projector.contrastive is not None:
            projector.contrastive.requires_grad_(False)

    def velocity(self, noisy: Tensor, timestep: Tensor, text: Tensor, batch: Sample) -> Tensor:
        return self.transformer(noisy, timestep, text, style=self._tokens(batch))

    def conditions(self, sample: Sample) -> dict[str, Any]:
        return {"style": self._tokens(sample)}

    def _tokens(self, sample: Sample) -> Tensor:
        return style_tokens(self.projector, self.config.style, self.embeds_key, sample)  # type: ignore[arg-type]

    def outputs(self) -> list[TrainedFile]:
        return [adapter_file(self, self.transformer, self.projector, self.embeds_key)]  # type: ignore[arg-type]


def create_style_trainer(
    config: TrainConfig,
    base: StateDict,
    features: Mapping[str, tuple[int, ...]],
    *,
    adapter: StateDict | None = None,
    contrastive: StateDict | None = None,
    num_heads: int | None = None,
    **more: Any,
) -> StyleModulationTrainer:
    """The trainer on a base model.

    Args:
        config: of the run.
        base: Wan transformer under any of its names.
        features: shapes of a sample.
        adapter: to start from; None for new weights.
        contrastive: file of the global projection's trainer; then the style model takes the plain
            picture's embedding, as in the paper.
        num_heads: of the transformer; None for width / 128.
        more: `null_text` and `provenance` of `FlowMatchTrainer`.
    """
    transformer = frozen_transformer(base, config, num_heads)
    projector = style_branch(
        transformer,
        config.style,
        features=features,
        adapter=adapter,
        contrastive=contrastive,
        seed=config.run.seed,
    )
    return StyleModulationTrainer(config, transformer, projector, **more)
