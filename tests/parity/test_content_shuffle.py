"""Content shuffle and CLIP's pixels against the release's numbers (golden 07)."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from stylemaster_core.data import content_shuffle as module
from stylemaster_core.data.content_shuffle import content_shuffle
from stylemaster_core.data.images import CLIP_MEAN, CLIP_STD, clip_pixels
from stylemaster_core.errors import ConfigError, LayoutError

GOLDEN = Path(__file__).parents[1] / "golden" / "stylemaster" / "07_content_shuffle.safetensors"
SEED = 50716


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def levels_apart(result, reference):
    difference = np.abs(result.astype(int) - reference.astype(int))
    return difference.max(), difference.mean()


def clip_levels(image):
    """Undo CLIP's normalisation: uint8 [3, 224, 224]."""
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return np.rint((clip_pixels(image).numpy() * std + mean) * 255).astype(np.uint8)


def test_shuffled_image(golden):
    shuffled = content_shuffle(golden["in.image"], seed=SEED)
    assert shuffled.shape == (512, 576, 3)
    largest, mean = levels_apart(shuffled[::2], golden["out.shuffled_rows2"])
    assert largest <= 4
    assert mean <= 0.1
    largest, mean = levels_apart(clip_levels(shuffled), golden["out.clip_u8_ps"])
    assert largest <= 4
    assert mean <= 0.1


def test_resized_image_and_flow(golden):
    resized = module._resize_short_side(golden["in.image"])
    assert levels_apart(resized[::4, ::4], golden["mid.resized"])[0] <= 1
    generator = np.random.RandomState(SEED)
    x = module._smooth_noise(generator, 512, 576) * 575
    y = module._smooth_noise(generator, 512, 576) * 511
    flow = np.stack([x, y], axis=-1)[::8, ::8]
    assert np.abs(flow - golden["mid.flow"]).max() <= 1e-3


def test_clip_pixels_of_the_plain_image(golden):
    np.testing.assert_array_equal(clip_levels(golden["in.image"]), golden["out.clip_u8_ref"])


@pytest.mark.parametrize("size", [(700, 900), (512, 520), (1024, 1100), (100, 333), (600, 570)])
def test_resize_equals_opencv(size):
    cv2 = pytest.importorskip("cv2")
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 1.5)
    result = module._resize_short_side(image)
    rule = cv2.INTER_LANCZOS4 if min(size) < 512 else cv2.INTER_AREA
    reference = cv2.resize(image, result.shape[1::-1], interpolation=rule)
    assert levels_apart(result, reference)[0] <= 1


def test_resize_where_one_side_grows():
    image = np.full((512, 570, 3), 7, np.uint8)
    resized = module._resize_short_side(image)
    assert resized.shape == (512, 576, 3)
    assert (resized == 7).all()


def test_seeds_decide_and_nothing_else_does(golden):
    image = golden["in.image"]
    np.random.seed(1)
    first = content_shuffle(image, seed=3)
    np.random.seed(2)
    state = np.random.get_state()[1].copy()
    np.testing.assert_array_equal(first, content_shuffle(image, seed=3))
    np.testing.assert_array_equal(state, np.random.get_state()[1])
    assert levels_apart(first, content_shuffle(image, seed=4))[1] > 5


def test_what_cannot_be_shuffled_is_refused(golden):
    image = golden["in.image"]
    with pytest.raises(LayoutError, match="float64"):
        content_shuffle(image / 255, seed=0)
    with pytest.raises(LayoutError, match="shape"):
        content_shuffle(image[:0], seed=0)
    with pytest.raises(LayoutError, match="too thin"):
        content_shuffle(image[:2], seed=0)
    with pytest.raises(ConfigError, match="seed of the content shuffle is -1"):
        content_shuffle(image, seed=-1)
