"""In which type to compute: one answer for the command line, training, the recipe and benchmarks.

bfloat16 is fast where the hardware multiplies it. A processor without AMX or AVX512-BF16 emulates
it, and PyTorch then takes 8 to 58 times as long as for float32.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, NamedTuple

from .errors import ConfigError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("stylemaster")

DTYPES = ("auto", "float32", "float16", "bfloat16")
MIN_SPEEDUP = 1.2  # of bfloat16 on a CPU; for less, its rounding is not worth it
_FLAGS = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
_REPEATS, _BUDGET_S = 5, 0.01  # of each operation in each type
# Other processes slow one of the two down: what is close to the bound is measured again, so that
# the next run takes the same type.
_CLOSE, _MEASUREMENTS = 0.5, 5


class DtypeChoice(NamedTuple):
    """A type, and why it was chosen."""

    dtype: torch.dtype
    reason: str


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type to compute in; see `explain_dtype`."""
    return explain_dtype(dtype, device).dtype


def explain_dtype(dtype: str, device: torch.device) -> DtypeChoice:
    """The type to compute in on a device, and the reason.

    `auto` is bfloat16 on a CPU that has instructions for it and is measured to be faster with it,
    what the capability says on CUDA, and float32 elsewhere. What is named is obeyed; where a CPU
    only emulates it, a warning says once how much slower it is.

    Args:
        dtype: auto, float32, float16 or bfloat16.
        device: where the computation runs.

    Raises:
        ConfigError: for an unknown name.
    """
    import torch

    if dtype not in DTYPES:
        raise ConfigError(f"the dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    if dtype != "auto":
        chosen = getattr(torch, dtype)
        if device.type == "cpu" and chosen != torch.float32:
            _warn_if_slower(chosen)
        return DtypeChoice(chosen, "as asked")
    if device.type == "cuda":
        return _for_cuda(device)
    if device.type == "cpu":
        return _for_cpu()
    return DtypeChoice(torch.float32, f"nothing faster has been measured on {device.type}")


def choose_precision(
    precision: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> Literal["float32", "bfloat16"]:
    """The precision of a training: that of `choose_dtype`, but float32 for float16.

    Its gradients would underflow.
    """
    import torch

    return "bfloat16" if choose_dtype(precision, device) == torch.bfloat16 else "float32"


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a training of the best precision for a device computes."""
    import torch

    precision = choose_precision("auto", device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def cpu_flags() -> tuple[str, ...]:
    """The instruction sets of this CPU that multiply bfloat16."""
    import torch

    return tuple(name for name, test in _FLAGS.items() if getattr(torch.cpu, test, bool)())


@functools.cache
def cpu_speedup(dtype: torch.dtype) -> float:
    """How much faster than in float32 this CPU computes in another type, measured once a process.

    A convolution and a linear layer, best of 5; the one that gains less counts. Below 1: slower.
    It takes 10 to 50 ms, and up to five times that where other processes disturb it.
    """
    import torch
    import torch.nn.functional as F

    with torch.inference_mode():
        video, kernel = torch.ones(1, 32, 24, 24), torch.ones(32, 32, 3, 3)
        tokens, matrix = torch.ones(128, 256), torch.ones(256, 256)

        def convolution(dtype: torch.dtype) -> float:
            a, b = video.to(dtype), kernel.to(dtype)
            return _best_s(lambda: F.conv2d(a, b, padding=1))

        def linear(dtype: torch.dtype) -> float:
            a, b = tokens.to(dtype), matrix.to(dtype)
            return _best_s(lambda: F.linear(a, b))

        measured = 0.0
        for _ in range(_MEASUREMENTS):
            found = min(
                time_in(torch.float32) / time_in(dtype) for time_in in (convolution, linear)
            )
            measured = max(measured, found)
            if not _CLOSE < measured < MIN_SPEEDUP:
                break
        return measured


def _best_s(operation: Callable[[], object]) -> float:
    """Seconds of the fastest of up to five calls, fewer where they are slow, after one more."""
    end = time.perf_counter() + _BUDGET_S
    operation()
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        operation()
        now = time.perf_counter()
        best = min(best, now - began)
        if now > end:
            break
    return best


def _for_cpu() -> DtypeChoice:
    import torch

    flags = " and ".join(cpu_flags())
    if not flags:
        return DtypeChoice(torch.float32, f"this CPU has none of {', '.join(_FLAGS)}")
    speedup = cpu_speedup(torch.bfloat16)
    reason = f"this CPU has {flags}, and bfloat16 is measured {speedup:.1f} times as fast"
    fast = speedup >= MIN_SPEEDUP
    return DtypeChoice(torch.bfloat16 if fast else torch.float32, reason)


def _for_cuda(device: torch.device) -> DtypeChoice:
    import torch

    if torch.version.hip is not None:
        return DtypeChoice(torch.bfloat16, "ROCm computes in bfloat16")
    capability = torch.cuda.get_device_capability(device)
    dtype = torch.float32
    if capability >= (7, 0):
        dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    return DtypeChoice(dtype, "CUDA capability {}.{}".format(*capability))


@functools.cache
def _warn_if_slower(dtype: torch.dtype) -> None:
    speedup = cpu_speedup(dtype)
    if speedup < 1:
        logger.warning(
            "%s on this CPU is measured %.0f times slower than float32, because it is emulated; "
            "leave the choice to auto, or use float32",
            str(dtype).removeprefix("torch."),
            1 / speedup,
        )
