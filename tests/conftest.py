"""Shared fixtures: golden numbers of the released code."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "stylemaster"


def pytest_collection_finish():
    """Every training run collects garbage when it ends: not among what the imports made, too."""
    gc.collect()
    gc.freeze()


class Golden:
    """One golden case: tensors, their tolerances, and the rule by which they are compared."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.meta: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
        self.tensors = {
            key: value.float() if value.dtype == torch.bfloat16 else value
            for key, value in load_file(GOLDEN / f"{name}.safetensors").items()
        }

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors under a prefix, without it."""
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def excess(self, key: str, value: Tensor, reference: Tensor | None = None) -> float:
        """How far |value - reference| lies above the written tolerance; at most 0 if it holds."""
        reference = self[key] if reference is None else reference
        assert value.shape == reference.shape, f"{key}: {value.shape} against {reference.shape}"
        bound = self.meta["tensors"][key]["recommended_atol"] + 1e-5 * reference.abs()
        return ((value - reference).abs() - bound).max().item()

    def check(self, key: str, value: Tensor) -> None:
        excess = self.excess(key, value)
        assert excess <= 0, f"{self.name} {key}: {excess:.3g} above tolerance"


@pytest.fixture(scope="session")
def golden():
    cache: dict[str, Golden] = {}

    def load(name: str) -> Golden:
        if name not in cache:
            cache[name] = Golden(name)
        return cache[name]

    return load
