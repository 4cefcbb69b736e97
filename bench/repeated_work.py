"""What a loop does in every turn that once would do, or that makes the device wait for the host.

Counted at the dispatcher, on any device, of tensors without content, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Their results depend on numbers in the tensors, so the host waits for the device.
WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}
WAITING |= {"unique", "_unique2", "linalg_solve", "_linalg_solve_ex"}
COPYING = {"_to_copy", "copy_"}


class RepeatedWork(TorchDispatchMode):
    """Counts by operation what the loop does needlessly; `next_turn` tells where a turn ends.

    `waits`: operations whose result the host waits for, and copies between devices.
    `made`: tensors made of nothing, or of what is the same in an earlier turn; views are none.
    Only turns after the first count. Tensors are kept, so that none is taken for another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.made: Counter[str] = Counter()
        self._turn = 0
        self._seen: dict[object, int] = {}  # operation and its inputs -> turn
        self._kept: list[Any] = []

    def next_turn(self) -> None:
        self._turn += 1

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        flat, structure = tree_flatten((args, kwargs))
        given = [x for x in flat if isinstance(x, Tensor)]
        signature = (str(func), str(structure), *map(_identity, flat))
        out = func(*args, **kwargs)
        results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        self._kept += [x.untyped_storage() for x in (*given, *results)]
        name = str(func).split(".")[1]
        devices = {x.device for x in (*given, *results) if x.ndim or x.device.type != "cpu"}
        before = self._seen.setdefault(signature, self._turn)
        if self._turn:
            if name in WAITING or (name in COPYING and len(devices) > 1):
                self.waits[name] += 1
            is_view = results and all(_is_part(x, given) for x in results)
            if not is_view and results and (not given or before < self._turn):
                self.made[name] += 1
        return out


def _identity(x: Any) -> object:
    if not isinstance(x, Tensor):
        return str(x)
    storage = x.untyped_storage()._cdata
    return storage, x.storage_offset(), tuple(x.shape), tuple(x.stride()), x._version


def _is_part(x: Tensor, given: list[Tensor]) -> bool:
    storage = x.untyped_storage()._cdata
    return any(storage == other.untyped_storage()._cdata for other in given)
