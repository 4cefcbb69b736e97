"""Configs, trained files, the command line on a cache, and the dry run."""

import argparse
import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import stylemaster_core
from stylemaster_core import (
    load_gray_tile_controlnet,
    load_motion_adapter,
    load_style_projector,
    load_transformer,
)
from stylemaster_core.cli.train import add_parser
from stylemaster_core.data.cache import CachedDataset
from stylemaster_core.data.cache_writer import CachePlan, Entry, write_cache
from stylemaster_core.data.videos import read_video
from stylemaster_core.errors import ConfigError, StyleMasterError, WeightsError
from stylemaster_core.models.small import draw_weights, write_small_models
from stylemaster_core.pipelines.models import ModelFiles, Models
from stylemaster_core.training import run_lock, setup
from stylemaster_core.training.base_model import create_base_trainer, new_base_weights
from stylemaster_core.training.config import (
    PRESETS,
    BaseConfig,
    ControlConfig,
    FlowConfig,
    MotionConfig,
    ProjectionConfig,
    RunConfig,
    StyleConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    override,
    read_config,
)
from stylemaster_core.training.dry_run import describe, estimate_memory
from stylemaster_core.training.global_projection import create_projection_trainer
from stylemaster_core.training.gray_tile_controlnet import create_control_trainer
from stylemaster_core.training.motion_adapter import create_motion_trainer
from stylemaster_core.training.stats import read_stats
from stylemaster_core.training.style_modulation import create_style_trainer
from stylemaster_core.training.synthetic import SyntheticWorld
from stylemaster_core.weights.convert import convert
from stylemaster_core.weights.files import read_state_dict, write_state_dict
from stylemaster_core.weights.shapes import (
    WanSizes,
    expected_adapter_shapes,
    expected_base_shapes,
    expected_controlnet_shapes,
)
from stylemaster_core.weights.state_dict import detect_kind, shapes_of, style_path_report

WORLD = SyntheticWorld()
SIZES = WanSizes(width=24, ffn_width=32, num_blocks=4, text_width=10, freq_width=8)
CONFIG = TrainConfig(
    "style", flow=FlowConfig(text_length=5, drop_text=0), motion=MotionConfig(rank=3),
    style=StyleConfig(drop_both=0, selection="all", global_tokens=3, num_layers=1, num_heads=2),
)  # fmt: skip
FEATURES = {key: tuple(value.shape) for key, value in WORLD.sample("x").items()}


def base_weights():
    return {k: v.float() for k, v in draw_weights(expected_base_shapes(SIZES), 0).items()}


def shaken(trainer):
    """The trainer with other weights than it starts from."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.trained().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainer


def written(trainer, folder):
    return [
        write_state_dict(folder / file.name, file.tensors, file.metadata)
        for file in trainer.outputs()
    ]


def inputs():
    draw = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 2, 4, 4, generator=draw)
    return latents, torch.tensor([700.0, 300.0]), torch.randn(2, 5, 10, generator=draw)


# ---- configs ----


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_to_dict(PRESETS[name])))
    assert read_config(path) == PRESETS[name] == read_config(name)


def test_overrides():
    config = override(PRESETS["style-images"], [
        "optimizer.lr=1", "run.precision=float32", "style.keep=15", "run.tensorboard=true",
        "optimizer.betas=[0.8,0.9]",
    ])  # fmt: skip
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.run.precision == "float32" and config.style.keep == 15 and config.run.tensorboard
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.flow == PRESETS["style-images"].flow


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optimizer.lr=fast", "optimizer.lr is 'fast'; expected float"),
        ("optimizer.lr=0", "optimizer.lr is 0.0; it must be positive"),
        ("optimizer.lr=NaN", "optimizer.lr is nan"),
        ("run.batch_size=1.5", "expected int"),
        ("run.batch_size=0", "at least 1"),
        ("run.precision=fp4", "expected one of"),
        ("optimizer.rate=1", "there is no field 'optimizer.rate'"),
        ("optimizer=1", "there is no field 'optimizer'"),
        ("flow.drop_text=0.9", "sum to above 1"),
        ("flow.drop_text", "sets nothing"),
    ],
)
def test_settings_that_cannot_work(setting, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        override(PRESETS["style-images"], [setting])


def test_configs_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="unknown field optimizer.rate"):
        config_from_dict({"optimizer": {"rate": 1}})
    with pytest.raises(ConfigError, match="neither a preset"):
        read_config("style-imags")
    (tmp_path / "bad.json").write_text("{")
    words = "bad.json .*cannot be read as a config in JSON.*line 1 column 2"
    with pytest.raises(ConfigError, match=words):
        read_config(tmp_path / "bad.json")


# ---- trained files ----


def test_style_adapter(tmp_path):
    trainer = shaken(create_style_trainer(CONFIG, base_weights(), FEATURES, num_heads=2))
    (path,) = written(trainer, tmp_path)
    (again,) = convert(path, tmp_path / "converted")
    for file in (path, again):
        tensors, metadata = read_state_dict(file)
        assert detect_kind(shapes_of(tensors)) == "style_adapter"
        assert metadata["style_num_heads"] == "2" and metadata["format"] == "stylemaster-adapter-1"
        assert json.loads(metadata["config"])["style"]["selection"] == "all"
        assert not style_path_report(tensors).is_uniform
        style = {k[12:]: v for k, v in tensors.items() if k.startswith("style_model.")}
        projector = load_style_projector(style, num_heads=2)
        net = load_transformer(base_weights() | tensors, num_heads=2)
        sample = {key: value[None] for key, value in WORLD.sample("y").items()}
        tokens = projector(
            sample["patch_features"], sample["shuffled_embeds"], selection="all"
        ).tokens
        latents, timestep, text = inputs()
        ours = trainer.transformer(latents, timestep, text, style=trainer._tokens(sample))
        torch.testing.assert_close(net(latents, timestep, text, style=tokens), ours)
    weights = read_state_dict(path).tensors
    expected = {k for k in expected_adapter_shapes() if "resblocks" not in k and ".0." in k}
    assert expected <= set(weights)
    resumed = create_style_trainer(CONFIG, base_weights(), FEATURES, adapter=weights, num_heads=2)
    assert all(torch.equal(v, weights[k]) for k, v in resumed.outputs()[0].tensors.items())


def test_controlnet(tmp_path):
    control = dataclasses.replace(CONFIG, trainer="control", control=ControlConfig(style="train"))
    trainer = create_control_trainer(control, base_weights(), FEATURES, num_heads=2)
    source = base_weights()
    first = trainer.outputs()[0].tensors
    assert torch.equal(first["control_blocks.1.ffn.0.weight"], source["blocks.2.ffn.0.weight"])
    assert first["zero_convs.1.weight"].eq(0).all()
    path, adapter = written(shaken(trainer), tmp_path)
    (again,) = convert(path, tmp_path / "converted")
    for file in (path, again):
        tensors = read_state_dict(file).tensors
        keys = {k for k in expected_controlnet_shapes() if k.startswith("control_blocks.1.")}
        assert {k for k in tensors if k.startswith("control_blocks.1.")} == keys
        network = load_gray_tile_controlnet(tensors, num_heads=2)
        latents, timestep, text = inputs()
        for ours, theirs in zip(
            trainer.controlnet(latents, timestep, text),
            network(latents, timestep, text), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(ours, theirs)
    assert detect_kind(shapes_of(read_state_dict(adapter).tensors)) == "style_adapter"
    weights = read_state_dict(path).tensors
    resumed = create_control_trainer(
        dataclasses.replace(control, control=ControlConfig()), base_weights(), FEATURES,
        controlnet=weights, num_heads=2,
    )  # fmt: skip
    (file,) = resumed.outputs()
    assert all(torch.equal(v, weights[k]) for k, v in file.tensors.items())


def test_a_frozen_style_branch_stays_as_it_was():
    adapter = create_style_trainer(CONFIG, base_weights(), FEATURES, num_heads=2)
    weights = shaken(adapter).outputs()[0].tensors
    frozen = dataclasses.replace(CONFIG, trainer="control", control=ControlConfig(style="frozen"))
    trainer = create_control_trainer(frozen, base_weights(), FEATURES, adapter=weights, num_heads=2)
    assert all(name.startswith("controlnet.") for name in trainer.trained())
    assert trainer.draws.keys[-2:] == ("patch_features", "shuffled_embeds")
    with pytest.raises(ConfigError, match="frozen needs a style adapter"):
        create_control_trainer(frozen, base_weights(), FEATURES, num_heads=2)


def test_motion_adapter(tmp_path):
    trainer = shaken(create_motion_trainer(CONFIG, base_weights(), num_heads=2))
    (path,) = written(trainer, tmp_path)
    tensors, metadata = read_state_dict(path)
    assert detect_kind(shapes_of(tensors)) == "motion_adapter" and metadata["rank"] == "3"
    assert all(key.startswith("diffusion_model.blocks.") for key in tensors)
    adapter = load_motion_adapter(tensors)
    net = load_transformer(base_weights(), num_heads=2)
    with adapter.attach(net):
        torch.testing.assert_close(net(*inputs()), trainer.transformer(*inputs()))
    assert not torch.allclose(net(*inputs()), trainer.transformer(*inputs()))


def test_base_model(tmp_path):
    sizes = BaseConfig(width=24, ffn_width=32, num_blocks=2, text_width=10)
    config = dataclasses.replace(CONFIG, trainer="base", base=sizes)
    fresh = new_base_weights(sizes, 0)
    assert all(torch.equal(v, new_base_weights(sizes, 0)[k]) for k, v in fresh.items())
    trainer = shaken(create_base_trainer(config, num_heads=2))
    (path,) = written(trainer, tmp_path)
    tensors = read_state_dict(path).tensors
    assert detect_kind(shapes_of(tensors)) == "wan_native"
    net = load_transformer(tensors, num_heads=2)
    torch.testing.assert_close(net(*inputs()), trainer.transformer(*inputs()))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_trained_file_has_the_dtype_that_was_asked_for(name):
    config = dataclasses.replace(CONFIG, run=RunConfig(output_dtype=name))
    (file,) = create_motion_trainer(config, base_weights(), num_heads=2).outputs()
    assert {value.dtype for value in file.tensors.values()} == {getattr(torch, name)}


def test_global_projection_goes_on_into_the_style_stage(tmp_path):
    projection = ProjectionConfig(hidden_width=12, train_tokens=True, global_tokens=3,
                                  token_width=10)  # fmt: skip
    config = dataclasses.replace(CONFIG, trainer="global-projection", projection=projection)
    widths = {key: tuple(value.shape) for key, value in WORLD.pair("x").items()}
    trainer = shaken(create_projection_trainer(config, widths))
    (path,) = written(trainer, tmp_path)
    weights = read_state_dict(path).tensors
    style = create_style_trainer(CONFIG, base_weights(), FEATURES, contrastive=weights, num_heads=2)
    assert style.embeds_key == "image_embeds", "the paper's MLP takes the plain picture"
    assert not any("contrastive" in name for name in style.trained())
    out = style.outputs()[0]
    assert out.metadata["global_embeds"] == "image_embeds"
    assert all(torch.equal(out.tensors[key], value) for key, value in weights.items())


def test_an_adapter_of_another_model_is_refused():
    small = dataclasses.replace(SIZES, num_blocks=2)
    other = {k: v.float() for k, v in draw_weights(expected_base_shapes(small), 0).items()}
    adapter = create_style_trainer(CONFIG, other, FEATURES, num_heads=2).outputs()[0].tensors
    with pytest.raises(WeightsError, match="not for a transformer of 4 blocks"):
        create_style_trainer(CONFIG, base_weights(), FEATURES, adapter=adapter, num_heads=2)
    wide = FEATURES | {"patch_features": (17, 18)}
    adapter = create_style_trainer(CONFIG, base_weights(), FEATURES, num_heads=2)
    with pytest.raises(StyleMasterError, match="image features of width 18"):
        create_style_trainer(
            CONFIG, base_weights(), wide, adapter=adapter.outputs()[0].tensors, num_heads=2
        )


# ---- the memory estimate ----


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("trainer", ["base", "motion"])
def test_the_estimate_of_activations_is_near_what_is_kept(trainer, every):
    """Two blocks more keep as much more as the estimate says; a peak while recomputing stays."""
    small, large = (kept_and_estimated(trainer, every, blocks) for blocks in (2, 4))
    assert large[0] - small[0] == pytest.approx(large[1] - small[1], rel=0.2)
    assert large[1] > small[1] > 0


def kept_and_estimated(name, every, num_blocks):
    sizes = dataclasses.replace(SIZES, width=64, ffn_width=128, num_blocks=num_blocks)
    weights = {k: v.float() for k, v in draw_weights(expected_base_shapes(sizes), 0).items()}
    run = RunConfig(batch_size=2, checkpoint_blocks=every)
    config = dataclasses.replace(CONFIG, trainer=name, run=run, motion=MotionConfig(rank=1))
    create = create_base_trainer if name == "base" else create_motion_trainer
    trainer = create(config, weights, num_heads=1)
    data = SyntheticWorld(size=(4, 16, 16)).dataset(2)
    drawn = [trainer.draws(data, i, torch.Generator(), 0.5) for i in range(2)]
    batch = {key: torch.stack([d[key] for d in drawn]) for key in drawn[0]}
    own = {p.untyped_storage().data_ptr() for p in trainer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        losses = trainer(batch)
    assert losses.shape == (2,)
    return sum(s.nbytes() for s in kept.values()), estimate_memory(trainer, data).activations


# ---- the command line ----


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_models(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    world = SyntheticWorld(size=(2, 4, 4), text_width=64, patches=257, patch_width=80,
                           embed_width=48)  # fmt: skip
    return write(tmp_path_factory.mktemp("cache") / "samples", "samples", world.dataset(8).samples)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    world = SyntheticWorld(embed_width=48)
    return write(tmp_path_factory.mktemp("cache") / "pairs", "pairs", world.pairs(8).samples)


def write(folder, kind, samples, vae="a" * 64, null_text=None):
    items = [(Entry(f"clip-{i}", "", str(i), str(i)), s) for i, s in enumerate(samples)]
    plan = CachePlan(kind, items, lambda item: item, lambda item, loaded: loaded,
                     {"vae": vae, "text_encoder": "b" * 64}, {}, null_text=null_text)  # fmt: skip
    write_cache(folder, plan)
    return folder


def command(*arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["train", *map(str, arguments)])
    return args.run(args)


QUICK = ["--steps", 2, "--batch-size", 2, "--cpu", "--no-progress",
         "--set", "run.precision=float32", "--set", "run.num_workers=0",
         "--set", "run.validation_samples=2", "--set", "run.validation_draws=1",
         "--set", "flow.text_length=8"]  # fmt: skip
UNDROPPED = ["--set", "flow.drop_text=0", "--set", "style.drop_both=0"]


def test_train_style_and_use_it(small, cache, tmp_path):
    out = tmp_path / "run"
    arguments = ["style", "--data", cache, "--base", small.stylemaster, "--out", out, *QUICK,
                 "--set", "style.num_heads=4", "--set", "style.num_layers=1"]  # fmt: skip
    with pytest.raises(ConfigError, match="give --text-encoder"):
        command(*arguments)
    config = tmp_path / "config.json"
    assert command(*arguments, *UNDROPPED) == 0
    assert json.loads((out / "config.json").read_text())["style"]["num_heads"] == 4
    assert command(*arguments, *UNDROPPED, "--resume", "--steps", 3) == 0
    config.write_text((out / "config.json").read_text())
    assert json.loads(config.read_text())["run"]["num_steps"] == 3
    path = out / "style_adapter.safetensors"
    assert len(read_state_dict(path).metadata["base_sha256"]) == 64
    models = Models(ModelFiles(transformer=small.stylemaster, adapter=path), device="cpu")
    with models.transformer() as net, models.style_projector() as projector:
        assert net.style_attention is not None
        assert projector.global_projection.proj.in_features == 48
    stage_b = tmp_path / "b"
    arguments = ["style", config, "--data", cache, "--base", small.stylemaster, "--adapter", path,
                 "--out", stage_b, "--steps", 1, "--cpu", "--no-progress"]  # fmt: skip
    other = write(tmp_path / "cache", "samples", [CachedDataset(cache)[0]] * 4, vae="c" * 64)
    with pytest.raises(WeightsError, match="data_vae_sha256 cccccccccccc instead of aaaaaaaaaaaa"):
        command(*arguments[:3], other, *arguments[4:])
    assert command(*arguments) == 0
    # Its learning rate is nearly 0 in the first step of the warm-up, so it is what it began as.
    before, after = (read_state_dict(p).tensors for p in (path, stage_b / path.name))
    assert all(torch.allclose(before[k].float(), after[k].float(), atol=1e-2) for k in before)


def test_the_empty_prompt_is_encoded_once_and_kept(small, cache, tmp_path, monkeypatch):
    out = tmp_path / "run"
    arguments = ["motion", "--data", cache, "--base", small.stylemaster, "--out", out, *QUICK,
                 "--set", "motion.rank=2"]  # fmt: skip
    with pytest.raises(ConfigError, match="made with another text encoder"):
        command(*arguments, "--text-encoder", small.text_encoder)
    monkeypatch.setattr(CachedDataset, "check_encoders", lambda self, files: None)
    assert command(*arguments, "--text-encoder", small.text_encoder) == 0
    kept = read_state_dict(out / "null_text.safetensors").tensors["null_text"]
    assert kept.shape == (1, 64)
    assert command(*arguments, "--resume") == 0


def test_the_empty_prompt_of_the_cache_needs_no_text_encoder(small, cache, tmp_path, monkeypatch):
    samples = [CachedDataset(cache)[i] for i in range(4)]
    features = torch.full((1, 64), 0.5, dtype=torch.float16)
    data = write(tmp_path / "cache", "samples", samples, null_text=lambda: features)
    made, create = [], setup.create_trainer

    def remember(*arguments, **options):
        made.append(create(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(setup, "create_trainer", remember)
    arguments = ["motion", "--data", data, "--base", small.stylemaster, *QUICK,
                 "--set", "motion.rank=2"]  # fmt: skip
    for extra in ("--dry-run", "--no-progress"):
        assert command(*arguments, "--out", tmp_path / "run", extra) == 0
    null = made[-1].null_text
    assert torch.equal(null[:1], features.float()) and not null[1:].any()
    assert not (tmp_path / "run" / "null_text.safetensors").exists()


@pytest.mark.parametrize("trainer", ["global-projection", "motion", "control", "base"])
def test_train_the_others(trainer, small, cache, pairs, tmp_path):
    data = pairs if trainer == "global-projection" else cache
    arguments = [trainer, "--data", data, "--out", tmp_path, *QUICK, *UNDROPPED]
    if trainer == "control":
        with pytest.raises(WeightsError, match="needs a base transformer"):
            command(*arguments)
        with_tile = ["--base", small.stylemaster, "--controlnet", small.controlnet]
        arguments += with_tile
    elif trainer == "motion":
        arguments += ["--base", small.stylemaster, "--motion-adapter", small.motion_adapter]
    elif trainer == "base":
        arguments += ["--set", "base.width=128", "--set", "base.text_width=64",
                      "--set", "base.num_blocks=2"]  # fmt: skip
    assert command(*arguments) == 0
    (path,) = tmp_path.glob("*.safetensors")
    assert read_state_dict(path).metadata["trainer"] == trainer


def test_samples_of_a_run_are_decoded_and_measured(small, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(CachedDataset, "check_encoders", lambda self, files: None)
    arguments = ["control", "--data", cache, "--base", small.stylemaster, "--vae", small.vae,
                 "--out", tmp_path, *QUICK, *UNDROPPED, "--set", "run.sample_every=2",
                 "--set", "run.sample_steps=1", "--set", "run.sample_text_scale=1"]  # fmt: skip
    assert command(*arguments) == 0
    (line,) = (line for line in read_stats(tmp_path) if "sample" in line)
    assert read_video(tmp_path / line["sample_video"]).frames.shape == (5, 32, 32, 3)
    numbers = ("colour", "gabor", "luma", "difference")
    assert all(line[f"sample_{name}"] > 0 for name in numbers)


def test_train_both_stages_of_stylecrafter(small, cache, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    common = ["--data", cache, "--base", small.stylemaster, *QUICK]
    sizes = [f"stylecrafter.{s}" for s in ("num_layers=1", "num_heads=2", "scale_width=32",
             "scale_num_heads=4", "rank=2", "image_share=0")]  # fmt: skip
    settings = [part for size in sizes for part in ("--set", size)]
    one = ["stylecrafter", *common, *settings, "--out", first]
    for extra in ("--dry-run", "--no-progress"):
        assert command(*one, extra) == 0
    assert "style_attention" not in capsys.readouterr().err
    (adapter,) = first.glob("*.safetensors")
    header = read_state_dict(adapter).metadata
    assert header["format"] == "stylecrafter-wan-1" and header["base_model"] == "custom"
    two = ["stylecrafter-video", *common, "--adapter", adapter, "--out", second]
    two += ["--set", "stylecrafter.rank=2", "--set", "stylecrafter.image_share=0"]
    for extra in ("--dry-run", "--no-progress"):
        assert command(*two, extra) == 0
    (lora,) = second.glob("*.safetensors")
    content = read_state_dict(lora)
    assert content.metadata["format"] == "stylecrafter-video-lora-1"
    assert content.metadata["adapter_sha256"] and len(content.tensors) == 4 * 4 * 2
    with pytest.raises(WeightsError, match="adapter: .* StyleCrafter adapter for Wan"):
        command("style", *common, *UNDROPPED, "--adapter", adapter, "--out", tmp_path / "third")
    with pytest.raises(WeightsError, match="needs the adapter of the first stage"):
        command(*two[:-8], "--out", tmp_path / "third")


@pytest.mark.parametrize("trainer", ["global-projection", "style", "motion", "control", "base"])
def test_dry_run(trainer, small, cache, pairs, tmp_path, capsys):
    data = pairs if trainer == "global-projection" else cache
    arguments = [trainer, "--data", data, "--out", tmp_path / "run", *UNDROPPED, "--dry-run"]
    arguments += ["--set", "flow.text_length=8"]
    if trainer not in ("global-projection", "base"):
        arguments += ["--base", small.stylemaster]
    if trainer == "base":
        arguments += ["--set", "base.text_width=64"]
    assert command(*arguments) == 0
    text = capsys.readouterr().out
    assert f"trainer {trainer}" in text and "8 samples" in text and "in all" in text
    trained = {"global-projection": 198_704, "motion": 4 * 4 * 2 * 256 * 64}
    if trainer in trained:
        assert f"trained in all {trained[trainer]:,}" in text
    assert not (tmp_path / "run").exists()


def test_files_and_configs_of_another_kind(small, cache, pairs, tmp_path):
    common = ["--out", tmp_path / "run", *QUICK, *UNDROPPED]
    style = ["style", "--data", cache, "--base", small.stylemaster, *common]

    def fails(error, match, *arguments):
        with pytest.raises(error, match=match):
            command(*arguments)
        assert not (tmp_path / "run").exists()

    fails(WeightsError, "adapter: .* gray-tile", *style, "--adapter", small.controlnet)
    fails(WeightsError, "does not exist", *style, "--adapter", tmp_path / "no.safetensors")
    fails(ConfigError, "no use for controlnet", *style, "--controlnet", small.controlnet)
    fails(ConfigError, "config for the trainer 'motion'", "style", "motion", *style[1:])
    fails(ConfigError, "made with another vae", *style, "--vae", small.vae)
    fails(ConfigError, "expected one of samples", *style[:1], "--data", pairs, *style[3:])
    fails(ConfigError, "expected one of pairs", "global-projection", "--data", cache, *common)
    with pytest.raises(StyleMasterError, match="no finished cache|manifest|no cache"):
        command(*style[:1], "--data", tmp_path, *style[3:])


@pytest.mark.parametrize("package", ["data", "training"])
def test_only_the_command_line_names_its_options(package):
    """What these packages say is read by users of the nodes, too, which have inputs instead."""
    said = []
    for path in (Path(stylemaster_core.__file__).parent / package).glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = (n for n in nodes if isinstance(n, ast.Constant) and id(n) not in docstrings)
        said += [(path.name, text.value) for text in texts if isinstance(text.value, str)]
    assert len(said) > 100
    option = re.compile(r"(?<!install )--[a-z]|stylemaster (data|train)")
    named = [words for words in said if option.search(words[1])]
    assert not named


def test_one_process_at_a_time_trains_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "LOOK_S", 0.1)
    assert not run_lock.is_running(tmp_path / "none")
    for _ in range(2):
        lock = run_lock.lock_run(tmp_path)
        assert run_lock.is_running(tmp_path)
        with pytest.raises(ConfigError, match="another process is training in"):
            run_lock.lock_run(tmp_path)
        lock.release()
        assert not run_lock.is_running(tmp_path)


def test_describe_says_what_does_not_fit(cache):
    trainer = create_style_trainer(CONFIG, base_weights(), FEATURES, num_heads=2)
    with pytest.raises(StyleMasterError, match="sample 'clip-0'"):
        describe(trainer, CachedDataset(cache))
