"""Nodes that load weights: the style adapter and the motion adapter."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy import model_management
from comfy_api.latest import io
from torch import Tensor

from ..stylemaster_core.errors import WeightsError
from ..stylemaster_core.models.motion_adapter import MotionAdapter, load_motion_adapter
from ..stylemaster_core.models.style_adapter import READERS, StyleAdapter, create_adapter
from ..stylemaster_core.reading import reading
from ..stylemaster_core.weights.files import read_state_dict
from ..stylemaster_core.weights.numbers import check_weights
from ..stylemaster_core.weights.state_dict import (
    Kind,
    describe_kind,
    detect_kind,
    shapes_of,
    strip_prefix,
)
from .motion import patch_motion
from .paths import (
    ADAPTERS,
    STYLECRAFTER,
    check_named,
    fingerprint,
    model_file,
    model_names,
    named_fingerprint,
    names_or_link,
)
from .sockets import MotionAdapterSocket, StyleAdapterSocket, range_inputs, schema

CHECK_VARIABLE = "STYLEMASTER_CHECK_WEIGHTS"  # 0: do not look for NaN in them
PACK = Path(__file__).resolve().parents[1]


def read_kind(path: Path, wanted: Kind, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of one kind.

    Raises:
        WeightsError: if it is damaged or of another kind; for the release's checkpoint with the
            command that converts it.
    """
    return _read_kinds(path, (wanted,), what)[1:]


def _read_kinds(
    path: Path, wanted: Sequence[Kind], what: str
) -> tuple[Kind, dict[str, Tensor], dict[str, str]]:
    """Kind, tensors and metadata of a file; as `read_kind`."""
    file = read_state_dict(path)
    tensors = strip_prefix(file.tensors)
    kind = detect_kind(shapes_of(tensors))
    if kind in wanted:
        if os.environ.get(CHECK_VARIABLE) != "0":
            check_weights(tensors, path, device=model_management.get_torch_device())
        return kind, tensors, file.metadata
    message = f"{path} is no {what}. This file is {describe_kind(kind)}."
    if kind == "stylemaster" and "style_adapter" in wanted:
        message += (
            " The command, for a terminal:\n"
            f'cd "{PACK}" && "{sys.executable}" -m stylemaster_core weights convert "{path}"\n'
            "Then refresh the node (R) and choose the new file."
        )
    raise WeightsError(message)


def load_adapter(path: Path) -> StyleAdapter:
    """Load a style adapter of any kind.

    Raises:
        WeightsError: if the file is of another kind, damaged or incomplete.
    """
    with reading(path, "a style adapter"):
        return create_adapter(path.name, *_read_kinds(path, tuple(READERS), "style adapter"))


class LoadAdapter(io.ComfyNode):
    """models/stylemaster -> STYLE_ADAPTER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterAdapterLoader",
            display_name="Load StyleMaster Adapter",
            description="Loads a style adapter: StyleMaster's for Wan 2.1, or StyleCrafter's for "
            "SDXL or VideoCrafter (the released weights are for research and non-commercial use) "
            "or Wan 2.1. The file tells which it is.",
            search_aliases=[
                "style adapter",
                "ip adapter",
                "stylemaster checkpoint",
                "stylecrafter",
            ],
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=model_names(ADAPTERS, STYLECRAFTER),
                    tooltip="Style adapter in models/stylemaster or models/stylecrafter "
                    "(.safetensors). The released stylemaster.ckpt must be converted first; "
                    "choosing it shows the command.",
                )
            ],
            outputs=[
                StyleAdapterSocket.Output(
                    display_name="adapter", tooltip="For Texture Selector and Apply Style."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str) -> str:
        return fingerprint(model_file(adapter_name, ADAPTERS, STYLECRAFTER))

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_adapter(model_file(adapter_name, ADAPTERS, STYLECRAFTER)))


class MotionAdapterLoader(io.ComfyNode):
    """MODEL -> MODEL with the motion adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="StyleMasterMotionAdapter",
            display_name="Load Motion Adapter",
            description="Applies a motion adapter, a LoRA trained on still videos. Below 0 it "
            "leads away from still videos: more motion, stronger style.",
            search_aliases=["motion lora", "still motion adapter", "stylemaster motion"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan 2.1 text-to-video model."),
                io.Combo.Input(
                    "adapter_name",
                    options=names_or_link("loras", ADAPTERS),
                    tooltip="Motion adapter in models/loras or models/stylemaster; not used if "
                    "motion_adapter is linked.",
                ),
                io.Float.Input(
                    "motion_scale",
                    default=-0.3,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    tooltip="1 is the still videos of the training, 0 the base model; below 0 the "
                    "video moves more. The paper chose -0.3.",
                ),
                *range_inputs(
                    "Part of the sampling at which it begins to act.",
                    "Part of the sampling at which it ends. From 0 to 1 it is merged into "
                    "the weights like any LoRA; a shorter range adds it while sampling, a little "
                    "slower.",
                ),
                MotionAdapterSocket.Input(
                    "motion_adapter",
                    optional=True,
                    tooltip="From Load StyleMaster Tiny; takes the place of a file.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with motion adapter.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str, **_others: Any) -> str:
        return named_fingerprint(adapter_name, "loras", ADAPTERS)

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter_name: str,
        motion_scale: float,
        start: float,
        end: float,
        motion_adapter: MotionAdapter | None = None,
    ) -> io.NodeOutput:
        adapter = motion_adapter or _load_motion_adapter(adapter_name)
        return io.NodeOutput(patch_motion(model, adapter, motion_scale, start, end))


def _load_motion_adapter(name: str) -> MotionAdapter:
    check_named(name, "motion_adapter")
    path = model_file(name, "loras", ADAPTERS)
    with reading(path, "a motion adapter"):
        return load_motion_adapter(read_kind(path, "motion_adapter", "motion adapter")[0])


NODES = [LoadAdapter, MotionAdapterLoader]
