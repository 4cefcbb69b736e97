"""The node that lets a style act on a MODEL."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

from comfy_api.latest import io
from torch import Tensor

from ..stylemaster_core.errors import ConfigError
from ..stylemaster_core.models.decoupled_attention import StyleAttention, StyleRegion
from ..stylemaster_core.models.style_adapter import StyleAdapter, StyleCrafterAdapter
from ..stylemaster_core.models.style_tokens import Style
from .conditionings import (
    Conditioning,
    prepare_styles,
    styled_conditioning,
    unstyled_conditioning,
)
from .layouts import Latent, picture_mask, region_mask
from .number_lists import BlockRange, block_scales
from .sdxl_patches import patch_layers
from .sdxl_styles import layer_conditionings, predicted_gains
from .sockets import (
    StyleAdapterSocket,
    StyleSocket,
    range_inputs,
    schema,
)
from .wan_patches import patch_style


class ApplyStyle(io.ComfyNode):
    """MODEL and prompts -> MODEL and prompts that carry a style."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterApplyStyle",
            display_name="Apply Style",
            description="Lets a style act on a Wan 2.1 text-to-video model, or with StyleCrafter's "
            "adapter on SDXL or VideoCrafter. For several styles, chain two with masks or ranges: "
            "model, positive and negative of the first go into the second, and only the styled "
            "output of the last is used.",
            search_aliases=["style transfer", "ip adapter", "regional style", "style mask"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Wan 2.1 text-to-video model (1.3B); SDXL or VideoCrafter for "
                    "StyleCrafter.",
                ),
                StyleAdapterSocket.Input("adapter", tooltip="From Load StyleMaster Adapter."),
                StyleSocket.Input("style", tooltip="From Texture Selector or Load Style."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Strength of the style attention; 1 as trained, 0 is the base model. "
                    "The style cfg of the sampler is the usual way to more or less style.",
                ),
                *range_inputs(
                    "Part of the sampling at which the style begins to act.",
                    "Part of the sampling at which the style ends.",
                ),
                io.Combo.Input(
                    "blocks",
                    options=list(get_args(BlockRange)),
                    default="all",
                    tooltip="Blocks of the model in which the style acts: all, a third of them, or "
                    "those of block_weights (list). On SDXL the 70 cross-attentions are counted: "
                    "0-23 on the way down, 24-59 up, 60-69 in the middle; on VideoCrafter "
                    "0-5, 6-14 and 15.",
                ),
                io.String.Input(
                    "block_weights",
                    default="0-9:1.0, 10-29:0.5",
                    tooltip="Only for blocks = list: strength of each block, from 0; blocks that "
                    "are not named get 0.",
                ),
                io.Int.Input(
                    "first_frame",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="First frame of the video on which the style acts. Not for SDXL and "
                    "VideoCrafter.",
                ),
                io.Int.Input(
                    "last_frame",
                    default=-1,
                    min=-1,
                    max=100000,
                    tooltip="Last frame on which it acts; -1 for the end. Four frames share a "
                    "latent frame, so the change is that gradual. Not for SDXL and VideoCrafter.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the style acts: one mask, or one for each frame; any size. "
                    "Where no mask is, the video has no style.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latent that will be sampled. Needed for a range of frames; masks "
                    "for each frame are checked against it. Not used on SDXL.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler or guider."),
                io.Conditioning.Output(display_name="styled", tooltip="The prompt with style."),
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt with 'no style'."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative prompt with 'no style'."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: StyleAdapter,
        style: Style,
        positive: Conditioning,
        negative: Conditioning,
        strength: float,
        start: float,
        end: float,
        blocks: str,
        block_weights: str,
        first_frame: int,
        last_frame: int,
        mask: Tensor | None = None,
        latent: Latent | None = None,
    ) -> io.NodeOutput:
        if strength < 0:
            raise ConfigError(
                f"the strength is {strength}; it must not be negative (0 is the base model). To "
                "lead away from a style, lower the style cfg instead"
            )
        attention = adapter.attention
        if attention is None:
            assert isinstance(adapter, StyleCrafterAdapter)  # the only kind for a UNet
            patched = patch_layers(model, adapter)
            region = StyleRegion(
                style.tokens,
                scale=strength,
                block_scales=block_scales(blocks, block_weights, adapter.num_layers),
                mask=picture_mask(mask, first_frame, last_frame),
                start=start,
                end=end,
            )
            conds = layer_conditionings(adapter, region, positive, negative)
            return io.NodeOutput(patched, *conds)
        patched = patch_style(model, attention)
        region = StyleRegion(
            style.tokens,
            scale=strength,
            block_scales=block_scales(blocks, block_weights, len(attention.blocks)),
            mask=region_mask(mask, first_frame, last_frame, latent),
            start=start,
            end=end,
        )
        prepared = prepare_styles([region], attention)
        if isinstance(adapter, StyleCrafterAdapter):
            styled, plain = with_gains(adapter, attention, region, positive)
        else:
            styled = styled_conditioning(positive, prepared)
            plain = unstyled_conditioning(positive, prepared)
        return io.NodeOutput(patched, styled, plain, unstyled_conditioning(negative, prepared))


def with_gains(
    adapter: StyleCrafterAdapter,
    attention: StyleAttention,
    region: StyleRegion,
    positive: Conditioning,
) -> tuple[Conditioning, Conditioning]:
    """Prompts with a style and with "no style", each prompt with gains of its own."""
    styled, plain = [], []
    for entry in positive:
        gains = predicted_gains(adapter, entry[0], region.tokens)
        prepared = prepare_styles([dataclasses.replace(region, gains=gains)], attention)
        styled += styled_conditioning([entry], prepared)
        plain += unstyled_conditioning([entry], prepared)
    return styled, plain


NODES = [ApplyStyle]
