"""Real pictures in the recipe: what is prepared once and cut from it, and that it is learned."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import numpy as np
import pytest
import torch

from recipes.tiny import bundle, command, recipe, teacher
from recipes.tiny.encoder import EncoderConfig, train_encoder
from recipes.tiny.encoder_paintings import Paintings, draw_crops, probe_paintings, whitened
from recipes.tiny.encoder_pool import draw_pool
from recipes.tiny.limit import TimeLimit, TimeOver
from recipes.tiny.made import Made, refine_on_made
from recipes.tiny.profiles import PROFILES
from recipes.tiny.real_data import RealData, draw_real_clip
from recipes.tiny.real_samples import (
    Motion,
    draw_real_samples,
    in_colours_of,
    window,
    with_look,
)
from recipes.tiny.refiner import seam_ratios
from recipes.tiny.samples import ClipSize
from recipes.tiny.shards import read_shards
from recipes.tiny.teacher import read_pairs, tile_pixels
from recipes.tiny.vae import ClipPool, fit_pca
from stylemaster_core.data.images import write_image
from stylemaster_core.data.jsonl import read_jsonl
from stylemaster_core.errors import ConfigError
from stylemaster_core.metrics.baselines import rgb_to_lab
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.patch_vae import PatchVAE, create_patch_vae
from stylemaster_core.models.vae import load_vae
from tests.standin_tiny import write_standin

NUM_PAIRS = 4


class FakeTeacher:
    """Inverts the content, and says of a style its mean colours in a grid."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def vector(self, picture):
        cells = picture[: len(picture) // 5 * 5, : picture.shape[1] // 5 * 5].astype(np.float32)
        cells = cells.reshape(5, len(picture) // 5, 5, -1, 3).mean((1, 3)) / 255
        return np.resize(cells.reshape(-1), teacher.STYLE_VALUES)

    def stylize(self, content, vector):
        del vector
        return 255 - content


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    rng = np.random.default_rng(0)
    for name, count in (("art", 30), ("photos", 2)):
        for number in range(count):
            grid = rng.integers(0, 256, (12, 10, 3), np.uint8)
            write_image(
                folder / name / f"{number:02d}.png", np.kron(grid, np.ones((17, 17, 1), np.uint8))
            )
    return folder


@pytest.fixture(scope="module")
def real(places, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "Teacher", FakeTeacher)
        patch.setattr(teacher, "SHARD_PAIRS", NUM_PAIRS)
        patch.setattr("recipes.tiny.real_data.SHARD_PAIRS", NUM_PAIRS)
        data = RealData(
            tmp_path_factory.mktemp("real"),
            places / "art",
            places / "photos",
            num_pairs=NUM_PAIRS,
            num_vectors=25,
            num_clips={64: 3},
        )
        data.prepare()
        yield data


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    return write_standin(tmp_path_factory.mktemp("tiny") / "tiny")


def test_the_teacher_works_once(real):
    made = FakeTeacher.made
    files = {p: p.stat().st_mtime_ns for p in real.folder.rglob("*.np*")}
    real.prepare()
    assert FakeTeacher.made == made
    assert files == {p: p.stat().st_mtime_ns for p in real.folder.rglob("*.np*")}
    pairs = read_pairs(real.folder, real.seed, 0)
    assert pairs.contents.shape == (NUM_PAIRS, 256, 256, 3)
    assert set(pairs.tiles) <= set(teacher.TILE_FACTORS)
    for content, stylized, factor in zip(pairs.contents, pairs.stylized, pairs.tiles, strict=True):
        seen = 255 - stylized
        np.testing.assert_array_equal(seen, tile_pixels(content[None], int(factor))[0])
        assert (np.ptp(seen, -1) == 0).all(), "the model sees no colours of the content"
    assert pairs.styles.max() < len(real.pictures) == 29  # one of 30 is held out
    assert real.paintings.vectors.shape == (25, 100)


def test_a_limit_keeps_what_was_done(places, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "Teacher", FakeTeacher)
    options: dict[str, Any] = {"num_pairs": 1, "num_vectors": 2, "num_clips": {}}
    data = RealData(tmp_path, places / "art", places / "photos", **options, limit=TimeLimit(0))
    with pytest.raises(TimeOver):
        data.prepare()
    assert (tmp_path / "paintings.npy").is_file()


def test_windows_show_the_same_place_of_both(real):
    canvas = real.pictures[0]
    still = Motion(np.array([80.0, 80.0]), 1.0, 0.0, 0.0, np.zeros(2), 1.0, 0.0)
    np.testing.assert_array_equal(window(canvas, still, 2, 64, 64)[1], canvas[48:112, 48:112])
    moving = still._replace(velocity=np.array([2.0, 0.0]))
    np.testing.assert_array_equal(window(canvas, moving, 3, 64, 64)[2], canvas[48:112, 52:116])


def test_samples_are_crops_of_pairs_and_load_with_the_drawn(real, standin, tmp_path):
    vae, encoder = (
        load_vae(standin / "vae.safetensors"),
        load_image_encoder(standin / "image_encoder"),
    )
    models = tmp_path / "models"
    (models / "vae").mkdir(parents=True)
    (models / "vae" / "vae.safetensors").symlink_to(standin / "vae.safetensors")
    (models / "encoder").symlink_to(standin / "image_encoder")
    real.draw_samples(tmp_path / "samples", models)
    train, held_out = (read_shards(tmp_path / "samples" / n) for n in ("train", "held_out"))
    assert len(train) > 4 * NUM_PAIRS and len(held_out) > 0
    assert {tuple(s) for s in train.sizes} >= {(16, 1, 12, 12), (16, 1, 16, 16)}
    assert len(train.patch_features) == 2 * NUM_PAIRS > max(train.references)
    stills = {ClipSize(1, 64, 64): 2.0}
    pairs = read_pairs(real.folder, real.seed, 0)
    again = [
        draw_real_samples(pairs, real.pictures, vae, encoder, seed=3, sizes=stills)
        for _ in range(2)
    ]
    assert torch.equal(torch.stack(again[0].latents), torch.stack(again[1].latents))


def test_gray_and_one_coloured_looks(real):
    picture, colour = real.pictures[0], np.array([200.0, 30.0, 90.0])
    assert with_look(picture, "as it is", colour, contrast=0) is picture
    gray = with_look(picture, "gray", colour, contrast=0)
    assert (np.ptp(gray, -1) == 0).all() and gray.dtype == np.uint8
    assert abs(gray.mean() - (picture @ np.array([0.299, 0.587, 0.114])).mean()) < 0.5
    flat = with_look(picture, "one colour", colour, contrast=0)
    assert (flat == colour).all()
    shaded = with_look(picture, "one colour", colour, contrast=0.15).astype(float)
    np.testing.assert_allclose(shaded[..., 2].std(), 0.15 * gray[..., 0].std(), rtol=0.05)
    np.testing.assert_allclose(shaded.mean((0, 1)), colour, atol=1.5)


def test_targets_have_the_colours_of_their_style():
    rng = np.random.default_rng(0)
    muted = (128 + 12 * rng.normal(size=(40, 40, 3))).astype(np.uint8)
    painting = (np.array([150, 90, 60]) + 25 * rng.normal(size=(30, 30, 3))).astype(np.uint8)
    found, before, wanted = (
        rgb_to_lab(p) for p in (in_colours_of(muted, painting), muted, painting)
    )
    for measure in (np.mean, np.std):
        a, b, c = (measure(lab, axis=(0, 1)) for lab in (found, before, wanted))
        np.testing.assert_allclose(a[1:], c[1:], atol=0.5)
        assert a[0] == pytest.approx((b[0] + c[0]) / 2, abs=0.5)
    gray = np.broadcast_to(painting.mean(-1, keepdims=True).astype(np.uint8), painting.shape)
    assert np.abs(rgb_to_lab(in_colours_of(muted, gray))[..., 1:]).max() < 2


def test_clips_of_the_vae_move_and_some_are_cut(real):
    pairs = read_pairs(real.folder, real.seed, 0)
    clips = [draw_real_clip(np.random.default_rng(n), 64, pairs, real.pictures) for n in range(30)]
    steps = [np.abs(np.diff(clip.astype(int), axis=0)).mean((1, 2, 3)) for clip in clips]
    assert sum(step.max() > 4 * np.median(step) + 5 for step in steps) >= 1
    assert all(step.mean() > 0 for step in steps)
    pool = real.with_clips(ClipPool({64: np.stack(clips[:2])}))
    assert pool.clips[64].shape == (5, 9, 64, 64, 3)


def test_the_encoder_learns_the_teachers_numbers(real, tmp_path):
    pool = draw_pool(0, num_styles=8, pictures=2, contents=4, progress=False)
    config = EncoderConfig(batch_styles=8, patches=24, batch_paintings=8, warmup_steps=5)
    options: dict[str, Any] = {"seed": 1, "pool": pool, "config": config, "progress": False}
    first = train_encoder(tmp_path / "a", steps=1, paintings=real.paintings, **options)
    losses = train_encoder(tmp_path / "b", steps=16, paintings=real.paintings, **options)
    assert losses[0] == first[0] and np.mean(losses[-4:]) < 0.9 * losses[0]
    probe = probe_paintings(load_image_encoder(tmp_path / "b"), real.paintings)
    assert 0 < probe.colours < 0.5 and probe.teacher < 1
    further = train_encoder(
        tmp_path / "c", steps=2, paintings=real.paintings, start=tmp_path / "b", **options
    )
    assert further[0] < losses[0]


def test_crops_of_the_encoder_are_of_known_paintings(real):
    numbers = whitened(np.arange(2500, dtype=np.float32).reshape(25, 100))
    crops, vectors, colours = draw_crops(
        Paintings(real.pictures, numbers), np.random.default_rng(0), 12
    )
    assert crops.shape == (12, 120, 120, 3) and colours.shape == (12, 21)
    places = [int(np.abs(numbers - v.numpy()).sum(1).argmin()) for v in vectors]
    assert min(places) >= 2 and 0 <= colours.min() <= colours.max() <= 1


def test_stages_of_real_pictures_come_first(places, tmp_path):
    options: dict[str, Any] = {"seed": 0, "minutes": None}
    plain = recipe.Recipe(tmp_path, PROFILES["smoke"], **options)
    assert "real" not in plain.stages()
    with_real = recipe.Recipe(
        tmp_path, PROFILES["smoke"], art=places / "art", photos=places / "photos", **options
    )
    assert list(with_real.stages()) == ["real", *plain.stages()]


def test_the_log_counts_every_call(tmp_path, monkeypatch):
    """Also the one that the limit ended."""
    made = recipe.Recipe(tmp_path, PROFILES["smoke"], seed=0, minutes=None)

    def stage(folder):
        folder.mkdir(exist_ok=True)
        if len(read_jsonl(tmp_path / recipe.LOG, missing_ok=True)) == 0:
            raise TimeOver

    monkeypatch.setattr(made, "stages", lambda: {"vae": stage})
    with pytest.raises(TimeOver):
        made.run()
    made.run()
    lines = read_jsonl(tmp_path / recipe.LOG)
    assert [(line["stage"], line["ended"]) for line in lines] == [("vae", False), ("vae", True)]
    assert all(line["core_seconds"] >= 0 for line in lines)


def test_training_goes_on_from_weights_that_exist(standin, tmp_path, monkeypatch):
    """What comes out at a rate of 0 is what went in."""
    from recipes.tiny.joint import continue_joint_trainer
    from stylemaster_core.weights.files import read_state_dict

    made = recipe.Recipe(tmp_path, PROFILES["smoke"], seed=0, minutes=None, start=standin)
    weights = {f"style_model.contrastive.{k}": v for k, v in contrastive().items()}
    features = {"patch_features": (17, 96), "image_embeds": (128,), "text": (24, 4096)}
    features |= {"latents": (16, 1, 4, 4), "control_latents": (16, 1, 4, 4)}
    config = recipe.TrainConfig(
        "control",
        recipe.RunConfig(num_steps=1),
        control=recipe.ControlConfig(style="train"),
        style=recipe.StyleConfig(num_layers=2),
    )
    conditions = {"contrastive": weights, "null_text": recipe.null_text()}
    encoder = load_image_encoder(standin / "image_encoder")
    loss = recipe.PictureLoss(recipe.PatchVAE(), encoder)
    trainer = continue_joint_trainer(config, features, standin, **conditions, loss=loss)
    written = {file.name: file.tensors for file in trainer.outputs()}
    for name in ("transformer", "controlnet", "style_adapter"):
        expected = read_state_dict(standin / f"{name}.safetensors").tensors
        found = written[f"{name}.safetensors"]
        for key, value in expected.items():
            if "contrastive" not in key:
                assert torch.allclose(found[key].float(), value.float(), atol=2e-3), (name, key)
    assert made._started("motion_adapter") is not None


def test_what_a_model_makes_lies_where_the_pictures_do(real, standin):
    made = real.draw_made(standin, 3)
    assert made.latents.shape == (3, 16, 1, 16, 16) and made.video.shape == (3, 3, 1, 128, 128)
    again = real.draw_made(standin, 3)
    assert torch.equal(made.latents, again.latents) and torch.equal(made.video, again.video)
    vae = load_vae(standin / "vae.safetensors")
    own = vae.encode(made.video)
    assert not torch.allclose(made.latents, own, atol=0.1)  # a model has been at it


def test_a_refiner_takes_off_the_borders_that_a_model_makes():
    """Squares of 16 pixels are brighter and darker by chance."""
    torch.manual_seed(0)
    vae = PatchVAE(refiner_width=16)
    smooth = torch.nn.functional.interpolate(torch.rand(8, 3, 8, 8) - 0.5, (128, 128))
    video = torch.nn.functional.avg_pool2d(smooth, 17, 1, 8)[:, :, None]
    clips = ((video.movedim(1, -1) + 1) * 127.5).byte().numpy().repeat(9, 1)
    vae.set_linear(*fit_pca(ClipPool({128: clips}), 0, 2000))
    shift = 0.5 * torch.randn(8, 16, 1, 8, 8).repeat_interleave(2, 3).repeat_interleave(2, 4)
    latents = vae.encode(video) + shift
    before = seam_ratios(vae.decode(latents).diff(dim=-1))[1]
    made = Made(latents, video)
    weights = refine_on_made(vae, made, clips[:, 0], steps=25, lr=3e-3, seed=0)
    refined = create_patch_vae(weights, "the VAE")
    after = seam_ratios(refined.decode(latents).diff(dim=-1))[1]
    assert before > 2 and after < 0.7 * before
    assert torch.equal(refined.encode(video), vae.encode(video))


def contrastive():
    from stylemaster_core.models.style_projector import ContrastiveProjection

    return ContrastiveProjection(128, 32).state_dict()


def test_a_bundle_is_one_tar_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "VOLUME_BYTES", 1 << 19)
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="lacks the stages vae"):
        bundle.write_bundle(out, tmp_path / "packed")
    for name in bundle.NEEDED:
        (out / name / "checkpoints").mkdir(parents=True)
        (out / name / "done.json").write_text("{}")
        (out / name / "checkpoints" / "x.safetensors").write_bytes(b"x")
    (out / "samples" / "train-000000.safetensors").write_bytes(bytes(range(256)) * 4000)
    paths = bundle.write_bundle(out, tmp_path / "packed")
    assert len(paths) > 2 and max(p.stat().st_size for p in paths) <= 1 << 19
    whole = io.BytesIO(b"".join(path.read_bytes() for path in paths))
    with tarfile.open(fileobj=whole) as tar:
        names = tar.getnames()
        inside = tar.extractfile("runs/tiny/samples/train-000000.safetensors")
        assert inside is not None and inside.read() == bytes(range(256)) * 4000
    assert "recipes/tiny/recipe.py" in names and "stylemaster_core/cli/train.py" in names
    assert not [name for name in names if "checkpoints" in name or name.endswith(".png")]
    with pytest.raises(ConfigError, match="holds something"):
        bundle.write_bundle(out, tmp_path / "packed")


def test_command_line_wants_both_places(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipes.tiny", "--art", "x"])
    with pytest.raises(SystemExit):
        command.main()
    assert "belong together" in capsys.readouterr().err
