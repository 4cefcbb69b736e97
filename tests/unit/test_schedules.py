"""Noise levels, ranges of steps, and the training schedule made of them."""

import math

import pytest
import torch

from stylemaster_core import ConfigError, LayoutError, flow_match_sigmas
from stylemaster_core.sampling.schedules import add_noise, in_range
from stylemaster_core.training.losses import flow_match_loss, training_schedule


def test_release_schedule_by_hand():
    sigmas = flow_match_sigmas(50, shift=5.0)
    assert sigmas.shape == (51,) and sigmas.dtype == torch.float32
    even = [1 - i / 50 for i in range(51)]
    assert sigmas.tolist() == pytest.approx([5 * s / (1 + 4 * s) for s in even], abs=1e-6)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_shift_1_is_even_and_one_step_is_enough():
    assert flow_match_sigmas(4, shift=1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert flow_match_sigmas(1, shift=5.0).tolist() == [1, 0]


def test_denoise_starts_later():
    sigmas = flow_match_sigmas(4, shift=5.0, denoise=0.5)
    assert sigmas[0].item() == pytest.approx(2.5 / 3)
    assert sigmas[-1] == 0 and len(sigmas) == 5 and (sigmas.diff() < 0).all()


@pytest.mark.parametrize(
    ("num_steps", "options", "words"),
    [
        (0, {"shift": 5.0}, "number of steps"),
        (-1, {"shift": 5.0}, "number of steps"),
        (5, {"shift": 0.0}, "shift"),
        (5, {"shift": -2.0}, "shift"),
        (5, {"shift": math.nan}, "shift"),
        (5, {"shift": math.inf}, "shift"),
        (5, {"shift": 5.0, "denoise": 0.0}, "denoise"),
        (5, {"shift": 5.0, "denoise": 1.1}, "denoise"),
        (5, {"shift": 5.0, "denoise": math.nan}, "denoise"),
    ],
)
def test_numbers_that_cannot_work(num_steps, options, words):
    with pytest.raises(ConfigError, match=words):
        flow_match_sigmas(num_steps, **options)


def test_range_of_steps_includes_both_ends():
    def steps(start, end, num_steps=50):
        return [i for i in range(num_steps) if in_range(i, num_steps, start, end)]

    assert steps(0.0, 0.7) == list(range(36))  # the release's control
    assert steps(0.0, 1.0) == list(range(50))
    assert steps(0.5, 0.5) == [25] and steps(0.0, 0.0) == [0]
    assert steps(0.3, 0.6, 10) == [3, 4, 5, 6]
    assert steps(0.99, 1.0) == []


def test_noise_is_added_in_proportion():
    clean, noise = torch.full((2, 1, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1, 1), 10.0)
    assert add_noise(clean, noise, 0.25).flatten().tolist() == [4, 4]
    assert add_noise(clean, noise, torch.tensor(1.0)).flatten().tolist() == [10, 10]
    assert add_noise(clean, noise, torch.tensor([0.0, 0.5])).flatten().tolist() == [2, 6]


def test_training_weights_have_mean_1():
    schedule = training_schedule(shift=5.0)
    assert all(len(part) == 1000 for part in schedule)
    assert schedule.weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert schedule.weights.min() == 0 and schedule.timesteps[0] == 1000


def test_loss_by_hand():
    clean, noise = torch.zeros(2, 1, 1, 1, 2), torch.ones(2, 1, 1, 1, 2)
    velocity = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).reshape(2, 1, 1, 1, 2)
    assert flow_match_loss(velocity, clean, noise, torch.tensor([0.5, 7.0])).item() == 0.5
    exact = flow_match_loss(noise - clean, clean, noise, torch.ones(2))
    assert exact.item() == 0
    half = flow_match_loss(velocity.bfloat16(), clean, noise, torch.ones(2))
    assert half.dtype == torch.float32


def test_loss_shapes_must_agree():
    x = torch.zeros(2, 1, 1, 1, 2)
    for arguments in [
        (x[:1], x, x, torch.ones(2)),
        (x, x[..., :1], x, torch.ones(2)),
        (x, x, x[:1], torch.ones(2)),
        (x, x, x, torch.ones(1)),
    ]:
        with pytest.raises(LayoutError, match="do not belong together"):
            flow_match_loss(*arguments)
