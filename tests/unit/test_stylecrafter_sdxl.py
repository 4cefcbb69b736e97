"""StyleCrafter on SDXL: a synthetic release file through convert, load, generate; bad input."""

import dataclasses
import logging
import weakref

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image

from stylemaster_core.cli import main
from stylemaster_core.errors import ConfigError, LayoutError, UnsupportedHostError, WeightsError
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.sdxl_unet import StyledUNet, check_unet
from stylemaster_core.models.small_sdxl import UNET, small_adapter_sizes, write_small_sdxl
from stylemaster_core.models.stylecrafter_sdxl import (
    LICENCE_NOTE,
    layer_styles,
    level_masks,
    load_stylecrafter_sdxl,
)
from stylemaster_core.pipelines.stylize_sdxl import (
    SdxlConfig,
    encode_style,
    load_adapter,
    load_sdxl,
    prepare_styles,
    stylize_sdxl,
)
from stylemaster_core.weights.convert import convert
from stylemaster_core.weights.files import read_state_dict, write_state_dict
from stylemaster_core.weights.shapes import expected_stylecrafter_sdxl_shapes
from stylemaster_core.weights.state_dict import shapes_of
from tests.origin import ORIGIN

CONFIG = SdxlConfig(prompt="a cat", size=(128, 96), num_steps=3, seed=4)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def pipe(small):
    return load_sdxl(small.sdxl, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def converted(small, tmp_path_factory):
    return convert(small.adapter, tmp_path_factory.mktemp("converted"))[0]


@pytest.fixture
def adapter(converted):
    return load_adapter(converted)


@pytest.fixture(scope="module")
def styles(small, converted):
    adapter = load_adapter(converted)
    return [encode_style(adapter, small.image_encoder, [picture(seed)]).tokens for seed in (0, 1)]


def generated(pipe, adapter, *regions, **changes):
    prepared = prepare_styles(adapter, regions)
    result = stylize_sdxl(pipe, adapter, prepared, dataclasses.replace(CONFIG, **changes))
    return result.astype(int)


def test_convert_and_load(small, converted, caplog):
    content = read_state_dict(converted)
    assert converted.name == "stylecrafter_sdxl_small.safetensors"
    assert content.metadata["format"] == "stylecrafter-sdxl-1"
    assert content.metadata["base_model"] == "custom" and content.metadata["num_blocks"] == "11"
    source = read_state_dict(small.adapter).tensors
    assert set(content.tensors) == set(source)
    with caplog.at_level(logging.WARNING, "stylemaster"):
        adapter = load_adapter(converted)
    assert LICENCE_NOTE in caplog.text and "research" in LICENCE_NOTE
    weights = adapter.release_state_dict()
    assert all(torch.equal(v.float(), source[k].float()) for k, v in weights.items())
    stored = {layer.to_k_style.weight.dtype for layer in adapter.layers}
    assert stored == {source["kv_attn_layers.1.to_k_style.weight"].dtype}  # not widened
    assert adapter.encoder.image_context_model.queries.dtype == torch.float32


def test_convert_refuses_a_part(small, tmp_path):
    tensors = read_state_dict(small.adapter).tensors
    gone = tensors.pop("kv_attn_layers.5.norm_style.bias")
    torch.save(tensors, tmp_path / "part.ckpt")
    with pytest.raises(WeightsError, match=r"missing: kv_attn_layers\.5\.norm_style\.bias"):
        convert(tmp_path / "part.ckpt", tmp_path)
    tensors["kv_attn_layers.4.norm_style.bias"] = gone
    torch.save(tensors, tmp_path / "other.ckpt")
    with pytest.raises(WeightsError, match=r"kv_attn_layers\.4"):
        convert(tmp_path / "other.ckpt", tmp_path)


def test_without_style_it_is_diffusers_own_pipeline(pipe, adapter):
    ours = generated(pipe, adapter)
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(CONFIG.seed))
    theirs = pipe(
        CONFIG.prompt, negative_prompt=CONFIG.negative_prompt, height=128, width=96,
        num_inference_steps=3, guidance_scale=7.5, latents=noise, output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(ours - theirs * 255).max() <= 1
    other = generated(pipe, adapter, seed=5)
    assert np.abs(ours - other).mean() > 3


def test_styles_act_and_strength_zero_is_no_style(pipe, converted, styles):
    def run(*regions, **changes):
        return generated(pipe, load_adapter(converted), *regions, **changes)

    plain = run()
    first, second = (run(StyleRegion(tokens)) for tokens in styles)
    assert np.abs(first - plain).mean() > 3 and np.abs(first - second).mean() > 0.3
    assert np.array_equal(run(StyleRegion(styles[0])), first)
    assert np.abs(run(StyleRegion(styles[0], 0.0)) - plain).max() <= 1
    weak = run(StyleRegion(styles[0], 0.1))
    assert 0 < np.abs(weak - plain).mean() < np.abs(first - plain).mean()
    late = run(StyleRegion(styles[0], start=0.9))
    assert np.abs(late - plain).max() <= 1
    half = run(StyleRegion(styles[0], end=0.4))
    assert np.abs(half - plain).mean() > 3 and not np.array_equal(half, first)
    other_prompt = run(StyleRegion(styles[0]), style_scale=0.0)
    assert np.abs(other_prompt - first).mean() > 0.3


def test_masks(pipe, converted, styles):
    def run(*regions):
        return generated(pipe, load_adapter(converted), *regions)

    ones, zeros = torch.ones(4, 3), torch.zeros(4, 3)
    plain, first = run(), run(StyleRegion(styles[0]))
    assert np.abs(run(StyleRegion(styles[0], mask=ones)) - first).max() <= 1
    assert np.abs(run(StyleRegion(styles[0], mask=zeros)) - plain).max() <= 1
    left = torch.cat([ones, zeros], 1)
    both = run(StyleRegion(styles[0], mask=left), StyleRegion(styles[1], mask=1 - left))
    assert np.abs(both - first).mean() > 0.3
    with pytest.raises(ConfigError, match="2 styles without masks"):
        run(*(StyleRegion(tokens) for tokens in styles))


def test_masks_at_every_resolution(pipe):
    region = StyleRegion(torch.ones(1, 2, 3), mask=torch.eye(8))
    like = torch.ones(1)
    lengths = {length: len(m) for length, m in level_masks([region], (1, 17, 12), like).items()}
    assert lengths == {204: 2, 54: 2, 15: 2, 6: 2}
    assert not any(level_masks([StyleRegion(torch.ones(1, 2, 3))], (1, 17, 12), like).values())
    assert pipe.unet.config.sample_size == 16


def test_references_are_read_together(adapter, small):
    images = [picture(0), picture(1)]
    together = encode_style(adapter, small.image_encoder, images, names=["a", "b"])
    alone = [encode_style(adapter, small.image_encoder, [image]) for image in images]
    assert together.tokens.shape == alone[0].tokens.shape
    mean = (alone[0].tokens + alone[1].tokens) / 2
    assert (together.tokens - mean).abs().max() > 1e-3
    assert together.provenance["images"] == ["a", "b"]
    assert set(together.provenance) == ORIGIN and together.provenance["adapter"] == adapter.name


def test_gains_differ_between_prompts_and_styles(pipe, adapter, styles):
    def gains(prompt, tokens):
        return adapter.gains(pipe.encode_prompt(prompt)[0], tokens)

    base = gains("a cat", styles[0])
    assert base.shape == (1, 11)
    assert (gains("two dogs on a beach", styles[0]) - base).abs().max() > 1e-4
    assert (gains("a cat", styles[1]) - base).abs().max() > 1e-4


def test_of_a_long_prompt_the_first_77_tokens_count(adapter, styles):
    text = torch.randn(1, 154, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        adapter.gains(text, styles[0]), adapter.gains(text[:, :77], styles[0])
    )
    assert not torch.equal(
        adapter.gains(text[:, :70], styles[0]), adapter.gains(text[:, :77], styles[0])
    )


def test_projections_are_freed(adapter, styles):
    before = sum(p.numel() for p in adapter.parameters())
    projections = sum(p.numel() for p in adapter.layers.parameters())
    alive = weakref.ref(adapter.layers[0])
    prepared = prepare_styles(adapter, [StyleRegion(styles[0])])
    assert sum(p.numel() for p in adapter.parameters()) == before - projections
    assert len(prepared[0].keys_values) == 11
    assert alive() is None
    for kept in prepared[0].keys_values:
        for tensor in (kept.keys, kept.values, *kept.norm.parameters()):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view of the file
    with pytest.raises(WeightsError, match="freed"):
        adapter.keys_values(styles[0])


def test_the_unet_is_as_before(pipe, adapter, styles):
    before = {n: type(p) for n, p in pipe.unet.attn_processors.items()}
    (prepared,) = prepare_styles(adapter, [StyleRegion(styles[0])])
    blocks = layer_styles([prepared.region], [prepared.keys_values], styles[0])
    with pytest.raises(KeyError), StyledUNet(pipe.unet) as host:
        host.set(blocks, {})
        assert {n: type(p) for n, p in pipe.unet.attn_processors.items()} != before
        raise KeyError
    assert {n: type(p) for n, p in pipe.unet.attn_processors.items()} == before


def test_another_base_is_refused_in_words(adapter):
    fewer = UNet2DConditionModel(**(UNET | {"transformer_layers_per_block": [1, 1, 1]}))
    with pytest.raises(WeightsError, match=r"11 cross-attentions.*has 7.*not SD 1.5"):
        check_unet(fewer, adapter)
    narrow = UNet2DConditionModel(**(UNET | {"cross_attention_dim": 48}))
    with pytest.raises(WeightsError, match="text of width 48"):
        check_unet(narrow, adapter)
    taken = UNet2DConditionModel(**UNET)
    taken.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2").processor = object()
    with pytest.raises(UnsupportedHostError, match="attention processor object"):
        StyledUNet(taken)


def test_other_files_are_refused_in_words(small, tmp_path):
    with pytest.raises(WeightsError, match=r"model_index\.json is missing"):
        load_sdxl(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(WeightsError, match="is a FluxPipeline; StyleCrafter's adapter needs SDXL"):
        load_sdxl(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    torch.save({"style_tokens": torch.ones(1, 2, 3)}, tmp_path / "style.pt")
    with pytest.raises(WeightsError, match="saved style tokens"):
        load_adapter(tmp_path / "style.pt")


def test_weights_that_are_not_finite_are_named(small, converted, tmp_path):
    tensors = {key: value.clone() for key, value in read_state_dict(converted).tensors.items()}
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    path = write_state_dict(tmp_path / "bad.safetensors", tensors, read_state_dict(converted)[1])
    with pytest.raises(WeightsError, match=r"bad\.safetensors: 1 weights .*NaN"):
        load_adapter(path)
    load_adapter(path, skip_check=True)
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    pipe = load_sdxl(small.sdxl, **where)
    pipe.unet.conv_in.bias.data[0] = torch.inf
    pipe.save_pretrained(tmp_path / "sdxl")
    with pytest.raises(WeightsError, match=r"sdxl: 1 weights \(conv_in\.bias\) with NaN"):
        load_sdxl(tmp_path / "sdxl", **where)
    load_sdxl(tmp_path / "sdxl", **where, skip_check=True)


def test_tensors_that_do_not_fit(adapter, styles):
    with pytest.raises(LayoutError, match=r"image features \[B, N, 80\].*ViT-H/14"):
        adapter.encoder(torch.ones(1, 257, 48))
    with pytest.raises(LayoutError, match="at least one picture"):
        adapter.encoder([])
    with pytest.raises(LayoutError, match="NaN"):
        adapter.encoder(torch.full((1, 3, 80), torch.nan))
    with pytest.raises(LayoutError, match=r"style tokens must be \[B, S, 64\]"):
        adapter.keys_values(torch.ones(1, 16, 32))
    with pytest.raises(LayoutError, match=r"text features must be \[B, L, 64\]"):
        adapter.gains(torch.ones(1, 77, 63), styles[0])
    region, kv = StyleRegion(styles[0]), adapter.keys_values(styles[0])
    wrong = dataclasses.replace(region, gains=torch.ones(1, 10))
    with pytest.raises(LayoutError, match="gains for 10 layers, the adapter has 11"):
        layer_styles([wrong], [kv], styles[0])
    wrong = dataclasses.replace(region, block_scales=[1.0] * 12)
    with pytest.raises(ConfigError, match="strengths for 12 layers, but the model has 11"):
        layer_styles([wrong], [kv], styles[0])
    with pytest.raises(LayoutError, match="gains must be finite"):
        dataclasses.replace(region, gains=torch.full((1, 11), torch.nan))


def test_heads_are_told_by_the_metadata(small):
    tensors = {k: v.float() for k, v in read_state_dict(small.adapter).tensors.items()}
    features = torch.randn(1, 9, 80, generator=torch.Generator().manual_seed(1))
    usual = load_stylecrafter_sdxl(tensors).encoder(features)
    other = load_stylecrafter_sdxl(tensors, {"style_num_heads": "5"}).encoder(features)
    assert (usual - other).abs().max() > 1e-3
    with pytest.raises(WeightsError, match="no multiple of 7 heads"):
        load_stylecrafter_sdxl(tensors, {"scale_num_heads": "7"})


def test_settings_that_cannot_work(pipe, adapter):
    for change, words in (({"size": (100, 96)}, "multiples of 8"), ({"num_steps": 0}, "steps")):
        with pytest.raises(ConfigError, match=words):
            stylize_sdxl(pipe, adapter, [], dataclasses.replace(CONFIG, **change))


def test_small_sizes_are_those_of_the_small_unet(small):
    tensors = read_state_dict(small.adapter).tensors
    assert shapes_of(tensors) == expected_stylecrafter_sdxl_shapes(small_adapter_sizes())


REFUSED = {
    "ending": (["{tmp}/out.xyz"], "'.xyz'"),
    "no ending": (["{tmp}/out"], "''"),
    "folder": (["{tmp}"], "is a folder"),
    "steps": (["--steps", "0"], "at least 1"),
    "range": (["--style-range", "0.9:0.1"], "start <= end"),
    "strength": (["--style-strength", "nan"], "finite"),
    "text scale": (["--text-scale", "nan"], "finite"),
    "style scale": (["--style-scale", "inf"], "finite"),
    "seed": (["--seed", str(2**64)], "expected"),
    "size": (["--size", "90x90"], "multiples of 8"),
    "memory": (["--size", "8000000x8000000"], "pass --size"),
    "style": (["--style", "absent.png"], "absent.png"),
    "mask": (["--style-mask", "absent.png"], "absent.png"),
    "lora": (["--lora", "absent.safetensors:0.5"], "absent.safetensors"),
    "saved style": (["--save-style", "{tmp}"], "is a folder"),
    "device": (["--device", "cuda:99"], "cuda:99"),
    "dtype": (["--dtype", "int8"], "int8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_known_is_refused_before_any_model_is_loaded(
    name, tmp_path, capsys, monkeypatch
):
    def load(*args):
        raise AssertionError("a model was asked for")

    monkeypatch.setattr("stylemaster_core.cli.stylize_sdxl.find_models", load)
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    options, message = REFUSED[name]
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    output = [str(tmp_path / "out.png")] if options[0].startswith("--") else []
    assert main(["stylize-sdxl", *output, "--style", str(tmp_path / "a.png"), *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_command_line(small, converted, tmp_path, capsys):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    Image.fromarray(picture(1)).save(tmp_path / "b.png")
    options = [
        "--adapter", str(converted), "--sdxl", str(small.sdxl),
        "--image-encoder", str(small.image_encoder), "--size", "96x128", "--steps", "2",
    ]  # fmt: skip
    out, style = tmp_path / "out.png", tmp_path / "style.safetensors"
    pictures = ["--style", str(tmp_path / "a.png"), "--style", str(tmp_path / "b.png")]
    command = ["stylize-sdxl", str(out), "--prompt", "a cat", *options]
    assert main([*command, *pictures, "--json", "--save-style", str(style)]) == 0
    assert '"height": 128' in capsys.readouterr().out
    first = np.asarray(Image.open(out))
    assert first.shape == (128, 96, 3)
    assert main([*command, *pictures]) == 2  # exists
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--style", str(style), "--overwrite", "--json"]) == 0
    assert np.array_equal(np.asarray(Image.open(out)), first)
    assert main([*command, "--overwrite"]) == 2
    assert "at least one --style" in capsys.readouterr().err
