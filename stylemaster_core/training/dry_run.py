"""What a run would do, without doing it: shapes, parameters, and an estimate of memory."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from .checks import check_data, disk_bytes
from .samples import TrainingData, group_by_size
from .trainer import Trainer

# Bytes that a block keeps for the backward pass, for each token: (per width, per ffn width).
# Measured with saved_tensors_hooks; a block whose weights are frozen keeps fewer inputs.
_KEPT = {
    ("float32", False): (48, 4),
    ("float32", True): (88, 8),
    ("bfloat16", False): (36, 2),
    ("bfloat16", True): (80, 5),
}


class MemoryEstimate(NamedTuple):
    """Bytes on each device, without fragmentation and libraries."""

    frozen: int
    trained: int  # float32
    gradients: int
    optimizer: int
    average: int
    activations: int  # of the largest samples

    @property
    def total(self) -> int:
        return sum(self)


def estimate_memory(trainer: Trainer, data: TrainingData) -> MemoryEstimate:
    """Memory of a training step."""
    trained = sum(p.numel() for p in trainer.trained().values())
    frozen = [p for p in trainer.parameters() if not p.requires_grad]
    optimizer = trainer.config.optimizer
    return MemoryEstimate(
        frozen=sum(p.numel() * p.element_size() for p in frozen),
        trained=4 * trained,
        gradients=4 * trained,
        optimizer=(2 if optimizer.name == "adamw8bit" else 8) * trained,
        average=4 * trained if optimizer.ema_decay else 0,
        activations=_activations(trainer, data),
    )


def _activations(trainer: Trainer, data: TrainingData) -> int:
    run, blocks = trainer.config.run, list(trainer.blocks())
    if not blocks:
        return 0
    tokens = run.batch_size * max(
        trainer.tokens_per_sample({"latents": tuple(data.sizes[group[0]])})
        for group in group_by_size(data)
    )
    kept = [_kept_bytes(block, run.precision) for block in blocks]
    every = run.checkpoint_blocks
    recomputed = [every > 0 and i % every == 0 for i in range(len(blocks))]
    itemsize = 2 if run.precision == "bfloat16" else 4
    width = _widths(blocks[0])[0]
    total = sum(
        width * itemsize if again else size for size, again in zip(kept, recomputed, strict=True)
    )
    # While a block is computed again, all that it keeps is there for a moment.
    peak = max((size for size, again in zip(kept, recomputed, strict=True) if again), default=0)
    return tokens * (total + peak)


def _kept_bytes(block: nn.Module, precision: str) -> int:
    is_trained = any(p.requires_grad for p in block.parameters())
    width, ffn_width = _widths(block)
    per_width, per_ffn = _KEPT[precision, is_trained]
    return per_width * width + per_ffn * ffn_width


def _widths(block: nn.Module) -> tuple[int, int]:
    shape = block.get_parameter("ffn.net.0.proj.weight").shape
    return shape[1], shape[0]


def describe(trainer: Trainer, data: TrainingData, num_processes: int = 1) -> str:
    """A text that says what would be trained, on what, and what it would take.

    Raises:
        StyleMasterError: as `train` would, if the data do not fit.
    """
    check_data(trainer, data)
    run = trainer.config.run
    lines = [f"trainer {trainer.name}, {run.num_steps} steps in {run.precision}"]
    per_step = run.batch_size * run.accumulation * num_processes
    lines.append(
        f"  {per_step} samples a step = {run.batch_size} a pass x {run.accumulation} passes x "
        f"{num_processes} process(es)"
    )
    lines.append(f"{len(data)} samples")
    for group in group_by_size(data):
        lines.append(f"  {len(group)} of size {list(data.sizes[group[0]])}")
    sample = data[0]
    lines += [f"  {key}: {list(sample[key].shape)}" for key in trainer.draws.keys]
    lines.append("parameters")
    trained, frozen = _counts(trainer, True), _counts(trainer, False)
    lines += [f"  trained {count:>15,}  {part}" for part, count in trained.items()]
    lines += [f"  frozen  {count:>15,}  {part}" for part, count in frozen.items()]
    lines.append(f"  trained in all {sum(trained.values()):,}, frozen {sum(frozen.values()):,}")
    lines.append("memory of each device, estimated")
    estimate = estimate_memory(trainer, data)
    lines += [f"  {name:12}{value / 1e9:9.3f} GB" for name, value in estimate._asdict().items()]
    without = "" if list(trainer.blocks()) else ", without activations"
    lines.append(f"  {'in all':12}{estimate.total / 1e9:9.3f} GB{without}")
    lines.append(f"disk, at most {disk_bytes(trainer) / 1e9:.3f} GB")
    return "\n".join(lines)


def _counts(trainer: Trainer, trained: bool) -> dict[str, int]:
    """Number of parameters of each part."""
    counts: Counter[str] = Counter()
    for name, parameter in trainer.named_parameters():
        if parameter.requires_grad == trained:
            parts = name.split(".")
            depth = 2 if parts[0] == "transformer" and parts[1] == "style_attention" else 1
            counts[".".join(parts[:depth])] += parameter.numel()
    return dict(counts)
