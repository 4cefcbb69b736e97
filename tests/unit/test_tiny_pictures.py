"""What the shipped small model makes of style pictures that are not paintings, by numbers."""

import numpy as np
import pytest
from PIL import Image

from stylemaster_core.data.demo_pictures import painted_styles, photograph_clip
from stylemaster_core.data.images import read_image
from stylemaster_core.pipelines.encode_style import encode_style
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.stylize import StylizeConfig, stylize
from stylemaster_core.pipelines.tiny import tiny_files, tiny_settings
from tests.standin_tiny import is_shipped

pytestmark = pytest.mark.skipif(not is_shipped(), reason="the trained weights are not there")


@pytest.fixture(scope="module")
def models():
    return Models(tiny_files(), device="cpu", keep_loaded=True)


@pytest.fixture(scope="module")
def restyled(models):
    content = photograph_clip(1, 128, 128)
    settings = tiny_settings(content) | {"num_steps": 6}
    config = StylizeConfig("video-to-video", **settings)

    def run(picture):
        style = encode_style(models, picture, "").style
        return stylize(models, style, config, frames=content).frames[0].astype(float)

    return run


def chroma(frame):
    return np.ptp(frame, -1).mean()


def test_a_gray_style_makes_a_gray_picture(restyled):
    coloured = painted_styles(128)["impasto"]
    luma = (coloured @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
    gray = restyled(np.repeat(luma[..., None], 3, -1))
    assert chroma(gray) < 18 and chroma(gray) < 0.6 * chroma(restyled(coloured))


@pytest.mark.parametrize("colour", [(190, 60, 40), (40, 90, 170), (30, 120, 60)])
def test_a_style_of_one_colour_makes_that_colour(restyled, colour):
    frame = restyled(np.full((128, 128, 3), colour, np.uint8))
    # Pulled towards it from a photograph whose means are near (130, 110, 100).
    assert abs(frame.mean((0, 1)) - colour).max() < 40


def test_hidden_colours_of_a_transparent_style_do_not_show(models, tmp_path):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:32, :, :3], pixels[:32, :, 3] = (200, 40, 40), 255
    pixels[32:, :, 1] = 255  # green, and wholly transparent
    Image.fromarray(pixels).save(tmp_path / "hidden.png")
    pixels[32:] = 255
    Image.fromarray(pixels[..., :3]).save(tmp_path / "white.png")
    both = [
        encode_style(models, read_image(tmp_path / f"{n}.png"), "") for n in ("hidden", "white")
    ]
    np.testing.assert_array_equal(*[encoded.style.tokens.numpy() for encoded in both])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("size", [(1, 1), (900, 20), (33, 1200)])
def test_any_mode_and_shape_gives_finite_tokens(models, tmp_path, mode, size):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (*size, 3), np.uint8)
    if mode == "I;16":
        picture = Image.fromarray((values[..., 0].astype(np.uint16)) * 257)
    elif mode == "F":
        picture = Image.fromarray(values[..., 0].astype(np.float32))
    else:
        picture = Image.fromarray(values).convert(mode)
    path = tmp_path / f"style.{'tiff' if mode in ('CMYK', 'F') else 'png'}"
    picture.save(path)
    tokens = encode_style(models, read_image(path), "").style.tokens
    assert tokens.isfinite().all() and tokens.abs().max() > 0
