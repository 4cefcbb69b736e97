"""From CLIP features to style tokens."""

import pytest
import torch

from stylemaster_core import ConfigError, LayoutError, WeightsError, load_style_projector
from stylemaster_core.models.small import draw_weights
from stylemaster_core.weights.shapes import AdapterSizes, expected_adapter_shapes

PREFIX = "style_model."
SIZES = AdapterSizes(
    width=8,
    num_blocks=0,
    style_width=10,
    patch_width=16,
    num_layers=2,
    local_tokens=2,
    global_tokens=3,
    global_width=6,
)


@pytest.fixture
def weights():
    drawn = draw_weights(expected_adapter_shapes(SIZES), 0)
    return {key.removeprefix(PREFIX): value.float() for key, value in drawn.items()}


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 17, 16, generator=generator),
        torch.randn(2, 6, generator=generator),
        torch.randn(1, 4, 32, generator=generator),
    )


def test_tokens_and_their_order(weights, features):
    """Texture tokens come from the patches, global tokens from the embedding, in this order."""
    projector = load_style_projector(weights, num_heads=4)
    patches, embeds, prompt = features
    tokens = projector(patches, embeds, prompt).tokens
    assert tokens.shape == (2, 5, 10) and not tokens.requires_grad
    other_embeds = projector(patches, embeds + 1, prompt).tokens
    other_patches = projector(patches.flip(-1), embeds, prompt).tokens
    assert torch.equal(tokens[:, :2], other_embeds[:, :2])
    assert torch.equal(tokens[:, 2:], other_patches[:, 2:])
    assert not torch.allclose(tokens[:, 2:], other_embeds[:, 2:])
    assert not torch.allclose(tokens[:, :2], other_patches[:, :2])


def test_only_kept_patches_count(weights, features):
    projector = load_style_projector(weights, num_heads=4)
    patches, embeds, prompt = features
    result = projector(patches, embeds, prompt, keep=3)
    assert result.kept.shape == (2, 3) and result.similarity.shape == (2, 17)
    dropped = torch.ones(2, 17, dtype=torch.bool).scatter(1, result.kept, False)
    changed = patches.masked_fill(dropped[..., None], 9.0)
    again = projector(changed, embeds, similarity=result.similarity, keep=3)
    assert torch.equal(again.tokens, result.tokens)
    touched = patches.clone()
    touched[0, result.kept[0, 0], 0] += 5  # a change of all features would be normalised away
    moved = projector(touched, embeds, similarity=result.similarity, keep=3)
    assert not torch.allclose(moved.tokens[0], result.tokens[0])
    assert torch.equal(moved.tokens[1], result.tokens[1])


def test_selection_options_reach_the_selection(weights, features):
    projector = load_style_projector(weights, num_heads=4)
    patches, embeds, prompt = features
    everything = projector(patches, embeds, selection="all", include_cls=False)
    assert everything.kept[0].tolist() == list(range(1, 17))
    random = projector(patches, embeds, selection="random", keep=4, seed=5)
    assert torch.equal(
        random.kept, projector(patches, embeds, selection="random", keep=4, seed=5).kept
    )
    assert projector(patches, embeds, prompt, drop_rate=0.5).kept.shape[1] == 9
    with pytest.raises(ConfigError, match="needs a seed"):
        projector(patches, embeds, selection="random")


def test_a_batch_equals_single_pictures(weights, features):
    projector = load_style_projector(weights, num_heads=4)
    patches, embeds, prompt = features
    together = projector(patches, embeds, prompt).tokens
    for i in range(2):
        alone = projector(patches[i : i + 1], embeds[i : i + 1], prompt).tokens
        torch.testing.assert_close(together[i : i + 1], alone)


def test_weights_go_in_and_come_out_unchanged(weights):
    projector = load_style_projector(weights, num_heads=4)
    out = projector.release_state_dict()
    assert set(out) == set(weights)
    assert all(torch.equal(out[key], weights[key]) for key in weights)
    assert not any(p.requires_grad for p in projector.parameters()) and not projector.training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(1, 17, 15), torch.ones(1, 6)), "width 16 and embeddings of width 6"),
        ((torch.ones(1, 17, 16), torch.ones(1, 7)), "got 16 and 7"),
        ((torch.ones(1, 17, 16), torch.ones(2, 6)), "one per picture"),
        ((torch.ones(1, 17, 16), torch.ones(1, 1, 6)), "one per picture"),
        ((torch.ones(1, 17, 16), torch.full((1, 6), torch.nan)), "NaN"),
        ((torch.full((1, 17, 16), torch.nan), torch.ones(1, 6)), "finite"),
    ],
)
def test_features_that_do_not_fit(weights, arguments, words):
    projector = load_style_projector(weights, num_heads=4)
    with pytest.raises(LayoutError, match=words):
        projector(*arguments, selection="all")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("style_emb"), "style_emb"),
        (lambda w: w.pop("ln1.weight"), "ln1.weight"),
        (lambda w: w.update(extra=torch.ones(1)), "extra"),
        (lambda w: w.update({"norm.bias": torch.ones(3)}), r"norm.bias \(3,\) instead of \(10,\)"),
    ],
)
def test_wrong_weights(weights, change, words):
    change(weights)
    with pytest.raises(WeightsError, match=words):
        load_style_projector(weights, num_heads=4)


@pytest.mark.parametrize("num_heads", [0, -1, 3])
def test_heads_must_divide_the_width(weights, num_heads):
    with pytest.raises(WeightsError, match="multiple"):
        load_style_projector(weights, num_heads=num_heads)
