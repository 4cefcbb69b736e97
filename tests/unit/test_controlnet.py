"""The gray-tile ControlNet and how its states reach the transformer."""

import pytest
import torch

from stylemaster_core import (
    ConfigError,
    LayoutError,
    WeightsError,
    denoise,
    flow_match_sigmas,
    load_gray_tile_controlnet,
)
from stylemaster_core.models.gray_tile_controlnet import copy_from_transformer

CLOSE = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture
def control_weights(tiny_weights):
    """Copies of every `stride`-th of `num_blocks` blocks, zero convolutions made random."""

    def build(num_blocks=4, stride=2):
        weights = copy_from_transformer(tiny_weights(num_blocks), stride=stride)
        generator = torch.Generator().manual_seed(7)
        for key in weights:
            if key.startswith("zero_convs"):
                weights[key].normal_(0, 0.2, generator=generator)
        return weights

    return build


@pytest.fixture
def controlnet(control_weights):
    return load_gray_tile_controlnet(control_weights(), num_heads=2)


@pytest.mark.parametrize(("num_blocks", "stride"), [(4, 1), (4, 2), (6, 3), (5, 2), (7, 3)])
def test_states_are_added_after_every_stride_th_block(
    tiny_transformer, tiny_inputs, control_weights, num_blocks, stride
):
    net, inputs = tiny_transformer(num_blocks), tiny_inputs()
    controlnet = load_gray_tile_controlnet(control_weights(num_blocks, stride), num_heads=2)
    states = controlnet(inputs.control_latents, inputs.timestep, inputs.text)
    places = range(0, num_blocks, stride)
    assert len(states) == len(places)
    ours = net(inputs.latents, inputs.timestep, inputs.text, control=states, control_scale=0.7)
    handles = [
        net.blocks[i].register_forward_hook(lambda _m, _i, out, state=state: out + 0.7 * state)
        for i, state in zip(places, states, strict=True)
    ]
    by_hooks = net(inputs.latents, inputs.timestep, inputs.text)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ours, by_hooks, **CLOSE)
    assert not torch.allclose(ours, net(inputs.latents, inputs.timestep, inputs.text))


def test_scale_0_adds_nothing_and_is_not_even_computed(tiny_transformer, tiny_inputs, controlnet):
    net, inputs = tiny_transformer(), tiny_inputs()
    states = controlnet(inputs.control_latents, inputs.timestep, inputs.text)
    plain = net(inputs.latents, inputs.timestep, inputs.text)
    off = net(inputs.latents, inputs.timestep, inputs.text, control=states, control_scale=0.0)
    assert torch.equal(off, plain)
    calls = []
    controlnet.register_forward_hook(lambda *_: calls.append(1))
    options = {
        "sigmas": flow_match_sigmas(10, shift=5.0),
        "text": inputs.text,
        "negative_text": None,
        "style": None,
        "text_scale": 1.0,
        "style_scale": 1.0,
    }
    control = {"controlnet": controlnet, "control_latents": inputs.control_latents}
    without = denoise(net, inputs.latents, **options)
    with_scale_0 = denoise(net, inputs.latents, **options, **control, control_scale=0.0)
    assert torch.equal(with_scale_0, without) and not calls
    ranged = denoise(net, inputs.latents, **options, **control, control_range=(0.2, 0.5))
    assert len(calls) == 4 and not torch.allclose(ranged, without)  # steps 2, 3, 4, 5


@pytest.mark.parametrize("batched", [True, False])
def test_one_control_serves_a_batch(tiny_transformer, tiny_inputs, controlnet, batched):
    net, inputs = tiny_transformer(), tiny_inputs(batch=2)
    options = {
        "sigmas": flow_match_sigmas(2, shift=5.0),
        "negative_text": inputs.negative,
        "style": inputs.tokens,
        "text_scale": 4.0,
        "style_scale": 2.0,
        "controlnet": controlnet,
        "batch_branches": batched,
    }
    texts = torch.cat([inputs.text, inputs.negative.flip(1)])
    for text in (inputs.text, texts):
        for control in (inputs.control_latents, inputs.control_latents.repeat(2, 1, 1, 1, 1)):
            together = denoise(net, inputs.latents, text=text, control_latents=control, **options)
            for i in range(2):
                alone = denoise(
                    net,
                    inputs.latents[i : i + 1],
                    text=text[i % len(text)][None],
                    control_latents=inputs.control_latents,
                    **options,
                )
                torch.testing.assert_close(together[i : i + 1], alone, **CLOSE)


def test_prepared_text_is_the_same(tiny_inputs, controlnet):
    inputs = tiny_inputs()
    prepared = controlnet.prepare_text(inputs.text)
    arguments = inputs.control_latents, inputs.timestep
    for ours, plain in zip(
        controlnet(*arguments, prepared), controlnet(*arguments, inputs.text), strict=True
    ):
        assert torch.equal(ours, plain)


def test_a_fresh_copy_adds_nothing_yet(tiny_weights, tiny_inputs):
    inputs = tiny_inputs()
    controlnet = load_gray_tile_controlnet(copy_from_transformer(tiny_weights()), num_heads=2)
    states = controlnet(inputs.control_latents, inputs.timestep, inputs.text)
    assert len(states) == 2 and not any(state.any() for state in states)


def test_copy_rule(tiny_weights):
    source = tiny_weights(5)
    weights = copy_from_transformer(source)
    embeddings = {k for k in source if k.split(".")[0].endswith(("_embedding", "_projection"))}
    assert embeddings and embeddings <= set(weights)
    for j, i in enumerate((0, 2, 4)):
        for key, value in source.items():
            if key.startswith(f"blocks.{i}."):
                copied = weights.pop(key.replace(f"blocks.{i}", f"control_blocks.{j}"), None)
                assert (copied is None) == ("_img." in key)
                assert copied is None or torch.equal(copied, value)
    left = set(weights) - embeddings
    assert left == {f"zero_convs.{j}.{part}" for j in range(3) for part in ("weight", "bias")}
    assert all(torch.equal(weights[k], source[k]) for k in embeddings)
    assert not any(weights[k].any() for k in left)


@pytest.mark.parametrize("stride", [0, -2, 3, 9])
def test_a_stride_that_could_not_be_found_again(tiny_weights, stride):
    """4 blocks at stride 3 give 2 copies, as stride 2 does."""
    with pytest.raises(ConfigError, match=f"stride of {stride} over 4 blocks"):
        copy_from_transformer(tiny_weights(4), stride=stride)


def test_copies_need_the_release_names():
    with pytest.raises(WeightsError, match="no Wan transformer"):
        copy_from_transformer({"blocks.0.attn1.to_q.weight": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"control_latents": torch.ones(16, 3, 4, 6)}, "control latents"),
        ({"control_latents": torch.ones(1, 15, 3, 4, 6)}, r"\[B, 16, t, h, w\]"),
        ({"control_latents": torch.ones(1, 16, 3, 5, 6)}, "even h and w"),
        ({"control_latents": torch.ones(1, 16, 3, 4, 7)}, "even h and w"),
        ({"control_latents": torch.ones(1, 16, 0, 4, 6)}, "control latents"),
        ({"text": torch.ones(1, 6, 9)}, r"\[B, L, 10\]"),
        ({"text": torch.ones(6, 10)}, r"\[B, L, 10\]"),
        ({"text": torch.ones(3, 6, 10), "batch": 2}, "do not belong together"),
        ({"timestep": torch.ones(3), "batch": 2}, "do not belong together"),
        ({"timestep": torch.tensor(3.0)}, "do not belong together"),
    ],
)
def test_wrong_inputs(controlnet, change, words):
    latents = torch.ones(change.pop("batch", 1), 16, 3, 4, 6)
    arguments = {
        "control_latents": latents,
        "timestep": torch.ones(1),
        "text": torch.ones(1, 6, 10),
    }
    with pytest.raises(LayoutError, match=words):
        controlnet(**(arguments | change))


def test_control_latents_with_nan(tiny_transformer, tiny_inputs, controlnet):
    inputs = tiny_inputs()
    with pytest.raises(LayoutError, match="control latents hold NaN"):
        denoise(
            tiny_transformer(),
            inputs.latents,
            sigmas=flow_match_sigmas(1, shift=5.0),
            text=inputs.text,
            negative_text=None,
            style=None,
            text_scale=1.0,
            style_scale=1.0,
            controlnet=controlnet,
            control_latents=inputs.control_latents * torch.nan,
        )


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([(1, 18, 24)] * 5, "5 control states .* 4 blocks"),
        ([(1, 18, 24)] * 3, "3 control states do not spread evenly"),
        ([(1, 18, 16)] * 2, "same model"),
        ([(1, 17, 24)] * 2, "same size"),
        ([(2, 18, 24)] * 2, r"\[1 or 1, 18, 24\]"),
    ],
)
def test_states_of_another_model(tiny_transformer, tiny_inputs, states, words):
    inputs = tiny_inputs()
    with pytest.raises(LayoutError, match=words):
        tiny_transformer()(
            inputs.latents,
            inputs.timestep,
            inputs.text,
            control=[torch.ones(shape) for shape in states],
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("patch_embedding.weight"), "patch_embedding.weight is missing"),
        (lambda w: w.pop("zero_convs.1.bias"), "1 missing: zero_convs.1.bias"),
        (lambda w: w.update(other=torch.ones(1)), "1 unexpected: other"),
    ],
)
def test_wrong_files(control_weights, change, words):
    weights = control_weights()
    change(weights)
    with pytest.raises(WeightsError, match=words):
        load_gray_tile_controlnet(weights, num_heads=2)


def test_heads(control_weights):
    with pytest.raises(WeightsError, match="num_heads="):
        load_gray_tile_controlnet(control_weights())  # 24 wide is less than one head of 128
    with pytest.raises(WeightsError, match="5 heads"):
        load_gray_tile_controlnet(control_weights(), num_heads=5)
