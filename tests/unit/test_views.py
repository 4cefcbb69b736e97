"""Views rearrange pixels and lose none."""

from typing import get_args

import numpy as np
import pytest
import torch

from stylemaster_core.data.views import View, ViewName, _jigsaw_pieces
from stylemaster_core.errors import ConfigError, LayoutError

NAMES = get_args(ViewName)
ANY_SIZE = [name for name in NAMES if name != "jigsaw"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 7])
def test_apply_and_invert_are_exact(name, seed):
    view = View(name, seed)
    picture = torch.randn(2, 3, 24, 24)
    seen = view.apply(picture)
    assert torch.equal(view.invert(seen), picture)
    assert torch.equal(view.apply(view.invert(picture)), picture)
    assert torch.equal(seen.flatten(-2).sort()[0], picture.flatten(-2).sort()[0])
    assert torch.equal(seen, picture) == (name == "identity")


@pytest.mark.parametrize("name", ANY_SIZE)
def test_oblong_pictures(name):
    view, picture = View(name, 1), torch.arange(8 * 12).view(8, 12)
    seen = view.apply(picture)
    assert seen.shape == ((12, 8) if name in ("rotate90", "rotate270") else (8, 12))
    assert torch.equal(view.invert(seen), picture)


def test_turns_and_flips_are_what_they_are_called():
    picture = torch.arange(12).view(3, 4)
    for turns, name in enumerate(("identity", "rotate90", "rotate180", "rotate270")):
        assert torch.equal(View(name).apply(picture), torch.rot90(picture, turns))
    assert torch.equal(View("flip_horizontal").apply(picture), picture.flip(1))
    assert torch.equal(View("flip_vertical").apply(picture), picture.flip(0))


def test_patches_move_whole_cells():
    picture = torch.arange(64).view(8, 8)
    cells = View("patches", 3, grid=4).apply(picture).unfold(0, 2, 2).unfold(1, 2, 2)
    originals = picture.unfold(0, 2, 2).unfold(1, 2, 2).reshape(16, 4).tolist()
    assert sorted(cells.reshape(16, 4).tolist()) == originals


def test_pixel_grid_keeps_blocks_together_at_a_larger_size():
    """A second stage at four times the size moves the pixels of the first as blocks."""
    view, small = View("pixels", 5, grid=8), torch.randn(3, 8, 8)
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    seen = view.apply(small).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(view.apply(large), seen)


@pytest.mark.parametrize("grid", [2, 4, 6])
def test_jigsaw_pieces_interlock_and_look_alike_after_a_quarter_turn(grid):
    size = 12 * grid
    pieces = _jigsaw_pieces((size, size), grid, np.random.RandomState(0))
    places = np.arange(grid * grid).reshape(grid, grid)
    plain = places.repeat(12, 0).repeat(12, 1)
    assert 0.01 < (pieces != plain).mean() < 0.2  # knobs
    turned = np.rot90(places).flatten()
    # The piece at each place of the turned puzzle has the outline of the piece that was there.
    assert np.array_equal(turned[pieces], np.rot90(pieces))


def test_jigsaw_moves_pieces_whole():
    view, size = View("jigsaw", 2), 48
    pieces = _jigsaw_pieces((size, size), 4, np.random.RandomState(2))
    seen = view.apply(torch.from_numpy(pieces)).numpy()
    for place in range(16):
        assert len(np.unique(seen[pieces == place])) == 1
    assert sorted(np.unique(seen)) == list(range(16))


def test_seeds_and_images():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    first, again = (View("patches", 4).apply_image(image) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, View("patches", 5).apply_image(image))
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    seen = View("patches", 4).apply(tensor).permute(1, 2, 0)
    assert np.array_equal(first, seen.numpy())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: View("sideways"), "sideways"),
        (lambda: View("patches", -1), "seed"),
        (lambda: View("patches", grid=1), "2 or more"),
        (lambda: View("jigsaw", grid=3), "even"),
    ],
)
def test_views_that_cannot_be(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (View("patches"), (3, 10, 8)),
        (View("jigsaw"), (3, 8, 16)),
        (View("jigsaw"), (3, 10, 10)),
        (View("pixels"), (4,)),
        (View("rotate90"), (3, 0, 4)),
    ],
)
def test_pictures_that_cannot_be_cut(view, shape):
    with pytest.raises(LayoutError):
        view.apply(torch.zeros(shape))
