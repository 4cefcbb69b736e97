"""Datasets that the tests of StyleCrafter's trainers put together, on Wan and on VideoCrafter."""

from stylemaster_core.training.samples import MemoryDataset


def joined(*datasets):
    samples = [sample for dataset in datasets for sample in dataset.samples]
    return MemoryDataset(samples, ids=[str(i) for i in range(len(samples))])


def of_another(dataset):
    """The samples with the style features of their neighbours."""
    samples = dataset.samples
    moved = [s | {"patch_features": samples[i - 1]["patch_features"]}
             for i, s in enumerate(samples)]  # fmt: skip
    return MemoryDataset(moved, ids=dataset.ids)
