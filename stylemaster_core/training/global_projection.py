"""Trainer of the global projection: an MLP on CLIP's image embedding that keeps style alone.

The two pictures of an illusion pair consist of the same pixels, so their styles are equal and only
their content differs. Their embeddings are drawn together, those of other styles pushed away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..models.style_projector import ContrastiveProjection, GlobalProjection
from .config import ProjectionConfig, TrainConfig
from .precision import settle_precision
from .samples import Sample, TrainingData, seed_of
from .style_branch import PREFIX, StateDict, load_contrastive
from .trainer import TrainedFile, Trainer, stored

PROJECTION_FORMAT = "stylemaster-global-projection-1"
PAIR_KEYS = ("first_embeds", "second_embeds")


class PairDraws:
    """A pair, and pictures of other styles drawn from the whole dataset.

    Drawing the negatives by the sample's seed, not taking them from its batch, keeps a step the
    same however it is spread over processes.
    """

    keys: tuple[str, ...] = PAIR_KEYS

    def __init__(self, num_negatives: int) -> None:
        self.num_negatives = num_negatives

    def __call__(
        self,
        dataset: TrainingData,
        index: int,
        generator: torch.Generator,
        position: float | None,
    ) -> Sample:
        """`pair` [2, De] and `negatives` [K, De], float32."""
        negatives = []
        for _ in range(self.num_negatives):
            other = _other(dataset.groups, index, generator)
            side = int(torch.randint(2, (), generator=generator))
            negatives.append(dataset[other][PAIR_KEYS[side]].float())
        return {"pair": _pair(dataset, index), "negatives": torch.stack(negatives)}


def _pair(dataset: TrainingData, index: int) -> Tensor:
    sample = dataset[index]
    return torch.stack([sample[key].float() for key in PAIR_KEYS])


def _other(groups: Sequence[str], index: int, generator: torch.Generator) -> int:
    """A sample of another group, hence of another style."""
    for _ in range(1000):
        other = int(torch.randint(len(groups), (), generator=generator))
        if groups[other] != groups[index]:
            return other
    raise ConfigError(
        f"no pair of another style than that of pair {index} was found among {len(groups)}; the "
        "projection needs pairs of several styles"
    )


class GlobalProjectionTrainer(Trainer):
    """Triplet loss and MSE, or InfoNCE, on illusion pairs.

    Source: StyleMaster, sec. 3.1 and supplement. Deviations: distances are taken on the unit
    sphere, for the MSE too, because it would otherwise be met by making all embeddings small; and
    InfoNCE is ours.
    """

    name = "global-projection"

    def __init__(
        self,
        config: TrainConfig,
        contrastive: ContrastiveProjection,
        tokens: GlobalProjection | None = None,
        *,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        """Set up.

        Args:
            config: of the run.
            contrastive: the MLP.
            tokens: projection to global style tokens, trained with the same loss; or None.
            provenance: hashes of the files that training starts from.
        """
        super().__init__()
        self.config = settle_precision(config)
        self.draws = PairDraws(config.projection.num_negatives)
        self.provenance = dict(provenance or {})
        self.contrastive = contrastive.float().requires_grad_(True)
        self.tokens = None if tokens is None else tokens.float().requires_grad_(True)

    def forward(self, batch: Sample) -> Tensor:
        """Loss of each pair."""
        pictures = torch.cat([batch["pair"], batch["negatives"]], dim=1)
        projected = self.contrastive(pictures)
        losses = contrastive_losses(projected, self.config.projection)
        if self.tokens is not None:
            tokens = self.tokens(projected.flatten(0, 1)).flatten(1)
            tokens = tokens.unflatten(0, pictures.shape[:2])
            losses = losses + contrastive_losses(tokens, self.config.projection)
        return losses

    def check(self, shapes: Mapping[str, tuple[int, ...]], num_samples: int) -> None:
        width = self.contrastive.fc1.in_features
        for key in PAIR_KEYS:
            if shapes[key] != (width,):
                raise LayoutError(
                    f"{key} of an illusion pair must be [{width}] for this projection, got "
                    f"{list(shapes[key])}; encode the pairs with the image encoder it is made for"
                )
        if num_samples < 2:
            raise ConfigError("one pair has no pictures of other styles beside it; add pairs")

    @torch.no_grad()
    def metrics(self, dataset: TrainingData) -> dict[str, float]:
        """Share of pictures whose nearest among all second pictures is their own pair's."""
        device = self.contrastive.fc1.weight.device
        pairs = torch.stack([_pair(dataset, i) for i in range(len(dataset))]).to(device)
        first, second = F.normalize(self.contrastive(pairs), dim=-1).unbind(1)
        nearest = (first @ second.T).argmax(1)
        right = nearest == torch.arange(len(nearest), device=device)
        return {"retrieval_at_1": right.float().mean().item()}

    def outputs(self) -> list[TrainedFile]:
        weights = {f"contrastive.{k}": v for k, v in self.contrastive.state_dict().items()}
        if self.tokens is not None:
            weights |= self.tokens.state_dict()
        tensors = stored({PREFIX + k: v for k, v in weights.items()}, self.config)
        return [
            TrainedFile("global_projection.safetensors", tensors, self.metadata(PROJECTION_FORMAT))
        ]


def contrastive_losses(embeddings: Tensor, config: ProjectionConfig) -> Tensor:
    """Loss of each pair.

    Args:
        embeddings: [B, 2 + K, D]: a pair, then K pictures of other styles.
        config: which loss, its margin, weights and temperature.

    Returns:
        [B] float32.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    pair, negatives = unit[:, :2], unit[:, 2:]
    positive = (pair[:, 0] * pair[:, 1]).sum(-1)  # [B] cosine
    negative = pair @ negatives.transpose(1, 2)  # [B, 2, K]
    if config.loss == "infonce":
        both = positive[:, None, None].expand(-1, 2, 1)
        logits = torch.cat([both, negative], dim=-1) / config.temperature
        return -logits.log_softmax(-1)[..., 0].mean(1)
    near, far = _distance(positive)[:, None, None], _distance(negative)
    triplet = F.relu(near - far + config.margin).mean((1, 2))
    return triplet + config.mse_weight * (2 - 2 * positive)


def _distance(cosine: Tensor) -> Tensor:
    # The root has an infinite slope at 0, which equal pictures reach.
    return (2 - 2 * cosine).clamp(min=1e-8).sqrt()


def create_projection_trainer(
    config: TrainConfig,
    features: Mapping[str, tuple[int, ...]],
    *,
    start: StateDict | None = None,
    provenance: Mapping[str, str] | None = None,
) -> GlobalProjectionTrainer:
    """The trainer, for embeddings of the data's width.

    Args:
        config: of the run.
        features: shapes of a sample.
        start: weights to start from, of an earlier run; None for new ones.
        provenance: hashes of the files that training starts from.
    """
    width, projection = features[PAIR_KEYS[0]][-1], config.projection
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.run.seed, "global projection"))
        contrastive = ContrastiveProjection(width, projection.hidden_width)
        tokens = None
        if projection.train_tokens:
            tokens = GlobalProjection(width, projection.global_tokens, projection.token_width)
    if start is not None:
        contrastive = load_contrastive(start)
    return GlobalProjectionTrainer(config, contrastive, tokens, provenance=provenance)
