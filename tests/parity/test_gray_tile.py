"""The gray tile against the release's numbers (golden 05): Pillow's arithmetic, so no tolerance."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stylemaster_core.data.gray_tile import gray_tile
from stylemaster_core.errors import ConfigError, LayoutError

GOLDEN = Path(__file__).parents[1] / "golden" / "stylemaster" / "05_gray_tile.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_gray_levels_are_equal(golden, index):
    tile = gray_tile(golden[f"in.frame{index}"].numpy()[None], 96, 128, factor=8)
    assert tile.shape == (3, 1, 96, 128)
    levels = tile.mul(0.5).add(0.5).mul(255).round().to(torch.uint8)
    for channel in levels[:, 0]:
        assert torch.equal(channel, golden[f"out.tile_u8_{index}"])


def test_control_video_is_equal(golden):
    frame = golden["in.frame0"].numpy()
    tile = gray_tile(np.stack([frame, frame[::-1]]), 96, 128)
    assert torch.equal(tile[:, :1], golden["out.control_video0"])
    assert not torch.equal(tile[:, 1], tile[:, 0])


def test_the_centre_is_cut_as_the_release_cuts_it():
    ramp = np.arange(133, dtype=np.uint8)[None, None, :, None]
    frames = np.broadcast_to(ramp, (1, 96, 133, 3)).copy()
    tile = gray_tile(frames, 96, 128, factor=1)
    # (133 - 128) / 2 = 2.5 goes to the even 2, not up to 3.
    assert torch.equal(tile[0, 0, 0].mul(0.5).add(0.5).mul(255).round(), torch.arange(2.0, 130))


def test_the_factor_decides_how_coarse_it_is(golden):
    frames = golden["in.frame2"].numpy()[None]
    fine, coarse = (gray_tile(frames, 96, 128, factor=factor) for factor in (1, 16))
    assert fine.diff(dim=-1).abs().mean() > 2 * coarse.diff(dim=-1).abs().mean()
    assert fine.abs().max() <= 1


def test_what_cannot_be_tiled_is_refused():
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(LayoutError, match="empty"):
        gray_tile(frames[:0], 16, 16)
    with pytest.raises(LayoutError, match="float64"):
        gray_tile(frames / 255, 16, 16)
    with pytest.raises(LayoutError, match="shape"):
        gray_tile(frames[..., :1], 16, 16)
    with pytest.raises(ConfigError, match="smaller than one tile"):
        gray_tile(frames, 7, 16)
    with pytest.raises(ConfigError, match="factor 0"):
        gray_tile(frames, 16, 16, factor=0)
