"""Long videos in overlapping windows."""

import pytest
import torch

from stylemaster_core import (
    ConfigError,
    StyleRegion,
    denoise,
    flow_match_sigmas,
    load_gray_tile_controlnet,
)
from stylemaster_core.models.gray_tile_controlnet import copy_from_transformer
from stylemaster_core.sampling.windows import (
    WindowBlend,
    WindowConfig,
    plan_windows,
    window_weights,
)

CASES = [
    (8, 3, 1),
    (9, 4, 2),
    (20, 5, 4),
    (7, 7, 3),
    (22, 21, 7),
    (50, 21, 7),
    (6, 5, 0),
    (3, 1, 0),
]


def blend(parts, windows, num_frames, overlap):
    shape = (*parts[0].shape[:2], num_frames, *parts[0].shape[3:])
    blended = WindowBlend(windows, num_frames, overlap, parts[0].new_empty(shape))
    assert torch.equal(blended(parts), blended(parts)), "nothing stays of an earlier step"
    return blended(parts)


@pytest.mark.parametrize(("num_frames", "length", "overlap"), CASES)
def test_windows_cover_every_frame(num_frames, length, overlap):
    windows = plan_windows(num_frames, WindowConfig(length, overlap))
    assert windows[0].start == 0 and windows[-1].stop == num_frames
    assert all(w.stop - w.start == min(length, num_frames) for w in windows)
    for left, right in zip(windows, windows[1:], strict=False):
        assert left.start < right.start and left.stop - right.start >= overlap


@pytest.mark.parametrize(("num_frames", "length", "overlap"), CASES)
def test_a_constant_stays_constant(num_frames, length, overlap):
    windows = plan_windows(num_frames, WindowConfig(length, overlap))
    parts = [torch.full((1, 2, w.stop - w.start, 2, 2), 3.0) for w in windows]
    blended = blend(parts, windows, num_frames, overlap)
    assert blended.shape == (1, 2, num_frames, 2, 2)
    torch.testing.assert_close(blended, torch.full_like(blended, 3.0))


def test_parts_of_one_video_give_it_back():
    video = torch.randn(2, 3, 17, 2, 2)
    windows = plan_windows(17, WindowConfig(6, 3))
    parts = [video[:, :, window] for window in windows]
    torch.testing.assert_close(blend(parts, windows, 17, 3), video)


def test_the_blend_runs_from_one_window_to_the_next():
    windows = plan_windows(8, WindowConfig(5, 2))
    assert windows == [slice(0, 5), slice(3, 8)]
    parts = [torch.full((1, 1, 5, 1, 1), float(i)) for i in range(2)]
    blended = blend(parts, windows, 8, 2).flatten().tolist()
    assert blended == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1])


def test_weights_ramp_at_inner_ends_only():
    assert window_weights(slice(0, 5), 8, 2).tolist() == pytest.approx([1, 1, 1, 2 / 3, 1 / 3])
    assert window_weights(slice(3, 8), 8, 2).tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])
    assert window_weights(slice(0, 8), 8, 2).tolist() == [1] * 8
    assert (window_weights(slice(2, 5), 8, 2) > 0).all()


@pytest.mark.parametrize(("length", "overlap"), [(0, 0), (5, 5), (5, 6), (5, -1)])
def test_windows_that_cannot_work(length, overlap):
    with pytest.raises(ConfigError, match="overlap"):
        WindowConfig(length, overlap)


def sample(net, inputs, style, windows, **control):
    return denoise(
        net,
        inputs.latents,
        sigmas=flow_match_sigmas(2, shift=5.0),
        text=inputs.text,
        negative_text=inputs.negative,
        style=style,
        text_scale=5.0,
        style_scale=3.0,
        windows=windows,
        **control,
    )


@pytest.fixture
def control(tiny_weights):
    weights = copy_from_transformer(tiny_weights(2, style=False))
    for key in weights:
        if key.startswith("zero_convs"):
            weights[key] = torch.randn_like(weights[key]) * 0.2
    return load_gray_tile_controlnet(weights, num_heads=2)


def test_one_window_is_no_window(tiny_transformer, tiny_inputs):
    net, inputs = tiny_transformer(2), tiny_inputs()
    plain = sample(net, inputs, inputs.tokens, None)
    assert torch.equal(sample(net, inputs, inputs.tokens, WindowConfig(3, 1)), plain)
    split = sample(net, inputs, inputs.tokens, WindowConfig(2, 1))
    assert (split - plain).norm() > 1e-3 * plain.norm()


def test_windows_without_overlap_are_videos_of_their_own(tiny_transformer, tiny_inputs, control):
    """Latents, control and per-frame masks are all cut at the same places."""
    net, inputs = tiny_transformer(2), tiny_inputs(frames=4)
    mask = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(5))
    extra = {"controlnet": control, "control_latents": inputs.control_latents}
    style = [StyleRegion(inputs.tokens, mask=mask)]
    together = sample(net, inputs, style, WindowConfig(2, 0), **extra)
    whole = inputs.latents, inputs.control_latents
    for frames in (slice(0, 2), slice(2, 4)):
        inputs.latents, extra["control_latents"] = (x[:, :, frames] for x in whole)
        alone = sample(net, inputs, [StyleRegion(inputs.tokens, mask=mask[frames])], None, **extra)
        torch.testing.assert_close(together[:, :, frames], alone, atol=1e-10, rtol=1e-10)


def test_overlapping_windows_blend_each_step(tiny_transformer, tiny_inputs):
    """One Euler step by hand: velocities of the windows, blended."""
    net, inputs = tiny_transformer(2), tiny_inputs(frames=5)
    config, windows = WindowConfig(3, 1), [slice(0, 3), slice(2, 5)]
    options = {
        "sigmas": torch.tensor([1.0, 0.5]),
        "text": inputs.text,
        "negative_text": None,
        "style": inputs.tokens,
        "text_scale": 1.0,
        "style_scale": 1.0,
    }
    assert plan_windows(5, config) == windows
    timestep = torch.tensor([1000.0])
    parts = [
        net(inputs.latents[:, :, w], timestep, inputs.text, style=inputs.tokens) for w in windows
    ]
    expected = inputs.latents - 0.5 * blend(parts, windows, 5, 1)
    sampled = denoise(net, inputs.latents, windows=config, **options)
    torch.testing.assert_close(sampled, expected, atol=1e-10, rtol=1e-10)
