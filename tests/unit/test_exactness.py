"""The optimised path equals plain passes, and does less work: float64 equality and counted FLOP."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.live_memory import LiveMemory
from stylemaster_core import (
    StyleRegion,
    combine_guidance,
    denoise,
    flow_match_sigmas,
    load_gray_tile_controlnet,
    load_transformer,
)
from stylemaster_core.errors import ConfigError
from stylemaster_core.models import wan_block
from stylemaster_core.models.decoupled_attention import StyleAttention
from stylemaster_core.models.gray_tile_controlnet import (
    DiffusersHost,
    GrayTileControlNet,
    copy_from_transformer,
)
from stylemaster_core.models.wan_transformer import StyledWanTransformer


@pytest.fixture(scope="module")
def models(golden):
    weights = {k: v.double() for k, v in golden("weights_dit_a").tensors.items()}
    control = copy_from_transformer(weights)
    for key, value in golden("03_controlnet_a").group("weights.").items():
        control[key] = value.double()
    return load_transformer(weights), load_gray_tile_controlnet(control)


def plain_denoise(net, latents, sigmas, text, negative, style, zero, scales, control=None):
    """Three plain passes a step, combined by the formula."""
    for sigma, following in itertools.pairwise(sigmas.tolist()):
        timestep = torch.tensor([sigma * 1000], dtype=torch.float32)
        states = None if control is None else control[0](control[1], timestep, text)
        v_negative = net(latents, timestep, negative, style=zero, control=states)
        v_text = net(latents, timestep, text, style=zero, control=states)
        v_styled = net(latents, timestep, text, style=style, control=states)
        velocity = combine_guidance(
            v_negative, v_text, v_styled, text_scale=scales[0], style_scale=scales[1]
        )
        latents = latents + (following - sigma) * velocity
    return latents


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scales", [(8.0, 4.0), (4.0, 4.0), (8.0, 0.0), (3.0, 5.0)])
@pytest.mark.parametrize("with_control", [False, True])
def test_optimised_path_equals_three_plain_passes(golden, models, scales, batched, with_control):
    net, controlnet = models
    case = golden("04_guidance")
    text, negative = case["in.context_pos"].double(), case["in.context_neg"].double()
    style, noise = case["out.style_feat"].double(), case["in.noise"].double()
    control_latents = case["in.control_latents"].double()
    sigmas = flow_match_sigmas(4, shift=5.0).double()
    ours = denoise(
        net,
        noise,
        sigmas=sigmas,
        text=text,
        negative_text=negative,
        style=style,
        text_scale=scales[0],
        style_scale=scales[1],
        batch_branches=batched,
        **({"controlnet": controlnet, "control_latents": control_latents} if with_control else {}),
    )
    plain = plain_denoise(
        net,
        noise,
        sigmas,
        text,
        negative,
        style,
        torch.zeros_like(style),
        scales,
        (controlnet, control_latents) if with_control else None,
    )
    assert ours.dtype == torch.float64
    assert (ours - plain).norm() <= 1e-10 * plain.norm()


def test_batch_of_latents_equals_single_runs(golden, models):
    net, _ = models
    case = golden("04_guidance")
    noise = torch.randn(2, *case["in.noise"].shape[1:], generator=torch.Generator().manual_seed(1))
    options = {
        "sigmas": flow_match_sigmas(2, shift=5.0),
        "text": case["in.context_pos"],
        "negative_text": case["in.context_neg"],
        "style": case["out.style_feat"],
        "text_scale": 8.0,
        "style_scale": 4.0,
    }
    together = denoise(net, noise.double(), **options)
    for i in range(2):
        alone = denoise(net, noise[i : i + 1].double(), **options)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-9, rtol=1e-9)


def test_strength_zero_is_the_base_model(golden, models):
    net, _ = models
    case = golden("02_dit_a")
    arguments = case["in.latents"].double(), case["in.timestep.0"], case["in.context"].double()
    tokens = case["in.style_feat"].double()
    off = net(*arguments, style=[StyleRegion(tokens, scale=0.0)])
    blocks_off = net(*arguments, style=[StyleRegion(tokens, block_scales=[0.0] * 3)])
    torch.testing.assert_close(off, net(*arguments), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(blocks_off, net(*arguments), atol=1e-12, rtol=1e-12)
    partly = net(*arguments, style=[StyleRegion(tokens, block_scales=[0.0, 1.0, 0.0])])
    assert (partly - off).abs().max() > 1e-3


def test_regions(golden, models):
    """A full mask is no mask, an empty one "no style"; each region acts in its own place first."""
    net, _ = models
    case = golden("02_dit_a")
    arguments = case["in.latents"].double(), case["in.timestep.0"], case["in.context"].double()
    tokens = case["in.style_feat"].double()
    other = tokens.flip(1) * 0.5
    full, empty = torch.ones(8, 10), torch.zeros(8, 10)
    plain, zero = net(*arguments, style=tokens), net(*arguments, style=torch.zeros_like(tokens))
    close = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(
        net(*arguments, style=[StyleRegion(tokens, mask=full)]), plain, **close
    )
    torch.testing.assert_close(
        net(*arguments, style=[StyleRegion(tokens, mask=empty)]), zero, **close
    )
    left = torch.zeros(8, 10)
    left[:, :4] = 1
    both = [StyleRegion(tokens, mask=left), StyleRegion(other, mask=1 - left)]
    mixed = net(*arguments, style=both)
    same = net(
        *arguments, style=[StyleRegion(tokens, mask=left), StyleRegion(tokens, mask=1 - left)]
    )
    torch.testing.assert_close(same, plain, **close)
    assert (mixed - plain).abs().max() > 1e-3
    early = torch.zeros(3, 8, 10)
    early[0] = 1
    per_frame = net(*arguments, style=[StyleRegion(tokens, mask=early)])
    change = (per_frame - zero).abs().amax(dim=(0, 1, 3, 4))
    assert change[0] > change[1:].max()


def test_style_range_of_steps(golden, models):
    """Outside its range a style is "no style": an empty range equals style scale 0."""
    net, _ = models
    case = golden("04_guidance")
    options = {
        "sigmas": flow_match_sigmas(3, shift=5.0),
        "text": case["in.context_pos"].double(),
        "negative_text": case["in.context_neg"].double(),
        "text_scale": 6.0,
    }
    noise, tokens = case["in.noise"].double(), case["out.style_feat"].double()
    never = [StyleRegion(tokens, start=0.9, end=0.95)]
    off = denoise(net, noise, style=never, style_scale=4.0, **options)
    plain = denoise(net, noise, style=tokens, style_scale=0.0, **options)
    always = denoise(net, noise, style=tokens, style_scale=4.0, **options)
    torch.testing.assert_close(off, plain, atol=1e-10, rtol=1e-10)
    first = denoise(net, noise, style=[StyleRegion(tokens, end=0.0)], style_scale=4.0, **options)
    assert (first - plain).norm() > 1e-3 and (first - always).norm() > 1e-3


@pytest.mark.parametrize("num_steps", [4, 5])
def test_one_style_after_another(golden, models, num_steps):
    """Where one range ends and the next begins, both act, each by half."""
    net, _ = models
    case = golden("04_guidance")
    options = {
        "sigmas": flow_match_sigmas(num_steps, shift=5.0),
        "text": case["in.context_pos"].double(),
        "negative_text": case["in.context_neg"].double(),
        "text_scale": 6.0,
        "style_scale": 4.0,
    }
    noise, tokens = case["in.noise"].double(), case["out.style_feat"].double()
    other = tokens.flip(1) * 0.5

    def guided(*regions):
        return denoise(net, noise, style=list(regions), **options)

    first, second = StyleRegion(tokens, end=0.5), StyleRegion(other, start=0.5)
    touching = guided(first, second)
    half = {"mask": torch.full((1, 1), 0.5)}
    masks = [replace(region, **half) for region in (first, second)]
    nearly = [replace(first, end=0.49), replace(second, start=0.51)]
    if num_steps == 4:  # step 2 lies on the border
        between = [replace(region, start=0.5, end=0.5) for region in masks]
        torch.testing.assert_close(touching, guided(*nearly, *between), atol=1e-10, rtol=1e-10)
    else:
        torch.testing.assert_close(touching, guided(*nearly), atol=1e-10, rtol=1e-10)
    same = guided(first, StyleRegion(tokens, start=0.5))
    torch.testing.assert_close(same, guided(StyleRegion(tokens)), atol=1e-10, rtol=1e-10)
    with pytest.raises(ConfigError, match="2 styles without masks"):
        guided(replace(first, end=0.51), second)


def whole(flop_of, num_blocks=30):
    """FLOP at real depth: those of a few blocks, since all but the first cost the same."""
    one, two, three = (flop_of(blocks) for blocks in (1, 2, 3))
    assert three - two == two - one > 0
    return one + (num_blocks - 1) * (two - one)


@functools.cache
def real_width(num_blocks):
    with torch.device("meta"):
        net = StyledWanTransformer(num_layers=num_blocks).to(torch.bfloat16)
        net.style_attention = StyleAttention(num_blocks, 4096, 1536).to(torch.bfloat16)
    return net.requires_grad_(False)


@functools.cache
def real_control(num_blocks):
    with torch.device("meta"):
        control = GrayTileControlNet(
            DiffusersHost(), width=1536, ffn_width=8960, num_heads=12, num_blocks=num_blocks
        )
    return control.to(torch.bfloat16).requires_grad_(False)


def count(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def real_inputs(frames=21):
    with torch.device("meta"):
        latents = torch.empty(1, 16, frames, 60, 104, dtype=torch.bfloat16)
        text = torch.empty(1, 512, 4096, dtype=torch.bfloat16)
        style = torch.empty(1, 16, 4096, dtype=torch.bfloat16)
        return latents, torch.empty(1), text, style


class MetaRegion(StyleRegion):
    """Meta tensors cannot be looked at."""

    def __post_init__(self):
        pass


# The tokens of a prompt and of the release's negative one, and a row of padding, which stands for
# the rest of 512.
PROMPT_ROWS, NEGATIVE_ROWS = 65, 127


def step_flop(num_blocks, num_branches):
    """FLOP of one step, with keys and values made beforehand."""
    net = real_width(num_blocks)
    latents, timestep, text, style = real_inputs()
    kv, negative = (
        net.embed_text(text[:, :rows], 1, 512 - rows + 1) for rows in (PROMPT_ROWS, NEGATIVE_ROWS)
    )
    regions = [MetaRegion(style)]
    wanted = [(negative, False), (kv, False), (kv, True)]
    if num_branches == 2:
        wanted = [wanted[0], wanted[2]]
    prepared = net.prepare_style(regions, net.style_keys_values(regions), (), True)
    branches = [net.prepare_branch(t, prepared, styled=s) for t, s in wanted]
    return count(lambda: net.velocities(latents, timestep, branches, batched=False))


def control_step_flop(num_blocks, text=None):
    """FLOP of one evaluation; keys and values of a text are made in it, of a prompt beforehand."""
    control = real_control(num_blocks)
    latents, timestep, prompt, _ = real_inputs()
    if text is None:
        text = control.prepare_text(prompt[:, :PROMPT_ROWS], padding=512 - PROMPT_ROWS + 1)
    return count(lambda: control(latents, timestep, text))


def test_flop_of_a_step():
    latents, timestep, text, style = real_inputs()

    def plain_flop(num_blocks):
        net = real_width(num_blocks)
        return count(lambda: net(latents, timestep, text, style=[MetaRegion(style)]))

    plain_pass = whole(plain_flop)
    assert abs(plain_pass / 283.11e12 - 1) < 0.005  # the cost model of one release pass
    two_branches = whole(lambda num_blocks: step_flop(num_blocks, 2))
    assert whole(lambda num_blocks: step_flop(num_blocks, 3)) / (3 * plain_pass) <= 0.9735
    assert two_branches / (3 * plain_pass) <= 0.652
    plain_control = whole(lambda num_blocks: control_step_flop(num_blocks, text), 15)
    with_control = two_branches + whole(control_step_flop, 15)
    assert with_control / (3 * plain_pass + plain_control) <= 0.702


def test_memory_of_a_step(monkeypatch):
    """One branch after the other needs less than a plain pass, all in one batch less than two."""
    net = StyledWanTransformer(num_attention_heads=1, ffn_dim=6 * 128, num_layers=2)
    net.style_attention = StyleAttention(2, 4096, 128)
    latents = torch.randn(1, 16, 5, 30, 52)  # 1950 tokens
    timestep, text, tokens = torch.tensor([500.0]), torch.randn(1, 40, 4096), torch.ones(1, 2, 4096)
    regions = [StyleRegion(tokens)]
    with torch.no_grad():
        texts = net.embed_text(text, 1), net.embed_text(text, 1)
        style = net.prepare_style(regions, net.style_keys_values(regions), (), True)
    branches = [
        net.prepare_branch(texts[i], style, styled=styled)
        for i, styled in ((0, False), (1, False), (1, True))
    ]

    def peak(run):
        with LiveMemory() as memory, torch.no_grad():
            run()
        return memory.peak

    def step(batched):
        return peak(lambda: net.velocities(latents, timestep, branches, batched=batched))

    ours = step(False), step(True)
    monkeypatch.setattr(wan_block, "MIN_FFN_TOKENS", 10_000)  # the feed-forward in one piece
    plain = peak(lambda: net(latents, timestep, text, style=tokens))
    assert ours[0] <= plain and ours[1] <= 2 * plain
    assert step(False) > plain and step(True) > 2 * plain


def test_control_flop_at_real_size():
    """36 of 50 steps cost this much, whatever the number of styles (see `test_work_done_once`)."""
    latents, timestep, text, _ = real_inputs()

    def flop(num_blocks):
        control = real_control(num_blocks)
        prepared = control.prepare_text(text)
        return count(lambda: control(latents, timestep, prepared))

    assert abs(whole(flop, 15) / 143.82e12 - 1) < 0.01


@pytest.mark.parametrize("styles", [0, 1, 2])
def test_work_done_once(golden, models, styles):
    """Text and style K, V linears run once per generation; the ControlNet once per step."""
    net, controlnet = models
    case = golden("04_guidance")
    calls = {"text": 0, "style": 0, "control": 0}
    handles = [
        net.blocks[0].attn2.to_k.register_forward_hook(_counter(calls, "text")),
        net.style_attention.blocks[0]["cross_attn"].k_img.register_forward_hook(
            _counter(calls, "style")
        ),
        controlnet.register_forward_hook(_counter(calls, "control")),
    ]
    tokens, left = case["out.style_feat"].double(), torch.zeros(8, 10)
    left[:, :5] = 1
    regions = [StyleRegion(tokens, mask=left), StyleRegion(tokens, mask=1 - left)][:styles]
    with FlopCounterMode(display=False) as counter:
        denoise(
            net,
            case["in.noise"].double(),
            sigmas=flow_match_sigmas(4, shift=5.0),
            text=case["in.context_pos"].double(),
            negative_text=case["in.context_neg"].double(),
            style=regions or None,
            text_scale=8.0,
            style_scale=4.0,
            controlnet=controlnet,
            control_latents=case["in.control_latents"].double(),
        )
    for handle in handles:
        handle.remove()
    assert calls["text"] == 2  # positive and negative
    assert calls["style"] == styles
    assert calls["control"] == 4
    # Equal for any number of styles: control depends on latents, timestep and prompt alone.
    assert control_flop.setdefault("flop", flop_of(counter, controlnet)) == flop_of(
        counter, controlnet
    )


control_flop: dict[str, int] = {}


def flop_of(counter, module):
    flop = sum(counter.flop_counts[type(module).__name__].values())
    assert flop > 0
    return flop


def _counter(calls, name):
    def hook(*_):
        calls[name] += 1

    return hook
