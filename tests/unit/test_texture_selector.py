"""Which patches of a style picture are kept."""

import pytest
import torch
import torch.nn.functional as F

from stylemaster_core import ConfigError, LayoutError
from stylemaster_core.models.texture_selector import (
    Selection,
    prompt_similarity,
    relevance_map,
    select_patches,
)

NUM_PATCHES = 17  # CLS and 4 x 4


@pytest.fixture
def patches():
    return torch.randn(2, NUM_PATCHES, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prompt():
    return torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1))


def test_similarity_by_hand(patches, prompt):
    pooled = prompt.reshape(5, 6, 2).mean(-1).mean(0)
    expected = torch.stack([F.cosine_similarity(row, pooled[None], dim=-1) for row in patches])
    torch.testing.assert_close(prompt_similarity(patches, prompt), expected)


@pytest.mark.parametrize("mode", ["release", "paper"])
def test_most_and_least_similar(patches, prompt, mode):
    result = select_patches(patches, prompt, mode=mode, keep=5)
    best = result.similarity.topk(5, largest=mode == "release").indices.sort(-1).values
    assert torch.equal(result.kept, best)
    opposite = select_patches(patches, prompt, mode="paper" if mode == "release" else "release")
    assert not set(result.kept[0].tolist()) & set(opposite.kept[0].tolist())


def test_all_keeps_everything_in_order(patches):
    result = select_patches(patches, mode="all")
    assert result.kept.tolist() == [list(range(NUM_PATCHES))] * 2 and result.similarity is None
    assert select_patches(patches, mode="all", include_cls=False).kept[0].tolist() == list(
        range(1, NUM_PATCHES)
    )


def test_random_follows_its_seed(patches):
    def choose(seed):
        return select_patches(patches, mode="random", keep=6, seed=seed).kept

    first = choose(3)
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(choose(3), first) and not torch.equal(choose(4), first)
    assert not torch.equal(first[0], first[1])
    assert (first.diff(dim=-1) > 0).all() and first.min() >= 0 and first.max() < NUM_PATCHES


@pytest.mark.parametrize(
    ("count", "options", "kept"),
    [
        (257, {}, 13),  # the release: 257 - int(257 * 0.95)
        (257, {"include_cls": False}, 13),  # 256 - int(256 * 0.95)
        (257, {"drop_rate": 0.0}, 257),
        (257, {"drop_rate": 0.5}, 129),
        (257, {"keep": 15}, 15),
        (17, {"keep": 17}, 17),
        (17, {"keep": 16, "include_cls": False}, 16),
    ],
)
def test_counts(count, options, kept):
    patches = torch.randn(1, count, 3, generator=torch.Generator().manual_seed(2))
    prompt = torch.ones(1, 2, 3)
    assert select_patches(patches, prompt, **options).kept.shape == (1, kept)


@pytest.mark.parametrize("mode", ["release", "paper", "random"])
def test_cls_is_a_candidate_or_not(patches, prompt, mode):
    similarity = torch.zeros(2, NUM_PATCHES)
    similarity[:, 0] = 1 if mode == "release" else -1  # CLS would come first
    options = {"mode": mode, "similarity": similarity, "seed": 0}
    every = select_patches(patches, keep=17, **options)
    assert 0 in every.kept
    if mode != "random":
        assert 0 in select_patches(patches, keep=1, **options).kept
    without = select_patches(patches, keep=16, include_cls=False, **options)
    assert without.kept[0].tolist() == list(range(1, 17))


def test_given_similarity_overrides_the_prompt(patches, prompt):
    similarity = torch.arange(NUM_PATCHES).float().expand(2, -1)
    result = select_patches(patches, prompt, keep=3, similarity=similarity)
    assert result.kept.tolist() == [[14, 15, 16]] * 2 and result.similarity is similarity
    assert select_patches(patches, keep=2, mode="paper", similarity=similarity).kept[
        0
    ].tolist() == [0, 1]


def test_ties_fall_the_same_way_every_time(patches):
    equal = torch.zeros(2, NUM_PATCHES)
    kept = [select_patches(patches, keep=4, similarity=equal).kept for _ in range(3)]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    assert kept[0][0].tolist() == [13, 14, 15, 16]


def test_relevance_map_of_several_pictures(patches, prompt):
    result = select_patches(patches, prompt, keep=5)
    similarity, kept = relevance_map(result, NUM_PATCHES)
    assert similarity.shape == kept.shape == (2, 4, 4) and kept.dtype == torch.bool
    for picture in range(2):
        chosen = {i for i in result.kept[picture].tolist() if i > 0}
        lit = kept[picture].flatten().nonzero().flatten() + 1
        assert set(lit.tolist()) == chosen
        torch.testing.assert_close(similarity[picture].flatten(), result.similarity[picture, 1:])
    unmeasured, lit = relevance_map(select_patches(patches, mode="all"), NUM_PATCHES)
    assert not unmeasured.any() and lit.all()


def test_relevance_map_needs_a_square():
    with pytest.raises(LayoutError, match="square"):
        relevance_map(Selection(torch.tensor([[1]]), None), 16)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mode": "best"}, ConfigError, "'best' is unknown"),
        ({"keep": 0}, ConfigError, "cannot keep 0 of 17"),
        ({"keep": -3}, ConfigError, "cannot keep -3"),
        ({"keep": 18}, ConfigError, "cannot keep 18 of 17"),
        ({"keep": 17, "include_cls": False}, ConfigError, "cannot keep 17 of 16"),
        ({"drop_rate": 1.0}, ConfigError, "drop rate"),
        ({"drop_rate": -0.1}, ConfigError, "drop rate"),
        ({"drop_rate": float("nan")}, ConfigError, "drop rate"),
        ({"drop_rate": 0.5, "keep": 3}, ConfigError, "not both"),
        ({"mode": "random"}, ConfigError, "needs a seed"),
        ({"prompt_features": None}, ConfigError, "by the prompt"),
        ({"mode": "paper", "prompt_features": None}, ConfigError, "by the prompt"),
        ({"prompt_features": torch.ones(5, 12)}, LayoutError, "prompt features"),
        ({"prompt_features": torch.ones(3, 5, 12)}, LayoutError, "prompt features"),
        ({"prompt_features": torch.full((1, 5, 12), torch.nan)}, LayoutError, "NaN"),
        ({"patch_features": torch.ones(17, 6)}, LayoutError, "patch features"),
        ({"patch_features": torch.full((2, 17, 6), torch.inf)}, LayoutError, "finite"),
        ({"similarity": torch.ones(1, 17)}, LayoutError, "similarity must be"),
        ({"similarity": torch.ones(2, 16)}, LayoutError, "similarity must be"),
        ({"similarity": torch.full((2, 17), torch.nan)}, LayoutError, "NaN"),
        ({"mode": "all", "drop_rate": 0.95}, ConfigError, "keeps every patch"),
        ({"mode": "all", "keep": 3}, ConfigError, "keeps every patch"),
        ({"mode": "all", "similarity": torch.ones(2, 16)}, LayoutError, "similarity must be"),
    ],
)
def test_errors(patches, prompt, options, error, words):
    arguments = {"patch_features": patches, "prompt_features": prompt} | options
    with pytest.raises(error, match=words):
        select_patches(**arguments)
