"""The recipe's losses: of latents by what they mean in pixels and look like; of the refiner."""

import cv2
import numpy as np
import pytest
import torch

from recipes.tiny import refiner
from recipes.tiny.limit import TimeOver
from recipes.tiny.picture_loss import FeatureLoss, PictureLoss, TextureLoss
from recipes.tiny.pixel_loss import COLOUR_FACTOR, PLANES, PixelLoss
from recipes.tiny.vae import ClipPool, fit_pca
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.patch_vae import (
    PatchVAE,
    blocks_to_video,
    create_patch_vae,
    save_patch_vae,
)
from stylemaster_core.pipelines.tiny import FOLDER
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
    def weigh():
        loss, error = PixelLoss(vae), torch.zeros(2, 16, 1, 4, 4)
        assert loss.weights.mean() == pytest.approx(1, abs=1e-5)
        error[0, 3] = error[1, 2] = 1
        costs = loss(error)
        return (loss.weights[3] / loss.weights[2]).item(), (costs[0] / costs[1]).item()

    before = weigh()
    with torch.no_grad():
        vae.patch_decoder.linear.weight[:, 3] *= 10
    for now, then in zip(weigh(), before, strict=True):
        assert now > 5 * then


def test_colours_weigh_more_than_light(vae):
    gray, blue_for_red = torch.tensor([1.0, 1, 1]), torch.tensor([1.0, 0, -1])
    with torch.no_grad():
        for channel, colour in enumerate((gray, blue_for_red)):
            direction = (colour / colour.norm()).repeat_interleave(64).repeat(4)
            vae.patch_decoder.linear.weight[:, channel] = direction[:, None, None]
    weights = PixelLoss(vae).weights
    assert 1.8 < weights[1] / weights[0] < 2.5


def test_borders_are_those_of_what_is_decoded(vae):
    torch.manual_seed(1)
    loss, error = PixelLoss(vae), torch.randn(2, 16, 1, 4, 4)
    maps = error[:, :, 0]
    linear = vae.patch_decoder.linear
    rgb = blocks_to_video(torch.nn.functional.conv2d(maps, linear.weight), 2)
    planes = torch.tensor(PLANES) * torch.tensor([1, COLOUR_FACTOR, COLOUR_FACTOR])[:, None]
    video = torch.einsum("bcthw,nc->bnthw", rgb, planes)
    across = video.diff(dim=-1)[..., 7::8].square().mean((1, 2, 3, 4))
    down = video.diff(dim=-2)[..., 7::8, :].square().mean((1, 2, 3, 4))
    plain = (error.square() * loss.weights[:, None, None, None]).flatten(1).mean(1)
    found = (loss(error) - plain).detach()
    wanted = across + down
    torch.testing.assert_close(found / found.sum(), wanted / wanted.sum(), atol=1e-4, rtol=1e-4)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_texture_counts_and_not_where_its_strokes_lie():
    loss, wanted = TextureLoss(), noise(1, 1, 3, 64, 64) * 0.3
    elsewhere = noise(1, 1, 3, 64, 64, seed=1) * 0.3
    none = torch.zeros_like(wanted)
    assert loss(wanted, wanted).item() == 0
    # By squared errors no strokes are better than strokes elsewhere.
    assert (none - wanted).square().mean() < 0.6 * (elsewhere - wanted).square().mean()
    assert loss(elsewhere, wanted) < 0.3 * loss(none, wanted)


def test_texture_counts_colours_that_are_too_weak():
    loss, wanted = TextureLoss(), noise(1, 1, 3, 64, 64) * 0.3
    light = (wanted * loss.planes[0, :, None, None]).sum(2, keepdim=True).expand_as(wanted)
    half, gray = (wanted + light) / 2, light
    assert 0 < loss(half, wanted) < loss(gray, wanted)


@pytest.fixture(scope="module")
def encoder():
    return load_image_encoder(FOLDER / "image_encoder")


@pytest.mark.parametrize("side", [64, 128, 192])
def test_features_are_those_of_the_style_encoder(encoder, side):
    loss, wanted = FeatureLoss(encoder), noise(2, 2, 3, side, side).clamp(-1, 1)
    assert loss(wanted, wanted).abs().max() == 0
    near, far = loss(0.9 * wanted, wanted), loss(0 * wanted, wanted)
    assert (near > 0).all() and (near < far).all()
    # A sample costs the same on its own.
    torch.testing.assert_close(loss(0.9 * wanted[:1], wanted[:1]), near[:1])
    assert loss(torch.cat([0 * wanted[:, :1], wanted[:, 1:]], 1), wanted).abs().max() == 0


def test_the_loss_of_pictures_is_that_of_what_is_left_without_noise(vae, encoder):
    loss = PictureLoss(vae, encoder)
    error, clean = noise(2, 16, 1, 8, 8).requires_grad_(), noise(2, 16, 1, 8, 8, seed=1)
    found = loss(error, clean, torch.tensor([0.0, 0.7]))
    alone = loss.pixels(error)
    assert found[0].item() == pytest.approx(alone[0].item(), abs=1e-4)
    assert found[1] > 1.05 * alone[1]
    found.sum().backward()
    assert error.grad is not None and error.grad[1].norm() > error.grad[0].norm()
    assert not any(parameter.requires_grad for parameter in loss.features.parameters())


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
