import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stylemaster_core.errors import ConfigError, LayoutError, WeightsError
from stylemaster_core.models.patch_vae import (
    BLOCK_VALUES,
    PatchVAE,
    blocks_to_video,
    create_patch_vae,
    save_patch_vae,
    video_to_blocks,
)
from stylemaster_core.models.vae import load_vae


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def vae():
    """Every layer at random, those that start at zero included."""
    sizes = {"encoder_width": 8, "decoder_width": 12, "encoder_depth": 1, "decoder_depth": 2}
    model = PatchVAE(**sizes).requires_grad_(False).eval()
    draws = generator()
    for parameter in model.parameters():
        fan_in = parameter[0].numel()
        parameter.copy_(torch.randn(parameter.shape, generator=draws) / fan_in**0.5)
    return model


@pytest.fixture
def video():
    return torch.rand(2, 3, 9, 16, 24, generator=generator(1)) * 2 - 1


def linear_vae(rank=16):
    """A PCA of blocks that lie in a space of `rank` dimensions, and such a video."""
    basis = torch.linalg.qr(torch.randn(BLOCK_VALUES, rank, generator=generator(2)).double())[0]
    scales = torch.linspace(2, 0.5, rank).double()
    mean = torch.full((BLOCK_VALUES,), 0.1).double()
    vae = PatchVAE(encoder_width=8, decoder_width=8).requires_grad_(False)
    vae.set_linear(mean, (basis * scales**2) @ basis.T)
    draws = torch.randn(1 * 3 * 4 * 5, rank, generator=generator(3)).double()
    blocks = mean + (draws * scales) @ basis.T
    return vae, blocks.float().view(3, 4, 5, BLOCK_VALUES).permute(0, 3, 1, 2)


def test_shapes_and_ranges_are_those_of_wan(vae, video):
    latents = vae.encode(video)
    assert latents.shape == (2, 16, 3, 2, 3) and latents.dtype == torch.float32
    decoded = vae.decode(latents * 20)
    assert decoded.shape == video.shape and decoded.dtype == torch.float32
    assert decoded.min() == -1 and decoded.max() == 1
    assert vae.encode(video[:, :, :1]).shape == (2, 16, 1, 2, 3)
    assert vae.device == torch.device("cpu") and vae.dtype == torch.float32


def test_blocks_are_cut_and_put_together_without_loss(video):
    blocks = video_to_blocks(video)
    assert blocks.shape == (6, BLOCK_VALUES, 2, 3)
    assert torch.equal(blocks_to_video(blocks, 2), video)
    # The first block of a video is its first frame, four times.
    frames = blocks.view(2, 3, 4, 3, 8, 8, 2, 3)[:, 0]
    assert all(torch.equal(frames[:, k], frames[:, 3]) for k in range(3))
    assert torch.equal(frames[0, 3, :, :, :, 1, 2], video[0, :, 0, 8:, 16:])


def test_a_frame_changes_no_latents_before_it(vae, video):
    latents = vae.encode(video)
    changed = video.clone()
    changed[:, :, 5:] = -changed[:, :, 5:]
    after = vae.encode(changed)
    assert torch.equal(after[:, :, :2], latents[:, :, :2])
    assert not torch.allclose(after[:, :, 2], latents[:, :, 2])
    # What came before is seen.
    changed = video.clone()
    changed[:, :, :5] = -changed[:, :, :5]
    assert not torch.allclose(vae.encode(changed)[:, :, 2], latents[:, :, 2])
    assert torch.allclose(vae.encode(video[:, :, :5]), latents[:, :, :2], atol=1e-6)


def test_clips_of_a_batch_do_not_mix(vae, video):
    latents = vae.encode(video)
    assert torch.allclose(vae.encode(video[1:]), latents[1:], atol=1e-6)
    assert torch.allclose(vae.decode(latents[1:]), vae.decode(latents)[1:], atol=1e-6)


def test_pca_gives_back_what_lies_in_its_space():
    vae, blocks = linear_vae()
    video = blocks_to_video(blocks, 1)
    latents = vae.to_latents(video)
    assert torch.allclose(vae.to_video(latents)[:, :, 1:], video[:, :, 1:], atol=1e-4)
    # Whitened: the true coordinates have unit variance. The first block is another one.
    assert 0.8 < latents[:, :, 1:].std() < 1.2
    # With one dimension more than latents, something is lost.
    vae, blocks = linear_vae(rank=17)
    video = blocks_to_video(blocks, 1)
    rest = (vae.to_video(vae.to_latents(video)) - video)[:, :, 1:]
    assert rest.abs().max() > 0.01


def test_folded_statistics_normalise_and_change_no_pixel(vae, video):
    latents, decoded = vae.to_latents(video), vae.to_video(vae.to_latents(video))
    values = latents.transpose(0, 1).flatten(1)
    vae.fold_statistics(values.mean(1), values.std(1))
    folded = vae.to_latents(video)
    values = folded.transpose(0, 1).flatten(1)
    assert torch.allclose(values.mean(1), torch.zeros(16), atol=1e-5)
    assert torch.allclose(values.std(1), torch.ones(16), atol=1e-4)
    assert torch.allclose(vae.to_video(folded), decoded, atol=1e-4)


def test_a_saved_file_loads_as_any_vae(vae, video, tmp_path):
    path = save_patch_vae(tmp_path / "vae.safetensors", vae)
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {"format": "stylemaster_patch_vae"}
        assert file.get_tensor("patch_encoder.linear.weight").dtype == torch.float16
    loaded = load_vae(path, dtype=torch.bfloat16)
    assert isinstance(loaded, PatchVAE) and loaded.dtype == torch.float32
    for key, value in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.half().float())
    assert torch.allclose(loaded.encode(video), vae.encode(video), atol=0.01)
    with pytest.raises(WeightsError, match="exists"):
        save_patch_vae(path, vae)
    with pytest.raises(ConfigError, match="'maybe'"):
        load_vae(path, tiling="maybe")  # pyright: ignore[reportArgumentType]


def test_the_refiner_sees_across_blocks_and_where_it_is_in_a_token(video, tmp_path):
    torch.manual_seed(0)
    plain = PatchVAE()
    refined = PatchVAE(refiner_width=8)
    refined.load_state_dict(plain.state_dict(), strict=False)
    latents = plain.encode(video)
    decoded = plain.decode(latents)
    assert torch.equal(refined.decode(latents), decoded), "it begins as nothing"
    refiner = refined.patch_refiner
    assert refiner is not None
    torch.nn.init.normal_(refiner.conv_out.weight, std=0.1)
    changed = refined.decode(latents)
    assert changed.shape == decoded.shape and not torch.allclose(changed, decoded, atol=1e-2)
    # Each frame on its own, and what a pixel becomes depends on the block beside it.
    assert torch.allclose(refiner(decoded)[:, :, 2:3], refiner(decoded[:, :, 2:3]), atol=1e-6)
    other = decoded.clone()
    other[..., 8:] += 0.5
    moved = (refiner(other) - refiner(decoded)).abs().amax((0, 1, 2, 3))
    assert moved[7] > 1e-3
    # A gray picture is changed alike in every token, but not in every square of it.
    change = refiner(torch.zeros(1, 3, 1, 80, 80))[..., 16:64, 16:64]
    assert torch.allclose(change[..., :16, :16], change[..., 16:32, 16:32], atol=1e-6)
    assert not torch.allclose(change[..., :4, :4], change[..., 4:8, 4:8], atol=1e-3)
    path = save_patch_vae(tmp_path / "vae.safetensors", refined)
    loaded = load_vae(path).to_video(latents)
    torch.testing.assert_close(loaded, refined.to_video(latents), atol=0.05, rtol=0)


def test_loading_needs_no_host(vae, tmp_path, monkeypatch):
    path = save_patch_vae(tmp_path / "vae.safetensors", vae)
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert isinstance(load_vae(path), PatchVAE)


def test_bad_files_are_refused(vae, tmp_path):
    weights = dict(vae.state_dict())
    with pytest.raises(WeightsError, match="expected a StyleMaster patch VAE"):
        create_patch_vae({"weight": torch.ones(1)}, "mine")
    del weights["patch_decoder.blocks.1.past.weight"]
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError, match=r"1 missing: patch_decoder.blocks.1.past.weight"):
        load_vae(tmp_path / "vae.safetensors")


def test_bad_videos_and_latents_are_refused(vae, video):
    with pytest.raises(LayoutError, match="4n"):
        vae.encode(video[:, :, :4])
    with pytest.raises(LayoutError, match="multiples of 8"):
        vae.encode(video[..., :23])
    with pytest.raises(LayoutError, match="expected"):
        vae.encode(video[0])
    with pytest.raises(LayoutError, match="NaN"):
        vae.encode(video / 0 * 0)
    with pytest.raises(LayoutError, match="16"):
        vae.decode(torch.zeros(1, 8, 1, 4, 4))
    with pytest.raises(LayoutError, match="NaN"):
        vae.decode(torch.full((1, 16, 1, 4, 4), torch.inf))
