"""The transformer: loading, refusing, saving, training."""

import pytest
import torch

from stylemaster_core import (
    ConfigError,
    LayoutError,
    StyleRegion,
    WeightsError,
    load_transformer,
)
from stylemaster_core.models.wan_transformer import StyledWanTransformer
from stylemaster_core.weights.state_dict import native_to_diffusers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": torch.ones(16, 3, 4, 6)}, r"\[B, 16, t, h, w\]"),
        ({"latents": torch.ones(1, 15, 3, 4, 6)}, r"\[B, 16, t, h, w\]"),
        ({"latents": torch.ones(1, 16, 0, 4, 6)}, r"\[B, 16, t, h, w\]"),
        ({"latents": torch.ones(1, 16, 3, 5, 6)}, "5 x 6 do not divide"),
        ({"latents": torch.ones(1, 16, 3, 4, 7)}, "multiples of 16"),
        ({"timestep": torch.ones(2)}, r"timestep must be \[1\] or \[1\]"),
        ({"timestep": torch.tensor(5.0)}, "timestep"),
        ({"text": torch.ones(6, 10)}, r"text features must be \[B, L, 10\]"),
        ({"text": torch.ones(1, 6, 11)}, "UMT5"),
        ({"text": torch.ones(2, 6, 10)}, "2 conditions for a batch of 1"),
        ({"style": torch.ones(5, 10)}, r"style tokens must be \[B, S, D\]"),
        ({"style": torch.ones(1, 5, 11)}, "11 wide, this adapter takes 10"),
        ({"style": torch.ones(3, 5, 10)}, "3 conditions for a batch of 1"),
        ({"style": torch.full((1, 5, 10), torch.nan)}, "NaN"),
    ],
)
def test_tensors_that_do_not_fit(tiny_transformer, tiny_inputs, change, words):
    inputs = tiny_inputs()
    arguments = {
        "latents": inputs.latents,
        "timestep": inputs.timestep,
        "text": inputs.text,
        "style": inputs.tokens,
    }
    with pytest.raises(LayoutError, match=words):
        tiny_transformer(2)(**(arguments | change))


def test_a_style_needs_an_adapter(tiny_transformer, tiny_inputs):
    inputs, net = tiny_inputs(), tiny_transformer(2, style=False)
    with pytest.raises(WeightsError, match="load a StyleMaster adapter"):
        net(inputs.latents, inputs.timestep, inputs.text, style=inputs.tokens)
    assert net(inputs.latents, inputs.timestep, inputs.text).isfinite().all()


def test_no_regions_are_no_style(tiny_transformer, tiny_inputs):
    inputs, net = tiny_inputs(), tiny_transformer(2)
    arguments = inputs.latents, inputs.timestep, inputs.text
    assert torch.equal(net(*arguments, style=[]), net(*arguments))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"start": 0.6, "end": 0.2}, ConfigError, "start <= end"),
        ({"end": 1.5}, ConfigError, "0 <= start"),
        ({"scale": float("nan")}, ConfigError, "finite"),
        ({"block_scales": [1.0, float("inf")]}, ConfigError, "finite"),
        ({"mask": torch.ones(4)}, LayoutError, "mask must be"),
    ],
)
def test_regions_that_cannot_work(options, error, words):
    with pytest.raises(error, match=words):
        StyleRegion(torch.ones(1, 5, 10), **options)


@pytest.mark.parametrize(
    ("regions", "error", "words"),
    [
        ([{"block_scales": [1.0]}], ConfigError, "1 block scales, but the model has 2"),
        ([{"mask": torch.full((2, 3), 1.5)}], LayoutError, "0..1"),
        ([{"mask": torch.full((2, 3), torch.nan)}], LayoutError, "0..1"),
        ([{}, {}], ConfigError, "2 styles without masks"),
    ],
)
def test_regions_that_do_not_fit(tiny_transformer, tiny_inputs, regions, error, words):
    inputs = tiny_inputs()
    style = [StyleRegion(inputs.tokens, **region) for region in regions]
    with pytest.raises(error, match=words):
        tiny_transformer(2)(inputs.latents, inputs.timestep, inputs.text, style=style)


def test_missing_and_wrong_keys_are_named(tiny_weights):
    def load(**changes):
        weights = tiny_weights(2)
        for key, value in changes.items():
            key = key.replace("__", ".")
            weights.pop(key) if value is None else weights.update({key: value})
        return load_transformer(weights, num_heads=2)

    with pytest.raises(WeightsError, match="missing: .*blocks.1.ffn.net.2.bias"):
        load(blocks__1__ffn__2__bias=None)
    with pytest.raises(WeightsError, match="strange"):
        load(strange=torch.ones(1))
    with pytest.raises(WeightsError, match="instead of"):
        load(head__head__bias=torch.ones(3))
    with pytest.raises(WeightsError, match="missing: .*v_img.bias"):
        load(blocks__1__cross_attn__v_img__bias=None)
    with pytest.raises(WeightsError, match="blocks.0.cross_attn.k_img.weight is missing"):
        load(blocks__0__cross_attn__k_img__weight=None)
    with pytest.raises(WeightsError, match="no Wan transformer"):
        load_transformer({"patch_embedding.bias": torch.ones(24)}, num_heads=2)


@pytest.mark.parametrize("channels", [36, 32])
@pytest.mark.parametrize("diffusers_names", [True, False])
def test_image_to_video_models_are_refused_in_words(tiny_weights, channels, diffusers_names):
    weights = tiny_weights(1, style=False)
    if diffusers_names:
        weights = native_to_diffusers(weights)
    weights["patch_embedding.weight"] = torch.ones(24, channels, 1, 2, 2)
    weights["img_emb.proj.1.weight"] = torch.ones(24, 8)
    with pytest.raises(WeightsError, match=f"{channels} input channels .* 16 channels"):
        load_transformer(weights, num_heads=2)


def test_an_adapter_of_another_model(tiny_weights):
    base = tiny_weights(2, style=False)
    style = {k: v for k, v in tiny_weights(3).items() if "_img." in k}
    with pytest.raises(WeightsError, match="for 3 blocks of width 24, the transformer has 2"):
        load_transformer(base | style, num_heads=2)


@pytest.mark.parametrize("num_heads", [None, 0, 5, 24])
def test_heads(tiny_weights, num_heads):
    with pytest.raises(WeightsError, match="num_heads="):
        load_transformer(tiny_weights(1), num_heads=num_heads)


def test_names_of_diffusers_and_prefixes_load_the_same(tiny_weights, tiny_inputs):
    inputs, native = tiny_inputs(), tiny_weights(2)
    style = {k: v for k, v in native.items() if "_img." in k}
    base = {k: v for k, v in native.items() if k not in style}
    variants = [
        native,
        native_to_diffusers(base) | style,
        {f"model.diffusion_model.{k}": v for k, v in native.items()},
        native | {"style_model.style_emb": torch.ones(1)},
    ]
    velocities = [
        load_transformer(weights, num_heads=2)(
            inputs.latents, inputs.timestep, inputs.text, style=inputs.tokens
        )
        for weights in variants
    ]
    assert all(torch.equal(velocity, velocities[0]) for velocity in velocities)


def test_save_and_load_in_diffusers_format(tmp_path, tiny_transformer, tiny_inputs):
    """The base alone; style weights live in files of their own."""
    net = tiny_transformer(2, style=False).float()
    net.save_pretrained(tmp_path)
    read = StyledWanTransformer.from_pretrained(tmp_path)
    assert read.config.num_layers == 2 and read.config.num_attention_heads == 2
    assert set(read.state_dict()) == set(net.state_dict())
    inputs = tiny_inputs()
    arguments = inputs.latents.float(), inputs.timestep, inputs.text.float()
    with torch.no_grad():
        torch.testing.assert_close(read(*arguments), net(*arguments), atol=1e-6, rtol=1e-6)


def train_loss(net, inputs):
    net.style_attention.requires_grad_(True)
    velocity = net(inputs.latents, inputs.timestep, inputs.text, style=inputs.tokens)
    return velocity.square().mean()


def test_gradient_checkpointing_gives_equal_gradients(tiny_transformer, tiny_inputs):
    inputs = tiny_inputs()
    gradients = []
    for checkpointing in (False, True):
        net = tiny_transformer(3)
        calls = []
        net.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            net.enable_gradient_checkpointing()
        inputs.tokens = inputs.tokens.detach().requires_grad_(True)
        train_loss(net, inputs).backward()
        assert len(calls) == 1 + checkpointing  # computed again on the way back
        named = {name: p.grad for name, p in net.style_attention.named_parameters()}
        gradients.append(named | {"tokens": inputs.tokens.grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=1e-10)


def test_style_training_has_no_deadlock(tiny_transformer, tiny_inputs):
    """From the base model v_img moves in the first step, k_img and norm_k_img in the second."""
    inputs, net = tiny_inputs(), tiny_transformer(2)
    arguments = inputs.latents, inputs.timestep, inputs.text
    generator = torch.Generator().manual_seed(0)
    for block in net.style_attention.blocks:
        block["cross_attn"].reset_for_training(generator)
    torch.testing.assert_close(
        net(*arguments, style=inputs.tokens), net(*arguments), atol=1e-12, rtol=1e-12
    )
    before = {k: v.clone() for k, v in net.style_attention.state_dict().items()}
    optimizer = torch.optim.SGD(net.style_attention.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        train_loss(net, inputs).backward()
        optimizer.step()
    after = net.style_attention.state_dict()
    still = [key for key in before if torch.equal(after[key], before[key])]
    assert not still
    assert all(
        p.grad is None for name, p in net.named_parameters() if "style_attention" not in name
    )


def test_branches_must_fit_into_one_batch(tiny_transformer, tiny_inputs):
    inputs, net = tiny_inputs(), tiny_transformer(2)
    regions = [StyleRegion(inputs.tokens)]
    style = net.prepare_style(regions, net.style_keys_values(regions), (), True)
    branch = net.prepare_branch(net.embed_text(inputs.text, 1), style, styled=True)
    arguments = inputs.latents, inputs.timestep, [branch, branch]
    with pytest.raises(LayoutError, match="one by one"):
        net.velocities(*arguments)
    first, second = net.velocities(*arguments, batched=False)
    assert torch.equal(first, second)
