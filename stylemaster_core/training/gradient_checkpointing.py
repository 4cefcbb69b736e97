"""Selective gradient checkpointing: every n-th block is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.gray_tile_controlnet import DiffusersHost
from ..models.temporal_transformer import TemporalTransformer


def checkpoint_transformer(transformer: Any, every: int) -> None:
    """Let every `every`-th block of a `StyledWanTransformer` be recomputed; 0 for none."""
    chosen = _every(transformer.blocks, every)

    def run(block: nn.Module, *arguments: Any) -> Tensor:
        return _run(block, arguments) if id(block) in chosen else block(*arguments)

    transformer.gradient_checkpointing = bool(chosen)
    transformer._gradient_checkpointing_func = run


def checkpoint_unet(unet: Any, every: int) -> None:
    """Let every `every`-th residual or transformer block of a UNet be recomputed; 0 for none."""
    kinds = (ResnetBlock2D, BasicTransformerBlock, TemporalTransformer)
    blocks = [module for module in unet.modules() if isinstance(module, kinds)]
    for block in blocks[::every] if every else ():
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


class CheckpointedHost(DiffusersHost):
    """diffusers' blocks for a control network, some of them recomputed."""

    def __init__(self) -> None:
        self._chosen: set[int] = set()

    def choose(self, blocks: Sequence[nn.Module], every: int) -> None:
        """Let every `every`-th of these blocks be recomputed; 0 for none."""
        self._chosen = _every(blocks, every)

    def run_block(
        self, block: nn.Module, hidden: Tensor, modulation: Tensor, rotary: Any, text: Any
    ) -> Tensor:
        arguments = (hidden, modulation, rotary, text.expand(hidden.shape[0]))
        return _run(block, arguments) if id(block) in self._chosen else block(*arguments)


def _every(blocks: Sequence[nn.Module], every: int) -> set[int]:
    return {id(block) for block in list(blocks)[::every]} if every else set()


def _run(block: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    # The blocks draw no random numbers, so their state need not be kept.
    return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
