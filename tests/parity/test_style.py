"""The style side against the released code."""

import zlib

import pytest
import torch

from stylemaster_core import load_style_projector
from stylemaster_core.models.query_transformer import QueryTransformer
from stylemaster_core.models.style_projector import GlobalProjection, StyleProjector
from stylemaster_core.models.texture_selector import prompt_similarity


def inputs(case):
    return case["in.last_hidden_state"], case["in.image_embeds_ps"], case["in.prompt_embeds"]


def test_small_release(golden):
    case = golden("01_style_small")
    result = load_style_projector(case.group("weights."))(*inputs(case))
    assert torch.equal(result.kept, case["out.kept_indices"])
    case.check("out.similarity", result.similarity)
    case.check("out.style_tokens", result.tokens)


def test_small_paper_rule(golden):
    case = golden("01_style_small")
    result = load_style_projector(case.group("weights."))(*inputs(case), selection="paper")
    assert torch.equal(result.kept, case["derived.least_similar.kept_indices"])
    case.check("derived.least_similar.style_tokens", result.tokens)


def test_guidance_style_tokens(golden):
    case, weights = golden("04_guidance"), golden("weights_dit_a").group("style_model.")
    result = load_style_projector(weights, num_heads=4)(
        case["in.last_hidden_state"], case["in.image_embeds_ps"], case["in.context_pos"]
    )
    case.check("out.style_feat", result.tokens)


def drawn(seed, name, *shape, std=1.0, mean=0.0):
    """The recipe by which weights and inputs of the real-size case were drawn."""
    seed = (zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1)) & 0x7FFFFFFF
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator) * std + mean


def rule(name, shape):
    last = name.rsplit(".", 1)[-1]
    if last == "weight" and len(shape) == 1:
        return 1.0, 0.25
    if last == "style_emb":
        return 0.0, 1.0
    if last == "proj_patch":
        return 0.0, shape[0] ** -0.5
    if last in ("bias", "in_proj_bias"):
        return 0.0, 0.1
    return 0.0, torch.Size(shape[1:]).numel() ** -0.5


def test_real_sizes(golden):
    case = golden("01_style_real_dims")
    seed, sizes = case.meta["seed"], case.meta["config"]
    with torch.device("meta"):
        blank = StyleProjector(
            QueryTransformer(
                sizes["local_tokens"], sizes["in_dim"], sizes["n_layers"], sizes["num_heads"], 4096
            ),
            GlobalProjection(sizes["clip_embeddings_dim"], sizes["global_tokens"], 4096),
        )
    weights = {}
    for key, value in blank.release_state_dict().items():
        mean, std = rule(key, tuple(value.shape))
        weights[key] = drawn(seed, key, *value.shape, std=std, mean=mean)
        recorded = case.meta["checksums"][f"weights.{key}"]["first4"]
        assert weights[key].flatten()[:4].tolist() == pytest.approx(recorded, rel=1e-5)
    assert sum(w.numel() for w in weights.values()) == case.meta["num_params"]

    patches = drawn(seed, "real.last_hidden_state", 1, 257, 1280)
    patches = patches + 0.5 * drawn(seed, "real.lhs_mean", 1, 1, 1280)
    prompt = 0.3 * drawn(seed, "real.prompt", 1, 512, 4096)
    prompt = prompt + 0.4 * drawn(seed, "real.prompt_mean", 1, 1, 4096)
    prompt[:, 37:] = 0
    result = load_style_projector(weights, num_heads=sizes["num_heads"])(
        patches, drawn(seed, "real.image_embeds_ps", 1, 1024), prompt
    )
    assert torch.equal(result.kept, case["out.kept_indices"])
    case.check("out.similarity", prompt_similarity(patches, prompt))
    case.check("out.style_tokens", result.tokens)
