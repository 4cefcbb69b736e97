"""The golden checks can fail: each plausible mistake is made on purpose and must be seen."""

import pytest
import torch
from torch import nn

import stylemaster_core.models.decoupled_attention as decoupled_attention
import stylemaster_core.sampling.denoise as denoise_module
from stylemaster_core import (
    denoise,
    flow_match_sigmas,
    load_gray_tile_controlnet,
    load_style_projector,
    load_transformer,
)
from stylemaster_core.models.gray_tile_controlnet import copy_from_transformer


def style_velocity(golden, net, **changes):
    case = golden("02_dit_b")
    arguments = {"style": case["in.style_feat"]} | changes
    return net(case["in.latents"], case["in.timestep.0"], case["in.context"], **arguments)


@pytest.mark.parametrize("eps, holds", [(1e-5, True), (1e-6, False)])
def test_eps_of_norm_k_img(golden, monkeypatch, eps, holds):
    monkeypatch.setattr(decoupled_attention, "NORM_K_IMG_EPS", eps)
    weights = {
        key: value * 2**-8 if ".k_img." in key else value
        for key, value in golden("weights_dit_b").tensors.items()
    }
    velocity = style_velocity(golden, load_transformer(weights, num_heads=3))
    assert (golden("02_dit_b").excess("out.eps_trap.velocity", velocity) <= 0) == holds


@pytest.mark.parametrize("selection, holds", [("release", True), ("paper", False)])
def test_most_and_least_similar_swapped(golden, selection, holds):
    case = golden("01_style_small")
    result = load_style_projector(case.group("weights."))(
        case["in.last_hidden_state"],
        case["in.image_embeds_ps"],
        case["in.prompt_embeds"],
        selection=selection,
    )
    assert torch.equal(result.kept, case["out.kept_indices"]) == holds
    assert (case.excess("out.style_tokens", result.tokens) <= 0) == holds


def test_zero_style_and_none_swapped(golden):
    case, net = golden("02_dit_b"), load_transformer(golden("weights_dit_b").tensors, num_heads=3)
    zeros = torch.zeros_like(case["in.style_feat"])
    assert case.excess("out.0.velocity_zero_style", style_velocity(golden, net, style=None)) > 0
    assert case.excess("out.0.velocity_no_style", style_velocity(golden, net, style=zeros)) > 0


@pytest.mark.parametrize("module, to, holds", [("style", "none", True), ("style", "tanh", False)])
def test_gelu_of_the_query_transformer(golden, module, to, holds):
    case = golden("01_style_small")
    projector = load_style_projector(case.group("weights."))
    for layer in projector.modules():
        if isinstance(layer, nn.GELU):
            layer.approximate = to
    result = projector(
        case["in.last_hidden_state"], case["in.image_embeds_ps"], case["in.prompt_embeds"]
    )
    assert (case.excess("out.style_tokens", result.tokens) <= 0) == holds


@pytest.mark.parametrize("where", ["ffn", "text"])
@pytest.mark.parametrize("approximate, holds", [("tanh", True), ("none", False)])
def test_gelu_of_the_transformer(golden, where, approximate, holds):
    net = load_transformer(golden("weights_dit_b").tensors, num_heads=3)
    if where == "ffn":
        for block in net.blocks:
            block.ffn.net[0].approximate = approximate
    else:
        net.condition_embedder.text_embedder.act_1 = nn.GELU(approximate=approximate)
    velocity = style_velocity(golden, net)
    assert (golden("02_dit_b").excess("out.0.velocity_style", velocity) <= 0) == holds


def windowed_sampling(golden, **changes):
    case, weights = golden("04_guidance"), golden("weights_dit_a")
    info = case.meta["cases"]["v2v_window"]
    zero_convs = golden("03_controlnet_a").group("weights.")
    control = load_gray_tile_controlnet(copy_from_transformer(weights.tensors) | zero_convs)
    options = {
        "sigmas": flow_match_sigmas(5, shift=5.0),
        "text": case["in.context_pos"],
        "negative_text": case["in.context_neg"],
        "style": case["out.style_feat"],
        "text_scale": info["cfg_scale"],
        "style_scale": info["style_cfg_scale"],
        "controlnet": control,
        "control_latents": case["in.control_latents"],
        "control_scale": info["scale"],
        "control_range": (info["start"], info["end"]),
    }
    final = denoise(load_transformer(weights.tensors), case["in.noise"], **(options | changes))
    return case.excess("out.v2v_window.final_latents", final)


def test_window_end_exclusive(golden, monkeypatch):
    assert windowed_sampling(golden) <= 0
    monkeypatch.setattr(denoise_module, "in_range", lambda i, n, start, end: start <= i / n < end)
    assert windowed_sampling(golden) > 0


def test_negative_prompt_in_the_control(golden, monkeypatch):
    from stylemaster_core.models.gray_tile_controlnet import GrayTileControlNet

    case = golden("04_guidance")
    original = GrayTileControlNet.prepare_text
    monkeypatch.setattr(
        GrayTileControlNet,
        "prepare_text",
        lambda self, text, padding: original(self, case["in.context_neg"]),
    )
    assert windowed_sampling(golden) > 0


def test_scales_of_guidance_swapped(golden):
    info = golden("04_guidance").meta["cases"]["v2v_window"]
    swapped = {"text_scale": info["style_cfg_scale"], "style_scale": info["cfg_scale"]}
    assert windowed_sampling(golden, **swapped) > 0
    assert windowed_sampling(golden, null_style="none") > 0
