"""The recipe's losses: of latents by what they mean in pixels, of the refiner by its seams."""

import cv2
import numpy as np
import pytest
import torch

from recipes.tiny import refiner
from recipes.tiny.limit import TimeOver
from recipes.tiny.pixel_loss import PixelLoss
from recipes.tiny.vae import ClipPool, fit_pca
from stylemaster_core.models.patch_vae import (
    PatchVAE,
    blocks_to_video,
    create_patch_vae,
    save_patch_vae,
)
from stylemaster_core.weights.files import read_state_dict


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 9, 9, 9, 3), dtype=np.uint8)
    smooth = [[cv2.resize(frame, (128, 128)) for frame in clip] for clip in coarse]
    return ClipPool({128: np.array(smooth)})


@pytest.fixture
def vae(pool):
    torch.manual_seed(0)
    vae = PatchVAE()
    vae.set_linear(*fit_pca(pool, 0, 2000))
    return vae


def test_channels_weigh_what_they_mean_in_pixels(vae):
    with torch.no_grad():
        vae.patch_decoder.linear.weight[:, 3] *= 10
    loss = PixelLoss(vae)
    assert loss.weights.mean() == pytest.approx(1, abs=1e-5)
    assert loss.weights[3] > 5 * loss.weights[2]

    def cost(channel):
        error = torch.zeros(1, 16, 1, 4, 4)
        error[:, channel] = 1
        return loss(error).item()

    assert cost(3) > 5 * cost(2)


def test_borders_are_those_of_what_is_decoded(vae):
    torch.manual_seed(1)
    loss, error = PixelLoss(vae), torch.randn(2, 16, 1, 4, 4)
    maps = error[:, :, 0]
    linear = vae.patch_decoder.linear
    video = blocks_to_video(torch.nn.functional.conv2d(maps, linear.weight), 2)
    across = video.diff(dim=-1)[..., 7::8].square().mean((1, 2, 3, 4))
    down = video.diff(dim=-2)[..., 7::8, :].square().mean((1, 2, 3, 4))
    plain = (error.square() * loss.weights[:, None, None, None]).flatten(1).mean(1)
    found = (loss(error) - plain).detach()
    wanted = across + down
    torch.testing.assert_close(found / found.sum(), wanted / wanted.sum(), atol=1e-4, rtol=1e-4)


def test_seam_ratios():
    steps = torch.ones(1, 3, 1, 8, 31)
    assert torch.allclose(refiner.seam_ratios(steps), torch.ones(2), atol=5e-3)
    steps[..., 15] = 3  # the border of two tokens is one of blocks, too
    assert torch.allclose(refiner.seam_ratios(steps), torch.tensor([5 / 3, 3.0]), atol=5e-3)


class Limit:
    """Time for so many steps."""

    def __init__(self, steps):
        self.steps = steps

    @property
    def left_s(self):
        self.steps -= 1
        return self.steps


def test_the_refiner_takes_the_seams_off(vae, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(refiner, "WIDTH", 16)
    monkeypatch.setattr(refiner, "SIZES", ((64, 1, 4),) * 4)
    path = save_patch_vae(tmp_path / "vae.safetensors", vae)

    def trained(name, **options):
        options = {"steps": 15, "batch": 1, "lr": 3e-3, "seed": 0} | options
        return refiner.train_refiner(tmp_path / name, path, pool, **options)

    weights = trained("a")
    with pytest.raises(TimeOver):
        trained("b", limit=Limit(6))
    again = trained("b")  # goes on where it stopped
    assert all(torch.equal(value, again[key]) for key, value in weights.items())
    target = tmp_path / "refined.safetensors"
    refiner.write_refined(target, weights, path)
    plain, refined = (create_patch_vae(read_state_dict(p).tensors, "it") for p in (path, target))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, refined.state_dict()[key]), key
    clips = pool.clips[128][:2, :1]
    before, after = (refiner.mean_seam(one, clips) for one in (plain, refined))
    assert after < 0.98 * before
    more = trained("c", start=target)
    kept = "patch_refiner.conv_in.bias"
    assert not torch.equal(more[kept], weights[kept]), "goes on from the refiner that is there"
