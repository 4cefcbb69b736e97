"""Guidance by two conditions, as a formula and as weights of branches."""

import pytest
import torch

from stylemaster_core import (
    ConfigError,
    LayoutError,
    StyleRegion,
    combine_guidance,
    denoise,
    flow_match_sigmas,
)
from stylemaster_core.sampling.guidance import GuidanceWeights
from tests.counting import Counting


def test_formula_by_hand():
    negative, text, styled = (torch.tensor([x]) for x in (1.0, 3.0, 10.0))
    out = combine_guidance(negative, text, styled, text_scale=8.0, style_scale=4.0)
    assert out.item() == 1 + 8 * 2 + 4 * 7


@pytest.mark.parametrize("scales", [(8.0, 4.0), (12.5, 6.0), (3.0, 3.0), (5.0, 0.0), (0.0, 2.0)])
def test_weights_are_the_formula(scales):
    velocities = torch.randn(3, 5, dtype=torch.float64)
    text_scale, style_scale = scales
    weights = GuidanceWeights.of(text_scale, style_scale)
    expected = combine_guidance(*velocities, text_scale=text_scale, style_scale=style_scale)
    summed = sum(w * v for w, v in zip(weights, velocities, strict=True))
    torch.testing.assert_close(summed, expected)
    assert sum(weights) == pytest.approx(1)


def test_weight_0_where_a_branch_is_not_needed():
    assert GuidanceWeights.of(4.0, 4.0).text == 0
    assert GuidanceWeights.of(8.0, 0.0).styled == 0
    assert GuidanceWeights.of(1.0, 4.0) == (0, 0, 1)


def options(inputs, **changes):
    return {
        "sigmas": flow_match_sigmas(2, shift=5.0),
        "text": inputs.text,
        "negative_text": inputs.negative,
        "style": inputs.tokens,
        "text_scale": 8.0,
        "style_scale": 4.0,
    } | changes


@pytest.mark.parametrize(
    ("changes", "branches"),
    [
        ({}, [3, 3]),
        ({"style_scale": 8.0}, [2, 2]),
        ({"style_scale": 0.0}, [2, 2]),
        ({"style": None}, [2, 2]),
        ({"text_scale": 1.0}, [1, 1]),
        ({"text_scale": 1.0, "negative_text": None}, [1, 1]),
        ({"text_scale": 1.0, "style": None}, [1, 1]),
    ],
)
def test_only_needed_branches_run(tiny_transformer, tiny_inputs, changes, branches):
    net, inputs = Counting(tiny_transformer(2)), tiny_inputs()
    denoise(net, inputs.latents, **options(inputs, **changes))
    assert net.branches == branches


def test_range_of_a_style_saves_its_branch(tiny_transformer, tiny_inputs):
    net, inputs = Counting(tiny_transformer(2)), tiny_inputs()
    region = StyleRegion(inputs.tokens, start=0.5)
    denoise(net, inputs.latents, **options(inputs, style=[region]))
    assert net.branches == [2, 3]


def one_step(net, inputs, **changes):
    """Velocity of a single Euler step from sigma 1 to 0."""
    changes = {"sigmas": flow_match_sigmas(1, shift=5.0)} | changes
    return inputs.latents - denoise(net, inputs.latents, **options(inputs, **changes))


@pytest.mark.parametrize("null_style", ["zero", "none"])
def test_what_no_style_means(tiny_transformer, tiny_inputs, null_style):
    """`zero` attends to zero tokens, `none` skips the branch; both by the formula."""
    net, inputs = tiny_transformer(2), tiny_inputs()
    timestep = torch.tensor([1000.0])
    nothing = torch.zeros_like(inputs.tokens) if null_style == "zero" else None
    expected = combine_guidance(
        net(inputs.latents, timestep, inputs.negative, style=nothing),
        net(inputs.latents, timestep, inputs.text, style=nothing),
        net(inputs.latents, timestep, inputs.text, style=inputs.tokens),
        text_scale=8.0,
        style_scale=4.0,
    )
    for batched in (True, False):
        velocity = one_step(net, inputs, null_style=null_style, batch_branches=batched)
        torch.testing.assert_close(velocity, expected, atol=1e-9, rtol=1e-9)


def test_the_two_kinds_of_no_style_differ(tiny_transformer, tiny_inputs):
    net, inputs = tiny_transformer(2), tiny_inputs()
    zero, none = (one_step(net, inputs, null_style=kind) for kind in ("zero", "none"))
    assert (zero - none).norm() > 1e-3 * zero.norm()


def test_prompts_of_different_lengths(tiny_transformer, tiny_inputs):
    net, inputs = tiny_transformer(2), tiny_inputs()
    inputs.negative = inputs.negative[:, :2]
    together = one_step(net, inputs, batch_branches=True)
    alone = one_step(net, inputs, batch_branches=False)
    torch.testing.assert_close(together, alone, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"negative_text": None}, ConfigError, "negative prompt"),
        ({"sigmas": torch.tensor([1.0])}, ConfigError, "sigmas"),
        ({"sigmas": torch.tensor([0.0, 1.0])}, ConfigError, "sigmas"),
        ({"sigmas": torch.tensor([1.0, torch.nan])}, ConfigError, "sigmas"),
        ({"control_range": (0.7, 0.1)}, ConfigError, "control range"),
        ({"control_latents": torch.ones(1, 16, 3, 4, 6)}, ConfigError, "only one"),
        ({"control_latents": torch.ones(1, 16, 2, 4, 6)}, LayoutError, "size of the video"),
        ({"text": torch.full((1, 6, 10), torch.nan)}, LayoutError, "the text hold NaN"),
        ({"text": torch.ones(3, 6, 10)}, LayoutError, "3 conditions for a batch of 1"),
        ({"negative_text": torch.ones(1, 6, 9)}, LayoutError, r"\[B, L, 10\]"),
        ({"style": torch.full((1, 5, 10), torch.nan)}, LayoutError, "style tokens hold NaN"),
        ({"style": torch.ones(1, 5, 9)}, LayoutError, "9 wide"),
        ({"sampler": "heun"}, ConfigError, "unknown"),
    ],
)
def test_errors(tiny_transformer, tiny_inputs, changes, error, words):
    net, inputs = tiny_transformer(1), tiny_inputs()
    with pytest.raises(error, match=words):
        denoise(net, inputs.latents, **options(inputs, **changes))


def test_latents_with_nan(tiny_transformer, tiny_inputs):
    inputs = tiny_inputs()
    inputs.latents[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(LayoutError, match="the latents hold NaN"):
        denoise(tiny_transformer(1), inputs.latents, **options(inputs))
