"""Equal rows at the end of prompts are attended to as one, exactly."""

from __future__ import annotations

import pytest
import torch

from stylemaster_core import denoise, flow_match_sigmas, load_gray_tile_controlnet, load_transformer
from stylemaster_core.models.decoupled_attention import attend
from stylemaster_core.models.gray_tile_controlnet import copy_from_transformer
from stylemaster_core.models.text_padding import merge_padding, padding_bias
from stylemaster_core.sampling import denoise as denoise_module

LENGTH = 24


def prompt(num_words: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_words)
    text = torch.zeros(batch, LENGTH, 4096, dtype=torch.float64)
    text[:, :num_words] = torch.randn(batch, num_words, 4096, generator=generator).double()
    return text


@pytest.mark.parametrize(
    ("words", "kept"),
    [((5,), 6), ((5, 9), 10), ((0,), 1), ((LENGTH,), LENGTH), ((3, LENGTH - 1), LENGTH)],
)
def test_what_is_cut(words: tuple[int, ...], kept: int) -> None:
    texts = [prompt(n) for n in words]
    merged, padding = merge_padding(texts)
    assert [text.shape[1] for text in merged] == [kept] * len(words)
    assert padding == LENGTH - kept + 1
    for text, short in zip(texts, merged, strict=True):
        again = torch.cat([short, short[:, -1:].expand(-1, padding - 1, -1)], 1)
        assert torch.equal(again, text)


def test_every_sample_of_a_batch_counts() -> None:
    text = torch.cat([prompt(4), prompt(11)])
    (merged,), padding = merge_padding([text])
    assert merged.shape[1] == 12 and padding == LENGTH - 11


def test_prompts_of_other_lengths_stay() -> None:
    texts = [prompt(4), prompt(4)[:, :-1]]
    merged, padding = merge_padding(texts)
    assert padding == 1 and all(a is b for a, b in zip(texts, merged, strict=True))


def test_attention_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, n, 16, dtype=torch.float64, generator=generator) for n in (7, 5, 5)
    )
    repeated = [torch.cat([x, x[:, -1:].expand(-1, 9, -1)], 1) for x in (keys, values)]
    whole = attend(query, *repeated, num_heads=2)
    merged = attend(query, keys, values, 2, padding_bias(5, 10, keys))
    torch.testing.assert_close(merged, whole, atol=1e-14, rtol=1e-12)
    assert (attend(query, keys, values, 2) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("batched", [True, False])
def test_a_generation_is_the_same(golden, batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {k: v.double() for k, v in golden("weights_dit_a").tensors.items()}
    control = copy_from_transformer(weights)
    for key, value in golden("03_controlnet_a").group("weights.").items():
        control[key] = value.double()
    net, controlnet = load_transformer(weights), load_gray_tile_controlnet(control)
    case = golden("04_guidance")
    seen = []
    net.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[3].keys.shape[1]))
    width = case["in.context_pos"].shape[-1]

    def run() -> torch.Tensor:
        return denoise(
            net,
            case["in.noise"].double(),
            sigmas=flow_match_sigmas(2, shift=5.0).double(),
            text=prompt(7)[..., :width],
            negative_text=prompt(12)[..., :width],
            style=case["out.style_feat"].double(),
            text_scale=8.0,
            style_scale=4.0,
            controlnet=controlnet,
            control_latents=case["in.control_latents"].double(),
            batch_branches=batched,
        )

    merged = run()
    assert set(seen) == ({13} if batched else {8, 13})
    monkeypatch.setattr(denoise_module, "merge_padding", lambda texts: (texts, 1))
    whole = run()
    assert LENGTH in seen
    assert (merged - whole).norm() <= 1e-10 * whole.norm()
