"""Samples of a step: which ones, in which order, and what is drawn at random for each.

Everything follows from the seed, the step and the sample's row in the step, so that neither an
interruption nor the number of processes changes what a step sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..seeds import seed_of

Sample = dict[str, Tensor]


class TrainingData(Protocol):
    """What a trainer reads: `CachedDataset` of a cache on disk, or samples in memory.

    Keys of a sample, as far as a trainer needs them: `latents` [16, t, h, w], unpadded `text`
    [L, Dt], `patch_features` [N, C], `image_embeds` [De] and `shuffled_embeds` [De] of the style
    picture, `control_latents` like `latents`; of an illusion pair `first_embeds` and
    `second_embeds` [De].

    Attributes:
        ids: by which messages call the samples.
        groups: what each sample's style is called; samples of one group are alike.
        hashes: SHA-256 of the models that encoded them, by the model's name.
        sizes: shape of each sample's `latents` (of pairs, of `first_embeds`).
    """

    ids: list[str]
    groups: list[str]
    hashes: dict[str, str]
    sizes: list[tuple[int, ...]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class MemoryDataset:
    """Samples in memory."""

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        ids: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        """Keep the samples; the arguments are the attributes of `TrainingData`."""
        self.samples = list(samples)
        self.ids = [str(i) for i in range(len(samples))] if ids is None else list(ids)
        self.groups = self.ids if groups is None else list(groups)
        self.hashes = dict(hashes or {})
        self.sizes = [tuple(sample[main_key(sample)].shape) for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class Subset:
    """Some samples of a dataset."""

    def __init__(self, dataset: TrainingData, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = list(indices)
        self.ids = [dataset.ids[i] for i in self.indices]
        self.groups = [dataset.groups[i] for i in self.indices]
        self.hashes = dataset.hashes
        self.sizes = [dataset.sizes[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.indices[index]]


def main_key(sample: Mapping[str, Tensor]) -> str:
    """The tensor whose shape is a sample's size."""
    return "latents" if "latents" in sample else "first_embeds"


def split_validation(
    dataset: TrainingData, count: int, seed: int
) -> tuple[TrainingData, Subset | None]:
    """Hold `count` samples out of a dataset, chosen by the seed.

    Raises:
        ConfigError: if none would be left to train on.
    """
    if count == 0:
        return dataset, None
    if count >= len(dataset):
        raise ConfigError(
            f"{count} of {len(dataset)} samples were to be held out, which leaves none to train "
            "on; lower run.validation_samples, give validation data, or add samples"
        )
    order = permutation(len(dataset), seed, "validation")
    return Subset(dataset, sorted(order[count:])), Subset(dataset, sorted(order[:count]))


def generator_of(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def permutation(count: int, *parts: object) -> list[int]:
    """A random order of 0..count - 1 that follows from the parts."""
    return torch.randperm(count, generator=generator_of(*parts)).tolist()


def group_by_size(dataset: TrainingData) -> list[list[int]]:
    """Numbers of samples of equal size: only such samples share a batch.

    Raises:
        ConfigError: for an empty dataset.
    """
    if len(dataset) == 0:
        raise ConfigError("the dataset is empty; add samples, or look at what was skipped and why")
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, size in enumerate(dataset.sizes):
        groups.setdefault(tuple(size), []).append(index)
    return [groups[size] for size in sorted(groups)]


def check_keys_of(dataset: TrainingData, keys: Sequence[str]) -> None:
    """Check that samples hold what a trainer reads; one of each size is looked at.

    Raises:
        LayoutError: if one lacks a key.
    """
    for group in group_by_size(dataset):
        sample = dataset[group[0]]
        missing = [key for key in keys if key not in sample]
        if missing:
            raise LayoutError(
                f"sample {dataset.ids[group[0]]!r} has no {', '.join(missing)} (it has "
                f"{', '.join(sorted(sample))}); encode the data again with what this trainer needs"
            )


class BatchPlan:
    """Which samples make up each step: epochs over groups of equal shapes, in random order.

    The last batch of a group is filled from the group's beginning, so that every step is full and
    every sample is seen at least once an epoch.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        self.groups = [list(group) for group in groups]
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_epoch = sum(-(-len(group) // batch_size) for group in self.groups)
        self._epoch: tuple[int, list[list[int]]] | None = None

    def __getitem__(self, step: int) -> list[int]:
        epoch, batch = divmod(step, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffle(epoch))
        return self._epoch[1][batch]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        batches = []
        for number, group in enumerate(self.groups):
            order = permutation(len(group), self.seed, "epoch", epoch, number)
            for first in range(0, len(group), self.batch_size):
                rows = range(first, first + self.batch_size)
                batches.append([group[order[row % len(group)]] for row in rows])
        order = permutation(len(batches), self.seed, "epoch", epoch, "batches")
        return [batches[i] for i in order]


class Draws(Protocol):
    """A trainer's random choices for a sample: noise, timestep, dropout, negatives."""

    keys: tuple[str, ...]  # of the sample's tensors that are read

    def __call__(
        self,
        dataset: TrainingData,
        index: int,
        generator: torch.Generator,
        position: float | None,
    ) -> dict[str, Tensor]:
        """Tensors of the sample, and what was drawn for it.

        Args:
            dataset: where the sample is.
            index: which sample.
            generator: source of all randomness.
            position: None in training; in validation the noise level's place in 0..1, and nothing
                is dropped.
        """
        ...


class Place(NamedTuple):
    """A sample in a pass."""

    step: int
    row: int  # in the step, over all processes and passes
    index: int  # in the dataset


class Batch(NamedTuple):
    """Samples of one pass on one process."""

    names: list[str]
    tensors: dict[str, Tensor]


class StepSamples(torch.utils.data.Dataset[tuple[str, dict[str, Tensor]]]):
    """Samples by their place in the training, together with what is drawn for them."""

    def __init__(self, dataset: TrainingData, draws: Draws, seed: int) -> None:
        self.dataset = dataset
        self.draws = draws
        self.seed = seed

    def __getitem__(self, place: Place) -> tuple[str, dict[str, Tensor]]:
        generator = generator_of(self.seed, "step", place.step, place.row)
        return draw_sample(self.dataset, place.index, self.draws, generator, None)


def draw_sample(
    dataset: TrainingData,
    index: int,
    draws: Draws,
    generator: torch.Generator,
    position: float | None,
) -> tuple[str, dict[str, Tensor]]:
    """A sample with its random choices, checked.

    Raises:
        LayoutError: if one of its tensors holds NaN or infinity.
    """
    name = dataset.ids[index]
    tensors = draws(dataset, index, generator, position)
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise LayoutError(
                f"{key} of sample {name!r} holds NaN or infinity; encode it again or leave it out"
            )
    return name, tensors


class StepBatches(torch.utils.data.Sampler[list[Place]]):
    """The passes of one process, from a step on."""

    def __init__(
        self,
        plan: BatchPlan,
        *,
        steps: range,
        batch_size: int,
        accumulation: int,
        process: int,
        num_processes: int,
    ) -> None:
        assert plan.batch_size == batch_size * accumulation * num_processes
        self.plan = plan
        self.steps = steps
        self.batch_size = batch_size
        self.firsts = [(i * num_processes + process) * batch_size for i in range(accumulation)]

    def __len__(self) -> int:
        return len(self.steps) * len(self.firsts)

    def __iter__(self) -> Iterator[list[Place]]:
        for step in self.steps:
            indices = self.plan[step]
            for first in self.firsts:
                rows = range(first, first + self.batch_size)
                yield [Place(step, row, indices[row]) for row in rows]


def collate(samples: Sequence[tuple[str, dict[str, Tensor]]]) -> Batch:
    """Stack samples to a batch.

    Raises:
        LayoutError: for samples of different sizes.
    """
    names = [name for name, _ in samples]
    tensors: dict[str, Tensor] = {}
    for key in samples[0][1]:
        values = [sample[key] for _, sample in samples]
        if len({value.shape for value in values}) > 1:
            sizes = {n: list(v.shape) for n, v in zip(names, values, strict=True)}
            raise LayoutError(f"{key} has different sizes in one batch: {sizes}")
        tensors[key] = torch.stack(values)
    return Batch(names, tensors)
