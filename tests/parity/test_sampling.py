"""Schedule, guidance and the whole sampling loop against the released pipeline."""

import pytest
import torch

from stylemaster_core import (
    combine_guidance,
    denoise,
    flow_match_sigmas,
    load_gray_tile_controlnet,
    load_style_projector,
    load_transformer,
)
from stylemaster_core.models.gray_tile_controlnet import copy_from_transformer
from stylemaster_core.sampling.schedules import add_noise, in_range

CASES = ["t2v", "v2v", "v2v_window", "cfg1", "style0", "img2img"]


@pytest.fixture(scope="module")
def models(golden):
    weights = golden("weights_dit_a").tensors
    zero_convs = golden("03_controlnet_a").group("weights.")
    style_weights = golden("weights_dit_a").group("style_model.")
    projector = load_style_projector(style_weights, num_heads=4)
    control = load_gray_tile_controlnet(copy_from_transformer(weights) | zero_convs)
    return load_transformer(weights), control, projector


def run(golden, models, name, **overrides):
    """Run a case of the released pipeline; final latents, and the latents after each step."""
    case = golden("04_guidance")
    info = case.meta["cases"][name]
    net, control, projector = models
    tokens = projector(
        case["in.last_hidden_state"], case["in.image_embeds_ps"], case["in.context_pos"]
    ).tokens
    sigmas = flow_match_sigmas(5, shift=5.0, denoise=info.get("denoise", 1.0))
    latents = case["in.noise"]
    if "denoise" in info:
        latents = add_noise(case["in.video_latents"], latents, sigmas[0])
    options = {
        "sigmas": sigmas,
        "text": case["in.context_pos"],
        "negative_text": case["in.context_neg"],
        "style": tokens,
        "text_scale": info["cfg_scale"],
        "style_scale": info["style_cfg_scale"],
    }
    if info.get("control"):
        options |= {
            "controlnet": control,
            "control_latents": case["in.control_latents"],
            "control_scale": info["scale"],
            "control_range": (info["start"], info["end"]),
        }
    steps = []
    final = denoise(
        net, latents, **(options | overrides), callback=lambda p: steps.append(p.latents)
    )
    return final, torch.stack([s[0] for s in steps])


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_whole_sampling(golden, models, name, batched):
    case = golden("04_guidance")
    final, steps = run(golden, models, name, batch_branches=batched)
    case.check(f"out.{name}.final_latents", final)
    if f"out.{name}.step_latents" in case.tensors:
        case.check(f"out.{name}.step_latents", steps)


@pytest.mark.parametrize("name", CASES)
def test_sigmas(golden, name):
    case = golden("04_guidance")
    denoise_strength = case.meta["cases"][name].get("denoise", 1.0)
    sigmas = flow_match_sigmas(5, shift=5.0, denoise=denoise_strength)
    torch.testing.assert_close(sigmas[:-1], case[f"out.{name}.sigmas"], atol=1e-6, rtol=1e-5)
    assert sigmas[-1] == 0


def test_schedule_of_50_steps(golden):
    case = golden("04_guidance")
    sigmas = flow_match_sigmas(50, shift=5.0)
    torch.testing.assert_close(sigmas[:-1], case["sched50.sigmas"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sigmas[:-1] * 1000, case["sched50.timesteps"], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", ["t2v", "v2v"])
def test_guided_velocity_of_branches(golden, name):
    case = golden("04_guidance")
    info = case.meta["cases"][name]
    branch = f"out.{name}.step0_branch."
    guided = combine_guidance(
        case[branch + "neg_zeros"],
        case[branch + "pos_zeros"],
        case[branch + "pos_style"],
        text_scale=info["cfg_scale"],
        style_scale=info["style_cfg_scale"],
    )
    case.check(f"out.{name}.step0_pred", guided)


def test_control_range_is_inclusive_as_in_the_release(golden):
    table = golden("04_guidance").meta["apply_table"]
    assert len(table) == 7
    for key, expected in table.items():
        numbers = dict(part.split("=") for part in key.split(","))
        steps, start, end = int(numbers["steps"]), float(numbers["start"]), float(numbers["end"])
        assert [i for i in range(steps) if in_range(i, steps, start, end)] == expected


def test_passes_per_step(golden, models):
    """Branches of weight 0 are not run, and the ControlNet runs only inside its range."""
    net, control, _ = models
    calls = []
    original_net, original_control = net.velocities, control.forward
    net.velocities = lambda *a, **k: (calls.append(len(a[2])), original_net(*a, **k))[1]
    control.forward = lambda *a, **k: (calls.append("control"), original_control(*a, **k))[1]
    try:
        for name, expected in {
            "t2v": [3] * 5,
            "cfg1": [1] * 5,
            "style0": [2] * 5,
            "v2v_window": [3, "control", 3, "control", 3, "control", 3, 3],
        }.items():
            calls.clear()
            run(golden, models, name)
            assert calls == expected, name
    finally:
        del net.velocities, control.forward
