"""Style adapters of every kind: how one is read from its file, for both hosts.

A new kind is a function in `READERS` that makes a `StyleAdapter` of a file's tensors and header.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import WeightsError
from ..weights.state_dict import Kind
from .decoupled_attention import StyleAttention, create_style_attention
from .style_projector import StyleProjector, load_style_projector
from .stylecrafter import StyleCrafterEncoder, load_stylecrafter_encoder, stylecrafter_heads
from .stylecrafter_sdxl import StyleCrafterSdxl, load_stylecrafter_sdxl, load_stylecrafter_video

STYLE_MODEL = "style_model."  # how keys of StyleMaster's style model begin

Tensors = dict[str, Tensor]
Metadata = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class StyleAdapter(ABC):
    """What turns style pictures into tokens, and tokens into something that a base model heeds.

    Attributes:
        name: of its file.
    """

    name: str

    @property
    @abstractmethod
    def method(self) -> str:
        """What a style that is made with it says of its origin."""

    @property
    @abstractmethod
    def attention(self) -> StyleAttention | None:
        """Its branch of Wan's blocks; None if it is for the UNet of another base."""

    @abstractmethod
    def float(self) -> StyleAdapter:
        """The same with its branch in float32."""


@dataclass(frozen=True, eq=False)
class StyleMasterAdapter(StyleAdapter):
    """StyleMaster's, for Wan."""

    projector: StyleProjector
    branch: StyleAttention

    @property
    def method(self) -> str:
        return "stylemaster"

    @property
    def attention(self) -> StyleAttention:
        return self.branch

    def float(self) -> StyleMasterAdapter:
        return replace(self, branch=self.branch.float())


@dataclass(frozen=True, eq=False)
class StyleCrafterAdapter(StyleAdapter):
    """StyleCrafter's; what it is for is told by its layers.

    Attributes:
        encoder: of style tokens, and of the strength of each layer.
        layers: for a UNet (SDXL, VideoCrafter), or for Wan.
    """

    encoder: StyleCrafterEncoder
    layers: StyleCrafterSdxl | StyleAttention

    @property
    def method(self) -> str:
        return "stylecrafter-wan" if self.unet_layers is None else self.unet_layers.method

    @property
    def attention(self) -> StyleAttention | None:
        return self.layers if isinstance(self.layers, StyleAttention) else None

    @property
    def unet_layers(self) -> StyleCrafterSdxl | None:
        """Its layers, if it is for a UNet."""
        return self.layers if isinstance(self.layers, StyleCrafterSdxl) else None

    @property
    def num_layers(self) -> int:
        return self.encoder.num_scales

    @property
    def text_width(self) -> int:
        return self.encoder.scale_predictor.text_proj.in_features

    def float(self) -> StyleCrafterAdapter:
        return replace(self, layers=self.layers.float())


def create_adapter(name: str, kind: Kind, tensors: Tensors, metadata: Metadata) -> StyleAdapter:
    """The adapter in a file's tensors, which are not copied.

    Args:
        name: of the file.
        kind: one of `READERS`, from `detect_kind`.
        tensors: under the release's names, without a common prefix.
        metadata: header of the file; it tells what shapes do not.

    Raises:
        WeightsError: if it is incomplete.
    """
    return READERS[kind](name, tensors, metadata)


def read_projector(tensors: Mapping[str, Tensor], metadata: Metadata) -> StyleProjector:
    """The style model in a StyleMaster adapter, or in the whole release.

    Raises:
        WeightsError: if it is incomplete.
    """
    style = {
        k.removeprefix(STYLE_MODEL): v for k, v in tensors.items() if k.startswith(STYLE_MODEL)
    }
    return load_style_projector(
        style,
        num_heads=int(metadata.get("style_num_heads", 8)),
        global_embeds=metadata.get("global_embeds"),
    )


def _stylemaster(name: str, tensors: Tensors, metadata: Metadata) -> StyleAdapter:
    projector, branch = read_projector(tensors, metadata), create_style_attention(tensors)
    if branch is None:
        raise WeightsError(
            f"{name} holds a style model but no k_img and v_img of the blocks; convert the release "
            "again, or download the adapter again"
        )
    return StyleMasterAdapter(name, projector, branch)


def _stylecrafter_wan(name: str, tensors: Tensors, metadata: Metadata) -> StyleAdapter:
    encoder = load_stylecrafter_encoder(tensors, **stylecrafter_heads(metadata))
    branch = create_style_attention(tensors)
    assert branch is not None  # the kind is told by its keys
    return StyleCrafterAdapter(name, encoder, branch)


def _stylecrafter_sdxl(name: str, tensors: Tensors, metadata: Metadata) -> StyleAdapter:
    layers = load_stylecrafter_sdxl(tensors, metadata)
    return StyleCrafterAdapter(name, layers.encoder, layers)


def _stylecrafter_video(name: str, tensors: Tensors, metadata: Metadata) -> StyleAdapter:
    layers = load_stylecrafter_video(tensors, metadata)
    return StyleCrafterAdapter(name, layers.encoder, layers)


READERS: dict[Kind, Callable[[str, Tensors, Metadata], StyleAdapter]] = {
    "style_adapter": _stylemaster,
    "stylecrafter_wan": _stylecrafter_wan,
    "stylecrafter_sdxl": _stylecrafter_sdxl,
    "stylecrafter_video": _stylecrafter_video,
}
