import numpy as np
import pytest
import torch

from recipes.tiny import vae as recipe
from stylemaster_core.errors import ConfigError
from stylemaster_core.models.patch_vae import PatchVAE, create_patch_vae
from stylemaster_core.weights.files import read_state_dict


@pytest.fixture(scope="module")
def pool():
    return recipe.ClipPool({size: recipe.draw_clips(6, size, seed=0) for size in (64, 128)})


def read(path):
    return create_patch_vae(read_state_dict(path).tensors, str(path))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(recipe, "PCA_BLOCKS", 20_000)
    monkeypatch.setattr(recipe, "LOG_STEPS", 1000)
    monkeypatch.setattr(recipe, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(
        recipe,
        "PatchVAE",
        lambda **more: PatchVAE(**more, encoder_width=16, decoder_width=16, decoder_depth=1),
    )


def test_clips_come_from_the_seed_and_held_out_ones_differ(pool):
    assert np.array_equal(pool.clips[64], recipe.draw_clips(6, 64, seed=0))
    assert not np.array_equal(pool.clips[64], recipe.draw_clips(6, 64, seed=0, held_out=True))
    batch = pool.batch(np.random.default_rng(0), 64, 5, 3)
    assert batch.shape == (3, 3, 5, 64, 64) and -1 <= batch.min() < batch.max() <= 1


def test_an_interrupted_training_ends_as_an_uninterrupted_one(pool, tmp_path, monkeypatch):
    whole = read(recipe.train_vae(tmp_path / "a", steps=5, batch=1, pool=pool))
    losses, calls = recipe._losses, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(*args)

    monkeypatch.setattr(recipe, "_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.train_vae(tmp_path / "b", steps=5, batch=1, pool=pool)
    resumed = read(recipe.train_vae(tmp_path / "b", steps=5, batch=1, pool=pool))
    assert len(calls) == 4 + 3  # step 2 is the checkpoint
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_training_lowers_the_loss_of_the_pca_and_normalises(pool, tmp_path):
    linear = recipe.PatchVAE()
    linear.set_linear(*recipe.fit_pca(pool, 0))
    path = recipe.train_vae(tmp_path / "a", steps=60, batch=1, pool=pool)
    trained = read(path)
    batch = pool.batch(np.random.default_rng(1), 64, 5, 32)
    before, after = (
        recipe._losses(vae, batch, np.random.default_rng(0))[0].item() for vae in (linear, trained)
    )
    assert after < 0.995 * before
    mean, std = recipe.latent_statistics(trained, pool, 0)
    assert mean.abs().max() < 0.05 and (std - 1).abs().max() < 0.05

    more = read(recipe.train_vae(tmp_path / "b", steps=5, batch=1, pool=pool, start=path))
    kept, moved = trained.state_dict(), more.state_dict()
    changed = {key.split(".")[0] for key, value in kept.items() if not moved[key].equal(value)}
    assert changed == {"patch_decoder"}


def test_psnr_is_that_of_the_definition(pool):
    class Shifted(PatchVAE):
        def encode(self, video):
            return video

        def decode(self, video):
            return video + 2 / 255 * 10  # ten levels of 255

    report = recipe.evaluate_vae(Shifted(), clips=pool.clips[64])
    assert report["psnr_pooled"] == pytest.approx(20 * np.log10(25.5), abs=1e-3)
    assert report["psnr_mean"] == pytest.approx(report["psnr_pooled"])


def test_a_training_without_an_end_is_refused(tmp_path, pool):
    with pytest.raises(ConfigError, match="give one"):
        recipe.train_vae(tmp_path, pool=pool)
