import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from stylemaster_core.errors import ConfigError, LayoutError, WeightsError
from stylemaster_core.models.small import draw_weights
from stylemaster_core.models.vae import WanVAE, load_vae, native_vae_state_dict
from stylemaster_core.weights.state_dict import vae_native_to_diffusers


@pytest.fixture(scope="module")
def reference():
    model = AutoencoderKLWan(base_dim=4).eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(draw_weights(shapes, seed=0))
    return model


@pytest.fixture
def video():
    return torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def saved_as(kind, model, folder):
    if kind in ("folder", "root"):
        model.save_pretrained(folder if kind == "folder" else folder / "vae")
        return folder
    weights = dict(model.state_dict())
    weights = native_vae_state_dict(weights) if kind == "native" else weights
    save_file(weights, folder / "vae.safetensors")
    return folder / "vae.safetensors"


@pytest.mark.parametrize("kind", ["folder", "root", "native", "file"])
def test_every_format_gives_the_same_latents(kind, reference, video, tmp_path):
    vae = load_vae(saved_as(kind, reference, tmp_path), dtype=torch.bfloat16)
    assert vae.dtype == torch.float32  # bfloat16 is for GPUs
    latents = vae.encode(video)
    assert latents.shape == (1, 16, 2, 4, 6)
    config = reference.config
    with torch.no_grad():
        mode = reference.encode(video).latent_dist.mode()
        mean, std = (
            torch.tensor(values).view(1, 16, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        decoded = reference.decode(mode).sample
    assert torch.allclose(latents * std + mean, mode, atol=1e-5)
    result = vae.decode(latents)
    assert result.shape == video.shape
    assert torch.allclose(result, decoded, atol=1e-4)
    assert result.std() > 0.1


def test_native_names_are_those_of_wan(reference):
    weights = reference.state_dict()
    native = native_vae_state_dict(weights)
    for key in (
        "encoder.conv1.weight",
        "encoder.downsamples.2.resample.1.weight",
        "encoder.downsamples.5.time_conv.bias",
        "encoder.middle.1.to_qkv.weight",
        "decoder.upsamples.4.shortcut.weight",
        "decoder.upsamples.14.residual.6.bias",
        "decoder.head.0.gamma",
        "conv1.weight",
        "conv2.bias",
    ):
        assert key in native
    back = vae_native_to_diffusers(native)
    assert back.keys() == weights.keys()
    assert all(back[key] is weights[key] for key in weights)
    with pytest.raises(WeightsError, match="'other'"):
        native_vae_state_dict({"other": torch.ones(1)})


def test_tiling_is_used_when_asked_for(reference, tmp_path, monkeypatch):
    path = saved_as("file", reference, tmp_path)
    latents = torch.randn(1, 16, 1, 36, 36, generator=torch.Generator().manual_seed(0))
    whole = load_vae(path, tiling="off").decode(latents)
    assert torch.equal(load_vae(path).decode(latents), whole)
    tiled = load_vae(path, tiling="on").decode(latents)
    assert tiled.shape == whole.shape
    # Tiles see less around them, so they differ a little, and only a little.
    assert 0 < (tiled - whole).abs().mean() < 0.2
    monkeypatch.setattr("stylemaster_core.models.vae.AUTO_TILING_PX", 288 * 288 - 1)
    assert torch.equal(load_vae(path).decode(latents), tiled)
    with pytest.raises(ConfigError, match="'maybe'"):
        WanVAE(reference, tiling="maybe")


def test_bad_videos_and_latents_are_refused(reference, video):
    vae = WanVAE(reference)
    with pytest.raises(LayoutError, match="4n"):
        vae.encode(video[:, :, :4])
    with pytest.raises(LayoutError, match="multiples of 8"):
        vae.encode(video[..., :47])
    with pytest.raises(LayoutError, match="expected"):
        vae.encode(video[0])
    with pytest.raises(LayoutError, match="NaN"):
        vae.encode(video / 0 * 0)
    with pytest.raises(LayoutError, match="16"):
        vae.decode(torch.zeros(1, 8, 1, 4, 4))
    with pytest.raises(LayoutError, match="NaN"):
        vae.decode(torch.full((1, 16, 1, 4, 4), torch.inf))


def test_bad_files_are_refused(reference, tmp_path):
    weights = dict(reference.state_dict())
    path = tmp_path / "vae.safetensors"
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match="expected a Wan 2.1 VAE"):
        load_vae(path)
    del weights["decoder.conv_in.bias"]
    save_file(weights, path)
    with pytest.raises(WeightsError, match=r"1 missing: decoder.conv_in.bias"):
        load_vae(path)
    del weights["encoder.conv_in.weight"]
    save_file(weights, path)
    with pytest.raises(WeightsError, match="first or last"):
        load_vae(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="cannot be loaded as a Wan VAE"):
        load_vae(tmp_path / "empty")
