import numpy as np
import pytest
import torch
from PIL import Image

from stylemaster_core.data.images import CLIP_MEAN, clip_pixels, read_image, write_image
from stylemaster_core.errors import ConfigError, LayoutError

RANDOM = np.random.default_rng(0)


def some_image(height, width):
    return RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_written_images_read_back(tmp_path):
    image = some_image(7, 5)
    write_image(tmp_path / "image.png", image)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), image)
    with pytest.raises(ConfigError, match="exists already"):
        write_image(tmp_path / "image.png", image)
    write_image(tmp_path / "image.png", image[:3], overwrite=True)
    assert read_image(tmp_path / "image.png").shape == (3, 5, 3)
    with pytest.raises(ConfigError, match="'.xyz'"):
        write_image(tmp_path / "image.xyz", image)
    with pytest.raises(LayoutError, match="float64"):
        write_image(tmp_path / "other.png", image / 255)
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


def test_a_picture_that_is_too_large_is_not_called_damaged(tmp_path, monkeypatch):
    write_image(tmp_path / "large.png", some_image(40, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(LayoutError, match="more pixels than are read.*at most 1,000") as caught:
        read_image(tmp_path / "large.png")
    assert "damaged" not in str(caught.value)


def test_orientation_of_cameras_is_honoured(tmp_path):
    image = some_image(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to view
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(image, -1))


def test_transparency_lies_on_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 128, 255)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png")[0, :, 0], [255, 127, 0])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=1)
    np.testing.assert_array_equal(
        read_image(tmp_path / "palette.png"), [[[10, 20, 30], [255, 255, 255]]]
    )


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "LA", "I;16"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(path)
    else:
        Image.new("L", (4, 4), 128).convert(mode).save(path)
    pixels = read_image(path)
    assert pixels.shape == (4, 4, 3)
    if mode != "1":
        assert abs(int(pixels[0, 0, 0]) - 128) <= 1


def test_files_that_are_no_images_are_refused(tmp_path):
    image = some_image(64, 64)
    write_image(tmp_path / "whole.png", image)
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    for name, words in [
        ("cut.png", "damaged"),
        ("empty.png", "0 bytes"),
        ("text.png", "not an image"),
        ("missing.png", "there is no image file"),
    ]:
        with pytest.raises(LayoutError, match=words):
            read_image(tmp_path / name)


def test_clip_pixels_keep_what_the_crop_says():
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, :50], image[:, 150:] = (255, 0, 0), (0, 0, 255)
    black = -torch.tensor(CLIP_MEAN) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    centre = clip_pixels(image)
    assert centre.shape == (3, 224, 224)
    assert centre.dtype == torch.float32
    # The middle half of the width: black all over, but for the blurred borders.
    assert torch.allclose(centre[:, :, 8:-8], black[:, None, None].expand(3, 224, 208))
    squashed = clip_pixels(image, crop="squash")
    assert squashed[0, 112, 5] > 1 > squashed[0, 112, 112]
    padded = clip_pixels(image, crop="pad", size=64)
    assert padded.shape == (3, 64, 64)
    assert torch.equal(padded[:, :16], torch.zeros(3, 16, 64))
    assert padded[0, 32, 2] > 1
    assert padded[2, 32, 61] > 1
    for crop in ("center", "pad", "squash"):
        assert clip_pixels(some_image(3, 100), crop=crop).shape == (3, 224, 224)
    assert clip_pixels(some_image(1, 500), crop="pad").shape == (3, 224, 224)
    with pytest.raises(LayoutError, match="too thin"):
        clip_pixels(some_image(1, 500))
    with pytest.raises(ConfigError, match="'fill'"):
        clip_pixels(image, crop="fill")
    with pytest.raises(LayoutError, match="shape"):
        clip_pixels(image[0])


@pytest.mark.parametrize("size", [(220, 240), (333, 500), (500, 333), (60, 61), (224, 224)])
def test_clip_pixels_equal_those_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()
    image = some_image(*size)
    reference = processor(Image.fromarray(image), return_tensors="pt").pixel_values[0]
    assert torch.allclose(clip_pixels(image), reference, atol=1e-6)
