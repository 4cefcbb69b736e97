"""Whether weights can be computed with: floating point, neither NaN nor infinite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import WeightsError

# The bits of a number without its sign reach this where it is not finite.
_NOT_FINITE = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float8_e4m3fn: 0x7F,
    torch.float8_e5m2: 0x7C,
}
_PIECE = 1 << 24  # numbers at once, so that the check needs little memory
# What files hold beside weights.
_WHOLE = ("position_ids", "spiece_model", "num_batches_tracked", "scaled_fp8")


def check_weights(
    tensors: Mapping[str, Tensor], path: str | Path, *, device: torch.device | str | None = None
) -> None:
    """Check the weights of a file.

    Args:
        tensors: by name; those on the device "meta" are left out.
        path: of the file, for the message.
        device: where to look at the numbers; None where they are.

    Raises:
        WeightsError: if some are whole numbers, or NaN or infinite.
    """
    check_floating(tensors, path)
    _refuse(not_finite(tensors, device=device), path)


def check_module(module: nn.Module, path: str | Path) -> None:
    """Check the weights of a loaded model for NaN and infinity, on the device where they are.

    Args:
        module: the model.
        path: of its file or folder, for the message.

    Raises:
        WeightsError: if some are NaN or infinite.
    """
    _refuse(not_finite(module.state_dict()), path)


def _refuse(bad: list[str], path: str | Path) -> None:
    if bad:
        raise WeightsError(
            f"{path}: {_some(bad)} with NaN or infinity; the file is damaged, or its training went "
            "wrong: get it again, or take an earlier checkpoint (--skip-weight-check on the "
            "command line uses it as it is)"
        )


def check_floating(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that no weight of a file is a whole number, which looks at no number.

    Raises:
        WeightsError: otherwise.
    """
    whole = [
        key
        for key, value in tensors.items()
        if not value.is_floating_point() and not key.endswith(_WHOLE)
    ]
    if whole:
        raise WeightsError(
            f"{path}: {_some(whole)} of whole numbers ({tensors[whole[0]].dtype}), where weights "
            "are floating point; the file is damaged, or quantised in a way that is not known here"
        )


def not_finite(
    tensors: Mapping[str, Tensor], *, device: torch.device | str | None = None
) -> list[str]:
    """Names of the tensors that hold NaN or infinity; the device is waited for once."""
    names, flags = [], []
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel() and value.device.type != "meta":
            names.append(name)
            flags += [_is_finite(value if device is None else value.to(device))]
    if not flags:
        return []
    devices = {flag.device for flag in flags}
    if len(devices) > 1:
        flags = [flag.cpu() for flag in flags]
    finite = torch.stack(flags).tolist()
    return [name for name, fine in zip(names, finite, strict=True) if not fine]


def _is_finite(value: Tensor) -> Tensor:
    """A flag on the device of `value`; reductions alone, without a mask of its size."""
    value = value.detach()
    limit = _NOT_FINITE.get(value.dtype)
    if limit is None and value.dtype.itemsize == 1:  # other kinds of 8 bits
        value = value.float()
    # Of 16 bits a CPU compares the bits much faster than the numbers; of 8 there is no other way.
    if limit is None or (value.dtype.itemsize == 2 and value.device.type != "cpu"):
        low, high = torch.aminmax(value)  # NaN spreads
        return torch.isfinite(low) & torch.isfinite(high)
    kind, mask = (torch.int16, 0x7FFF) if value.dtype.itemsize == 2 else (torch.uint8, 0x7F)
    pieces = value.contiguous().view(kind).flatten().split(_PIECE)
    return torch.stack([(piece & mask).amax() < limit for piece in pieces]).all()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} weights ({shown})"
