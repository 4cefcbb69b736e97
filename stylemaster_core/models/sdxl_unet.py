"""Styles on diffusers' SDXL UNet: attention processors on its cross-attentions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from ..errors import UnsupportedHostError, WeightsError
from .decoupled_attention import BlockStyle, attend, style_residual
from .stylecrafter_sdxl import StyleCrafterSdxl

PARTS = ("down_blocks.", "up_blocks.", "mid_block.")  # the order in which layers are counted


class StyledProcessor:
    """Text attention, and the style's beside it before the output projection."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.style: BlockStyle | None = None
        self.masks: Mapping[int, tuple[Tensor, ...]] = {}

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if self.style is None:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attention_mask is not None:
            raise UnsupportedHostError(
                "a style does not work together with an attention mask on the text; leave it out"
            )
        query = attn.to_q(hidden_states)
        keys, values = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        style = self.style._replace(masks=self.masks.get(query.shape[1], ()))
        attended = attend(query, keys, values, attn.heads)
        attended = attended + style_residual(query, style, attn.heads)
        return attn.to_out[1](attn.to_out[0](attended))


class StyledUNet:
    """While this context is open, `styles` act on the last rows of every batch of the UNet."""

    def __init__(self, unet: Any) -> None:
        """Look for the cross-attentions.

        Raises:
            UnsupportedHostError: if something else has replaced their attention.
        """
        self.unet = unet
        self.names = cross_attentions(unet)
        for name in self.names:
            processor = unet.get_submodule(name).processor
            if not isinstance(processor, AttnProcessor | AttnProcessor2_0):
                raise UnsupportedHostError(
                    f"{name} has the attention processor {type(processor).__name__}; take it off "
                    "(unet.set_default_attn_processor()) before a style is applied"
                )
        self.processors = [StyledProcessor(unet.get_submodule(n).processor) for n in self.names]

    def set(
        self, styles: Sequence[BlockStyle] | None, masks: Mapping[int, tuple[Tensor, ...]]
    ) -> None:
        """Let styles act from now on; None for the base model.

        Args:
            styles: one per layer, from `layer_styles`, with as many rows as are styled.
            masks: from `level_masks`.
        """
        for index, processor in enumerate(self.processors):
            processor.style = None if styles is None else styles[index]
            processor.masks = masks

    def __enter__(self) -> StyledUNet:
        for name, processor in zip(self.names, self.processors, strict=True):
            self.unet.get_submodule(name).set_processor(processor)
        return self

    def __exit__(self, *exc: object) -> None:
        for name, processor in zip(self.names, self.processors, strict=True):
            self.unet.get_submodule(name).set_processor(processor.plain)


def cross_attentions(unet: Any) -> list[str]:
    """Names of the cross-attentions, in the order in which StyleCrafter counts layers."""
    # VideoCrafter has others of that name, over frames; diffusers' own take a processor.
    named = unet.named_modules()
    names = [n for n, layer in named if n.endswith(".attn2") and hasattr(layer, "processor")]
    return sorted(names, key=lambda name: [name.startswith(part) for part in PARTS].index(True))


def check_unet(unet: Any, adapter: StyleCrafterSdxl) -> None:
    """Check that an adapter belongs to a UNet.

    Raises:
        WeightsError: with the layers and widths that came and that were expected.
    """
    widths = [unet.get_submodule(name).to_q.out_features for name in cross_attentions(unet)]
    text = unet.get_submodule(cross_attentions(unet)[0]).to_k.in_features
    needed = adapter.encoder.scale_predictor.text_proj.in_features
    if widths != adapter.layer_widths or text != needed:
        raise WeightsError(
            f"this StyleCrafter adapter is for {len(adapter.layer_widths)} cross-attentions of "
            f"widths {sorted(set(adapter.layer_widths))} and text of width {needed}; the base "
            f"model has {len(widths)} of widths {sorted(set(widths))} and text of width {text}. "
            "The released adapter needs SDXL (70 cross-attentions, text of width 2048), not SD "
            "1.5, SD 2 or another model"
        )
