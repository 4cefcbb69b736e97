"""The trainers of StyleCrafter on VideoCrafter: what they learn, what they leave alone, files."""

import dataclasses
import functools
import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stylemaster_core.cli import main
from stylemaster_core.data.cache import CachedDataset
from stylemaster_core.data.demo_scene import demo_clip, demo_styles
from stylemaster_core.data.encode_videocrafter import style_crop
from stylemaster_core.data.gray_tile import cover_resize_frames
from stylemaster_core.data.images import read_image, stylecrafter_video_pixels, write_image
from stylemaster_core.data.videos import read_video, write_video
from stylemaster_core.errors import ConfigError, LayoutError, WeightsError
from stylemaster_core.models import small_videocrafter
from stylemaster_core.models.image_encoder import load_image_encoder
from stylemaster_core.models.sd_parts import TextEncoder, load_sd2_text, load_sd_vae
from stylemaster_core.models.sdxl_unet import cross_attentions
from stylemaster_core.models.small_videocrafter import write_small_videocrafter
from stylemaster_core.models.stylecrafter_sdxl import load_stylecrafter_video
from stylemaster_core.models.videocrafter_unet import (
    VideoCrafterUNet,
    is_temporal,
    load_videocrafter_unet,
)
from stylemaster_core.pipelines.stylize_sdxl import load_adapter
from stylemaster_core.sampling.denoise_video import create_ddim
from stylemaster_core.training.config import (
    OptimizerConfig,
    RunConfig,
    StyleConfig,
    StyleCrafterConfig,
    TrainConfig,
    override,
    read_config,
)
from stylemaster_core.training.dry_run import describe
from stylemaster_core.training.loop import train
from stylemaster_core.training.samples import collate, draw_sample, generator_of
from stylemaster_core.training.setup import TrainingFiles, create_trainer
from stylemaster_core.training.stats import read_stats
from stylemaster_core.training.synthetic import SyntheticWorld
from stylemaster_core.training.videocrafter import (
    create_videocrafter_adapter_trainer,
    create_videocrafter_temporal_trainer,
)
from stylemaster_core.weights.convert import convert
from stylemaster_core.weights.files import read_state_dict, write_state_dict
from stylemaster_core.weights.state_dict import detect_kind, shapes_of
from stylemaster_core.weights.videocrafter_keys import TEMPORAL_KEY
from tests.style_datasets import joined, of_another

TEXT_WIDTH, FEATURE_WIDTH = 8, 16
SIZES = dataclasses.replace(small_videocrafter.SIZES, text_width=TEXT_WIDTH, init_width=32)
CLIPS, PICTURES = (
    SyntheticWorld(size=(t, 4, 4), channels=4, text_width=TEXT_WIDTH, patch_width=FEATURE_WIDTH)
    for t in (2, 1)
)
CRAFTER = StyleCrafterConfig(num_tokens=4, num_layers=1, num_heads=2, scale_num_layers=1,
                             scale_num_heads=2)  # fmt: skip
NO_PLACE = ("text_proj.", "style_proj.", "scale_predictor.scale_predictor.projection")


def config_of(trainer="videocrafter-adapter", *settings, **sections):
    run = RunConfig(num_steps=60, batch_size=4, save_every=10_000, validate_every=60)
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=5, weight_decay=0.0)
    style = StyleConfig(drop_style=0.0, drop_both=0.0)
    config = TrainConfig(trainer, run, optimizer, style=style, stylecrafter=CRAFTER)
    config = dataclasses.replace(config, **sections)
    return override(config, ["flow.drop_text=0", "flow.weighting=none", *settings])


def features():
    return {key: tuple(value.shape) for key, value in PICTURES.sample("x").items()}


def losses_of(folder):
    """At fixed noise and noise levels, before the first step and after the last."""
    lines = [line for line in read_stats(folder) if "validation_loss" in line]
    return lines[0]["validation_loss"], lines[-1]["validation_loss"]


@torch.no_grad()
def loss_on(trainer, data):
    """As the loop validates."""
    drawn = [
        draw_sample(data, i, trainer.draws, generator_of(0, "validation", i, n), (n + 0.5) / 4)
        for i in range(len(data)) for n in range(4)
    ]  # fmt: skip
    return trainer(collate(drawn).tensors).mean().item()


def noised(samples, seed):
    """Clean latents, noise and levels of a few samples, stacked."""
    draws = torch.Generator().manual_seed(seed)
    clean = torch.stack([sample["latents"] for sample in samples])
    level = torch.randint(0, 1000, (len(samples),), generator=draws)
    return clean, torch.randn(clean.shape, generator=draws), level


@pytest.fixture(scope="module")
def base():
    """A UNet that knows texts, pictures and clips, and no style; names of the release."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = VideoCrafterUNet(SIZES)
    optimizer, ddim = torch.optim.AdamW(unet.parameters(), lr=4e-3), create_ddim()
    sets = [world.dataset(16, style=False).samples for world in (PICTURES, CLIPS)]
    for step in range(60):
        samples = [sets[step % 3 == 2][(8 * step + i) % 16] for i in range(8)]
        clean, noise, level = noised(samples, step)
        frames = clean.shape[2]
        text = torch.stack([sample["text"] for sample in samples])
        noisy = ddim.add_noise(clean, noise, level).transpose(1, 2).flatten(0, 1)
        rows = (level.repeat_interleave(frames), text.repeat_interleave(frames, 0), frames)
        predicted = unet(noisy, *rows).unflatten(0, (-1, frames)).transpose(1, 2)
        nn.functional.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    names = unet.release_keys
    return {names[key]: value.detach() for key, value in unet.state_dict().items()}


@pytest.fixture(scope="module")
def create(base):
    return functools.partial(create_videocrafter_adapter_trainer, base=base, features=features())


@pytest.fixture(scope="module")
def stage_one(create, tmp_path_factory):
    """File of the first stage, its losses before and after, and that with styles exchanged."""
    data, trainer = PICTURES.dataset(4), create(config_of())
    folder = tmp_path_factory.mktemp("one")
    train(trainer, data, folder, validation=data)
    before, after = losses_of(folder)
    assert loss_on(trainer, data) == pytest.approx(after, rel=1e-5)
    return trainer.outputs()[0], before, after, loss_on(trainer, of_another(data))


# ---- the first stage ----


def test_the_first_stage_learns_the_style(stage_one):
    file, before, after, other = stage_one
    print(f"\nvideocrafter-adapter: {before:.4f} -> {after:.4f}; style of another {other:.4f}")
    assert after < 0.92 * before and after < 0.985 * other
    assert file.name == "stylecrafter_video_adapter.safetensors"
    assert detect_kind(shapes_of(file.tensors)) == "stylecrafter_video"
    header = {"format": "stylecrafter-video-1", "style_num_heads": "2", "scale_num_heads": "2"}
    header |= {"licence": "research and non-commercial use only", "base_model": "custom"}
    assert header.items() <= file.metadata.items()


def test_the_file_is_the_adapter_that_was_trained(create, stage_one, tmp_path):
    """Read by the loader of `stylize-videocrafter`, it gives the trainer's numbers."""
    file = stage_one[0]
    path = write_state_dict(tmp_path / file.name, file.tensors, file.metadata)
    read = load_adapter(path)
    trainer = create(config_of(), adapter=file.tensors)
    sample = {k: v[None] for k, v in trainer.draws.read(PICTURES.sample("x")).items()}
    with torch.no_grad():
        tokens = read.encoder(sample["patch_features"])
        assert torch.equal(tokens, trainer.adapter.encoder(sample["patch_features"]))
    gains = read.gains(sample["text"], tokens)
    assert torch.equal(gains, trainer.adapter.gains(sample["text"], tokens))
    assert (gains - 1).abs().max() > 1e-3  # they were trained, too
    for ours, theirs in zip(read.layers, trainer.adapter.layers, strict=True):
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


def test_the_first_stage_starts_from_the_text_keys(create, base):
    trainer = create(config_of())
    for name, layer in zip(cross_attentions(trainer.unet), trainer.adapter.layers, strict=True):
        text = trainer.unet.get_submodule(name)
        assert torch.equal(layer.to_k_style.weight, text.to_k.weight)
        assert torch.equal(layer.to_v_style.weight, text.to_v.weight)
    sample = {k: v[None] for k, v in trainer.draws.read(PICTURES.sample("x")).items()}
    tokens = trainer.adapter.encoder(sample["patch_features"])
    assert torch.equal(trainer.adapter.gains(sample["text"], tokens), torch.ones(1, 4))


@pytest.mark.parametrize("chosen", ["all", "style", "scales"])
def test_only_what_shall_be_trained_changes(create, stage_one, tmp_path, chosen):
    config = config_of("videocrafter-adapter", "run.num_steps=1", f"stylecrafter.train={chosen}")
    trainer = create(config, adapter=stage_one[0].tensors)
    before = {name: value.clone() for name, value in trainer.state_dict().items()}
    train(trainer, PICTURES.dataset(8), tmp_path, validation=PICTURES.dataset(2))
    after = trainer.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    in_adapter = {name for name in before if name.startswith("adapter.")}
    scales = {name for name in in_adapter if ".scale_predictor." in name}
    unit = {name for name in scales if any(part in name for part in NO_PLACE)}
    assert len(unit) == 5 and len(before) - len(in_adapter) > 200
    wanted = {"all": in_adapter, "style": in_adapter - scales, "scales": scales}[chosen] - unit
    assert changed == wanted
    file = trainer.outputs()[0]
    loaded = load_stylecrafter_video(file.tensors, file.metadata)  # nothing trained is lost in it
    kept = loaded.state_dict()
    assert all(torch.equal(kept[name.removeprefix("adapter.")], after[name]) for name in in_adapter)


def test_scales_of_no_adapter_are_refused(create):
    with pytest.raises(ConfigError, match="stylecrafter.train is scales.*give the adapter"):
        create(config_of("videocrafter-adapter", "stylecrafter.train=scales"))


# ---- the second stage ----


@pytest.fixture(scope="module")
def create_second(base, stage_one):
    make = create_videocrafter_temporal_trainer
    return functools.partial(make, base=base, adapter=stage_one[0].tensors)


def test_the_second_stage_learns_clips_in_a_style(create_second, tmp_path):
    data = joined(CLIPS.dataset(4), PICTURES.dataset(1))
    trainer = create_second(
        config_of("videocrafter-temporal", "run.num_steps=30", "run.validate_every=30")
    )
    before = {name: value.clone() for name, value in trainer.state_dict().items()}
    train(trainer, data, tmp_path, validation=CLIPS.dataset(4))
    first, last = losses_of(tmp_path)
    print(f"\nvideocrafter-temporal: {first:.4f} -> {last:.4f}")
    assert last < 0.95 * first
    changed = {n for n, value in trainer.state_dict().items() if not torch.equal(before[n], value)}
    assert changed == {name for name in before if is_temporal(name.removeprefix("unet."))}
    assert len(changed) > 100 and set(trainer.trained()) == changed
    (file,) = trainer.outputs()
    assert file.name == "stylecrafter_temporal.safetensors"
    assert file.metadata["format"] == "stylecrafter-temporal-1"
    assert file.metadata["licence"] == "research and non-commercial use only"
    assert detect_kind(shapes_of(file.tensors)) == "stylecrafter_temporal"


@pytest.mark.parametrize("world", [PICTURES, CLIPS], ids=["pictures", "clips"])
def test_every_temporal_tensor_learns(create_second, world, tmp_path):
    """From pictures, too, though the layers rest on them when sampling."""
    share = f"stylecrafter.image_share={int(world is PICTURES)}"
    settings = (share, "run.num_steps=1", "run.batch_size=2")
    trainer = create_second(config_of("videocrafter-temporal", *settings))
    before = {name: p.detach().clone() for name, p in trainer.trained().items()}
    train(trainer, world.dataset(2), tmp_path, validation=world.dataset(1))
    same = {n for n, p in trainer.trained().items() if torch.equal(p, before[n])}
    # To a single frame all of its own weight goes: what decides about shares has no slope.
    deciding = ("to_q.weight", "to_k.weight", "relative_position_k.embeddings_table")
    assert same == ({n for n in before if n.endswith(deciding)} if world is PICTURES else set())


def test_the_layers_rest_on_pictures_when_sampling(create_second, base):
    trainer = create_second(config_of("videocrafter-temporal"))
    batch = batch_of(trainer, PICTURES.dataset(1), drop_style=[True])
    with torch.no_grad():
        trained = trainer(batch)
    rested = losses_of_the_base(base, batch, batch["text"])
    assert not torch.isclose(trained, rested, rtol=1e-4)


def test_the_second_stage_goes_on_from_temporal_layers(create_second, base):
    names = {name for name in base if TEMPORAL_KEY.fullmatch(name)}
    temporal = {name: base[name] + 1 for name in names}
    trainer = create_second(config_of("videocrafter-temporal"), temporal=temporal)
    (file,) = trainer.outputs()
    assert all(torch.equal(file.tensors[name], value) for name, value in temporal.items())


def test_pictures_and_clips_have_their_shares(create_second):
    trainer = create_second(config_of("videocrafter-temporal"))
    arranged = trainer.arrange(joined(CLIPS.dataset(8), PICTURES.dataset(1)))
    assert sum(size[1] == 1 for size in arranged.sizes) == 2 and len(arranged) == 10
    with pytest.raises(ConfigError, match="8 clips and 0 pictures"):
        trainer.arrange(CLIPS.dataset(8))


# ---- what a step computes ----


def batch_of(trainer, data, **flags):
    """Samples at different noise levels."""
    drawn = [trainer.draws(data, i, generator_of(i), 0.2 + 0.2 * i) for i in range(len(data))]
    batch = {key: torch.stack([sample[key] for sample in drawn]) for key in drawn[0]}
    return batch | {name: torch.tensor(value) for name, value in flags.items()}


@torch.no_grad()
def losses_of_the_base(base, batch, text):
    """Losses that the released formulas give without a style."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0).float()
    unet, losses = load_videocrafter_unet(base), []
    for i, level in enumerate(batch["level"]):
        clean, noise = (batch[key][i].transpose(0, 1) for key in ("latents", "noise"))
        noisy = alphas[level].sqrt() * clean + (1 - alphas[level]).sqrt() * noise
        count = len(noisy)
        predicted = unet(noisy, level, text[i].expand(count, -1, -1), count)
        losses.append((predicted - noise).square().mean())
    return torch.stack(losses)


def test_a_dropped_style_is_the_base_model(create, base, stage_one):
    trainer = create(config_of(), adapter=stage_one[0].tensors)
    batch = batch_of(trainer, CLIPS.dataset(2), drop_style=[True, False])
    with torch.no_grad():
        losses = trainer(batch)
    plain = losses_of_the_base(base, batch, batch["text"])
    assert torch.isclose(losses, plain, rtol=1e-5).tolist() == [True, False]


def test_a_dropped_text_is_the_empty_prompt(create, base, stage_one):
    null = PICTURES.null_text.repeat(5, 1)
    trainer = create(config_of(), adapter=stage_one[0].tensors, null_text=null)
    batch = batch_of(trainer, CLIPS.dataset(2), drop_style=[True] * 2, drop_text=[True, False])
    with torch.no_grad():
        losses = trainer(batch)
    empty = losses_of_the_base(base, batch, torch.stack([null, null]))
    assert torch.isclose(losses, empty, rtol=1e-5).tolist() == [True, False]
    with pytest.raises(ConfigError, match="empty prompt, and the data have none"):
        create(config_of("videocrafter-adapter", "flow.drop_text=0.1"))


def test_samples_of_a_batch_do_not_mix(create, stage_one):
    trainer = create(config_of(), adapter=stage_one[0].tensors)
    batch = batch_of(trainer, CLIPS.dataset(3))
    with torch.no_grad():
        together = trainer(batch)
        alone = [trainer({k: v[i : i + 1] for k, v in batch.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert len(set(together.tolist())) == 3


def test_conditions_are_dropped_as_often_as_asked(create):
    settings = ("flow.drop_text=0.2", "style.drop_style=0.3", "style.drop_both=0.1")
    null = PICTURES.null_text.repeat(5, 1)
    trainer = create(config_of("videocrafter-adapter", *settings), null_text=null)
    data = PICTURES.dataset(1)
    drawn = [trainer.draws(data, 0, generator_of("d", i), None) for i in range(600)]
    shares = {key: torch.stack([d[key] for d in drawn]).float().mean().item()
              for key in ("drop_text", "drop_style")}  # fmt: skip
    assert shares == pytest.approx({"drop_text": 0.3, "drop_style": 0.4}, abs=0.06)
    preset = read_config("videocrafter-images")  # the released recipe drops nothing
    assert preset.flow.drop_text == preset.style.drop_style == preset.style.drop_both == 0


@pytest.mark.parametrize("setting", ["run.checkpoint_blocks=1", "run.checkpoint_blocks=2"])
def test_recomputed_blocks_give_the_same_gradients(create, stage_one, setting):
    def gradients(*settings):
        trainer = create(config_of("videocrafter-adapter", *settings), adapter=stage_one[0].tensors)
        trainer(batch_of(trainer, CLIPS.dataset(2))).mean().backward()
        return {name: p.grad for name, p in trainer.trained().items()}

    plain, again = gradients(), gradients(setting)
    assert set(plain) == set(again) and len(plain) > 20
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6)


# ---- runs and files ----


@pytest.mark.parametrize("name", ["videocrafter-adapter", "videocrafter-temporal"])
def test_a_resumed_run_equals_an_uninterrupted_one(create, create_second, tmp_path, name):
    data = joined(CLIPS.dataset(2), PICTURES.dataset(2))
    validation = PICTURES.dataset(1, "held out")
    make = create if name == "videocrafter-adapter" else create_second

    def run(folder, steps, resume=False):
        settings = (f"run.num_steps={steps}", "run.batch_size=2", "stylecrafter.image_share=0.5")
        trainer = make(config_of(name, *settings))
        train(trainer, data, tmp_path / folder, validation=validation, resume=resume)
        return trainer.outputs()[0].tensors

    whole = run("whole", 4)
    half = run("parts", 2)
    resumed = run("parts", 4, resume=True)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert any(not torch.equal(whole[key], half[key]) for key in whole)


def test_from_files(base, stage_one, tmp_path):
    file = stage_one[0]
    unet = write_state_dict(tmp_path / "unet.safetensors", base)
    adapter = write_state_dict(tmp_path / "adapter.safetensors", file.tensors, file.metadata)
    data = PICTURES.dataset(4)
    config = config_of("videocrafter-adapter", "stylecrafter.num_heads=8")
    trainer = create_trainer(config, TrainingFiles(unet, adapter), data)
    assert trainer.config.stylecrafter.num_heads == 2  # as the file's header tells
    dry = create_trainer(config, TrainingFiles(unet, adapter), data, meta=True)
    assert "trained in all" in describe(dry, data) and "without activations" in describe(dry, data)
    with pytest.raises(WeightsError, match="adapter: .* is VideoCrafter's UNet"):
        create_trainer(config, TrainingFiles(unet, unet), data)
    with pytest.raises(WeightsError, match="base: .* is a StyleCrafter adapter for VideoCrafter"):
        create_trainer(config, TrainingFiles(adapter), data)
    with pytest.raises(ConfigError, match="no use for motion adapter"):
        create_trainer(config, TrainingFiles(unet, motion_adapter=adapter), data)
    second = config_of("videocrafter-temporal")
    with pytest.raises(WeightsError, match="needs the adapter of the first stage"):
        create_trainer(second, TrainingFiles(unet), data)
    with pytest.raises(WeightsError, match="temporal: .* is VideoCrafter's UNet"):
        create_trainer(second, TrainingFiles(unet, adapter, temporal=unet), data)


def test_the_unet_is_told_the_frame_rate_of_the_data(base, tmp_path):
    unet = write_state_dict(tmp_path / "unet.safetensors", base)
    data = PICTURES.dataset(2)
    data.settings = {"fps": 12.0}
    for settings, fps in (((), 12.0), (("stylecrafter.fps=24",), 24.0)):
        config = config_of("videocrafter-adapter", *settings)
        assert create_trainer(config, TrainingFiles(unet), data).fps == fps
    del data.settings
    assert create_trainer(config_of(), TrainingFiles(unet), data).fps == 8.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": (16, 1, 4, 4)}, r"latents must be \[4, t, h, w\].*for VideoCrafter"),
        ({"latents": (4, 1, 5, 4)}, "multiples of 2 for this UNet"),
        ({"text": (5, 9)}, r"text features must be \[L, 8\]"),
        ({"patch_features": (17, 9)}, "image features of width 9, the adapter takes 16"),
    ],
)
def test_data_that_do_not_fit_are_refused(create, change, words):
    with pytest.raises(LayoutError, match=words):
        create(config_of()).check(features() | change, 4)


def test_samples_are_generated_while_training(create, tmp_path):
    settings = ("run.num_steps=2", "run.sample_every=2", "run.sample_steps=2", "run.batch_size=2")
    null = CLIPS.null_text.repeat(5, 1)
    scales = ("run.sample_text_scale=3", "run.sample_style_scale=2")
    trainer = create(config_of("videocrafter-adapter", *settings, *scales), null_text=null)
    seen = []

    def decode(latents):
        seen.append(latents)
        return (torch.ones(latents.shape[2], 16, 16, 3) * 255).byte().numpy()

    train(trainer, CLIPS.dataset(4), tmp_path, validation=CLIPS.dataset(2), decode=decode)
    assert seen[0].shape == (1, 4, 2, 4, 4) and torch.isfinite(seen[0]).all()
    assert (tmp_path / "samples/step-00000002.png").is_file()
    assert torch.equal(seen[0], trainer.sample(CLIPS.dataset(2), 0))
    batch = batch_of(trainer, CLIPS.dataset(2))
    kept = trainer(batch)  # the styles act again
    assert not torch.allclose(kept, trainer(batch | {"drop_style": torch.tensor([True, True])}))


# ---- the whole way: encode, train, generate ----


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Options that name small random files, as the command line takes them."""
    folder = tmp_path_factory.mktemp("small")
    models = write_small_videocrafter(folder)
    unet, vae, text = convert(models.checkpoint, folder)
    return {"--base": unet, "--vae": vae, "--text-encoder": text,
            "--image-encoder": models.image_encoder}  # fmt: skip


def options(files, *names, **renamed):
    pairs = {name: files[name] for name in names} | {f"--{k}": files[v] for k, v in renamed.items()}
    return [str(word) for pair in pairs.items() for word in pair]


ENCODERS = ("--vae", "--text-encoder", "--image-encoder")


@pytest.fixture(scope="module")
def cache(small, tmp_path_factory):
    """A clip of four frames and two pictures, encoded."""
    media = tmp_path_factory.mktemp("media")
    write_video(media / "clip.mp4", demo_clip(9, 32, 48), fps=16)
    for name, picture in list(demo_styles(64).items())[:2]:
        write_image(media / f"{name}.png", picture)
    command = ["data", "encode", str(media), str(media / "cache"), "--model", "videocrafter"]
    command += ["--caption", "a cat", "--size", "32x16", "--frames", "4"]
    assert main([*command, *options(small, *ENCODERS)]) == 0
    return media / "cache"


def test_samples_are_encoded_for_videocrafter(small, cache):
    data = CachedDataset(cache, bucket=True)
    shapes = {name: size for name, size in zip(data.ids, data.sizes, strict=True)}
    assert shapes.pop("clip.mp4") == (4, 4, 2, 4)
    assert set(shapes.values()) == {(4, 1, 2, 4)} and len(shapes) == 2
    assert data.settings["fps"] == 8.0 and data.settings["model"] == "videocrafter"
    vae, text = (read_state_dict(small[n]).tensors for n in ("--vae", "--text-encoder"))
    encoder = TextEncoder(load_sd2_text({k: v.float() for k, v in text.items()}))
    index = data.ids.index("clip.mp4")
    sample = data[index]
    assert torch.equal(sample["text"], encoder.encode("a cat")[0].half())
    assert torch.equal(data.null_text, encoder.encode("")[0].half())
    clip = read_video(cache.parent / "clip.mp4").frames[[0, 2, 4, 6]]  # 8 frames a second of 16
    frames = cover_resize_frames(clip, 16, 32)
    stock = load_sd_vae({k: v.float() for k, v in vae.items()})  # diffusers' own way of it
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = stock.encode(pixels).latent_dist.mean * 0.18215
    torch.testing.assert_close(sample["latents"].float(), latents.transpose(0, 1), rtol=1e-3,
                               atol=1e-3)  # fmt: skip
    image_encoder = load_image_encoder(small["--image-encoder"])
    name = next(name for name in data.ids if name.endswith(".png"))
    picture = read_image(cache.parent / name)
    seed = zlib.crc32(f"0 {name}".encode())
    crop = style_crop(picture, seed=seed)
    seen = image_encoder.stylecrafter_video(stylecrafter_video_pixels(crop)[None])[0].half()
    assert torch.equal(data[data.ids.index(name)]["patch_features"], seen)


def test_the_style_crop_is_a_square_of_the_larger_picture():
    picture = np.random.default_rng(0).integers(0, 255, (100, 150, 3), np.uint8)
    crops = [style_crop(picture, seed=seed) for seed in (1, 1, 2)]
    assert all(crop.shape == (512, 512, 3) for crop in crops)
    assert np.array_equal(crops[0], crops[1]) and not np.array_equal(crops[0], crops[2])
    whole = np.asarray(Image.fromarray(picture).resize((1200, 800), Image.Resampling.BILINEAR))
    found = [
        (top, left)
        for top in range(289) for left in np.flatnonzero(
            (whole[top, :689] == crops[0][0, 0]).all(-1)
        )
        if np.array_equal(whole[top : top + 512, left : left + 512], crops[0])
    ]  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tile"], "--tile, --tile-factor and --crop mean nothing"),
        (["--frames", "0"], "0 frames; expected at least 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(small, cache, capsys, more, words):
    command = ["data", "encode", str(cache.parent), str(cache.parent / "no"), "--caption", "a"]
    files = options(small, *ENCODERS)
    assert main([*command, "--model", "videocrafter", *files, *more]) == 2
    assert words in capsys.readouterr().err and not (cache.parent / "no").exists()


def trained(small, cache, out, trainer, *more):
    command = ["train", trainer, "--data", str(cache), "--out", str(out), "--cpu", "--no-progress"]
    command += ["--steps", "1", "--batch-size", "2", "--accumulation", "1"]
    command += ["--set", "run.validate_every=0", "--set", "run.num_workers=0"]
    return main([*command, *options(small, "--base"), *more])


def generated(small, folder, name, *more):
    style = folder / "style.png"
    write_image(style, demo_styles(64)["neon"], overwrite=True)
    command = ["stylize-videocrafter", str(folder / name), "--style", str(style), "--json"]
    command += ["--prompt", "a cat", "--size", "32x16", "--frames", "3", "--steps", "2"]
    files = options(small, "--vae", "--text-encoder", "--image-encoder", unet="--base")
    assert main([*command, *files, *map(str, more)]) == 0
    return read_video(folder / name).frames


def test_trained_files_act_in_stylize_videocrafter(small, cache, tmp_path, capsys):
    new = ("--set", "stylecrafter.num_layers=1", "--set", "stylecrafter.scale_num_layers=1")
    fast = (*new, "--lr", "0.01", "--set", "run.batch_size=1")
    frames, files = [], []
    for steps in ("1", "3"):
        out, more = tmp_path / steps, (*fast, "--steps", steps)
        assert trained(small, cache, out, "videocrafter-adapter", *more) == 0
        files = ["--adapter", out / "stylecrafter_video_adapter.safetensors"]
        frames.append(generated(small, tmp_path, f"{steps}.mp4", *files))
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    assert config["stylecrafter"]["fps"] == 8.0
    adapter = [str(word) for word in files]
    assert trained(small, cache, tmp_path / "two", "videocrafter-temporal", *fast, *adapter) == 0
    files += ["--temporal", tmp_path / "two" / "stylecrafter_temporal.safetensors"]
    frames.append(generated(small, tmp_path, "two.mp4", *files))
    for index, one in enumerate(frames):
        assert all(not np.array_equal(one, other) for other in frames[:index])
    capsys.readouterr()
    dry = (*new, *map(str, files), "--dry-run")
    assert trained(small, cache, tmp_path / "dry", "videocrafter-temporal", *dry) == 0
    assert "trainer videocrafter-temporal" in capsys.readouterr().out
