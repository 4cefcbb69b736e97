"""The style branch as it is trained: made new or from an adapter, dropped at random, written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError, WeightsError
from ..models.decoupled_attention import StyleAttention, StyleProjection, create_style_attention
from ..models.query_transformer import QueryTransformer
from ..models.style_projector import (
    ContrastiveProjection,
    GlobalProjection,
    StyleProjector,
    load_style_projector,
)
from ..weights.convert import ADAPTER_FORMAT, CUSTOM_BASE, KNOWN_BASE, AdapterSizes
from ..weights.shapes import adapter_sizes
from ..weights.state_dict import check_keys, shapes_of
from .config import StyleConfig
from .samples import Sample, generator_of, seed_of
from .trainer import TrainedFile, Trainer, stored

StateDict = Mapping[str, Tensor]
PREFIX = "style_model."


def new_style_attention(num_blocks: int, style_width: int, width: int, seed: int) -> StyleAttention:
    """A style branch that adds nothing yet and learns from the first step on."""
    attention = StyleAttention(num_blocks, style_width, width)
    generator = generator_of(seed, "style attention")
    for module in attention.modules():
        if isinstance(module, StyleProjection):
            module.reset_for_training(generator)
    return attention


def new_style_projector(
    config: StyleConfig, *, patch_width: int, embed_width: int, style_width: int, seed: int
) -> StyleProjector:
    """A style model with random weights; its sizes are the config's and those of the features."""
    if patch_width % config.num_heads:
        raise LayoutError(
            f"patch features of width {patch_width} do not divide into {config.num_heads} heads; "
            "set style.num_heads"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "style model"))
        texture = QueryTransformer(
            config.local_tokens, patch_width, config.num_layers, config.num_heads, style_width
        )
        return StyleProjector(
            texture, GlobalProjection(embed_width, config.global_tokens, style_width)
        )


def load_contrastive(state_dict: StateDict) -> ContrastiveProjection:
    """The contrastive projection of a file that the global projection's trainer wrote.

    Raises:
        WeightsError: if it holds none.
    """
    start = f"{PREFIX}contrastive."
    weights = {k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start)}
    if set(weights) != {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}:
        raise WeightsError(
            f"no contrastive projection among {sorted(state_dict)[:3]}; use a file that "
            "the trainer of the global projection wrote"
        )
    hidden, width = weights["fc1.weight"].shape
    module = ContrastiveProjection(width, hidden)
    module.load_state_dict(weights)
    return module


def style_branch(
    transformer: Any,
    config: StyleConfig,
    *,
    features: Mapping[str, tuple[int, ...]],
    adapter: StateDict | None,
    contrastive: StateDict | None,
    seed: int,
) -> StyleProjector:
    """Give the transformer a style branch, and make the style model that feeds it; both float32.

    Args:
        transformer: `StyledWanTransformer`; its `style_attention` is set.
        config: sizes, where the branch is new.
        features: shapes of a sample.
        adapter: to start from, under the release's names; None for new weights.
        contrastive: file of the global projection's trainer.
        seed: of new weights.

    Raises:
        WeightsError: if the adapter is of another model.
        LayoutError: if the features are of other widths than the adapter's.
    """
    patch_width, embed_width = features["patch_features"][-1], features["image_embeds"][-1]
    width, num_blocks = transformer.proj_out.in_features, len(transformer.blocks)
    if adapter is None:
        style_width = transformer.config.text_dim
        attention = new_style_attention(num_blocks, style_width, width, seed)
        projector = new_style_projector(
            config,
            patch_width=patch_width,
            embed_width=embed_width,
            style_width=style_width,
            seed=seed,
        )
    else:
        adapter = {key: value.float() for key, value in adapter.items()}
        loaded = create_style_attention(adapter)
        if loaded is None or (len(loaded.blocks), loaded.width) != (num_blocks, width):
            raise WeightsError(
                f"the adapter is not for a transformer of {num_blocks} blocks of width {width}; "
                "start from an adapter that was trained on this base, or from none"
            )
        attention = loaded
        style = {k.removeprefix(PREFIX): v for k, v in adapter.items() if k.startswith(PREFIX)}
        projector = load_style_projector(style, num_heads=config.num_heads)
    if contrastive is not None:
        projector.contrastive = load_contrastive(contrastive).float()
        if adapter is None:
            _take_token_projection(projector.global_projection, contrastive)
    widths = projector.texture.queries.shape[-1], projector.global_projection.proj.in_features
    if widths != (patch_width, embed_width):
        raise LayoutError(
            f"the data have image features of width {patch_width} and embeddings of width "
            f"{embed_width}, the adapter takes {widths[0]} and {widths[1]}; encode the data with "
            "the image encoder it was trained with"
        )
    transformer.style_attention = attention
    return projector


def _take_token_projection(module: GlobalProjection, weights: StateDict) -> None:
    """Start the projection to tokens from that of the file, if it holds one."""
    names = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    found = {name: weights[PREFIX + name] for name in names if PREFIX + name in weights}
    if not found:
        return
    check_keys(shapes_of(found), shapes_of(module.state_dict()), "the projection to style tokens")
    module.load_state_dict(found)


def style_keys(config: StyleConfig, *, has_contrastive: bool) -> tuple[str, str]:
    """Names of a sample's patch features, and of the embedding that the style model takes."""
    plain = config.global_embeds == "plain"
    if config.global_embeds == "auto":
        plain = has_contrastive
    return "patch_features", "image_embeds" if plain else "shuffled_embeds"


def style_tokens(
    projector: StyleProjector, config: StyleConfig, embeds_key: str, sample: Sample
) -> Tensor:
    """Style tokens [B, S, D] of a batch, those of dropped styles all zero.

    The texture selection sees the sample's own text, dropped or not: as when sampling, the prompt
    ranks the patches, whichever guidance branch is computed.
    """
    tokens = projector(
        sample["patch_features"],
        sample[embeds_key],
        sample["text"],
        selection=config.selection,
        drop_rate=config.drop_rate,
        keep=config.keep,
        similarity=sample.get("similarity"),
    ).tokens
    if "drop_style" not in sample:
        return tokens
    return torch.where(sample["drop_style"][:, None, None], torch.zeros_like(tokens), tokens)


def adapter_file(
    trainer: Trainer, transformer: Any, projector: StyleProjector, embeds_key: str
) -> TrainedFile:
    """The style branch and style model as an adapter under the release's names."""
    style = {PREFIX + key: value for key, value in projector.release_state_dict().items()}
    tensors = style | transformer.style_attention.state_dict()
    tensors = stored(tensors, trainer.config)
    # A contrastive projection stands before the style tokens: the base does not notice it.
    sizes = replace(adapter_sizes(shapes_of(tensors)), contrastive_width=0)
    metadata = trainer.metadata(
        ADAPTER_FORMAT,
        base_model=KNOWN_BASE if sizes == AdapterSizes() else CUSTOM_BASE,
        num_blocks=str(sizes.num_blocks),
        style_num_heads=str(trainer.config.style.num_heads),
        texture_selection=trainer.config.style.selection,
        global_embeds=embeds_key,
    )
    return TrainedFile("style_adapter.safetensors", tensors, metadata)
