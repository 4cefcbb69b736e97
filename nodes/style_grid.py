"""Nodes that try several styles at several strengths in one run, and show them on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
from comfy_api.latest import io
from torch import Tensor

from ..stylemaster_core.errors import ConfigError
from ..stylemaster_core.models.style_tokens import Style
from ..stylemaster_core.pipelines.pictures import Row, contact_sheet, grid_rows
from .folders import some_frames
from .layouts import PADDING_KEY, Latent, crop_image, frames_to_image
from .number_lists import strength_list
from .sockets import Grid, GridSocket, StyleSocket, schema

NUM_STYLES = 8
MOST_RESULTS = 64


def style_names(given: Sequence[str], count: int) -> tuple[str, ...]:
    """A name for each style: a text of names with commas, or a list from another node.

    Raises:
        ConfigError: for more names than styles.
    """
    names = given[0].split(",") if len(given) == 1 else list(given)
    names = [" ".join(name.split()) for name in names]
    if len(names) > count and any(names[count:]):
        raise ConfigError(
            f"{len(names)} names came for {count} styles; give one for each, separated by commas"
        )
    names += [""] * count
    return tuple(name or f"style {n}" for n, name in enumerate(names[:count], 1))


class StyleGrid(io.ComfyNode):
    """STYLEs and strengths -> each style at each strength, one after the other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        styles: list[io.Input] = [
            StyleSocket.Input(
                f"style_{n}", optional=n > 1, tooltip=f"Style {n}, or a list of several."
            )
            for n in range(1, NUM_STYLES + 1)
        ]
        return schema(
            node_id="StyleMasterStyleGrid",
            display_name="Style Grid",
            description="Tries each style at each strength in one run: link style and strength to "
            "Apply Style, and ComfyUI runs it and all that follows once for each of them. Style "
            "Sheet at the end shows all results on one labelled sheet.",
            search_aliases=["xy plot", "compare styles", "strength sweep", "batch styles"],
            inputs=[
                *styles,
                io.String.Input(
                    "strengths",
                    default="0.5, 1, 1.5",
                    tooltip="Strengths at which each style is tried, from 0 to 4, separated by "
                    "commas.",
                ),
                io.String.Input(
                    "names",
                    default="",
                    tooltip="Names of the styles for the sheet, separated by commas; else they are "
                    "numbered.",
                ),
            ],
            outputs=[
                StyleSocket.Output(
                    display_name="style", is_output_list=True, tooltip="For Apply Style."
                ),
                io.Float.Output(
                    display_name="strength",
                    is_output_list=True,
                    tooltip="For the strength of Apply Style.",
                ),
                GridSocket.Output(display_name="grid", tooltip="For Style Sheet."),
            ],
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls, strengths: list[str], names: list[str], **numbered: list[Style | None]
    ) -> io.NodeOutput:
        slots = [numbered.get(f"style_{n}") or [] for n in range(1, NUM_STYLES + 1)]
        styles = [style for given in slots for style in given if style is not None]
        values = strength_list(strengths[0], most=MOST_RESULTS)
        if not 0 < len(styles) * len(values) <= MOST_RESULTS:
            raise ConfigError(
                f"{len(styles)} styles at {len(values)} strengths are {len(styles) * len(values)} "
                f"results; give 1 to {MOST_RESULTS}"
            )
        pairs = [(style, value) for style in styles for value in values]
        grid = Grid(style_names(names, len(styles)), tuple(values))
        return io.NodeOutput([style for style, _ in pairs], [value for _, value in pairs], grid)


def decoded(vae: Any, latent: Latent) -> Tensor:
    """Frames of a LATENT, as VAE Decode and StyleMaster Crop after it give them."""
    from nodes import VAEDecode  # ComfyUI's own

    (frames,) = VAEDecode().decode(vae, latent)
    return crop_image(frames, latent) if PADDING_KEY in latent else frames


class StyleSheet(io.ComfyNode):
    """Sampled LATENTs of a Style Grid -> one IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterStyleSheet",
            display_name="Style Sheet",
            description="One labelled sheet of all results of a Style Grid. They are decoded one "
            "after the other, so that their number costs no memory.",
            search_aliases=["contact sheet", "xy plot", "image grid", "comparison"],
            inputs=[
                GridSocket.Input("grid", tooltip="From Style Grid."),
                io.Latent.Input(
                    "latent", tooltip="From the sampler: one for each style and strength."
                ),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Int.Input(
                    "columns",
                    default=1,
                    min=1,
                    max=32,
                    tooltip="How many frames of each result, evenly from first to last. With 1, "
                    "the strengths of a style stand side by side.",
                ),
                io.Int.Input(
                    "side",
                    default=256,
                    min=32,
                    max=1024,
                    tooltip="Side of the square that each frame is fitted into, in pixels.",
                ),
                io.Image.Input(
                    "content",
                    optional=True,
                    tooltip="The clip or frame before, for a row of its own at the top.",
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="For Save Image.")],
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls,
        grid: list[Grid],
        latent: list[Latent],
        vae: list[Any],
        columns: list[int],
        side: list[int],
        content: list[Tensor | None] | None = None,
    ) -> io.NodeOutput:
        expected = len(grid[0].names) * len(grid[0].strengths)
        if len(latent) != expected:
            raise ConfigError(
                f"{len(latent)} latents came for a grid of {expected}; link style and strength of "
                "Style Grid to Apply Style, and what is sampled from it to this node"
            )
        results = []
        for number, sampled in enumerate(latent, 1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            frames = decoded(vae[0], sampled)
            results.append(some_frames(frames, f"result {number}", columns[0]))
        rows: list[Row] = []
        if content and content[0] is not None:
            rows.append(("content", some_frames(content[0], "the content", columns[0])))
        rows += grid_rows(grid[0].names, grid[0].strengths, results)
        return io.NodeOutput(frames_to_image(contact_sheet(rows, side[0])[None]))


NODES = [StyleGrid, StyleSheet]
