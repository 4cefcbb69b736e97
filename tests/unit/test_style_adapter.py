"""One reader for every kind of style adapter."""

import pytest
import torch

from stylemaster_core.errors import WeightsError
from stylemaster_core.models.small import draw_weights
from stylemaster_core.models.style_adapter import (
    READERS,
    StyleCrafterAdapter,
    StyleMasterAdapter,
    create_adapter,
)
from stylemaster_core.weights.shapes import (
    AdapterSizes,
    StyleCrafterSdxlSizes,
    StyleCrafterSizes,
    StyleCrafterWanSizes,
    expected_adapter_shapes,
    expected_stylecrafter_sdxl_shapes,
    expected_stylecrafter_wan_shapes,
)
from stylemaster_core.weights.state_dict import detect_kind, shapes_of

ENCODER = StyleCrafterSizes(
    feature_width=16, style_width=8, text_width=10, num_tokens=5, num_layers=1,
    num_scales=2, scale_width=8, scale_num_layers=1,
)  # fmt: skip
STYLEMASTER = AdapterSizes(
    width=8, num_blocks=2, style_width=10, patch_width=16, num_layers=1, global_tokens=3,
    global_width=6, contrastive_width=4,
)  # fmt: skip
SHAPES = {
    "stylemaster": expected_adapter_shapes(STYLEMASTER),
    "stylecrafter-wan": expected_stylecrafter_wan_shapes(StyleCrafterWanSizes(ENCODER, 8)),
    "stylecrafter-sdxl": expected_stylecrafter_sdxl_shapes(StyleCrafterSdxlSizes(ENCODER, (8, 16))),
}


def read(method, **changes):
    tensors = draw_weights(SHAPES[method], 0) | changes
    kind = detect_kind(shapes_of(tensors))
    assert kind in READERS
    return create_adapter("a.safetensors", kind, tensors, {})


@pytest.mark.parametrize("method", SHAPES)
def test_a_file_tells_what_it_is(method):
    adapter = read(method)
    assert adapter.method == method and adapter.name == "a.safetensors"
    assert isinstance(adapter, StyleMasterAdapter) == (method == "stylemaster")
    assert (adapter.attention is None) == (method == "stylecrafter-sdxl")
    if isinstance(adapter, StyleCrafterAdapter):
        assert (adapter.unet_layers is None) == (method == "stylecrafter-wan")
        assert (adapter.num_layers, adapter.text_width) == (2, 10)


@pytest.mark.parametrize("method", SHAPES)
def test_in_float32(method):
    half = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in SHAPES[method].items()}
    adapter = read(method, **half)
    branch = adapter.float().attention or adapter.float().layers  # type: ignore[attr-defined]
    assert {p.dtype for p in branch.parameters()} == {torch.float32}


def test_an_adapter_without_its_branch():
    tensors = draw_weights(SHAPES["stylemaster"], 0)
    style = {key: value for key, value in tensors.items() if key.startswith("style_model.")}
    with pytest.raises(WeightsError, match="a.safetensors holds a style model but no k_img"):
        create_adapter("a.safetensors", "style_adapter", style, {})
