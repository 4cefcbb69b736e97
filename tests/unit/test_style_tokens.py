"""Styles kept in files and mixed."""

import pytest
import torch

from stylemaster_core import ConfigError, LayoutError, WeightsError
from stylemaster_core.models.small import draw_weights
from stylemaster_core.models.style_tokens import (
    FORMAT,
    Style,
    blend_styles,
    load_style,
    save_style,
)
from stylemaster_core.weights.files import write_state_dict
from stylemaster_core.weights.shapes import AdapterSizes, expected_adapter_shapes

PROVENANCE = {"image": "Öl, dick.png", "prompt": "a fox", "texture": {"keep": None, "seed": 7}}


def style(value=None, tokens=4, width=6, **provenance):
    values = torch.randn(1, tokens, width) if value is None else None
    return Style(
        torch.full((1, tokens, width), float(value)) if values is None else values, provenance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    kept = Style(torch.randn(1, 16, 8).to(dtype), PROVENANCE)
    path = save_style(tmp_path / "fox.safetensors", kept)
    read = load_style(path)
    assert torch.equal(read.tokens, kept.tokens) and read.tokens.dtype == dtype
    assert read.provenance == PROVENANCE
    assert [p.name for p in tmp_path.iterdir()] == ["fox.safetensors"]


def test_nothing_is_overwritten_unless_asked(tmp_path):
    path = save_style(tmp_path / "style.safetensors", style(1))
    with pytest.raises(WeightsError, match="exists"):
        save_style(path, style(2))
    assert load_style(path).tokens.unique().tolist() == [1]
    save_style(path, style(2), overwrite=True)
    assert load_style(path).tokens.unique().tolist() == [2]


def test_other_files_are_refused_by_name(tmp_path):
    sizes = AdapterSizes(width=8, num_blocks=1, style_width=8, patch_width=8, num_layers=1)
    adapter = draw_weights(expected_adapter_shapes(sizes), 0)
    path = write_state_dict(tmp_path / "adapter.safetensors", adapter)
    with pytest.raises(WeightsError, match="no saved style, but .*adapter"):
        load_style(path)
    with pytest.raises(WeightsError):
        load_style(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a weight file at all")
    with pytest.raises(WeightsError):
        load_style(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    "tokens", [torch.ones(4, 6), torch.ones(2, 4, 6), torch.full((1, 4, 6), torch.nan)]
)
def test_damaged_tokens_in_a_file(tmp_path, tokens):
    tensors, metadata = {"style_tokens": tokens}, {"format": FORMAT}
    path = write_state_dict(tmp_path / "style.safetensors", tensors, metadata)
    with pytest.raises(WeightsError, match="no usable style"):
        load_style(path)


def test_styles_of_another_format_are_refused(tmp_path):
    tensors, metadata = {"style_tokens": torch.ones(1, 4, 6)}, {"format": "stylemaster-style-9"}
    path = write_state_dict(tmp_path / "style.safetensors", tensors, metadata)
    with pytest.raises(WeightsError, match="stylemaster-style-9.*stylemaster-style-1"):
        load_style(path)


def test_damaged_provenance(tmp_path):
    path = write_state_dict(
        tmp_path / "style.safetensors",
        {"style_tokens": torch.ones(1, 4, 6)},
        {"format": FORMAT, "provenance": "{not json"},
    )
    with pytest.raises(WeightsError, match="provenance"):
        load_style(path)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.ones(4, 6),
        torch.ones(2, 4, 6),
        torch.ones(1, 0, 6),
        torch.full((1, 4, 6), torch.inf),
    ],
)
def test_what_is_no_style(tokens):
    with pytest.raises(LayoutError):
        Style(tokens)


def test_mean():
    blended = blend_styles([style(0), style(4)])
    assert blended.tokens.unique().tolist() == [2]
    weighted = blend_styles([style(0, name="a"), style(4, name="b")], [1, 3])
    assert weighted.tokens.unique().tolist() == [3]
    assert weighted.provenance == {
        "blend": "mean",
        "weights": [1, 3],
        "styles": [{"name": "a"}, {"name": "b"}],
    }
    only_first = style()
    assert torch.equal(blend_styles([only_first, style(9)], [2, 0]).tokens, only_first.tokens)


def test_mean_keeps_the_dtype():
    half = Style(torch.full((1, 2, 3), 0.5, dtype=torch.bfloat16))
    assert blend_styles([half, half]).tokens.dtype == torch.bfloat16


def test_concatenate():
    first, second = style(tokens=4), style(tokens=7)
    blended = blend_styles([first, second], mode="concatenate")
    assert torch.equal(blended.tokens, torch.cat([first.tokens, second.tokens], dim=1))
    assert blended.provenance["blend"] == "concatenate"


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (0, {}, "at least one"),
        (2, {"mode": "sum"}, "'sum' is unknown"),
        (2, {"weights": [1.0]}, "1 weights for 2 styles"),
        (2, {"weights": [1.0, -1.0]}, "negative"),
        (2, {"weights": [0.0, 0.0]}, "not all 0"),
        (2, {"weights": [1.0, float("nan")]}, "weights"),
        (2, {"weights": [1.0, float("inf")]}, "weights"),
        (2, {"weights": [1.0, 2.0], "mode": "concatenate"}, "no weights"),
    ],
)
def test_blends_that_cannot_work(count, options, words):
    with pytest.raises(ConfigError, match=words):
        blend_styles([style() for _ in range(count)], **options)


@pytest.mark.parametrize("mode", ["mean", "concatenate"])
def test_styles_that_do_not_fit_together(mode):
    with pytest.raises(LayoutError, match="one adapter"):
        blend_styles([style(width=6), style(width=8)], mode=mode)
    if mode == "mean":
        with pytest.raises(LayoutError, match="one adapter"):
            blend_styles([style(tokens=4), style(tokens=5)])
