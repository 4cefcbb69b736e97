"""How many bytes of tensors are alive at once: exact, on any device, however busy it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operations make inside the `with` block, while they live.

    What was there before, such as weights, does not count. `peak` is in bytes; what a kernel
    allocates for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._made: set[int] = set()
        self._given: dict[int, object] = {}  # holds them, so that no address is used again

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._given[storage._cdata] = storage
        out = func(*args, **kwargs)
        for storage in _storages(out):
            if storage._cdata not in self._made and storage._cdata not in self._given:
                self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._made.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._made.discard(key)
        self._live -= size


def _storages(tree: Any) -> list[Any]:
    return [x.untyped_storage() for x in tree_iter(tree) if isinstance(x, torch.Tensor)]
