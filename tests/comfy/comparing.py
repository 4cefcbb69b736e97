"""Numbers that a script computed inside ComfyUI, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

Numbers = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and the JSON of the last line
SCRIPTS = Path(__file__).parent / "scripts"


def compute(
    run_in_comfy: Callable[..., dict[str, Any]], folder: Path, script: str, *arguments: object
) -> Numbers:
    """Run one of `scripts`, whose first argument is the file that it writes its tensors to."""
    written = folder / "results.safetensors"
    facts = run_in_comfy(SCRIPTS / script, written, *arguments)
    return load_file(written), facts


def deviation(value: Tensor, reference: Tensor) -> float:
    """Largest difference, as a part of the largest reference value."""
    assert value.shape == reference.shape
    return ((value - reference).abs().max() / reference.abs().max()).item()
