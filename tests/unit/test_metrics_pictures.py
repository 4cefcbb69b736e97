"""Colour, texture and content metrics and baselines, on clips and filters drawn by code."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from stylemaster_core.data.demo_scene import demo_clip
from stylemaster_core.errors import LayoutError
from stylemaster_core.metrics.baselines import lab_to_rgb, reinhard, rgb_to_lab
from stylemaster_core.metrics.colour import colour_distance, colour_signature
from stylemaster_core.metrics.content import fit_frames, luma, luma_correlation, ssim
from stylemaster_core.metrics.texture import gabor_distance, texture_filters, texture_signature

CLIP = demo_clip(3, 64, 96)
# Another scene for the references: the same filter on other content.
OTHER = demo_clip(9, 96, 96)[-1:, :, ::-1].copy()
WARM = np.array([[40, 10, 20], [150, 60, 30], [230, 160, 60], [250, 230, 190]])
COLD = np.array([[10, 20, 50], [20, 90, 140], [90, 180, 190], [220, 240, 250]])


def palette(colours):
    def apply(frames):
        levels = (luma(frames) * len(colours)).astype(int).clip(0, len(colours) - 1)
        return colours[levels].astype(np.uint8)

    return apply


def halftone(frames):
    y, x = np.mgrid[0 : frames.shape[1], 0 : frames.shape[2]]
    dots = (np.sin(2 * np.pi * x / 5) * np.sin(2 * np.pi * y / 5) + 1) / 2
    ink = (dots[None] > luma(frames))[..., None]
    return np.where(ink, frames // 4, frames).astype(np.uint8)


def blur(frames):
    radius = ImageFilter.GaussianBlur(3)
    return np.stack([np.asarray(Image.fromarray(f).filter(radius)) for f in frames])


def hatch(frames):
    y, x = np.mgrid[0 : frames.shape[1], 0 : frames.shape[2]]
    lines = np.sin(2 * np.pi * (x + y) / 8)[None, ..., None] > 0.3
    return np.where(lines, frames // 2, frames).astype(np.uint8)


TEXTURES = (halftone, blur, hatch)


@pytest.mark.parametrize("own, other", [(WARM, COLD), (COLD, WARM)])
def test_own_palette_is_nearer_in_colour(own, other):
    result = palette(own)(CLIP)
    own_distance, other_distance = (
        colour_distance(result, palette(p)(OTHER)) for p in (own, other)
    )
    assert own_distance < 0.6 * other_distance


@pytest.mark.parametrize("own", TEXTURES)
def test_own_texture_is_nearer_in_gabor_energies(own):
    result = own(CLIP)
    distances = {other: gabor_distance(result, other(OTHER)) for other in TEXTURES}
    assert min(distances, key=distances.__getitem__) is own


def test_colour_distance_is_the_shift_of_a_flat_colour():
    """Every quantile moves by the projection of the shift: known in closed form."""
    black, gray = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 51, np.uint8)
    directions = np.random.default_rng(0).standard_normal((48, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    expected = np.abs(directions.sum(1) * 0.2).mean()
    assert colour_distance(black, gray) == pytest.approx(expected, rel=1e-4)
    assert colour_signature(black).shape == (64, 48)


def test_colour_distance_knows_no_place_and_texture_no_colour():
    shuffled = np.random.default_rng(0).permutation(CLIP.reshape(-1, 3)).reshape(CLIP.shape)
    assert colour_distance(CLIP, shuffled) < 1e-6
    assert gabor_distance(CLIP, shuffled) > 1
    assert colour_distance(CLIP, 255 - CLIP) > 0.1
    assert gabor_distance(CLIP, 255 - CLIP) < 1e-3


def test_large_clips_are_sampled_without_a_visible_error():
    large = CLIP.repeat(6, axis=1).repeat(6, axis=2)
    assert colour_distance(CLIP, large) < 0.003


def test_texture_filters_are_as_defined():
    filters = texture_filters()
    assert filters.shape == (25, 1, 15, 15)
    assert filters.sum((1, 2, 3)).abs().max() < 1e-5
    np.testing.assert_allclose(filters.abs().sum((1, 2, 3)), 1, rtol=1e-5)
    y, x = np.mgrid[0:96, 0:96]
    for index, wavelength in ((0, 4), (18, 10)):  # waves along x answer best to filters along x
        wave = np.sin(2 * np.pi * x / wavelength) * 60 + 128
        energies = texture_signature(np.repeat(wave[None, ..., None], 3, -1).astype(np.uint8))
        assert energies[:24].argmax() == index
    assert texture_signature(np.full((1, 32, 32, 3), 90, np.uint8)).max() < np.log(1e-2)


def test_reinhard_wins_on_colour_and_not_on_texture():
    style = halftone(palette(WARM)(OTHER))
    moved = reinhard(CLIP, style[0])
    assert colour_distance(moved, style) < 0.6 * colour_distance(CLIP, style)
    assert gabor_distance(moved, style) > 0.8 * gabor_distance(CLIP, style)
    assert gabor_distance(halftone(palette(WARM)(CLIP)), style) < 0.6 * gabor_distance(moved, style)
    assert luma_correlation(moved, CLIP) > 0.95


def test_reinhard_moves_the_statistics_of_each_frame():
    style = np.random.default_rng(0).normal(128, 12, (32, 32, 3)).clip(0, 255).astype(np.uint8)
    wanted = rgb_to_lab(style)
    for frame in reinhard(CLIP, style):
        lab = rgb_to_lab(frame)
        np.testing.assert_allclose(lab.mean((0, 1)), wanted.mean((0, 1)), atol=0.5)
        np.testing.assert_allclose(lab.std((0, 1)), wanted.std((0, 1)), rtol=0.05)


def test_lab_has_published_values_and_an_inverse():
    known = {(255, 255, 255): (100, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20)}
    known |= {(0, 0, 255): (32.30, 79.19, -107.86), (0, 0, 0): (0, 0, 0)}
    for rgb, lab in known.items():
        np.testing.assert_allclose(rgb_to_lab(np.array(rgb, np.uint8)), lab, atol=0.02)
    pixels = np.random.default_rng(0).integers(0, 256, (500, 3), np.uint8)
    np.testing.assert_array_equal(lab_to_rgb(rgb_to_lab(pixels)), pixels)


def test_luma_correlation_ignores_inversion_and_fine_texture():
    assert luma_correlation(CLIP, CLIP) == pytest.approx(1)
    assert luma_correlation(255 - CLIP, CLIP) == pytest.approx(1, abs=1e-6)
    assert luma_correlation(halftone(CLIP), CLIP) > 0.9
    noise = np.random.default_rng(0).integers(0, 256, CLIP.shape, np.uint8)
    assert luma_correlation(noise, CLIP) < 0.15
    assert luma_correlation(np.full_like(CLIP, 7), CLIP) == 0


def test_luma_correlation_is_numpys_on_blocks():
    changed = hatch(CLIP)
    blocks = [luma(x).reshape(3, 16, 4, 24, 4).mean((2, 4)).reshape(3, -1) for x in (CLIP, changed)]
    expected = np.mean([abs(np.corrcoef(a, b)[0, 1]) for a, b in zip(*blocks, strict=True)])
    assert luma_correlation(changed, CLIP) == pytest.approx(expected, abs=1e-6)


def test_ssim_orders_and_has_its_fixed_points():
    assert ssim(CLIP, CLIP) == pytest.approx(1)
    assert ssim(255 - CLIP, CLIP) < 0.3
    slightly, much = (np.clip(CLIP + n, 0, 255).astype(np.uint8) for n in noises(4, 40))
    assert 1 > ssim(slightly, CLIP) > ssim(much, CLIP) > 0
    assert ssim(slightly, CLIP) == pytest.approx(ssim(CLIP, slightly))


def noises(*spreads):
    generator = np.random.default_rng(0)
    return [generator.normal(0, spread, CLIP.shape) for spread in spreads]


def test_ssim_of_flat_pictures_is_the_luminance_term():
    first, second = (np.full((1, 16, 16, 3), level, np.uint8) for level in (51, 102))
    expected = (2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4)
    assert ssim(first, second) == pytest.approx(expected, rel=1e-5)


def test_frames_are_fitted_by_covering():
    assert fit_frames(CLIP, 64, 96) is CLIP
    assert fit_frames(CLIP, 40, 30).shape == (3, 40, 30, 3)
    flat = np.full((1, 20, 50, 3), 9, np.uint8)
    assert (fit_frames(flat, 64, 64) == 9).all()  # no border is invented


@pytest.mark.parametrize("measure", [luma_correlation, ssim])
def test_clips_of_other_shapes_are_refused(measure):
    with pytest.raises(LayoutError, match="pixel by pixel"):
        measure(CLIP, CLIP[:2])
    with pytest.raises(LayoutError, match="too small"):
        measure(CLIP[:, :6, :6], CLIP[:, :6, :6])


def test_other_types_and_tiny_pictures_are_refused():
    with pytest.raises(LayoutError, match="uint8"):
        colour_distance(CLIP.astype(float), CLIP)
    with pytest.raises(LayoutError, match="16 x 16"):
        texture_signature(CLIP[:, :15])
