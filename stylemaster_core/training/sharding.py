"""Weights that are spread over processes: FSDP and DeepSpeed, as accelerate's own config asks."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedHostError
from .config import TrainConfig


def knows_fsdp_2() -> bool:
    """Whether PyTorch and accelerate are new enough for FSDP 2."""
    import torch.distributed.fsdp
    from accelerate import FullyShardedDataParallelPlugin

    fields = getattr(FullyShardedDataParallelPlugin, "__dataclass_fields__", {})
    return hasattr(torch.distributed.fsdp, "fully_shard") and "fsdp_version" in fields


def prepare_sharding(accelerator: Any, config: TrainConfig) -> bool:
    """Whether the weights are to be spread over processes, so that each holds a part alone.

    FSDP 2 and DeepSpeed ZeRO 2 have been run on two CPU processes (tests), never on GPUs. DeepSpeed
    steps within the backward pass: a loss that is not finite stops it one step late.

    Raises:
        UnsupportedHostError: for what cannot work then.
    """
    kind, run = str(accelerator.distributed_type.value).upper(), config.run
    if kind not in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        return False
    if config.trainer.startswith(("global-projection", "videocrafter")):
        raise UnsupportedHostError(
            f"with {kind} the weights are spread over processes, which the trainer "
            f"{config.trainer!r} does not do; use plain data parallelism"
        )
    if config.optimizer.ema_decay or run.sample_every:
        raise UnsupportedHostError(
            f"with {kind} the weights are spread over processes, and neither their moving average "
            "nor sample pictures work; set optimizer.ema_decay=0 and run.sample_every=0, or use "
            "plain data parallelism"
        )
    state = accelerator.state
    if kind == "DEEPSPEED":
        settings = state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = run.batch_size
        settings["gradient_accumulation_steps"] = run.accumulation
        settings["gradient_clipping"] = config.optimizer.clip_norm
    whole = {
        "FSDP": lambda: getattr(state.fsdp_plugin, "fsdp_version", 1) == 2,
        "DEEPSPEED": lambda: state.deepspeed_plugin.zero_stage < 3,
        "MEGATRON_LM": lambda: False,
    }
    if not whole[kind]():
        raise UnsupportedHostError(
            f"this kind of {kind} leaves no tensor whole to write; use FSDP with fsdp_version: 2, "
            "DeepSpeed ZeRO 1 or 2, or plain data parallelism"
        )
    if kind == "FSDP":
        # Its own policy would round the latents and the loss to bfloat16; autocast does not.
        state.fsdp_plugin.mixed_precision_policy = None
    return True


def gather_for_methods(accelerator: Any, model: nn.Module) -> None:
    """Let FSDP gather a block's weights for its text keys and values, too.

    It does so for `forward` alone, and they are made before the first block runs.
    """
    if not getattr(accelerator, "is_fsdp2", False):
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    for module in model.modules():
        if isinstance(module, FSDPModule) and hasattr(module, "text_keys_values"):
            register_fsdp_forward_method(module, "text_keys_values")
