"""VideoCrafter's files: key lists, conversion, its parts, and the command line on small weights."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stylemaster_core.cli import main
from stylemaster_core.data.videos import read_video
from stylemaster_core.errors import ConfigError, LayoutError, WeightsError
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.sd_parts import TextEncoder, load_sd2_text, load_sd_vae
from stylemaster_core.models.sdxl_unet import check_unet, cross_attentions
from stylemaster_core.models.small_videocrafter import SIZES, write_small_videocrafter
from stylemaster_core.models.stylecrafter import create_stylecrafter_encoder
from stylemaster_core.models.stylecrafter_sdxl import StyleCrafterSdxl
from stylemaster_core.models.videocrafter_unet import (
    VideoCrafterUNet,
    is_temporal,
    load_videocrafter_unet,
)
from stylemaster_core.pipelines.stylize_sdxl import load_adapter, prepare_styles
from stylemaster_core.pipelines.stylize_videocrafter import (
    VideoCrafterConfig,
    load_videocrafter,
    stylize_videocrafter,
)
from stylemaster_core.weights.convert import convert
from stylemaster_core.weights.files import read_state_dict, write_state_dict
from stylemaster_core.weights.shapes import StyleCrafterSizes
from stylemaster_core.weights.state_dict import detect_kind, shapes_of
from stylemaster_core.weights.stylecrafter_video_keys import (
    stylecrafter_video_to_sdxl,
    video_layer_names,
)
from stylemaster_core.weights.videocrafter_keys import (
    TEMPORAL_KEY,
    VideoCrafterSizes,
    videocrafter_sizes,
)

KEYS = Path(__file__).parents[1] / "golden/checkpoint_keys/stylecrafter_video_ckpt_keys.json"
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def released():
    content = json.loads(KEYS.read_text())
    for part in ("base", "adapter"):
        content[part] = {key: tuple(shape) for key, shape in content[part].items()}
    return content


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return VideoCrafterUNet(VideoCrafterSizes())


# ---- key lists ----


def test_the_unet_has_the_keys_of_the_release(released, unet):
    wanted = {k.removeprefix(PREFIX): v for k, v in released["base"].items() if PREFIX in k}
    names = unet.release_keys
    ours = {names[key]: tuple(value.shape) for key, value in unet.state_dict().items()}
    assert ours == wanted and len(wanted) == 1196
    assert videocrafter_sizes(wanted) == VideoCrafterSizes()
    numbers = released["params"]
    assert sum(p.numel() for p in unet.parameters()) == numbers["unet"] == 1_144_485_956
    temporal = {key: p for key, p in unet.named_parameters() if is_temporal(key)}
    assert sum(p.numel() for p in temporal.values()) == numbers["temporal"] == 278_575_232
    modules = {TEMPORAL_KEY.fullmatch(names[key])[1] for key in temporal}
    assert modules == set(released["temporal_modules"]) and len(temporal) == 510
    assert sum(TEMPORAL_KEY.fullmatch(key) is not None for key in wanted) == 510


def test_the_adapter_has_the_keys_of_the_release(released, unet):
    keys = released["adapter"]
    names = video_layer_names(keys)
    assert [f"kv_attn_layers.{name}" for name in names] == released["layers"]
    assert names == unet.style_layer_names
    sizes = StyleCrafterSizes(
        style_width=1024, text_width=1024, num_tokens=8, num_layers=3, num_scales=16,
        scale_width=1024,
    )  # fmt: skip
    with torch.device("meta"):
        encoder = create_stylecrafter_encoder(sizes, num_heads=8, scale_num_heads=8)
        widths = [unet.get_submodule(n).to_q.out_features for n in cross_attentions(unet)]
        adapter = StyleCrafterSdxl(encoder, widths)
    adapter.video_layers = names
    assert shapes_of(adapter.release_state_dict()) == keys and len(keys) == 139
    total = sum(value.numel() for value in adapter.release_state_dict().values())
    assert total == released["params"]["adapter_total"] == 111_188_161
    check_unet(unet, adapter)


def test_the_other_parts_have_the_keys_of_the_release(released):
    def part(prefix):
        keys = {k: v for k, v in released["base"].items() if k.startswith(prefix)}
        return {k.removeprefix(prefix): torch.empty(v, device="meta") for k, v in keys.items()}

    vae = load_sd_vae(part("first_stage_model."))
    assert sum(p.numel() for p in vae.parameters()) == released["params"]["vae"]
    assert list(vae.config["block_out_channels"]) == [128, 256, 512, 512]
    text = load_sd2_text(part("cond_stage_model.model."))
    assert text.config.num_hidden_layers == 23 and text.config.num_attention_heads == 16


def test_scales_that_are_not_one_for_each_layer_are_refused(released):
    tensors = {key: torch.empty(shape) for key, shape in released["adapter"].items()
               if "kv_attn" not in key or "input" in key}  # fmt: skip
    with pytest.raises(WeightsError, match="16 scales for 6 layers"):
        stylecrafter_video_to_sdxl(tensors)
    with pytest.raises(WeightsError, match=r"'something.else' is no key"):
        stylecrafter_video_to_sdxl(tensors | {"something.else": torch.ones(1)})


# ---- conversion ----


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_videocrafter(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def converted(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    return [path for source in small[:3] for path in convert(source, folder)]


def test_a_checkpoint_becomes_files_of_its_parts(small, converted):
    kinds = [detect_kind(shapes_of(read_state_dict(path).tensors)) for path in converted]
    assert kinds == ["videocrafter_unet", "sd_vae", "clip_text_open_clip", "stylecrafter_video",
                     "stylecrafter_temporal"]  # fmt: skip
    whole = read_state_dict(small.checkpoint).tensors
    for path, prefix in zip(
        converted, (PREFIX, "first_stage_model.", "cond_stage_model.model."), strict=False
    ):
        content = read_state_dict(path)
        assert content.metadata["licence"] == "research and non-commercial use only"
        assert len(content.tensors) == sum(key.startswith(prefix) for key in whole)
        for key, value in content.tensors.items():
            assert torch.equal(value, whole[prefix + key])


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (f"{PREFIX}init_attn.0.norm.bias", "1 missing: init_attn.0.norm.bias"),
        ("first_stage_model.decoder.conv_in.bias", "1 missing: decoder.conv_in.bias"),
        (
            "cond_stage_model.model.ln_final.bias",
            r"1 missing: (text_model\.)?final_layer_norm\.bias",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_not_converted(small, tmp_path, key, words):
    tensors = dict(read_state_dict(small.checkpoint).tensors)
    del tensors[key]
    torch.save(tensors, tmp_path / "cut.ckpt")
    with pytest.raises(WeightsError, match=words):
        convert(tmp_path / "cut.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_of_a_checkpoint_is_named(small, tmp_path):
    tensors = dict(read_state_dict(small.checkpoint).tensors) | {"betas": torch.ones(3)}
    torch.save(tensors | {"style_stage.x": torch.ones(1)}, tmp_path / "more.ckpt")
    with pytest.raises(WeightsError, match=r"1 unexpected: style_stage\.x"):
        convert(tmp_path / "more.ckpt", tmp_path / "out")
    torch.save(tensors, tmp_path / "scheduled.ckpt")  # the noise schedule is left out
    assert len(convert(tmp_path / "scheduled.ckpt", tmp_path / "out")) == 3


def test_temporal_layers_take_the_place_of_the_unets(converted):
    unet, temporal = (read_state_dict(converted[i]).tensors for i in (0, 4))
    before, after = load_videocrafter_unet(unet), load_videocrafter_unet(unet, temporal)
    assert set(after.temporal_state_dict()) == set(temporal)
    for (key, ours), theirs in zip(
        after.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs) != is_temporal(key), key
    with pytest.raises(WeightsError, match="the temporal layers for this UNet"):
        load_videocrafter_unet(unet, {key: value[:1] for key, value in temporal.items()})
    assert videocrafter_sizes(shapes_of(unet)) == SIZES


def test_weights_that_know_of_a_frame_rate(converted):
    unet = {k: v.float() for k, v in read_state_dict(converted[0]).tensors.items()}
    width = unet["time_embed.2.bias"].shape[0]
    told = {f"fps_embedding.{k.split('.', 1)[1]}": v.clone() for k, v in unet.items()
            if k.startswith("time_embed.")}  # fmt: skip
    model = load_videocrafter_unet(unet | told)
    x, text = torch.ones(2, 4, 4, 4), torch.ones(2, 77, SIZES.text_width)
    with torch.no_grad():
        slow, fast = (model(x, torch.tensor(5), text, 2, fps) for fps in (8.0, 24.0))
        untold = load_videocrafter_unet(unet)(x, torch.tensor(5), text, 2, 24.0)
    assert (slow - fast).abs().max() > 1e-4 and width == model.fps_embedding.linear_2.out_features
    assert (untold - fast).abs().max() > 1e-4


def test_a_batch_that_is_no_video_is_refused(converted):
    model = load_videocrafter_unet(read_state_dict(converted[0]).tensors)
    text = torch.ones(3, 77, SIZES.text_width)
    with pytest.raises(LayoutError, match="no batch of videos of 2 frames"):
        model(torch.ones(3, 4, 4, 4), torch.tensor(5), text, 2)
    with pytest.raises(LayoutError, match="multiples of 16 px"):
        model(torch.ones(2, 4, 3, 4), torch.tensor(5), text[:2], 2)


# ---- the text encoder ----


def open_clip_features(tensors, tokens, num_layers):
    """What open_clip computes, up to a layer; then its final norm."""
    width = tensors["ln_final.bias"].shape[0]

    def norm(name, x):
        return nn.functional.layer_norm(
            x, (width,), tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        )

    x = tensors["token_embedding.weight"][tokens] + tensors["positional_embedding"]
    mask = torch.full((77, 77), float("-inf")).triu(1)
    for layer in range(num_layers):
        name = f"transformer.resblocks.{layer}."
        attention = nn.MultiheadAttention(width, 1, batch_first=True)
        attention.load_state_dict(
            {k.removeprefix(f"{name}attn."): v for k, v in tensors.items() if f"{name}attn." in k}
        )
        y = norm(f"{name}ln_1", x)
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = norm(f"{name}ln_2", x)
        y = y @ tensors[f"{name}mlp.c_fc.weight"].T + tensors[f"{name}mlp.c_fc.bias"]
        y = nn.functional.gelu(y) @ tensors[f"{name}mlp.c_proj.weight"].T
        x = x + y + tensors[f"{name}mlp.c_proj.bias"]
    return norm("ln_final", x)


@torch.no_grad()
def test_prompts_are_read_as_open_clip_does_but_for_the_last_layer(converted):
    tensors = {k: v.float() for k, v in read_state_dict(converted[2]).tensors.items()}
    encoder = TextEncoder(load_sd2_text(tensors))
    value = encoder.encode("a photo of a cat")
    # open_clip's numbers of these words: start, the words, end, and zeros after it.
    tokens = torch.zeros(1, 77, dtype=torch.long)
    tokens[0, :7] = torch.tensor([49406, 320, 1125, 539, 320, 2368, 49407])
    expected = open_clip_features(tensors, tokens, 2)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert (value - open_clip_features(tensors, tokens, 3)).abs().max() > 1e-2
    assert encoder.encode("a cat " * 90).shape == (1, 77, SIZES.text_width)


# ---- the whole way ----


@pytest.fixture(scope="module")
def models(converted):
    return load_videocrafter(*converted[:3], temporal=converted[4])


CONFIG = VideoCrafterConfig(prompt="a cat", size=(16, 32), num_frames=3, num_steps=2)


def generate(models, converted, style, **changes):
    adapter = load_adapter(converted[3])
    styles = prepare_styles(adapter, style) if style else []
    return stylize_videocrafter(models, adapter, styles, dataclasses.replace(CONFIG, **changes))


def region(seed=0, **options):
    tokens = torch.randn(1, 8, SIZES.text_width, generator=torch.Generator().manual_seed(seed))
    return StyleRegion(tokens, **options)


def test_a_video_is_repeated_by_its_seed_and_follows_its_style(models, converted):
    plain = generate(models, converted, [])
    styled = generate(models, converted, [region()])
    assert styled.shape == (3, 16, 32, 3) and styled.dtype == np.uint8
    assert np.array_equal(styled, generate(models, converted, [region()]))
    assert not np.array_equal(styled, plain)
    assert np.array_equal(generate(models, converted, [region(scale=0.0)], style_scale=0.0),
                          generate(models, converted, [], text_scale=15.0))  # fmt: skip
    for other in ({"seed": 4}, {"eta": 0.0}, {"prompt": "two dogs"}):
        assert not np.array_equal(styled, generate(models, converted, [region()], **other))


def test_a_mask_of_each_frame_is_that_frames(models, converted):
    mask = torch.zeros(3, 32, 48)
    mask[1] = 1
    temporal_free = models._replace(unet=_without_temporal(models.unet))
    plain, some = (
        generate(temporal_free, converted, [region(mask=m)]) for m in (torch.zeros_like(mask), mask)
    )
    differs = [not np.array_equal(a, b) for a, b in zip(plain, some, strict=True)]
    assert differs == [False, True, False]


def _without_temporal(unet):
    unet = copy.deepcopy(unet)
    for key, value in unet.named_parameters():
        if is_temporal(key) and "proj_out" in key:
            value.zero_()
    return unet


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"size": (40, 48)}, ConfigError),
        ({"num_frames": 0}, ConfigError),
        ({"num_steps": 0}, ConfigError),
        ({"eta": 1.5}, ConfigError),
    ],
)
def test_settings_that_cannot_work_are_refused(models, converted, change, error):
    with pytest.raises(error, match=r"got"):
        generate(models, converted, [region()], **change)


def test_scales_of_the_release_for_videos_and_for_pictures():
    assert VideoCrafterConfig().scales == (15.0, 7.5)
    assert VideoCrafterConfig(num_frames=1).scales == (6.0, 0.0)
    assert VideoCrafterConfig(num_frames=1, style_scale=5.0).scales == (6.0, 5.0)


def test_a_file_of_another_kind_is_named(converted):
    with pytest.raises(WeightsError, match="Stable Diffusion's VAE.*expected VideoCrafter's UNet"):
        load_videocrafter(converted[1], converted[1], converted[2])


@pytest.mark.parametrize("part", range(3))
def test_a_part_with_nan_is_named(converted, tmp_path, part):
    file = read_state_dict(converted[part])
    tensors = {key: value.clone() for key, value in file.tensors.items()}
    next(value for value in tensors.values() if value.is_floating_point()).view(-1)[0] = torch.nan
    files = list(converted[:3])
    files[part] = write_state_dict(tmp_path / "bad.safetensors", tensors, file.metadata)
    with pytest.raises(WeightsError, match=r"bad\.safetensors: 1 weights .*NaN"):
        load_videocrafter(*files)
    load_videocrafter(*files, skip_check=True)


def run(tmp_path, capsys, output, *options):
    style = tmp_path / "style.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(style)
    command = ["stylize-videocrafter", str(tmp_path / output), "--style", str(style)]
    command += ["--size", "32x16", "--steps", "1", "--json", *options]
    return main(command), capsys.readouterr()


def test_the_command_writes_a_video(tmp_path, capsys, caplog):
    code, said = run(tmp_path, capsys, "out.mp4", "--frames", "3", "--model", "small-random")
    assert code == 0 and json.loads(said.out)["frames"] == 3
    assert read_video(tmp_path / "out.mp4").frames.shape == (3, 16, 32, 3)
    notes = [record.message for record in caplog.records if "non-commercial" in record.message]
    assert len(notes) == 2  # of the adapter and of the UNet
    code, said = run(tmp_path, capsys, "out.mp4")
    assert code == 2 and "exists" in said.err
    code, said = run(tmp_path, capsys, "out.png")
    assert code == 2 and "16 frames are written as" in said.err


def test_the_command_writes_a_picture_with_files_of_ones_own(
    small, converted, models, tmp_path, capsys
):
    names = ("--unet", "--vae", "--text-encoder", "--adapter", "--temporal")
    files = [str(word) for pair in zip(names, converted, strict=True) for word in pair]
    files += ["--image-encoder", str(small.image_encoder)]
    code, said = run(tmp_path, capsys, "out.png", "--frames", "1", *files)
    assert code == 0 and Image.open(tmp_path / "out.png").size == (32, 16), said.err
    code, said = run(tmp_path, capsys, "more.png", "--frames", "1", *files[2:])
    assert code == 2 and "give --unet" in said.err


# ---- LoRAs ----

LAYERS = ["input_blocks.1.1.transformer_blocks.0.attn1.to_q", "init_attn.0.proj_in",
          "input_blocks.1.2.transformer_blocks.0.attn2.to_v"]  # fmt: skip
# How the layer and the two matrices are called, and whether dots in its name are.
FORMS = {
    "kohya": ("lora_unet_", "_", "lora_down", "lora_up"),
    "ComfyUI": ("diffusion_model.", ".", "lora_A", "lora_B"),
    "release": ("model.diffusion_model.", ".", "lora_down", "lora_up"),
}


def write_lora(path, unet, form, layers=LAYERS):
    """A LoRA of rank 2 and alpha 1; returns what it adds at strength 1."""
    prefix, dot, down, up = FORMS[form]
    draw, tensors, change = torch.Generator().manual_seed(2), {}, {}
    for layer in layers:
        rows, *columns = unet[f"{layer}.weight"].shape
        a = torch.randn(2, *columns, generator=draw)
        b = torch.randn(rows, 2, *[1] * (len(columns) - 1), generator=draw)
        name = prefix + layer.replace(".", dot)
        tensors |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        change[f"{layer}.weight"] = (b.flatten(1) @ a.flatten(1)).view(rows, *columns) / 2
    write_state_dict(path, tensors)
    return change


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_is_merged(converted, tmp_path, form):
    unet, temporal = (read_state_dict(converted[i]).tensors for i in (0, 4))
    change = write_lora(tmp_path / "lora.safetensors", unet, form)
    loras = [(tmp_path / "lora.safetensors", 0.5)]
    model = load_videocrafter(*converted[:3], temporal=converted[4], loras=loras).unet
    names = model.release_keys
    for key, value in model.state_dict().items():
        wanted = (unet | temporal)[names[key]].float()  # onto the layers that took others' place
        if names[key] in change:
            wanted = wanted + 0.5 * change[names[key]]
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_command_merges_loras_and_refuses_others(tmp_path, capsys, converted, small):
    unet = dict(read_state_dict(converted[0]).tensors)
    lora, other = tmp_path / "lora.safetensors", tmp_path / "other.safetensors"
    write_lora(lora, unet, "kohya")
    write_lora(other, {"blocks.0.x.weight": torch.ones(4, 4)}, "kohya", ["blocks.0.x"])
    names = ("--unet", "--vae", "--text-encoder", "--adapter", "--temporal")
    files = [str(word) for pair in zip(names, converted, strict=True) for word in pair]
    files += ["--image-encoder", str(small.image_encoder), "--frames", "1"]
    for name, more in {"a.png": [], "b.png": ["--lora", f"{lora}:0.7"]}.items():
        assert run(tmp_path, capsys, name, *files, *more)[0] == 0
    assert not np.array_equal(*(np.asarray(Image.open(tmp_path / n)) for n in ("a.png", "b.png")))
    for path, words in ((other, "1 of 1 parts fit nothing in this UNet"), ("x", "no such file")):
        code, said = run(tmp_path, capsys, "c.png", *files, "--lora", str(path))
        assert code == 2 and words in said.err and not (tmp_path / "c.png").exists()
