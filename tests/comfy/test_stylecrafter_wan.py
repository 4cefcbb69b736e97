"""A StyleCrafter adapter on ComfyUI's native Wan, through the nodes, against the core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stylemaster_core import denoise, flow_match_sigmas, load_transformer
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.small import draw_weights
from stylemaster_core.models.stylecrafter import load_stylecrafter_encoder
from stylemaster_core.weights.shapes import (
    StyleCrafterSizes,
    StyleCrafterWanSizes,
    expected_stylecrafter_wan_shapes,
)

SCRIPT = Path(__file__).parent / "scripts" / "stylecrafter_wan.py"
TOLERANCE = 1e-5
ENCODER = StyleCrafterSizes(
    feature_width=64, style_width=64, text_width=128, num_tokens=5, num_layers=1,
    num_scales=3, scale_width=64, scale_num_layers=1,
)  # fmt: skip


@pytest.fixture(scope="session")
def reference(golden, tmp_path_factory) -> list[Path]:
    """Inputs with the core's results, and the adapter."""
    folder = tmp_path_factory.mktemp("stylecrafter_wan")
    shapes = expected_stylecrafter_wan_shapes(StyleCrafterWanSizes(ENCODER, 256, True))
    adapter = {key: value.float() for key, value in draw_weights(shapes, 3).items()}
    released = golden("weights_dit_a").tensors
    base = {k: v for k, v in released.items() if "_img." not in k and "style_model." not in k}
    net = load_transformer(base | adapter)
    case = golden("04_guidance")
    draw = torch.Generator().manual_seed(1)
    x = {
        "tokens": torch.randn(1, 5, 64, generator=draw),
        "text": case["in.context_pos"],
        "negative": case["in.context_neg"],
        "latents": torch.randn(1, 16, 3, 8, 10, generator=draw),
        "mask": torch.rand(1, 17, 23, generator=draw),
        "sigmas": flow_match_sigmas(3, shift=5.0),
    }
    with torch.no_grad():
        gains = load_stylecrafter_encoder(adapter).gains(x["text"], x["tokens"])
        region = StyleRegion(x["tokens"], 0.8, gains=gains)
        masked = StyleRegion(x["tokens"], 0.8, mask=x["mask"], gains=gains)
        timestep = torch.tensor([700.0])
        x["gains"] = gains
        x["styled"] = net(x["latents"], timestep, x["text"], style=[region])
        x["masked"] = net(x["latents"], timestep, x["text"], style=[masked])
        x["sampled"] = denoise(
            net, x["latents"], sigmas=x["sigmas"], text=x["text"], negative_text=x["negative"],
            style=[region], text_scale=5.0, style_scale=3.0,
        )  # fmt: skip
    save_file({k: v.contiguous() for k, v in x.items()}, folder / "reference.safetensors")
    save_file(adapter, folder / "adapter.safetensors")
    return [folder / "reference.safetensors", folder / "adapter.safetensors"]


@pytest.fixture(scope="session")
def facts(run_in_comfy, reference) -> dict[str, Any]:
    return run_in_comfy(SCRIPT, *reference)


@pytest.mark.parametrize("name", ["gains", "styled", "batch.styled", "mask", "guided"])
def test_equals_the_core(facts, name):
    assert facts[name] < TOLERANCE


def test_no_style_is_the_base_model(facts):
    assert facts["no_style"] == facts["strength_0"] == 0
    assert facts["batch.no_style"] < TOLERANCE
    assert facts["effect"] > 0.05


def test_styles_of_two_methods_are_not_mixed(facts):
    assert facts["mixed"].startswith("ConfigError: ")
    assert "use styles of one adapter" in facts["mixed"]
