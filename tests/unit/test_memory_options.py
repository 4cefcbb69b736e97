"""8-bit storage, offloading and compilation of the transformer, as far as a CPU can tell."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from stylemaster_core import ConfigError, StyleRegion, load_transformer
from stylemaster_core.models.motion_adapter import MotionAdapter, attached_motion
from stylemaster_core.pipelines.models import ModelFiles, Models

CPU = torch.device("cpu")


@pytest.fixture
def net(tiny_weights):
    weights = {key: value.float() for key, value in tiny_weights(4).items()}
    return load_transformer(weights, num_heads=2)


@pytest.fixture
def arguments(tiny_inputs):
    inputs = tiny_inputs()
    return inputs.latents.float(), inputs.timestep, inputs.text.float()


@pytest.fixture
def tokens(tiny_inputs):
    return tiny_inputs().tokens.float()


def both_paths(net, arguments, tokens):
    """The plain forward pass, and the optimised path of the sampling loop."""
    latents, timestep, text = arguments
    plain = net(latents, timestep, text, style=tokens)
    regions = [StyleRegion(tokens)]
    style = net.prepare_style(regions, net.style_keys_values(regions), (), True)
    text_kv = net.embed_text(text, 1)
    branches = [net.prepare_branch(text_kv, style, styled=styled) for styled in (False, True)]
    return [plain, *net.velocities(latents, timestep, branches)]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_float8_storage(net, arguments, tokens, compute):
    exact = both_paths(net, arguments, tokens)
    net.to(compute)
    net.enable_layerwise_casting(torch.float8_e4m3fn, compute)
    stored = [p for p in net.parameters() if p.dtype == torch.float8_e4m3fn]
    assert sum(p.numel() for p in stored) > 0.5 * sum(p.numel() for p in net.parameters())
    assert all(p.dtype == compute for p in net.style_attention.parameters())
    assert net.compute_dtype == compute
    for ours, full in zip(both_paths(net, arguments, tokens), exact, strict=True):
        assert ours.dtype == compute
        error = (ours.float() - full).norm() / full.norm()
        assert 1e-4 < error < 0.1


def test_offloading_by_layers_changes_nothing(net, arguments, tokens):
    exact = both_paths(net, arguments, tokens)
    net.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    for ours, full in zip(both_paths(net, arguments, tokens), exact, strict=True):
        assert torch.equal(ours, full)


class UncheckedRegion(StyleRegion):
    """Fake tensors cannot be looked at."""

    def __post_init__(self):
        pass


def test_offloaded_parameters_meet_the_right_device(monkeypatch):
    """Tensors without content, on two devices: a parameter used without being fetched is an error.

    "cpu:1" stands for the accelerator; both paths of the transformer must run on it.
    """
    from diffusers.hooks.group_offloading import ModuleGroup

    from stylemaster_core.models.decoupled_attention import StyleAttention
    from stylemaster_core.models.wan_transformer import StyledWanTransformer

    def move_to(attribute):
        def move(group):
            held = [t for m in group.modules for t in (*m.parameters(), *m.buffers())]
            for tensor in held + list(group.parameters) + list(group.buffers):
                tensor.fake_device = getattr(group, attribute)

        return move

    monkeypatch.setattr(ModuleGroup, "onload_", move_to("onload_device"))
    monkeypatch.setattr(ModuleGroup, "offload_", move_to("offload_device"))
    monkeypatch.setattr(f"{__name__}.StyleRegion", UncheckedRegion)
    monkeypatch.setattr("stylemaster_core.models.wan_transformer.StyleRegion", UncheckedRegion)
    accelerator = torch.device("cpu:1")
    with FakeTensorMode():
        net = StyledWanTransformer(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=10,
            freq_dim=8,
            ffn_dim=32,
            num_layers=2,
        )
        net.style_attention = StyleAttention(2, 10, 24)
        net.requires_grad_(False)
        net.enable_group_offload(
            onload_device=accelerator, offload_device=CPU, offload_type="leaf_level"
        )
        net.motion_adapter = MotionAdapter(2, 24, 2).requires_grad_(False)
        for parameter in net.motion_adapter.parameters():
            parameter.fake_device = accelerator
        assert net.blocks[0].attn1.to_q.weight.device == CPU
        arguments = [
            torch.empty(shape, device=accelerator) for shape in ((1, 16, 3, 4, 6), (1,), (1, 6, 10))
        ]
        style = torch.empty(1, 5, 10, device=accelerator)
        with attached_motion(net, -0.3):
            velocities = both_paths(net, arguments, style)
        assert all(velocity.device == accelerator for velocity in velocities)
        assert net.blocks[0].attn1.to_q.weight.device == CPU


# PyTorch 2.4 takes each block for a function of its own: it compiles as often, times the blocks.
OWN_GRAPHS = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 5)


@pytest.fixture
def graphs(net):
    torch._dynamo.reset()
    counter = CompileCounter()
    net.compile_repeated_blocks(fullgraph=True, backend=counter)
    yield counter
    torch._dynamo.reset()


def test_one_graph_for_all_blocks_and_styles(net, arguments, tokens, graphs):
    exact = load_transformer({k: v for k, v in _release_weights(net).items()}, num_heads=2)
    first = net(*arguments, style=tokens)
    count = len(net.blocks) if OWN_GRAPHS else 1
    assert graphs.frame_count == count
    torch.testing.assert_close(first, exact(*arguments, style=tokens))
    for scale in (0.5, -1.0, 2.0):
        for other in (tokens, tokens.flip(1), torch.zeros_like(tokens)):
            net(*arguments, style=[StyleRegion(other, scale=scale)])
    net(arguments[0] + 1, torch.tensor([3.0]), arguments[2] * 2, style=tokens)
    assert graphs.frame_count == count


def _release_weights(net):
    from stylemaster_core.weights.key_maps import diffusers_to_native

    base, style = {}, {}
    for key, value in net.state_dict().items():
        prefix = "style_attention."
        (style if key.startswith(prefix) else base)[key.removeprefix(prefix)] = value
    return diffusers_to_native(base) | style


def test_the_optimised_path_adds_one_graph(net, arguments, tokens, graphs):
    """Blocks 1.. share one graph per shape of the batch, however often styles change."""
    both_paths(net, arguments, tokens)
    count = graphs.frame_count
    assert count <= (2 * len(net.blocks) if OWN_GRAPHS else 2)
    for _ in range(3):
        tokens = tokens.flip(1) * 0.5
        both_paths(net, arguments, tokens)
    assert graphs.frame_count == count


def test_compiled_blocks_notice_the_motion_adapter(net, arguments, tokens, graphs):
    base = net(*arguments, style=tokens)
    net.motion_adapter = MotionAdapter(4, 24, 2).requires_grad_(False)
    results = []
    for scale in (-0.3, 0.4, 1.0, -0.7, 0.2, 0.9, -1.0, 0.6, -0.1, 0.3):
        with attached_motion(net, scale):
            results.append(net(*arguments, style=tokens))
    count = 2 * len(net.blocks) if OWN_GRAPHS else 2
    assert graphs.frame_count == count  # with and without, whatever the scale
    assert not any(torch.allclose(result, base) for result in results)
    assert not torch.allclose(results[0], results[1])
    assert torch.equal(net(*arguments, style=tokens), base)


@pytest.mark.parametrize("options", [{"offload": "layers"}, {"storage": "float8"}])
def test_options_that_exclude_each_other(options):
    with pytest.raises(ConfigError, match="do not go together"):
        Models(ModelFiles(), device="cpu", compile_blocks=True, **options)
