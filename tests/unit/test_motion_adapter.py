"""The motion adapter: W + scale * B A, without touching W."""

import pytest
import torch

from stylemaster_core import LayoutError, WeightsError, load_motion_adapter, load_transformer
from stylemaster_core.models.motion_adapter import (
    MotionAdapter,
    attached_motion,
    motion_adapter_state_dict,
)

BLOCKS, WIDTH, RANK = 3, 24, 2
CLOSE = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture
def adapter():
    adapter = MotionAdapter(BLOCKS, WIDTH, RANK).double()
    generator = torch.Generator().manual_seed(4)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return adapter.requires_grad_(False)


@pytest.fixture
def run(tiny_inputs):
    inputs = tiny_inputs()
    return lambda net: net(inputs.latents, inputs.timestep, inputs.text, style=inputs.tokens)


def merged(weights, adapter, scale):
    """The base weights with the adapter added by hand."""
    lora = adapter.state_dict()
    out = dict(weights)
    for i in range(BLOCKS):
        for p in "qkvo":
            name = f"blocks.{i}.self_attn.{p}"
            delta = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
            out[f"{name}.weight"] = out[f"{name}.weight"] + scale * delta
    return out


@pytest.mark.parametrize("scale", [1.0, -0.3, 0.5, -2.0])
def test_equals_merged_weights(tiny_transformer, tiny_weights, adapter, run, scale):
    net = tiny_transformer(BLOCKS)
    by_hand = load_transformer(merged(tiny_weights(BLOCKS), adapter, scale), num_heads=2)
    base = run(net)
    adapter.scale = scale
    with adapter.attach(net):
        torch.testing.assert_close(run(net), run(by_hand), **CLOSE)
        assert (run(net) - base).norm() > 1e-3 * base.norm()


def test_the_optimised_path_has_it_too(tiny_transformer, tiny_inputs, adapter):
    net, inputs = tiny_transformer(BLOCKS), tiny_inputs()
    text = net.embed_text(inputs.text, 1)
    with adapter.attach(net):
        together = net.velocities(
            inputs.latents, inputs.timestep, [net.prepare_branch(text, None, styled=False)] * 2
        )
        plain = net(inputs.latents, inputs.timestep, inputs.text)
    for velocity in together:
        torch.testing.assert_close(velocity, plain, **CLOSE)


def test_scale_0_is_the_base_model(tiny_transformer, adapter, run):
    net = tiny_transformer(BLOCKS)
    base = run(net)
    adapter.scale = 0.0
    with adapter.attach(net):
        assert torch.equal(run(net), base)
    net.motion_adapter = adapter
    with attached_motion(net, 0.0):
        assert torch.equal(run(net), base)


def test_detaching_restores_the_base_model(tiny_transformer, adapter, run):
    net = tiny_transformer(BLOCKS)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    base = run(net)
    attached = adapter.attach(net)
    assert not torch.equal(run(net), base)
    attached.detach()
    attached.detach()  # twice does no harm
    assert torch.equal(run(net), base)
    after = net.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_keys_of_the_transformer_stay_while_attached(tiny_transformer, adapter):
    net = tiny_transformer(BLOCKS)
    keys = set(net.state_dict())
    with adapter.attach(net):
        assert set(net.state_dict()) == keys


def test_detached_even_after_an_error(tiny_transformer, adapter, run):
    net = tiny_transformer(BLOCKS)
    net.motion_adapter = adapter
    base = run(net)
    with pytest.raises(ZeroDivisionError), attached_motion(net, -0.3):
        raise ZeroDivisionError
    assert torch.equal(run(net), base)


def test_attached_motion(tiny_transformer, adapter, run):
    net = tiny_transformer(BLOCKS)
    base = run(net)
    with attached_motion(net, -0.3):  # it has none
        assert torch.equal(run(net), base)
    adapter.scale = -0.3
    with adapter.attach(net):
        expected = run(net)
    net.motion_adapter = adapter
    adapter.scale = 1.0
    with attached_motion(net, -0.3):
        assert torch.equal(run(net), expected)
    assert torch.equal(run(net), base)


def test_scale_may_change_while_attached(tiny_transformer, adapter, run):
    net = tiny_transformer(BLOCKS)
    with adapter.attach(net):
        full = run(net)
        adapter.scale = -0.5
        assert adapter.scale == -0.5 and not torch.allclose(run(net), full)
        adapter.scale = 1.0
        assert torch.equal(run(net), full)


def test_training_starts_from_the_base_model(tiny_transformer, adapter, run):
    net = tiny_transformer(BLOCKS)
    adapter.reset_for_training(torch.Generator().manual_seed(0))
    with adapter.attach(net):
        torch.testing.assert_close(run(net), run(tiny_transformer(BLOCKS)), **CLOSE)
    weights = adapter.state_dict()
    assert all(value.any() == ("lora_A" in key) for key, value in weights.items())


def test_training_moves_everything(tiny_transformer, adapter, run):
    net = tiny_transformer(BLOCKS)
    adapter.reset_for_training(torch.Generator().manual_seed(0))
    adapter.requires_grad_(True)
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    with adapter.attach(net):
        for _ in range(3):
            optimizer.zero_grad()
            run(net).square().mean().backward()
            optimizer.step()
    still = [k for k, v in adapter.state_dict().items() if torch.equal(v, before[k])]
    assert not still
    assert all(p.grad is None for p in net.parameters())


def comfy_names(weights):
    return {
        k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in weights.items()
    }


NAMINGS = {
    "saved": lambda w: {f"diffusion_model.{k}": v for k, v in w.items()},
    "bare": dict,
    "peft": lambda w: {f"base_model.model.{k}": v for k, v in w.items()},
    "comfy": lambda w: {f"diffusion_model.{k}": v for k, v in comfy_names(w).items()},
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_namings(adapter, naming):
    weights = adapter.state_dict()
    loaded = load_motion_adapter(NAMINGS[naming](weights))
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
    assert loaded.scale == 1 and not any(p.requires_grad for p in loaded.parameters())


def test_saved_names_are_those_of_comfyui(adapter):
    saved = motion_adapter_state_dict(adapter)
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in saved
    assert len(saved) == BLOCKS * 4 * 2
    loaded = load_motion_adapter(saved).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in adapter.state_dict().items())


@pytest.mark.parametrize("alpha", [RANK, 1.0, 8.0])
def test_alpha_is_folded_in(adapter, alpha):
    weights = NAMINGS["comfy"](adapter.state_dict())
    for i in range(BLOCKS):
        for p in "qkvo":
            weights[f"diffusion_model.blocks.{i}.self_attn.{p}.alpha"] = torch.tensor(float(alpha))
    loaded = load_motion_adapter(weights).state_dict()
    for key, value in adapter.state_dict().items():
        factor = alpha / RANK if "lora_B" in key else 1
        torch.testing.assert_close(loaded[key], value * factor)


def test_wrong_host(tiny_transformer, adapter):
    with pytest.raises(WeightsError, match="3 blocks of width 24, the transformer has 2"):
        adapter.attach(tiny_transformer(2))
    with pytest.raises(WeightsError, match="of width 16"):
        MotionAdapter(BLOCKS, 16, RANK).attach(tiny_transformer(BLOCKS))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda w: w.pop("blocks.0.self_attn.q.lora_A.weight"), WeightsError, "no motion adapter"),
        (lambda w: w.pop("blocks.1.self_attn.o.lora_B.weight"), WeightsError, "self_attn.o.lora_B"),
        (
            lambda w: w.update({"blocks.0.cross_attn.q.lora_A.weight": torch.ones(2, 24)}),
            WeightsError,
            "1 unexpected: blocks.0.cross_attn",
        ),
        (
            lambda w: w.update({"blocks.2.self_attn.v.lora_A.weight": torch.ones(5, 24)}),
            WeightsError,
            r"self_attn.v.lora_A.weight \(5, 24\) instead of \(2, 24\)",
        ),
        (
            lambda w: w["blocks.2.self_attn.v.lora_A.weight"].fill_(torch.nan),
            LayoutError,
            "NaN",
        ),
    ],
)
def test_wrong_files(adapter, change, error, words):
    weights = dict(adapter.state_dict())
    change(weights)
    with pytest.raises(error, match=words):
        load_motion_adapter(weights)
