import numpy as np
import pytest
import torch

from stylemaster_core.data.images import clip_pixels
from stylemaster_core.errors import WeightsError
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.motion_adapter import load_motion_adapter
from stylemaster_core.models.small import TEXT_WIDTH, write_small_models
from stylemaster_core.models.style_projector import load_style_projector
from stylemaster_core.models.text_encoder import load_text_encoder
from stylemaster_core.models.vae import load_vae
from stylemaster_core.weights.files import read_state_dict
from stylemaster_core.weights.state_dict import (
    detect_kind,
    shapes_of,
    split_release,
    style_path_report,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_small_models(tmp_path_factory.mktemp("small"))


def test_files_are_of_the_kinds_of_the_release(models):
    kinds = {
        models.stylemaster: "stylemaster",
        models.controlnet: "gray_tile_controlnet",
        models.vae: "wan_vae_native",
        models.motion_adapter: "motion_adapter",
    }
    for path, kind in kinds.items():
        tensors = read_state_dict(path).tensors
        assert detect_kind(shapes_of(tensors)) == kind
        assert all(torch.isfinite(value).all() for value in tensors.values())
    files = [file for file in models.vae.parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
    assert not style_path_report(read_state_dict(models.stylemaster).tensors).is_uniform


def test_style_tokens_of_an_image_have_the_width_of_the_text(models):
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    features = load_image_encoder(models.image_encoder).encode(clip_pixels(image)[None])
    text = load_text_encoder(models.text_encoder).encode(["a cat"])
    _, adapter = split_release(read_state_dict(models.stylemaster).tensors)
    prefix = "style_model."
    projector = load_style_projector(
        {k.removeprefix(prefix): v.float() for k, v in adapter.items() if k.startswith(prefix)}
    )
    tokens = projector(features.patch_features, features.image_embeds, text).tokens
    assert tokens.shape == (1, 6, TEXT_WIDTH) == (1, 6, text.shape[-1])
    assert 0.3 < tokens.std() < 3


def test_pixels_and_latents_stay_of_order_one(models):
    vae = load_vae(models.vae)
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(video)
    assert 0.1 < latents.std() < 3
    assert 0.1 < vae.decode(latents).std() < 0.9
    assert len(load_motion_adapter(read_state_dict(models.motion_adapter).tensors).blocks) == 4


def test_equal_seeds_give_equal_weights(models, tmp_path):
    again = write_small_models(tmp_path / "again")
    other = write_small_models(tmp_path / "other", seed=1)
    for name in ("stylemaster", "controlnet", "vae", "motion_adapter"):
        first, second, third = (
            read_state_dict(getattr(m, name)).tensors for m in (models, again, other)
        )
        assert first.keys() == second.keys() == third.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not any(torch.equal(first[key], third[key]) for key in first)
    with pytest.raises(WeightsError, match="exists"):
        write_small_models(tmp_path / "again")
    write_small_models(tmp_path / "again", seed=2, overwrite=True)
