"""Samplers integrate velocity fields whose solution is known."""

import pytest
import torch

from stylemaster_core import ConfigError, denoise, flow_match_sigmas
from stylemaster_core.sampling.samplers import create_sampler

NAMES = ["euler", "unipc", "dpm++"]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 2, generator=generator), torch.randn(1, 4, 2, generator=generator)


def integrate(name, velocity, start, num_steps, shift=5.0, denoise=1.0):
    sigmas = flow_match_sigmas(num_steps, shift=shift, denoise=denoise)
    sampler, x = create_sampler(name, sigmas), start
    for step in range(num_steps):
        x = sampler.step(velocity(x, float(sigmas[step])), step, x)
    return x


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 25])
@pytest.mark.parametrize("name", NAMES)
def test_a_straight_flow_is_exact(pair, name, num_steps, shift):
    clean, noise = pair
    end = integrate(name, lambda x, sigma: noise - clean, noise, num_steps, shift)
    torch.testing.assert_close(end, clean, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_straight_flow_from_the_middle(pair, name):
    clean, noise = pair
    sigma = flow_match_sigmas(6, shift=5.0, denoise=0.4)[0]
    start = (1 - sigma) * clean + sigma * noise
    end = integrate(name, lambda x, sigma: noise - clean, start, 6, denoise=0.4)
    torch.testing.assert_close(end, clean, atol=2e-6, rtol=0)


def gaussian(spread):
    """The exact velocity field of clean data drawn from N(0, spread^2)."""

    def velocity(x, sigma):
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        return x * (sigma - (1 - sigma) * spread**2) / variance

    return velocity


@pytest.mark.parametrize("name", NAMES)
def test_a_curved_flow_gets_better_with_steps(pair, name):
    _, noise = pair
    errors = [
        (integrate(name, gaussian(0.5), noise, n) - 0.5 * noise).abs().max().item()
        for n in (5, 10, 20, 40)
    ]
    assert all(later < 0.7 * earlier for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.07


def test_second_order_beats_euler(pair):
    _, noise = pair
    error = {
        name: (integrate(name, gaussian(0.5), noise, 40) - 0.5 * noise).abs().max().item()
        for name in NAMES
    }
    assert error["unipc"] < error["euler"] / 4 and error["dpm++"] < error["euler"] / 4


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_every_time(pair, name):
    _, noise = pair
    first = integrate(name, gaussian(0.3), noise, 7)
    torch.rand(3)
    assert torch.equal(integrate(name, gaussian(0.3), noise, 7), first)
    assert torch.isfinite(first).all()


@pytest.mark.parametrize("name", NAMES)
def test_in_the_sampling_loop(tiny_transformer, tiny_inputs, name):
    """Same seed, same latents; float64 latents stay float64."""
    net, inputs = tiny_transformer(2), tiny_inputs()
    seen = []

    def run(latents):
        return denoise(
            net,
            latents,
            sigmas=flow_match_sigmas(3, shift=5.0),
            text=inputs.text,
            negative_text=inputs.negative,
            style=inputs.tokens,
            text_scale=3.0,
            style_scale=2.0,
            sampler=name,
            callback=seen.append,
        )

    first = run(inputs.latents)
    assert torch.equal(run(inputs.latents), first) and torch.isfinite(first).all()
    assert not torch.allclose(run(tiny_inputs(seed=9).latents), first)
    assert first.dtype == torch.float64
    assert [p.step for p in seen[:3]] == [0, 1, 2] and seen[0].num_steps == 3
    assert seen[0].sigma == 1 and torch.equal(seen[2].latents, first)
    # The last step ends at sigma 0, so what is left is the guess of the clean latents.
    torch.testing.assert_close(seen[2].denoised, first, atol=1e-5, rtol=1e-5)


def test_unknown_name():
    with pytest.raises(ConfigError, match="'heun' is unknown"):
        create_sampler("heun", flow_match_sigmas(2, shift=5.0))


@pytest.mark.parametrize("name", NAMES)
def test_no_equation_holds_infinity(pair, monkeypatch, name):
    """What comes of it depends on the linear algebra library: NaN with PyTorch 2.4."""
    solve = torch.linalg.solve

    def finite(matrix, right):
        assert torch.isfinite(matrix).all() and torch.isfinite(right).all()
        return solve(matrix, right)

    monkeypatch.setattr(torch.linalg, "solve", finite)
    assert torch.isfinite(integrate(name, gaussian(0.3), pair[1], 7)).all()
