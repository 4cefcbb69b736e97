"""LoRA files of the community: what they change in which layer, whatever the trainer called it.

The namings are those of kohya's trainers, PEFT, diffusers and ComfyUI, and lightx2v's files, which
also carry whole differences (`diff`, `diff_b`) of norms and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WeightsError
from .files import read_keys, read_state_dict, shards_of
from .key_maps import diffusers_to_native, native_to_diffusers
from .state_dict import split_release, strip_prefix

_MATRICES = {  # of the two matrices, by the ending of their keys
    ".lora_down.weight": ".lora_up.weight",
    ".lora_A.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_B.default.weight",
    ".lora.down.weight": ".lora.up.weight",
}
_DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias"}
_PREFIXES = (
    "diffusion_model.",
    "transformer.",
    "base_model.model.",
    "model.diffusion_model.",
    "lora_unet_",
    "lora_unet__",  # Wan Fun's
    "",
)


class LowRank(NamedTuple):
    """A change of a weight by two matrices."""

    down: Tensor  # [rank, in, ...]
    up: Tensor  # [out, rank, ...]
    alpha: float  # the change is up @ down * alpha / rank

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """The change in float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return product.view(self.shape) * (self.alpha / self.down.shape[0])


class Difference(NamedTuple):
    """A change of a weight or a bias that is written out."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def delta(self) -> Tensor:
        """The change in float32."""
        return self.value.float()


Change = LowRank | Difference


@dataclass(frozen=True)
class Lora:
    """A LoRA file.

    Attributes:
        path: of the file.
        changes: what is changed, by the name that the file has for it: a layer and ".weight" or
            ".bias", underscores for dots in the layer's name.
    """

    path: Path
    changes: Mapping[str, Change]


def read_lora(path: Path) -> Lora:
    """Read a LoRA.

    Raises:
        WeightsError: if the file is damaged, or holds something else too.
    """
    tensors = read_state_dict(path).tensors
    changes: dict[str, Change] = {}
    rest = set(tensors)
    for key, tensor in tensors.items():
        for down, up in _MATRICES.items():
            layer = key.removesuffix(down)
            if layer == key or layer + up not in tensors:
                continue
            alpha = tensors.get(f"{layer}.alpha")
            value = float(tensor.shape[0]) if alpha is None else float(alpha)
            changes[_spelled(layer) + ".weight"] = LowRank(tensor, tensors[layer + up], value)
            rest -= {key, layer + up, f"{layer}.alpha"}
        for ending, part in _DIFFERENCES.items():
            layer = key.removesuffix(ending)
            if layer != key:
                changes[_spelled(layer) + part] = Difference(tensor)
                rest.discard(key)
    if not changes or rest:
        left = ", ".join(sorted(rest)[:3]) or "nothing"
        raise WeightsError(
            f"{path} is no LoRA of pairs of matrices that is known here (left over: {left}); give "
            "one with names of kohya's trainers, PEFT, diffusers or ComfyUI"
        )
    for name, change in changes.items():
        tensors_of_it = [part for part in change if isinstance(part, Tensor)]
        if not all(torch.isfinite(part).all() for part in tensors_of_it):
            raise WeightsError(f"{path}: {name} holds NaN or infinity; download the file again")
        if isinstance(change, LowRank) and change.up.flatten(1).shape[1] != change.down.shape[0]:
            raise WeightsError(
                f"{path}: the matrices of {name} are {list(change.down.shape)} and "
                f"{list(change.up.shape)}, which do not multiply; download the file again"
            )
    return Lora(path, changes)


def find_wan_targets(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Change]:
    """What a LoRA changes in a Wan transformer, by the keys of that transformer.

    Args:
        lora: from `read_lora`.
        shapes: of the transformer's tensors, named as in Wan's own files or in diffusers'.

    Raises:
        WeightsError: naming what fits nothing, or has another shape.
    """
    base, _ = split_release(strip_prefix(shapes))
    names = {spelled: key for key in base for name in _both_names(key) for spelled in _names(name)}
    return _targets(lora, names, base, "Wan transformer")


def find_videocrafter_targets(
    lora: Lora, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Change]:
    """What a LoRA changes in VideoCrafter's UNet, by the names of its release; else as for Wan."""
    names = {spelled: key for key in shapes for spelled in _names(key)}
    return _targets(lora, names, shapes, "UNet of VideoCrafter")


def _names(key: str) -> list[str]:
    """How LoRAs call a tensor of the base."""
    layer, dot, part = key.rpartition(".")
    if part not in ("weight", "bias"):  # such as a block's modulation
        return [_spelled(prefix + key) + ".weight" for prefix in _PREFIXES]
    return [_spelled(prefix + layer) + dot + part for prefix in _PREFIXES]


def _targets(
    lora: Lora, names: Mapping[str, str], base: Mapping[str, tuple[int, ...]], model: str
) -> dict[str, Change]:
    unknown = sorted(set(lora.changes) - set(names))
    if unknown:
        raise WeightsError(
            f"{lora.path}: {len(unknown)} of {len(lora.changes)} parts fit nothing in this "
            f"{model} ({', '.join(unknown[:3])}, ...); give a LoRA for it"
        )
    found = {names[name]: change for name, change in lora.changes.items()}
    for key, change in found.items():
        if change.shape != tuple(base[key]):
            raise WeightsError(
                f"{lora.path}: {key} is for {list(change.shape)}, this {model} has "
                f"{list(base[key])}; give a LoRA for a model of its size"
            )
    return found


def check_wan_loras(loras: Iterable[tuple[Path, float]], transformer: Path) -> None:
    """Refuse LoRAs that are damaged or for another model, before any model is loaded."""
    loras = list(loras)
    if not loras:
        return
    shapes = {
        key: shape
        for file in shards_of(transformer, "a Wan transformer")
        for key, (shape, _) in read_keys(file).items()
    }
    for path, _ in loras:
        find_wan_targets(read_lora(path), shapes)


def check_videocrafter_loras(loras: Iterable[tuple[Path, float]], unet: Path) -> None:
    """Refuse LoRAs that are damaged or for another model, before any model is loaded."""
    shapes = strip_prefix({key: shape for key, (shape, _) in read_keys(unet).items()})
    for path, _ in loras:
        find_videocrafter_targets(read_lora(path), shapes)


def merge_wan_loras(
    weights: Mapping[str, Tensor], loras: Sequence[tuple[Path, float]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights of a Wan transformer with LoRAs added; what no LoRA changes is passed on.

    Args:
        weights: without prefix, named as in Wan's own files or in diffusers'.
        loras: files and strengths; 1 is the trained one, below 0 leads away from it.
        dtype: of the changed weights; the sum is made in float32.

    Raises:
        WeightsError: as `read_lora` and `find_wan_targets`.
    """
    return _merged(weights, loras, dtype, find_wan_targets)


def merge_videocrafter_loras(
    weights: Mapping[str, Tensor], loras: Sequence[tuple[Path, float]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights of VideoCrafter's UNet, under its release's names, with LoRAs; else as for Wan."""
    return _merged(weights, loras, dtype, find_videocrafter_targets)


@torch.no_grad()
def _merged(
    weights: Mapping[str, Tensor],
    loras: Sequence[tuple[Path, float]],
    dtype: torch.dtype,
    find_targets: Callable[[Lora, Mapping[str, tuple[int, ...]]], dict[str, Change]],
) -> dict[str, Tensor]:
    merged = dict(weights)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    for path, scale in loras:
        for key, change in find_targets(read_lora(path), shapes).items():
            weight = merged[key].float()
            merged[key] = weight + change.delta().to(weight.device) * scale
    return {
        key: value if value is weights[key] else value.to(dtype) for key, value in merged.items()
    }


def _spelled(layer: str) -> str:
    return layer.replace(".", "_")


def _both_names(key: str) -> list[str]:
    """A key as it is, and as the other naming of Wan has it, if it is in both."""
    names = [key]
    for rename in (native_to_diffusers, diffusers_to_native):
        try:
            names += rename({key: None})
        except WeightsError:
            continue
    return names
