"""StyleCrafter on Wan: its branch in the transformer, its file, the pipeline."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stylemaster_core import denoise, flow_match_sigmas, load_transformer
from stylemaster_core.cli import main
from stylemaster_core.errors import LayoutError, WeightsError
from stylemaster_core.models.decoupled_attention import (
    StyleAttention,
    StyleRegion,
    attend,
    create_style_attention,
    style_residual,
)
from stylemaster_core.models.small import TEXT_WIDTH, draw_weights, write_small_models
from stylemaster_core.models.stylecrafter import load_stylecrafter_encoder
from stylemaster_core.models.wan_transformer import StyledWanTransformer
from stylemaster_core.pipelines.encode_style import encode_style, encode_stylecrafter
from stylemaster_core.pipelines.models import ModelFiles, Models
from stylemaster_core.pipelines.stylize import StylizeConfig, stylize
from stylemaster_core.training.stylecrafter import new_stylecrafter_branch
from stylemaster_core.weights.files import read_state_dict, write_state_dict
from stylemaster_core.weights.shapes import (
    StyleCrafterSizes,
    StyleCrafterWanSizes,
    expected_stylecrafter_wan_shapes,
    stylecrafter_wan_sizes,
)
from stylemaster_core.weights.state_dict import detect_kind, shapes_of, split_release
from tests.origin import ORIGIN

WIDTH = 24  # of the tiny transformer
ENCODER = StyleCrafterSizes(
    feature_width=16, style_width=WIDTH, text_width=10, num_tokens=5, num_layers=1,
    num_scales=4, scale_width=8, scale_num_layers=1,
)  # fmt: skip


def adapter_weights(norm=True, seed=3):
    shapes = expected_stylecrafter_wan_shapes(StyleCrafterWanSizes(ENCODER, WIDTH, norm))
    return {key: value.double() for key, value in draw_weights(shapes, seed).items()}


def build(tiny_weights, norm=True):
    return load_transformer(tiny_weights(4, style=False) | adapter_weights(norm), num_heads=2)


def tokens_of(seed=0, batch=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 5, WIDTH, dtype=torch.float64, generator=draw)


def run(net, inputs, style):
    return net(inputs.latents, inputs.timestep, inputs.text, style=style)


@pytest.mark.parametrize("norm", [True, False])
def test_gain_zero_and_no_style_are_the_base_exactly(tiny_weights, tiny_inputs, norm):
    inputs, net = tiny_inputs(), build(tiny_weights, norm)
    base = load_transformer(tiny_weights(4, style=False), num_heads=2)
    expected = run(base, inputs, None)
    tokens, none = tokens_of(), torch.zeros(1, 4)
    assert torch.equal(run(net, inputs, None), expected)
    for region in (
        StyleRegion(tokens, gains=none),
        StyleRegion(tokens, 0.0, gains=none + 1.3),
        StyleRegion(tokens, block_scales=[0.0] * 4),
        StyleRegion(tokens, mask=torch.zeros(2, 3)),
    ):
        assert torch.equal(run(net, inputs, [region]), expected)
    changed = run(net, inputs, [StyleRegion(tokens, gains=none + 1)])
    assert (changed - expected).abs().max() > 1e-3


@pytest.mark.parametrize("norm", [True, False])
def test_branches_without_style_skip_it(tiny_weights, tiny_inputs, norm):
    """Where StyleMaster's see all-zero tokens, and the biases of v_img with them."""
    inputs, net = tiny_inputs(), build(tiny_weights, norm)
    base = load_transformer(tiny_weights(4, style=False), num_heads=2)
    options = {
        "sigmas": flow_match_sigmas(2, shift=5.0), "text": inputs.text,
        "negative_text": inputs.negative, "text_scale": 4.0,
    }  # fmt: skip
    plain = denoise(base, inputs.latents, style=None, style_scale=0.0, **options)
    region = StyleRegion(tokens_of(), gains=torch.full((1, 4), 0.9))
    for batched in (True, False):
        same = denoise(
            net, inputs.latents, style=[region], style_scale=0.0, batch_branches=batched, **options
        )
        torch.testing.assert_close(same, plain, rtol=1e-10, atol=1e-10)
    styled = denoise(net, inputs.latents, style=[region], style_scale=3.0, **options)
    assert (styled - plain).abs().max() > 1e-3


def test_the_formula(tiny_weights):
    """out = T + w (1 + s) LN(S), with the released names of K and V."""
    net, weights = build(tiny_weights), adapter_weights()
    draw = torch.Generator().manual_seed(8)
    query = torch.randn(1, 7, WIDTH, dtype=torch.float64, generator=draw)
    tokens, gain, strength = tokens_of(1), 1.37, 0.6
    gains = torch.ones(1, 4, dtype=torch.float64)
    gains[0, 2] = gain
    region = StyleRegion(tokens, strength, gains=gains)
    styles = net.prepare_style([region], net.style_keys_values([region]), (), no_style=True)
    part = {k.rpartition("cross_attn.")[2]: v for k, v in weights.items() if "blocks.2." in k
            and "cross_attn" in k}  # fmt: skip
    keys = F.linear(tokens, part["k_img.weight"], part["k_img.bias"])
    keys = keys * keys.square().mean(-1, keepdim=True).add(1e-5).rsqrt() * part["norm_k_img.weight"]
    values = F.linear(tokens, part["v_img.weight"], part["v_img.bias"])
    read = attend(query, keys, values, 2)
    norm = F.layer_norm(read, (WIDTH,), part["norm_style.weight"], part["norm_style.bias"], 1e-5)
    torch.testing.assert_close(
        style_residual(query, styles[2], 2), strength * gain * norm, rtol=1e-10, atol=1e-10
    )
    other = style_residual(query, styles[1], 2)
    assert (other - strength * gain * norm).abs().max() > 1e-2


@pytest.mark.parametrize("norm", [True, False])
def test_gains_of_each_sample(tiny_weights, tiny_inputs, norm):
    inputs, net = tiny_inputs(batch=2), build(tiny_weights, norm)
    tokens = tokens_of(batch=2)
    gains = torch.tensor([[0.2, 1.8, 0.7, 1.1], [1.5, 0.0, 1.0, 0.4]], dtype=torch.float64)
    together = run(net, inputs, [StyleRegion(tokens, gains=gains)])
    shared = run(net, inputs, [StyleRegion(tokens[:1], gains=gains)])
    for i in range(2):
        row = slice(i, i + 1)
        alone = net(inputs.latents[row], inputs.timestep, inputs.text,
                    style=[StyleRegion(tokens[row], gains=gains[row])])  # fmt: skip
        torch.testing.assert_close(together[row], alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shared[:1], together[:1], rtol=1e-10, atol=1e-10)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_gains_for_other_blocks_are_refused(tiny_weights, tiny_inputs):
    region = StyleRegion(tokens_of(), gains=torch.ones(1, 5))
    with pytest.raises(LayoutError, match="gains for 5 blocks, the model has 4"):
        run(build(tiny_weights), tiny_inputs(), [region])


def test_a_new_branch_is_the_text_s_and_adds_nothing(tiny_weights, tiny_inputs):
    inputs, net = tiny_inputs(), load_transformer(tiny_weights(4, style=False), num_heads=2)
    base = run(net, inputs, None)
    text = net.condition_embedder.text_embedder(inputs.text)  # where style tokens live
    net.style_attention = new_stylecrafter_branch(net).double()
    assert torch.equal(run(net, inputs, text), base)
    # Attending to the text once more, beside itself: twice the text's attention.
    net.style_attention = new_stylecrafter_branch(net, norm=False).double()
    keys, values, norm = net.style_attention(StyleRegion(text))
    for i, text_kv in enumerate(net.embed_text(inputs.text, 1)):
        torch.testing.assert_close(keys[i], text_kv.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values[i], text_kv.values, rtol=1e-6, atol=1e-7)
    assert norm is None and (run(net, inputs, text) - base).abs().max() > 1e-3
    other = StyleAttention(4, WIDTH, WIDTH, norm_style=True, bypass=True)
    assert set(other.state_dict()) == set(new_stylecrafter_branch(net).state_dict())


def test_the_file_is_known_by_its_content():
    weights = adapter_weights()
    assert detect_kind(shapes_of(weights)) == "stylecrafter_wan"
    assert stylecrafter_wan_sizes(shapes_of(weights)) == StyleCrafterWanSizes(ENCODER, WIDTH, True)
    base, adapter = split_release(weights)
    assert not base and set(adapter) == set(weights)
    attention = create_style_attention(weights)
    assert attention is not None and attention.bypass
    assert attention.no_style([StyleRegion(tokens_of())]).eq(0).all()
    plain = create_style_attention(adapter_weights(norm=False))
    assert plain is not None and plain.bypass
    assert set(weights) - set(adapter_weights(norm=False)) == {
        k for k in weights if "norm_style" in k
    }
    del weights["blocks.3.cross_attn.norm_style.bias"]
    with pytest.raises(WeightsError, match=r"missing: blocks\.3\.cross_attn\.norm_style\.bias"):
        create_style_attention(weights)


def test_sizes_for_wan():
    with torch.device("meta"):
        net = StyledWanTransformer()
        net.style_attention = new_stylecrafter_branch(net)
    expected = expected_stylecrafter_wan_shapes()
    branch = shapes_of(net.style_attention.state_dict())
    assert branch == {k: v for k, v in expected.items() if k.startswith("blocks.")}
    count = {
        part: sum(torch.Size(v).numel() for k, v in expected.items() if k.startswith(part))
        for part in ("image_context_model", "scale_predictor", "blocks")
    }
    assert [round(n / 1e6, 1) for n in count.values()] == [61.0, 9.5, 141.8]
    assert expected["scale_predictor.scale_predictor.query_emb"] == (1, 30, 512)
    assert expected["blocks.29.cross_attn.k_img.weight"] == (1536, 1536)


# ---- the pipeline, on small random models ----


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    small = write_small_models(folder)
    release = read_state_dict(small.stylemaster).tensors
    blocks, width = 4, release["blocks.0.self_attn.q.weight"].shape[0]
    encoder = dataclasses.replace(
        ENCODER, feature_width=80, style_width=width, text_width=TEXT_WIDTH,
        num_scales=blocks, scale_width=64,
    )  # fmt: skip
    shapes = expected_stylecrafter_wan_shapes(StyleCrafterWanSizes(encoder, width))
    adapter = write_state_dict(folder / "crafter.safetensors", draw_weights(shapes, 7))
    files = ModelFiles(small.stylemaster, small.vae, small.text_encoder, small.image_encoder,
                       adapter)  # fmt: skip
    return Models(files, device="cpu", keep_loaded=True)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)


CONFIG = StylizeConfig("text-to-image", prompt="a cat", size=(32, 32), num_steps=2)


def test_pipeline(models, monkeypatch):
    assert models.has_stylecrafter
    style = encode_stylecrafter(models, [picture(0), picture(1)], names=["a", "b"])
    assert style.tokens.shape == (1, 5, 256) and style.provenance["images"] == ["a", "b"]
    assert set(style.provenance) == ORIGIN and style.provenance["method"] == "stylecrafter-wan"
    styled = stylize(models, style, CONFIG).latents
    plain = stylize(models, None, CONFIG).latents
    assert (styled - plain).abs().max() > 1e-2
    weak = stylize(models, [StyleRegion(style.tokens, 0.0)], CONFIG).latents
    torch.testing.assert_close(weak, plain, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(Models, "with_gains", lambda self, regions, text: regions)
    assert (stylize(models, style, CONFIG).latents - styled).abs().max() > 1e-4


def test_gains_are_of_prompt_and_style(models):
    styles = [encode_stylecrafter(models, [picture(seed)]) for seed in (0, 1)]

    def gains(style, prompt, cut=None):
        text = models.encode_text([prompt])[:, :cut]
        (region,) = models.with_gains([StyleRegion(style.tokens)], text)
        assert region.gains.shape == (1, 4) and region.gains.min() > 0 and region.gains.max() < 2
        return region.gains

    first = gains(styles[0], "a cat")
    assert (gains(styles[1], "a cat") - first).abs().max() > 1e-4
    assert (gains(styles[0], "two dogs on a beach") - first).abs().max() > 1e-4
    torch.testing.assert_close(gains(styles[0], "a cat", cut=9), first, rtol=1e-5, atol=1e-6)
    given = StyleRegion(styles[0].tokens, gains=torch.full((1, 4), 0.5))
    assert models.with_gains([given], models.encode_text(["a cat"]))[0] is given


def test_other_adapters_are_refused_in_words(models):
    with pytest.raises(WeightsError, match="a StyleCrafter adapter for Wan.*StyleMaster"):
        encode_style(models, picture(0), "a cat")
    master = Models(dataclasses.replace(models.files, adapter=None), device="cpu")
    assert not master.has_stylecrafter
    with pytest.raises(WeightsError, match="needs the adapter"):
        encode_stylecrafter(master, [picture(0)])
    with pytest.raises(WeightsError, match="no StyleCrafter adapter|is not a StyleCrafter adapter"):
        load_stylecrafter_encoder({"a": torch.ones(1)})
    stranger = encode_style(master, picture(0), "a cat").style
    with pytest.raises(LayoutError, match="style tokens must be"):
        stylize(models, stranger, CONFIG)


def test_command_line(models, tmp_path, capsys):
    for seed, name in enumerate("ab"):
        Image.fromarray(picture(seed)).save(tmp_path / f"{name}.png")
    files = ("transformer", "vae", "text_encoder", "image_encoder", "adapter")
    options = [x for f in files for x in (f"--{f.replace('_', '-')}", getattr(models.files, f))]
    pictures = ["--style", tmp_path / "a.png", "--style", tmp_path / "b.png"]
    command = ["stylize", tmp_path / "out.png", "--prompt", "a cat", "--size", "32x32", "--steps",
               "2", "--device", "cpu", "--overwrite", *options, *pictures]  # fmt: skip

    def run(*more):
        return main([str(part) for part in (*command, *more)])

    assert run() == 0
    together = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert run("--blend", "concatenate") == 0
    assert np.abs(np.asarray(Image.open(tmp_path / "out.png")) - together).max() > 0
    assert run("--style-weight", "1", "--style-weight", "3") == 0
    capsys.readouterr()
    assert run("--keep", "9") == 2
    assert "StyleCrafter reads all of a picture; leave out" in capsys.readouterr().err
