"""The sampling loop does after its first step only what depends on the step, and never waits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.repeated_work import RepeatedWork
from stylemaster_core import (
    StyleRegion,
    denoise,
    flow_match_sigmas,
    load_gray_tile_controlnet,
    load_transformer,
)
from stylemaster_core.models.decoupled_attention import StyleAttention
from stylemaster_core.models.gray_tile_controlnet import (
    DiffusersHost,
    GrayTileControlNet,
    copy_from_transformer,
)
from stylemaster_core.models.wan_transformer import StyledWanTransformer
from stylemaster_core.sampling import denoise as denoise_module
from stylemaster_core.sampling.windows import WindowConfig

SIZES = {"num_heads": 2, "width": 24, "ffn_width": 32, "text_width": 10, "freq_width": 8}
TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2])
SIGMAS = flow_match_sigmas(3, shift=5.0)  # with content, unlike all that is made in a test


class UncheckedRegion(StyleRegion):
    """Tensors without content cannot be looked at."""

    def __post_init__(self) -> None:
        pass


def work_of(make_loop) -> RepeatedWork:
    """What a loop does on "cpu:1", which stands for an accelerator; tensors have no content."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        loop = make_loop(torch.device("cpu:1"))
        with RepeatedWork() as work:
            loop(work)
    return work


def sampling(device: torch.device, *, masks: bool, controlled: bool, **options):
    with device:
        net = StyledWanTransformer(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=10,
            freq_dim=8,
            ffn_dim=32,
            num_layers=2,
        )
        net.style_attention = StyleAttention(2, 10, 24)
        control = GrayTileControlNet(DiffusersHost(), num_blocks=1, **SIZES)
        latents, gray = torch.empty(2, 1, 16, 5, 4, 6).unbind()
        text, negative = torch.empty(2, 1, 6, 10).unbind()
        tokens = torch.empty(2, 1, 5, 10).unbind()
        mask = torch.empty(4, 6) if masks else None
    regions = [UncheckedRegion(x, mask=mask) for x in (tokens if masks else tokens[:1])]
    if controlled:
        options |= {"controlnet": control, "control_latents": gray, "control_scale": 0.5}

    def loop(work: RepeatedWork) -> None:
        denoise(
            net,
            latents,
            sigmas=SIGMAS,
            text=text,
            negative_text=negative,
            style=regions,
            text_scale=8.0,
            style_scale=3.0,
            callback=lambda _: work.next_turn(),
            **options,
        )

    return loop


@pytest.mark.parametrize(
    ("batched", "controlled", "masks", "windows"),
    [
        (False, False, False, None),
        (True, False, True, None),
        (True, True, False, None),
        (False, True, True, WindowConfig(3, 1)),
    ],
)
def test_nothing_is_repeated_and_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, batched, controlled, masks, windows
) -> None:
    monkeypatch.setattr(denoise_module, "_check", lambda *_: None)
    monkeypatch.setattr(denoise_module, "merge_padding", lambda texts: (list(texts), 3))
    monkeypatch.setattr(
        denoise_module,
        "region_masks",
        lambda regions, grid: (
            [x.tokens.new_empty(1, 5 * 2 * 3, 1) for x in regions] * 2 if masks else ()
        ),
    )
    work = work_of(
        lambda device: sampling(
            device, masks=masks, controlled=controlled, windows=windows, batch_branches=batched
        )
    )
    # The patches of the gray tile: to keep them would cost more memory than they cost time.
    patches = {"convolution": 2 * (2 if windows else 1)} if controlled else {}
    assert not work.waits and work.made == patches, (work.waits, work.made)


@pytest.mark.parametrize(
    ("turn", "waits", "made"),
    [
        (lambda x, one: x + one, {}, {}),
        (lambda x, one: x[:1].mul_(2), {}, {}),
        (lambda x, one: x + one * one, {}, {"mul"}),
        (lambda x, one: x + torch.zeros(2, device=x.device), {}, {"zeros"}),
        (lambda x, one: x.cpu(), {"_to_copy"}, {}),
        (lambda x, one: x + torch.tensor([1.0, 2.0]).to(x), {"_to_copy"}, {}),
    ],
)
def test_what_is_found(turn, waits, made) -> None:
    def make_loop(device: torch.device):
        x, one = torch.empty(2, 2, device=device).unbind()

        def loop(work: RepeatedWork) -> None:
            nonlocal x
            for _ in range(3):
                x = turn(x, one).to(device)
                work.next_turn()

        return loop

    work = work_of(make_loop)
    assert set(work.waits) == set(waits) and set(work.made) >= set(made), (work.waits, work.made)


def test_a_number_taken_from_the_device_is_found() -> None:
    with RepeatedWork() as work:
        x = torch.ones(3)
        work.next_turn()
        assert float(x.sum()) == 3 and len(x.nonzero()) == 3
    assert work.waits == {"_local_scalar_dense": 1, "nonzero": 1}


@pytest.mark.parametrize("batched", [False, True])
def test_one_graph_for_all_blocks_steps_and_styles(tiny_weights, tiny_inputs, batched) -> None:
    """A generation of other styles, at other strengths and times, is compiled no more."""
    inputs = tiny_inputs()
    weights = tiny_weights(3)
    net, controlnet = (
        load_transformer(weights, num_heads=2),
        load_gray_tile_controlnet(copy_from_transformer(weights), num_heads=2),
    )
    torch._dynamo.reset()
    graphs = CompileCounter()
    net.compile_repeated_blocks(fullgraph=True, backend=graphs)

    def generate(tokens: Tensor, **options) -> Tensor:
        return denoise(
            net,
            inputs.latents,
            sigmas=SIGMAS,
            text=inputs.text,
            negative_text=inputs.negative,
            style=[StyleRegion(tokens, **options)],
            text_scale=8.0,
            style_scale=3.0,
            controlnet=controlnet,
            control_latents=inputs.control_latents,
            control_range=(0.0, 0.5),
            batch_branches=batched,
        )

    compiled = generate(inputs.tokens)
    count = graphs.frame_count
    # One by one, the styled branch has a graph of its own. Block 0 is not compiled here; PyTorch
    # 2.4 takes each of the others for a function of its own.
    each = len(net.blocks) - 1 if TORCH < (2, 5) else 1
    assert count == each * (1 if batched else 2)
    for tokens in (inputs.other_tokens, inputs.tokens * 2):
        for change in ({"scale": 0.5}, {"block_scales": [1.0, 0.0, 2.0]}, {"end": 1.0}):
            generate(tokens, **change)
    assert graphs.frame_count == count
    for start in (0.3, 0.5, 0.6):  # without the styled branch a batch is smaller
        generate(inputs.tokens, start=start)
    assert graphs.frame_count == count + each * batched
    torch._dynamo.reset()
    net = load_transformer(weights, num_heads=2)
    torch.testing.assert_close(compiled, generate(inputs.tokens))
