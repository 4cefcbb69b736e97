"""The node that shows how strongly a StyleCrafter adapter lets each layer take a style."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from comfy_api.latest import io
from PIL import Image, ImageDraw

from ..stylemaster_core.errors import ConfigError
from ..stylemaster_core.models.style_adapter import StyleAdapter, StyleCrafterAdapter
from ..stylemaster_core.models.style_tokens import Style
from .conditionings import Conditioning
from .layouts import pictures_to_image
from .sdxl_styles import predicted_gains
from .sockets import StyleAdapterSocket, StyleSocket, schema

SIZE, MARGIN = (768, 320), 44
BACKGROUND, AXIS, TEXT, BAR = (24, 26, 30), (90, 94, 102), (210, 214, 220), (110, 180, 255)
HIGHEST = 2.0
LABEL_EVERY = 10


def draw_gains(gains: Sequence[float]) -> Image.Image:
    """Bars from 0 to 2, one for each layer, with a line at 1.

    Args:
        gains: 1 + s of each layer, in the order in which the adapter counts them.

    Returns:
        RGB, of `SIZE`.
    """
    picture = Image.new("RGB", SIZE, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = MARGIN, 28, SIZE[0] - 16, SIZE[1] - 28
    step = (right - left) / len(gains)

    def height(gain: float) -> float:
        return bottom - (bottom - top) * min(max(gain, 0.0), HIGHEST) / HIGHEST

    for number, gain in enumerate(gains):
        x = left + number * step
        draw.rectangle((x + 1, height(gain), x + max(step - 1, 2), bottom), fill=BAR)
        if number % LABEL_EVERY == 0:
            draw.text((x, bottom + 6), str(number), fill=TEXT)
    for level in (0.0, 1.0, HIGHEST):
        draw.line((left, height(level), right, height(level)), fill=AXIS)
        draw.text((8, height(level) - 6), f"{level:g}", fill=TEXT)
    mean = sum(gains) / len(gains)
    words = f"gain of each layer: {min(gains):.3f} to {max(gains):.3f}, mean {mean:.3f}"
    draw.text((left, 8), words, fill=TEXT)
    return picture


class ShowScales(io.ComfyNode):
    """STYLE_ADAPTER, STYLE, CONDITIONING -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterShowScales",
            display_name="Show Scales",
            description="Shows how strongly each layer takes the style, as a StyleCrafter adapter "
            "predicts it from the prompt and the style: bars from 0 to 2, 1 is neutral. Apply "
            "Style uses these numbers by itself.",
            search_aliases=["stylecrafter scales", "gains", "adaptive fusion", "layer strength"],
            inputs=[
                StyleAdapterSocket.Input(
                    "adapter", tooltip="From Load StyleMaster Adapter; a StyleCrafter adapter."
                ),
                StyleSocket.Input("style", tooltip="From Texture Selector or Load Style."),
                io.Conditioning.Input(
                    "prompt",
                    tooltip="The positive prompt. Of several parts the first, of a long prompt the "
                    "first 77 tokens.",
                ),
            ],
            outputs=[io.Image.Output(display_name="picture", tooltip="A bar for each layer.")],
        )

    @classmethod
    def execute(cls, adapter: StyleAdapter, style: Style, prompt: Conditioning) -> io.NodeOutput:
        if not isinstance(adapter, StyleCrafterAdapter):
            raise ConfigError(
                f"{adapter.name} is a StyleMaster adapter, which predicts no scales: every layer "
                "takes the style at strength 1; link a StyleCrafter adapter"
            )
        gains = predicted_gains(adapter, prompt[0][0], style.tokens)[0].tolist()
        return io.NodeOutput(pictures_to_image([np.asarray(draw_gains(gains))]))


NODES = [ShowScales]
