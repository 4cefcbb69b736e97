"""The motion adapter (StyleMaster, sec. 3.3): a LoRA on self-attention, trained on still videos.

It is trained at scale 1. Scales below 0 move away from still videos: more motion and stronger style
(the paper chose -0.3).
Wan has no temporal-only attention, so it sits on q, k, v and o of the 3D self-attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import LayoutError, WeightsError

MOTION_FORMAT = "stylemaster-motion-adapter-1"
VIDEO_LORA_FORMAT = "stylecrafter-video-lora-1"
MOTION_SCALE = -0.3  # the paper's choice
PROJECTIONS = ("q", "k", "v", "o")


class LowRank(nn.Module):
    """x -> up(down(x)), without bias."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))).to(x)


class MotionAdapter(nn.Module):
    """W' = W + scale * B A on the self-attention of every block; base weights are never touched.

    Keys: `blocks.N.self_attn.{q,k,v,o}.lora_A.weight` and `lora_B`. Saved files carry the prefix
    `diffusion_model.`, by which ComfyUI's stock LoRA loader knows them.

    StyleCrafter's second stage on Wan trains the same LoRA, and there it is for videos at scale 1.
    """

    def __init__(self, num_blocks: int, width: int, rank: int) -> None:
        super().__init__()
        self.for_videos = False  # the LoRA of StyleCrafter's second stage
        # A tensor, so that compiled blocks need not be compiled again for another scale.
        self._scale = torch.tensor(1.0, dtype=torch.float64, device="cpu")
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"self_attn": nn.ModuleDict({p: LowRank(width, rank) for p in PROJECTIONS})}
            )
            for _ in range(num_blocks)
        )

    @property
    def scale(self) -> float:
        """Strength of the adapter; it may be set at any time."""
        return self._scale.item()

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale.fill_(value)

    @torch.no_grad()
    def reset_for_training(self, generator: torch.Generator | None = None) -> None:
        """A random, B zero: training starts from the base model."""
        for module in self.modules():
            if isinstance(module, LowRank):
                std = module.lora_A.in_features**-0.5
                module.lora_A.weight.normal_(0, std, generator=generator)
                nn.init.zeros_(module.lora_B.weight)

    def attach(self, transformer: Any) -> Attached:
        """Let the adapter act on a `StyledWanTransformer`, at `self.scale`, until `detach()`.

        Raises:
            WeightsError: if the transformer has other blocks or another width.
        """
        width = self._layer(0, "q").lora_A.in_features
        host_width = transformer.blocks[0].attn1.to_q.in_features
        if len(transformer.blocks) != len(self.blocks) or host_width != width:
            raise WeightsError(
                f"this motion adapter is for {len(self.blocks)} blocks of width {width}, the "
                f"transformer has {len(transformer.blocks)} of width {host_width}; use an adapter "
                "trained on it"
            )
        for i, block in enumerate(transformer.blocks):
            layers = {name: self._layer(i, name) for name in PROJECTIONS}
            block.motion = BlockMotion(layers, self._scale)
        return Attached(transformer)

    def _layer(self, block: int, projection: str) -> LowRank:
        return cast(Any, self.blocks)[block]["self_attn"][projection]


class BlockMotion(NamedTuple):
    """What an attached adapter does in one block.

    Not forward hooks: compiled blocks do not notice that hooks come or go.
    """

    layers: dict[str, LowRank]  # q, k, v, o
    scale: Tensor  # one number, shared by all blocks

    def residual(self, projection: str, x: Tensor) -> Tensor:
        """[B, L, D], to be added to the projection of `x`."""
        return self.layers[projection](x) * self.scale


class Attached:
    """Handle of an attached adapter; also a context manager."""

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer

    def detach(self) -> None:
        for block in self._transformer.blocks:
            block.motion = None

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()


def attached_motion(
    transformer: Any, scale: float | None, *, is_video: bool = True
) -> AbstractContextManager[Any]:
    """While this context is open, the transformer's motion adapter, if any, acts at `scale`.

    Args:
        transformer: `StyledWanTransformer`.
        scale: None for the paper's -0.3, or of StyleCrafter's LoRA 1 in videos and 0 in images.
        is_video: whether more than one frame is made.
    """
    adapter = transformer.motion_adapter
    if adapter is not None and scale is None:
        scale = float(is_video) if adapter.for_videos else MOTION_SCALE
    if adapter is None or scale == 0:
        return nullcontext()
    assert scale is not None
    adapter.scale = scale
    return adapter.attach(transformer)


def motion_adapter_state_dict(adapter: MotionAdapter) -> dict[str, Tensor]:
    """Weights to save, named as ComfyUI's stock LoRA loader expects them."""
    return {f"diffusion_model.{key}": value for key, value in adapter.state_dict().items()}


def load_motion_adapter(state_dict: Mapping[str, Tensor]) -> MotionAdapter:
    """Build a motion adapter from a LoRA file in PEFT or ComfyUI (`lora_down/up`, `.alpha`) naming.

    `alpha / rank` is folded into the weights.

    Raises:
        WeightsError: for keys that are not a LoRA on all of self_attn q, k, v, o.
    """
    weights: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = key
        for prefix in ("base_model.model.", "transformer.", "diffusion_model."):
            name = name.removeprefix(prefix)
        name = name.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        weights[name] = value
    for name in [k for k in weights if k.endswith(".alpha")]:
        alpha = float(weights.pop(name))
        down, up = (f"{name.removesuffix('.alpha')}.lora_{x}.weight" for x in "AB")
        if down in weights and up in weights:
            weights[up] = weights[up] * (alpha / weights[down].shape[0])
    first = weights.get("blocks.0.self_attn.q.lora_A.weight")
    if first is None:
        raise WeightsError(
            "no motion adapter: blocks.0.self_attn.q.lora_A.weight is missing among "
            f"{len(state_dict)} keys (first: {sorted(state_dict)[:2]}); a LoRA on Wan's "
            "self-attention was expected"
        )
    from ..weights.state_dict import check_keys

    rank, width = first.shape
    num_blocks = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    with torch.device("meta"):
        adapter = MotionAdapter(num_blocks, width, rank)
    check_keys(
        {key: tuple(value.shape) for key, value in weights.items()},
        {key: tuple(value.shape) for key, value in adapter.state_dict().items()},
        "motion adapter",
    )
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise LayoutError("the motion adapter's weights hold NaN or infinity")
    adapter.load_state_dict(weights, assign=True)
    return adapter.requires_grad_(False).eval()
