"""Names and sizes of VideoCrafter's UNet: those of the release, and those of diffusers' blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import WeightsError
from .shapes import Shape, _shape

_WHAT = "VideoCrafter's UNet"
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "fps_embedding.linear_1": "fps_embedding.0",
    "fps_embedding.linear_2": "fps_embedding.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PART = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
TEMPORAL_KEY = re.compile(r"(init_attn\.0|(?:input|output)_blocks\.\d+\.2|middle_block\.2)\.(.+)")
_STAGE = "transformer_blocks.0.attn1.relative_position_k.embeddings_table"


@dataclass(frozen=True)
class VideoCrafterSizes:
    """Sizes of the UNet; the defaults are those of VideoCrafter1's text-to-video at 320 x 512."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of each level
    attention: tuple[bool, ...] = (True, True, True, False)  # whether a level has it
    layers_per_block: int = 2
    head_width: int = 64
    text_width: int = 1024
    init_width: int = 512  # of the temporal layer before all others
    max_distance: int = 16  # frames
    has_fps: bool = False  # VideoCrafter2 is told the frame rate


def release_names(names: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Names of the release by those of `VideoCrafterUNet`, for tensors or modules.

    Args:
        names: all names of the model, which tell in which blocks attention is.
        layers_per_block: residual blocks of each level on the way down.
    """
    names = list(names)
    attending = {".".join(name.split(".")[:2]) for name in names if ".attentions." in name}
    return {name: _release_name(name, layers_per_block, attending) for name in names}


def _release_name(name: str, layers: int, attending: set[str]) -> str:
    found = _PART.fullmatch(name)
    if found is None:
        module, _, leaf = name.rpartition(".")
        return f"{_TOP[module]}.{leaf}" if module in _TOP else _TOP.get(name, name)
    way, block, part, number, rest = found.groups()
    index, each = int(number), layers + 1
    place = {"resnets": 0, "attentions": 1}.get(part, 0)
    if part == "attentions" and rest.startswith("temporal."):
        place, rest = 2, rest.removeprefix("temporal.")
    if part == "resnets":
        module, dot, leaf = rest.partition(".")
        rest = _RESNET[module] + dot + leaf
    if way is None:
        return f"middle_block.{3 * index if part == 'resnets' else place}.{rest}"
    if part == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * each}.0.{rest.replace('conv', 'op', 1)}"
    if part == "upsamplers":
        place = 3 if f"up_blocks.{block}" in attending else 1
        return f"output_blocks.{int(block) * each + layers}.{place}.{rest}"
    row = int(block) * each + index
    return f"input_blocks.{1 + row}.{place}.{rest}" if way == "down" else (
        f"output_blocks.{row}.{place}.{rest}"
    )  # fmt: skip


def videocrafter_sizes(shapes: Mapping[str, Shape]) -> VideoCrafterSizes:
    """Read the sizes of the UNet off its shapes.

    Args:
        shapes: key to shape under the names of the release, without prefix.

    Returns:
        Sizes; that every tensor agrees with them is `check_keys`' matter.

    Raises:
        WeightsError: if a tensor that tells a size is missing.
    """
    numbers = [
        int(m[1]) for k in shapes if (m := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.bias", k))
    ]  # noqa: E501
    if not numbers:
        raise WeightsError(
            f"This is not {_WHAT}: there is no input_blocks.N.0.op.bias. Choose the file that "
            "`stylemaster weights convert` makes of VideoCrafter's model.ckpt."
        )
    each = min(numbers)
    first = [1 + level * each for level in range(len(numbers) + 1)]
    attention = tuple(f"input_blocks.{row}.1.norm.weight" in shapes for row in first)
    table = _shape(shapes, f"init_attn.0.{_STAGE}", 2, _WHAT)
    text_key = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    return VideoCrafterSizes(
        in_channels=_shape(shapes, "input_blocks.0.0.weight", 4, _WHAT)[1],
        out_channels=_shape(shapes, "out.2.weight", 4, _WHAT)[0],
        channels=tuple(
            _shape(shapes, f"input_blocks.{row}.0.out_layers.0.weight", 1, _WHAT)[0]
            for row in first
        ),
        attention=attention,
        layers_per_block=each - 1,
        head_width=table[1],
        text_width=_shape(shapes, text_key, 2, _WHAT)[1],
        init_width=_shape(shapes, "init_attn.0.proj_in.weight", 3, _WHAT)[0],
        max_distance=table[0] // 2,
        has_fps="fps_embedding.0.weight" in shapes,
    )
