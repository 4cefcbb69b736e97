"""The two trainers of StyleCrafter on Wan: they learn what they must, from the base model on."""

import dataclasses
import functools

import pytest
import torch

from stylemaster_core.errors import ConfigError, LayoutError, WeightsError
from stylemaster_core.models.motion_adapter import (
    MOTION_SCALE,
    VIDEO_LORA_FORMAT,
    attached_motion,
    load_motion_adapter,
)
from stylemaster_core.models.wan_transformer import load_transformer
from stylemaster_core.training.base_model import create_base_trainer
from stylemaster_core.training.checkpoint import Checkpoint
from stylemaster_core.training.checks import check_resume
from stylemaster_core.training.config import (
    BaseConfig,
    FlowConfig,
    OptimizerConfig,
    RunConfig,
    StyleConfig,
    StyleCrafterConfig,
    TrainConfig,
    config_to_dict,
)
from stylemaster_core.training.loop import train
from stylemaster_core.training.samples import generator_of
from stylemaster_core.training.setup import TrainingFiles, create_trainer
from stylemaster_core.training.stats import read_stats
from stylemaster_core.training.stylecrafter import (
    create_stylecrafter_trainer,
    create_stylecrafter_video_trainer,
)
from stylemaster_core.training.synthetic import SyntheticWorld
from stylemaster_core.weights.files import write_state_dict
from stylemaster_core.weights.state_dict import detect_kind, shapes_of
from tests.style_datasets import joined, of_another

CLIPS, PICTURES = (SyntheticWorld(size=(frames, 4, 4)) for frames in (3, 1))
BASE = BaseConfig(width=64, ffn_width=128, num_blocks=2, text_width=10)
FLOW = FlowConfig(text_length=7, timesteps="logit_normal", weighting="none", shift=2.0,
                  drop_text=0.0)  # fmt: skip
CRAFTER = StyleCrafterConfig(num_tokens=4, num_layers=1, num_heads=2, scale_width=16,
                             scale_num_layers=1, scale_num_heads=2, rank=8)  # fmt: skip


def config_of(trainer, steps=120, lr=5e-3, **sections):
    run = RunConfig(num_steps=steps, batch_size=16, save_every=10_000, validate_every=steps,
                    validation_draws=4)  # fmt: skip
    optimizer = OptimizerConfig(lr=lr, warmup_steps=10, schedule="cosine", weight_decay=0.0)
    style = StyleConfig(drop_style=0.0, drop_both=0.0)
    defaults = {"flow": FLOW, "style": style, "stylecrafter": CRAFTER, "base": BASE}
    return TrainConfig(trainer, run, optimizer, **(defaults | sections))


def features():
    return {key: tuple(value.shape) for key, value in PICTURES.sample("x").items()}


def held_out(trainer, folder, data, validation):
    train(trainer, data, folder, validation=validation)
    lines = [line for line in read_stats(folder) if "validation_loss" in line]
    return lines[0]["validation_loss"], lines[-1]["validation_loss"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base that knows texts, pictures and clips, and no style."""
    trainer = create_base_trainer(config_of("base", 300), num_heads=2)
    data = joined(*(w.dataset(192, style=False) for w in (CLIPS, PICTURES)))
    train(trainer, data, tmp_path_factory.mktemp("base"), validation=CLIPS.dataset(2, "held out"))
    return trainer.outputs()[0].tensors


@pytest.fixture(scope="module")
def stage_one(base, tmp_path_factory):
    """Adapter of the first stage, its losses before and after, and that of an ablation."""
    data, validation = PICTURES.dataset(256), PICTURES.dataset(32, "held out")

    def run(name, dataset):
        trainer = create_stylecrafter_trainer(config_of("stylecrafter"), base, features(),
                                              num_heads=2)  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        return trainer, held_out(trainer, folder, dataset, validation)

    trainer, (before, after) = run("own", data)
    _, (_, other) = run("other", of_another(data))
    return trainer.outputs()[0], before, after, other


def test_the_first_stage_learns_the_style(stage_one):
    file, before, after, other = stage_one
    print(f"\nstylecrafter: {before:.4f} -> {after:.4f}; style of another {other:.4f}")
    assert after < 0.85 * before and after < 0.9 * other
    assert file.name == "stylecrafter_adapter.safetensors"
    assert detect_kind(shapes_of(file.tensors)) == "stylecrafter_wan"
    header = {"format": "stylecrafter-wan-1", "style_num_heads": "2", "scale_num_heads": "2"}
    assert header.items() <= file.metadata.items() and file.metadata["trainer"] == "stylecrafter"


def test_the_first_stage_starts_from_the_base_exactly(base):
    config = config_of("stylecrafter")
    trainer = create_stylecrafter_trainer(config, base, features(), num_heads=2)
    sample = {k: v[None] for k, v in trainer.flow_draws.read(PICTURES.sample("x")).items()}
    arguments = sample["latents"], torch.tensor([700.0]), sample["text"]
    with torch.no_grad():
        ours = trainer.velocity(*arguments, sample)
        assert torch.equal(ours, load_transformer(base, num_heads=2)(*arguments))


@pytest.mark.parametrize("norm", [True, False])
def test_nothing_of_the_adapter_is_stuck(base, tmp_path, norm):
    crafter = dataclasses.replace(CRAFTER, norm=norm)
    config = config_of("stylecrafter", 20, stylecrafter=crafter)
    trainer = create_stylecrafter_trainer(config, base, features(), num_heads=2)
    before = {name: p.detach().clone() for name, p in trainer.trained().items()}
    frozen = {n: p.clone() for n, p in trainer.named_parameters() if not p.requires_grad}
    train(trainer, PICTURES.dataset(32), tmp_path, validation=PICTURES.dataset(2))
    assert [n for n, p in trainer.trained().items() if torch.equal(p, before[n])] == []
    assert all("encoder." in n or "style_attention." in n for n in before)
    assert len(frozen) > 50
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.named_parameters() if n in frozen)


@pytest.mark.parametrize(("chosen", "begun"), [("style", False), ("style", True), ("scales", True)])
def test_parts_of_the_adapter_learn_alone(base, stage_one, tmp_path, chosen, begun):
    config = config_of("stylecrafter", 2, stylecrafter=dataclasses.replace(CRAFTER, train=chosen))
    last = "scale_predictor.out_proj.2."  # 0: gain 1, far from where tanh is flat
    trained = stage_one[0].tensors
    adapter = {k: v * (not k.startswith(last)) for k, v in trained.items()} if begun else None
    trainer = create_stylecrafter_trainer(config, base, features(), adapter=adapter, num_heads=2)
    before = {key: value.clone() for key, value in trainer.outputs()[0].tensors.items()}
    train(trainer, PICTURES.dataset(8), tmp_path, validation=PICTURES.dataset(2))
    after = trainer.outputs()[0].tensors
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert {key.startswith("scale_predictor.") for key in changed} == {chosen == "scales"}


def test_scales_of_no_adapter_are_refused(base):
    config = config_of("stylecrafter", stylecrafter=dataclasses.replace(CRAFTER, train="scales"))
    with pytest.raises(ConfigError, match="stylecrafter.train is scales.*give the adapter"):
        create_stylecrafter_trainer(config, base, features(), num_heads=2)


def test_a_dropped_style_is_the_base_model(base, stage_one):
    config = config_of("stylecrafter", style=StyleConfig(drop_style=0.5, drop_both=0.0))
    adapter = stage_one[0].tensors
    trainer = create_stylecrafter_trainer(config, base, features(), adapter=adapter, num_heads=2)
    data = PICTURES.dataset(2)
    drawn = [trainer.draws(data, i, generator_of(i), 0.3) for i in range(2)]
    for sample, dropped in zip(drawn, (True, False), strict=True):
        sample["drop_style"] = torch.tensor(dropped)
    batch = {key: torch.stack([s[key] for s in drawn]) for key in drawn[0]}
    with torch.no_grad():
        losses = trainer(batch)
        plain = load_transformer(base, num_heads=2)
        for i, equal in enumerate((True, False)):
            clean, noise, level = (drawn[i][k][None] for k in ("latents", "noise", "level"))
            noisy = torch.lerp(clean, noise, trainer.sigmas[level].view(-1, 1, 1, 1, 1))
            velocity = plain(noisy, trainer.timesteps[level], drawn[i]["text"][None])
            loss = (velocity - (noise - clean)).square().mean()
            assert torch.isclose(loss, losses[i], rtol=1e-5) == equal
    flags = [trainer.draws(data, 0, generator_of("d", i), None)["drop_style"] for i in range(400)]
    assert torch.stack(flags).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_the_second_stage_learns_clips_with_the_adapter_frozen(base, stage_one, tmp_path):
    adapter = stage_one[0].tensors
    data = joined(CLIPS.dataset(128), PICTURES.dataset(32))
    validation = CLIPS.dataset(24, "held out")

    def run(name, dataset):
        config = config_of("stylecrafter-video", 80, 1e-2)
        trainer = create_stylecrafter_video_trainer(config, base, adapter, num_heads=2)
        return trainer, held_out(trainer, tmp_path / name, dataset, validation)

    trainer, (before, after) = run("own", data)
    _, (_, other) = run("other", of_another(data))
    print(f"\nstylecrafter-video: {before:.4f} -> {after:.4f}; style of another {other:.4f}")
    assert after < 0.97 * before and after < 0.99 * other
    assert all(".lora_" in name for name in trainer.trained())
    kept = trainer.encoder.release_state_dict() | trainer.transformer.style_attention.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in adapter.items())
    (file,) = trainer.outputs()
    assert file.name == "stylecrafter_video_lora.safetensors"
    assert file.metadata["format"] == VIDEO_LORA_FORMAT and file.metadata["rank"] == "8"
    assert detect_kind(shapes_of(file.tensors)) == "motion_adapter"


def test_the_lora_acts_in_videos_alone(base):
    shapes = {
        f"blocks.{b}.self_attn.{p}.lora_{x}.weight": (2, 64) if x == "A" else (64, 2)
        for b in range(2) for p in "qkvo" for x in "AB"
    }  # fmt: skip
    net = load_transformer(base, num_heads=2)
    net.motion_adapter = load_motion_adapter({k: torch.ones(s) for k, s in shapes.items()})

    def scale(given, **options):
        with attached_motion(net, given, **options):
            motion = net.blocks[0].motion
            return 0.0 if motion is None else motion.scale.item()

    assert scale(None) == MOTION_SCALE and scale(0.7) == 0.7 and scale(0.0) == 0.0
    net.motion_adapter.for_videos = True
    assert scale(None) == 1.0 and scale(None, is_video=False) == 0.0
    assert scale(0.5, is_video=False) == 0.5


@pytest.mark.parametrize(
    ("clips", "pictures", "share", "expected"),
    [(8, 1, 0.2, (8, 2)), (4, 9, 0.2, (36, 9)), (8, 2, 0.2, (8, 2)), (5, 3, 0.0, (5, 0)),
     (5, 3, 1.0, (0, 3)), (3, 3, 0.5, (3, 3))],
)  # fmt: skip
def test_share_of_pictures(base, stage_one, clips, pictures, share, expected):
    crafter = dataclasses.replace(CRAFTER, image_share=share)
    config = config_of("stylecrafter-video", stylecrafter=crafter)
    trainer = create_stylecrafter_video_trainer(config, base, stage_one[0].tensors, num_heads=2)
    arranged = trainer.arrange(joined(CLIPS.dataset(clips), PICTURES.dataset(pictures)))
    counts = tuple(
        sum((size[1] > 1) == is_clip for size in arranged.sizes) for is_clip in (True, False)
    )
    assert counts == expected
    assert len(set(arranged.ids)) == clips * (share < 1) + pictures * (share > 0)


def test_data_of_one_kind_are_refused(base, stage_one):
    adapter = stage_one[0].tensors
    config = config_of("stylecrafter-video")
    trainer = create_stylecrafter_video_trainer(config, base, adapter, num_heads=2)
    with pytest.raises(ConfigError, match="8 clips and 0 pictures.*set it to 0 or 1"):
        trainer.arrange(CLIPS.dataset(8))


def test_from_files(base, stage_one, tmp_path):
    write_state_dict(tmp_path / "base.safetensors", base)
    file = stage_one[0]
    adapter = write_state_dict(tmp_path / "adapter.safetensors", file.tensors, file.metadata)
    data = PICTURES.dataset(4)
    files = functools.partial(TrainingFiles, base=tmp_path / "base.safetensors")
    config = config_of("stylecrafter-video")
    with pytest.raises(WeightsError, match="needs the adapter of the first stage"):
        create_trainer(config, files(), data)
    with pytest.raises(ConfigError, match="no use for controlnet"):
        create_trainer(config, files(controlnet=adapter), data)
    wide = {k: v for k, v in file.tensors.items() if "blocks.1." not in k or "cross" not in k}
    with pytest.raises(WeightsError, match=r"missing: blocks\.1\.cross_attn"):
        create_stylecrafter_trainer(config, base, features(), adapter=wide, num_heads=2)
    with pytest.raises(LayoutError, match="image features of width 9"):
        trainer = create_stylecrafter_trainer(config_of("stylecrafter"), base, features(),
                                              num_heads=2)  # fmt: skip
        trainer.check({**features(), "patch_features": (17, 9)}, 4)


def test_a_run_begun_before_a_setting_existed_goes_on():
    config = config_of("style")
    old = {k: v for k, v in config_to_dict(config).items() if k != "stylecrafter"}
    config = dataclasses.replace(config, stylecrafter=StyleCrafterConfig())
    check_resume(Checkpoint(5, "style", old, {}, 1), config, {}, 1)
    changed = dataclasses.replace(config, stylecrafter=CRAFTER)
    with pytest.raises(ConfigError, match=r"stylecrafter\.rank 8 instead of 32"):
        check_resume(Checkpoint(5, "style", old, {}, 1), changed, {}, 1)
