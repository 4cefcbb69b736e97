"""The style encoder of stylemaster-tiny learns, goes on after a stop, and loads like any CLIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from recipes.tiny.encoder import (
    EncoderConfig,
    encode_patches,
    input_patches,
    load_or_draw_pool,
    train_encoder,
)
from recipes.tiny.encoder_pool import Pool, draw_pool
from recipes.tiny.encoder_probe import embed, linear_probe, probe_encoder, retrieval_at_1
from stylemaster_core.data.images import clip_pixels
from stylemaster_core.errors import ConfigError
from stylemaster_core.models.image_encoder import load_image_encoder

CONFIG = EncoderConfig(batch_styles=8, patches=24, warmup_steps=5)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return draw_pool(0, num_styles=24, pictures=2, contents=8, progress=False)


@pytest.fixture(scope="module")
def trained(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    out = tmp_path_factory.mktemp("encoder")
    losses = train_encoder(out, seed=3, steps=20, pool=pool, config=CONFIG, progress=False)
    return out, losses


def test_siblings_share_colours_and_contents_and_differ_in_texture(pool: Pool) -> None:
    assert pool.pictures.shape == (24, 2, 128, 128, 3)
    assert (pool.families[::2] != pool.families[1::2]).all()
    between = np.abs(pool.colours[::2] - pool.colours[1::2]).mean()
    others = np.abs(pool.colours[:-2:2] - pool.colours[3::2]).mean()
    assert between < 0.7 * others


def test_pool_is_drawn_once(tmp_path: Path) -> None:
    sizes = {"num_styles": 2, "pictures": 2, "contents": 2, "progress": False}
    first = load_or_draw_pool(tmp_path / "pool", 1, **sizes)
    again = load_or_draw_pool(tmp_path / "pool", 1, **sizes)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_loss_falls(trained: tuple[Path, list[float]]) -> None:
    _, losses = trained
    assert len(losses) == 20
    assert np.mean(losses[-3:]) < 0.85 * np.mean(losses[:3])


def test_equal_seeds_train_equally(trained: tuple[Path, list[float]], pool: Pool, tmp_path) -> None:
    losses = train_encoder(tmp_path, seed=3, steps=20, pool=pool, config=CONFIG, progress=False)
    assert losses == trained[1]


def test_goes_on_after_a_stop(trained, pool: Pool, tmp_path: Path, monkeypatch) -> None:
    import recipes.tiny.encoder as module

    original = module.draw_batch
    calls = 0

    def stopping(*args):
        nonlocal calls
        calls += 1
        if calls == 13:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, "draw_batch", stopping)
    config = EncoderConfig(batch_styles=8, patches=24, warmup_steps=5, save_every_s=0.0)
    with pytest.raises(KeyboardInterrupt):
        train_encoder(tmp_path, seed=3, steps=20, pool=pool, config=config, progress=False)
    monkeypatch.undo()
    rest = train_encoder(tmp_path, seed=3, steps=20, pool=pool, config=config, progress=False)
    assert len(rest) == 8
    assert rest == trained[1][12:]


def test_output_loads_as_a_folder_and_as_one_file(trained, pool: Pool) -> None:
    out, _ = trained
    weights = out / "model.safetensors"
    assert weights.stat().st_size < 1.5e6
    with safe_open(str(weights), "pt") as file:
        assert file.metadata()["num_heads"] == "3"
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    folder, single = load_image_encoder(out), load_image_encoder(weights)
    pixels = clip_pixels(pool.pictures[0, 0], size=folder.image_size)[None]
    first, second = folder.encode(pixels), single.encode(pixels)
    assert first.patch_features.shape == (1, 257, 96)
    assert first.image_embeds.shape == (1, 128)
    torch.testing.assert_close(first.image_embeds, second.image_embeds)
    torch.testing.assert_close(first.patch_features, second.patch_features)
    embeds, _ = embed(folder, pool.pictures[:, 0])
    assert embeds.square().mean().item() == pytest.approx(1, abs=0.05)


def test_training_computes_what_the_encoder_computes(trained, pool: Pool) -> None:
    encoder = load_image_encoder(trained[0])
    picture = pool.pictures[:1, 0]
    pixels = clip_pixels(picture[0], size=encoder.image_size)[None]
    expected = encoder.encode(pixels)
    with torch.no_grad():
        features, embeds = encode_patches(encoder.model, input_patches(picture))
    torch.testing.assert_close(features, expected.patch_features[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embeds, expected.image_embeds, rtol=1e-4, atol=1e-4)


def test_embedding_does_not_know_where_patches_are(trained, pool: Pool) -> None:
    encoder = load_image_encoder(trained[0])
    patches = input_patches(pool.pictures[:1, 0])
    order = torch.randperm(patches.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, embeds = encode_patches(encoder.model, patches)
        _, permuted = encode_patches(encoder.model, patches[:, order])
    torch.testing.assert_close(embeds, permuted, rtol=1e-4, atol=1e-4)


def test_length_is_given_once(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of them"):
        train_encoder(tmp_path, seed=0, pool=pool)
    with pytest.raises(ConfigError, match="one of them"):
        train_encoder(tmp_path, seed=0, steps=2, minutes=1, pool=pool)


def test_probe_tells_signal_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 5
    noise = torch.randn(300, 8, generator=generator)
    seen = torch.eye(5)[labels] @ torch.randn(5, 8, generator=generator) * 5 + noise
    found = linear_probe(seen[:200], labels[:200], seen[200:])
    assert (found == labels[200:]).float().mean() > 0.95
    found = linear_probe(noise[:200], labels[:200], noise[200:])
    assert (found == labels[200:]).float().mean() < 0.4


def test_retrieval_counts_full_groups_of_32() -> None:
    keys = torch.randn(70, 16, generator=torch.Generator().manual_seed(0))
    assert retrieval_at_1(2 * keys, keys) == 1
    wrong = keys.clone()
    wrong[:16] = keys[:16].roll(1, 0)
    assert retrieval_at_1(wrong, keys) == pytest.approx(0.75)


def test_probe_of_an_encoder_gives_shares(trained, pool: Pool) -> None:
    held_out = draw_pool(
        0, num_styles=32, pictures=2, contents=4, siblings=False, held_out=True, progress=False
    )
    result = probe_encoder(load_image_encoder(trained[0]), pool, held_out)
    assert all(0 <= share <= 1 for share in result)
