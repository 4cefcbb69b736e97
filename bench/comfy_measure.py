"""Measuring inside ComfyUI, whatever the model: seconds, FLOP and memory of a guider's steps."""

# pyright: reportMissingImports=false
from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Setting = types.SimpleNamespace
Part = Callable[[Setting], dict[str, Any]]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Stopwatch:
    """Notes seconds, CPU seconds and batch of each step that a guider takes."""

    def __init__(self, guider: Any, latents: Tensor, highest_sigma: float = 1.0) -> None:
        self.guider, self.latents, self.highest_sigma = guider, latents, highest_sigma
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.rows: list[int] = []
        self.predict = guider.predict_noise
        guider.predict_noise = self._step
        model = guider.model_patcher.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "bench", self._note_rows)
        guider.model_patcher = model
        guider.model_options = model.model_options

    def _step(self, *args: Any, **kwargs: Any) -> Tensor:
        started, cpu_started = time.perf_counter(), time.process_time()
        denoised = self.predict(*args, **kwargs)
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu_started)
        return denoised

    def _note_rows(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.rows.append(x.shape[0])
        return executor(x, *args, **kwargs)

    def sample(self, steps: int) -> None:
        """Run Euler steps over the whole schedule."""
        self.guider.sample(
            self.latents,
            torch.zeros_like(self.latents),
            comfy.samplers.ksampler("euler"),
            torch.linspace(self.highest_sigma, 0.0, steps + 1),
            disable_pbar=True,
            seed=1,
        )

    def flop(self) -> int:
        """FLOP of one step: of matrix products and attention, as torch counts them."""
        cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        known = {cpu_attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            self.sample(1)
        return counter.get_total_flops()


def compare(makers: Mapping[str, Callable[[], Stopwatch]], setting: Setting) -> dict[str, Any]:
    """Interleaved rounds of "native" and "ours", first one first and then the other one first."""
    flop, rows = {}, {}
    for name, make in makers.items():  # warms up, too
        watch = make()
        flop[name] = watch.flop()
        rows[name] = watch.rows
    rounds: dict[str, list[Stopwatch]] = {name: [] for name in makers}
    for number in range(setting.repeat):
        for name in list(makers)[:: 1 if number % 2 else -1]:
            watch = makers[name]()
            watch.sample(setting.steps)
            rounds[name].append(watch)
    result: dict[str, Any] = {}
    for name, watches in rounds.items():
        seconds = [x for watch in watches for x in watch.seconds]
        cpu_seconds = [x for watch in watches for x in watch.cpu_seconds]
        result[name] = {
            "seconds_per_step": statistics.median(seconds),
            "cpu_seconds_per_step": statistics.median(cpu_seconds),
            "tflop_per_step": flop[name] / 1e12,
            "rows_per_model_call": rows[name],
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
        }
    for ratio, key in (
        ("seconds_ratio", "seconds_per_step"),
        ("cpu_seconds_ratio", "cpu_seconds_per_step"),
        ("flop_ratio", "tflop_per_step"),
    ):
        result[ratio] = result["ours"][key] / result["native"][key]
    for key in ("seconds", "cpu_seconds"):
        result[f"{key}_ratio_by_round"] = [
            sum(getattr(ours, key)) / sum(getattr(native, key))
            for native, ours in zip(rounds["native"], rounds["ours"], strict=True)
        ]
    return result


def sampling_memory(watch: Stopwatch, steps: int) -> dict[str, Any]:
    gc.collect()
    before = memory()
    own_peak = reset_peak()
    watch.sample(steps)
    return {
        "before_bytes": before["resident"],
        "before_anonymous_bytes": before["anonymous"],
        "peak_bytes": memory()["peak"],
        "peak_of": "the sampling" if own_peak else "the process, with loading",
    }


def memory() -> dict[str, int]:
    """Resident bytes of this process now, those of no file among them, and the most there were."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "resident": 0,
            "anonymous": 0,
            "peak": peak if sys.platform == "darwin" else 1024 * peak,
        }
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {
        name: 1024 * int(lines[key].split()[0])
        for name, key in (("resident", "VmRSS"), ("anonymous", "RssAnon"), ("peak", "VmHWM"))
    }


def reset_peak() -> bool:
    """Let the peak count from now on; False where the system does not offer that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def run_part(parts: Mapping[str, Part]) -> None:
    """Run the part that the setting on the command line names, and print what it gives."""
    setting = Setting(**json.loads(sys.argv[1]))
    with torch.no_grad():
        result = parts[setting.part](setting)
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    sys.stdout.write("\n" + json.dumps(result) + "\n")
