"""The transformer with its style branch, and the ControlNet, against the released code."""

import pytest
import torch

from stylemaster_core import load_gray_tile_controlnet, load_transformer
from stylemaster_core.models.gray_tile_controlnet import copy_from_transformer

HEADS = {"a": None, "b": 3}  # a has heads of 128, the default


def transformer(golden, model):
    return load_transformer(golden(f"weights_dit_{model}").tensors, num_heads=HEADS[model])


def control_weights(golden, model, variant):
    weights = copy_from_transformer(golden(f"weights_dit_{model}").tensors)
    if variant == "scaled075":
        weights = {key: value * 0.75 for key, value in weights.items()}
    return weights | golden(f"03_controlnet_{model}").group("weights.")


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("model", ["a", "b"])
def test_velocity(golden, model, index):
    case = golden(f"02_dit_{model}")
    net = transformer(golden, model)
    tokens = case["in.style_feat"]
    arguments = (case["in.latents"], case[f"in.timestep.{index}"], case["in.context"])
    control = list(case.group("in.control_state.").values())
    out = f"out.{index}.velocity_"
    case.check(out + "style", net(*arguments, style=tokens))
    case.check(out + "no_style", net(*arguments))
    case.check(out + "zero_style", net(*arguments, style=torch.zeros_like(tokens)))
    case.check(out + "control", net(*arguments, style=tokens, control=control, control_scale=0.7))


def test_eps_of_norm_k_img(golden):
    """Tiny keys, where 1e-5 and 1e-6 differ."""
    case = golden("02_dit_b")
    weights = {
        key: value * 2**-8 if ".k_img." in key else value
        for key, value in golden("weights_dit_b").tensors.items()
    }
    net = load_transformer(weights, num_heads=3)
    velocity = net(
        case["in.latents"], case["in.timestep.0"], case["in.context"], style=case["in.style_feat"]
    )
    case.check("out.eps_trap.velocity", velocity)


def test_timesteps_may_differ_within_a_batch(golden):
    """The release mixes rows here; each row must equal its own run."""
    case, net = golden("02_dit_b"), transformer(golden, "b")
    latents, text, tokens = case["in.latents"], case["in.context"], case["in.style_feat"]
    timestep = torch.tensor([900.0, 100.0])
    together = net(latents, timestep, text, style=tokens)
    for i in range(2):
        row = slice(i, i + 1)
        alone = net(latents[row], timestep[row], text[row], style=tokens[row])
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["copied", "scaled075"])
@pytest.mark.parametrize("model", ["a", "b"])
def test_controlnet(golden, model, variant):
    case = golden(f"03_controlnet_{model}")
    net = load_gray_tile_controlnet(control_weights(golden, model, variant), num_heads=HEADS[model])
    checked = 0
    for index in (0, 1):
        states = net(case["in.control_latents"], case[f"in.timestep.{index}"], case["in.context"])
        for i, state in enumerate(states):
            key = f"out.{index}.{variant}.{i}"
            if key in case.tensors:
                case.check(key, state)
                checked += 1
        key = f"out.{index}.{variant}.velocity"
        if key in case.tensors:
            latents = golden(f"02_dit_{model}")["in.latents"]
            velocity = transformer(golden, model)(
                latents,
                case[f"in.timestep.{index}"],
                case["in.context"],
                style=golden(f"02_dit_{model}")["in.style_feat"],
                control=states,
            )
            case.check(key, velocity)
            checked += 1
    assert checked == (4 if model == "a" else 5)


def test_copies_do_not_share_memory(golden):
    source = golden("weights_dit_a").tensors
    copies = copy_from_transformer(source)
    pointers = {value.data_ptr() for value in source.values()}
    assert not any(value.data_ptr() in pointers for value in copies.values())
