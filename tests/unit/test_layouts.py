import numpy as np
import pytest
import torch

from stylemaster_core.errors import ConfigError, LayoutError
from stylemaster_core.layouts import (
    Padding,
    fit_area,
    fit_size,
    frames_to_video,
    latent_shape,
    pad_video,
    padded_num_frames,
    video_to_frames,
)

RANDOM = np.random.default_rng(0)


def some_frames(*shape):
    return RANDOM.integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((480, 832), (480, 832)),
        ((1080, 1920), (480, 848)),
        ((1920, 1080), (848, 480)),
        ((100, 100), (624, 624)),
        ((5, 5000), (16, 19984)),
    ],
)
def test_a_size_of_a_shape_keeps_the_area(shape, expected):
    assert fit_area(*shape, 480 * 832) == expected
    with pytest.raises(ConfigError, match="all must be at least 1"):
        fit_area(*shape, 0)


def test_frames_and_video_convert_without_loss():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    frames[..., 1] = 255 - frames[..., 0]
    video = frames_to_video(frames)
    assert video.shape == (1, 3, 1, 16, 16)
    assert video.dtype == torch.float32
    assert video[0, 0, 0, 0, 0] == -1
    assert video[0, 1, 0, 0, 0] == 1
    np.testing.assert_array_equal(video_to_frames(video), frames)
    assert video_to_frames(video * 3).min() == 0


def test_conversion_refuses_other_layouts():
    with pytest.raises(LayoutError, match="float64"):
        frames_to_video(np.zeros((1, 4, 4, 3)))
    with pytest.raises(LayoutError, match=r"\[4, 4, 3\]"):
        frames_to_video(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(LayoutError, match="empty"):
        frames_to_video(np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(LayoutError, match=r"\[2, 3, 1, 4, 4\]"):
        video_to_frames(torch.zeros(2, 3, 1, 4, 4))
    with pytest.raises(LayoutError, match="NaN"):
        video_to_frames(torch.full((1, 3, 1, 4, 4), torch.nan))


def test_latent_shape_of_the_release():
    assert latent_shape(81, 480, 832) == (21, 60, 104)
    assert latent_shape(1, 8, 8) == (1, 1, 1)
    with pytest.raises(LayoutError, match="use 81"):
        latent_shape(80, 480, 832)
    with pytest.raises(LayoutError, match="multiples of 8"):
        latent_shape(81, 481, 832)


def test_sizes_are_rounded_up():
    assert [padded_num_frames(n) for n in (1, 2, 5, 6, 80, 81)] == [1, 5, 5, 9, 81, 81]
    assert fit_size(480, 833) == (480, 848)
    assert fit_size(5, 9, multiple=8) == (8, 16)
    with pytest.raises(ConfigError, match="at least 1"):
        fit_size(0, 16)


@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 32, 16), (6, 17, 15), (2, 1, 1), (8, 31, 48)])
def test_padding_is_undone_exactly(shape):
    frames = some_frames(*shape)
    padded, padding = pad_video(frames)
    latent_shape(*padded.shape[:3])
    assert padded.shape[1] % 16 == padded.shape[2] % 16 == 0
    np.testing.assert_array_equal(padding.crop(padded), frames)
    np.testing.assert_array_equal(
        padded[shape[0] :, :1, :1],
        np.broadcast_to(frames[-1:, :1, :1], (len(padded) - shape[0], 1, 1, 3)),
    )
    np.testing.assert_array_equal(
        padded[0, 0, shape[2] :], np.broadcast_to(frames[0, 0, -1], (padded.shape[2] - shape[2], 3))
    )


def test_padding_copies_nothing_where_nothing_is_missing():
    frames = some_frames(5, 16, 32)
    assert pad_video(frames)[0] is frames


def test_crop_refuses_what_is_too_small():
    with pytest.raises(LayoutError, match="cannot cut"):
        Padding(5, 16, 16).crop(some_frames(4, 16, 16))
    tensor = torch.zeros(9, 32, 32, 3)
    assert Padding(5, 16, 16).crop(tensor).shape == (5, 16, 16, 3)
