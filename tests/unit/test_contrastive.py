"""The paper's contrastive projection, where an adapter has one."""

import pytest
import torch

from stylemaster_core import WeightsError, load_style_projector
from stylemaster_core.models.small import draw_weights
from stylemaster_core.models.style_projector import ContrastiveProjection
from stylemaster_core.weights.shapes import AdapterSizes, expected_adapter_shapes

SIZES = AdapterSizes(
    width=8,
    num_blocks=0,
    style_width=10,
    patch_width=16,
    num_layers=1,
    global_tokens=3,
    global_width=6,
)


def release_weights():
    drawn = draw_weights(expected_adapter_shapes(SIZES), 0)
    return {key.removeprefix("style_model."): value.float() for key, value in drawn.items()}


def with_contrastive(module):
    return release_weights() | {f"contrastive.{k}": v for k, v in module.state_dict().items()}


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 17, 16, generator=generator), torch.randn(1, 6, generator=generator)


def test_it_starts_as_the_identity():
    module = ContrastiveProjection(6, 12)
    embeds = torch.randn(4, 6)
    assert torch.equal(module(embeds), embeds)
    plain = load_style_projector(release_weights())
    fresh = load_style_projector(with_contrastive(module))
    assert plain.contrastive is None and fresh.contrastive is not None
    assert torch.equal(
        fresh(*inputs(), selection="all").tokens, plain(*inputs(), selection="all").tokens
    )


def test_it_is_read_used_and_kept():
    module = ContrastiveProjection(6, 12)
    torch.nn.init.normal_(module.fc2.weight)
    weights = with_contrastive(module)
    projector = load_style_projector(weights)
    patches, embeds = inputs()
    with torch.no_grad():
        expected = load_style_projector(release_weights())(patches, module(embeds), selection="all")
    result = projector(patches, embeds, selection="all")
    torch.testing.assert_close(result.tokens, expected.tokens)
    assert not torch.allclose(result.tokens[:, 2:], projector.global_projection(embeds))
    out = projector.release_state_dict()
    assert set(out) == set(weights) and all(torch.equal(out[k], weights[k]) for k in out)


def test_its_gradients_flow_from_the_first_step():
    module = ContrastiveProjection(6, 12)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    target = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    embeds = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        optimizer.zero_grad()
        (module(embeds) - target).square().mean().backward()
        optimizer.step()
    still = [name for name, p in module.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_incomplete_weights():
    weights = with_contrastive(ContrastiveProjection(6, 12))
    del weights["contrastive.fc2.bias"]
    with pytest.raises(WeightsError, match="contrastive.fc2.bias"):
        load_style_projector(weights)
