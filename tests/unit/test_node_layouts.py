"""Conversions between ComfyUI's layouts and the core's, and numbers written as text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stylemaster_core.data.images import clip_pixels
from tests.unit.node_modules import node_module


@pytest.fixture(scope="module")
def layouts():
    with node_module("layouts") as module:
        yield module


@pytest.fixture(scope="module")
def lists():
    with node_module("number_lists") as module:
        yield module


def latent(frames, height, width, padding=None):
    samples = torch.zeros(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    return {"samples": samples} | ({"stylemaster_padding": padding} if padding else {})


def test_every_level_survives_the_way_there_and_back(layouts):
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert (layouts.image_to_frames(layouts.frames_to_image(frames), "x") == frames).all()


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (torch.zeros(0, 4, 4, 3), "shape"),
        (torch.zeros(1, 4, 0, 3), "shape"),
        (torch.zeros(1, 4, 4, 1), "shape"),
        (torch.zeros(4, 4, 3), "shape"),
        (torch.full((1, 4, 4, 3), torch.nan), "NaN"),
    ],
)
def test_bad_images_are_refused(layouts, image, word):
    with pytest.raises(layouts.LayoutError, match=word):
        layouts.image_to_frames(image, "the picture")


def test_alpha_is_left_out_and_overflow_clipped(layouts):
    image = torch.tensor([[[[2.0, -1.0, 0.5, 0.3]]]])
    assert layouts.image_to_frames(image, "x").tolist() == [[[[255, 0, 128]]]]


def test_a_clip_view_normalises_back_to_itself(layouts):
    picture = np.random.RandomState(0).randint(0, 256, (30, 40, 3), np.uint8)
    pixels = clip_pixels(picture)[None]
    image = layouts.clip_view_to_image(pixels)
    # ComfyUI rounds to levels before it normalises.
    mean, std = (torch.tensor(v) for v in (layouts.CLIP_MEAN, layouts.CLIP_STD))
    again = ((image * 255).round() / 255 - mean) / std
    assert image.shape == (1, 224, 224, 3)
    torch.testing.assert_close(again.permute(0, 3, 1, 2), pixels, atol=2e-6, rtol=0)


def test_a_latent_is_padded_and_remembers(layouts):
    made = layouts.empty_latent(layouts.Padding(7, 50, 33))
    assert made["samples"].shape == (1, 16, 3, 8, 6)
    assert layouts.latent_video_size(made) == (9, 64, 48)
    assert tuple(layouts.latent_padding(made)) == (7, 50, 33)
    image = torch.rand(9, 64, 48, 3)
    assert torch.equal(layouts.crop_image(image, made), image[:7, :50, :33])


def test_cropping_says_what_is_wrong(layouts):
    image = torch.rand(9, 64, 48, 3)
    with pytest.raises(layouts.LayoutError, match="remembers no size"):
        layouts.crop_image(image, latent(9, 64, 48))
    with pytest.raises(layouts.LayoutError, match="9 frames came"):
        layouts.crop_image(image, latent(5, 64, 48, (5, 50, 33)))
    with pytest.raises(layouts.LayoutError, match="cannot cut"):
        layouts.crop_image(image[:, :40], latent(9, 64, 48, (7, 50, 33)))


def test_only_video_latents_are_taken(layouts):
    for samples in (torch.zeros(1, 4, 8, 8), torch.zeros(1, 48, 3, 8, 8)):
        with pytest.raises(layouts.LayoutError, match="Wan 2.1"):
            layouts.latent_video_size({"samples": samples})


def test_no_mask_and_no_range_is_everywhere(layouts):
    assert layouts.region_mask(None, 0, -1, None) is None
    assert layouts.region_mask(None, 0, -1, latent(9, 64, 48)) is None


def test_one_mask_serves_all_frames(layouts):
    mask = torch.rand(1, 6, 5)
    assert torch.equal(layouts.region_mask(mask, 0, -1, None), mask)
    assert torch.equal(layouts.region_mask(mask[0], 0, -1, latent(9, 64, 48)), mask)


def test_masks_of_frames_are_averaged_as_the_vae_groups_them(layouts):
    mask = torch.rand(7, 6, 5)
    made = layouts.region_mask(mask, 0, -1, latent(9, 64, 48, (7, 64, 48)))
    last = (mask[5] + 3 * mask[6]) / 4
    expected = torch.stack([mask[0], mask[1:5].mean(0), last])
    torch.testing.assert_close(made, expected)


def test_a_range_of_frames_becomes_a_mask(layouts):
    made = layouts.region_mask(None, 3, 5, latent(13, 64, 48))
    assert made.flatten().tolist() == [0, 0.5, 0.25, 0]
    mask = torch.full((1, 2, 2), 0.5)
    made = layouts.region_mask(mask, 0, 4, latent(9, 64, 48))
    assert made[:, 0, 0].tolist() == [0.5, 0.5, 0]
    assert made.shape == (3, 2, 2)


def test_a_range_to_the_end_includes_the_padding(layouts):
    made = layouts.region_mask(None, 2, -1, latent(9, 64, 48, (7, 64, 48)))
    assert made.flatten().tolist() == [0, 0.75, 1]


def test_masks_that_do_not_fit_are_refused(layouts):
    with pytest.raises(layouts.LayoutError, match="5 masks came for a video of 9 frames"):
        layouts.region_mask(torch.ones(5, 4, 4), 0, -1, latent(9, 64, 48))
    with pytest.raises(layouts.LayoutError, match="at least one pixel"):
        layouts.region_mask(torch.ones(0, 4, 4), 0, -1, None)
    with pytest.raises(layouts.ConfigError, match="link the LATENT"):
        layouts.region_mask(None, 1, 5, None)
    for first, last in ((0, 9), (5, 4), (9, -1), (-1, 3)):
        with pytest.raises(layouts.ConfigError, match="no part of a video of 9 frames"):
            layouts.region_mask(None, first, last, latent(9, 64, 48))


def test_thirds_of_the_blocks(lists):
    assert lists.block_scales("all", "nonsense", 6) is None
    assert lists.block_scales("early", "", 6) == [1, 1, 0, 0, 0, 0]
    assert lists.block_scales("middle", "", 6) == [0, 0, 1, 1, 0, 0]
    assert lists.block_scales("late", "", 6) == [0, 0, 0, 0, 1, 1]
    thirds = [lists.block_scales(third, "", 4) for third in ("early", "middle", "late")]
    assert [sum(column) for column in zip(*thirds, strict=True)] == [1, 1, 1, 1]


def test_listed_blocks(lists):
    assert lists.block_scales("list", "0-1:1.0, 3:0.5", 5) == [1, 1, 0, 0.5, 0]


@pytest.mark.parametrize(
    "text",
    ["", ",", "0-5", "0-5:x", "a:1", "3-1:1", "0-9:1", "0:-1", "0:nan", "1:1,0-2:1", "0-1-2:1"],
)
def test_bad_lists_of_blocks_are_refused(lists, text):
    with pytest.raises(lists.ConfigError):
        lists.block_scales("list", text, 6)


def test_an_unknown_choice_of_blocks_is_refused(lists):
    with pytest.raises(lists.ConfigError, match="some"):
        lists.block_scales("some", "", 6)


def test_schedules(lists):
    assert lists.guidance_schedule(" ", 7.5) == [7.5]
    assert lists.guidance_schedule("0:8, 0.5:4", 1) == [8, 4]
    assert lists.guidance_schedule("0:8, 0.25:4, 0.5:-1", 1) == [8, 4, -1, -1]
    assert lists.guidance_schedule("0:8,1/3:2", 1) == [8, 2, 2]


@pytest.mark.parametrize(
    "text", ["8", "0.5:4", "0:8, 0:4", "0:8, 1:4", "0:8, 0.5:4, 0.2:1", "0:8, x:1", "0:inf", "-1:2"]
)
def test_bad_schedules_are_refused(lists, text):
    with pytest.raises(lists.ConfigError):
        lists.guidance_schedule(text, 1)


def test_a_schedule_is_text_and_never_code(lists):
    with pytest.raises(lists.ConfigError):
        lists.guidance_schedule("0:__import__('os').getpid()", 1)
