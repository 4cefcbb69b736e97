"""Trainers of StyleCrafter on Wan: the adapter on pictures, then a LoRA that carries it to videos.

The original trains its adapter on an image model, and then only the temporal layers of a video
model (StyleCrafter, sec. 3.4). Wan has no layers of time alone, so the second stage trains a LoRA
on self-attention, in a file of its own, that is loaded for videos only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, LayoutError, WeightsError
from ..models.decoupled_attention import (
    StyleAttention,
    StyleProjection,
    StyleRegion,
    create_style_attention,
)
from ..models.motion_adapter import (
    VIDEO_LORA_FORMAT,
    MotionAdapter,
    load_motion_adapter,
    motion_adapter_state_dict,
)
from ..models.stylecrafter import (
    StyleCrafterEncoder,
    create_stylecrafter_encoder,
    load_stylecrafter_encoder,
    stylecrafter_heads,
)
from ..weights.convert import CUSTOM_BASE, KNOWN_BASE, STYLECRAFTER_WAN_FORMAT
from ..weights.shapes import (
    StyleCrafterSizes,
    StyleCrafterWanSizes,
    expected_stylecrafter_wan_shapes,
    stylecrafter_wan_sizes,
)
from ..weights.state_dict import check_keys, shapes_of
from .config import StyleCrafterConfig, TrainConfig
from .flow_matching import FlowDraws, FlowMatchTrainer, StateDict, frozen_transformer, trainable
from .samples import Sample, Subset, TrainingData, generator_of, seed_of
from .trainer import TrainedFile, stored

FEATURES = "patch_features"


class StyleCrafterTrainer(FlowMatchTrainer):
    """Flow matching under text and style, through the adapter alone: the first stage.

    Source: StyleCrafter, sec. 3.4, stage 1. Deviations: flow matching, as Wan's; the style picture
    is seen through CLIP's features as the cache holds them.
    """

    name = "stylecrafter"

    def __init__(
        self, config: TrainConfig, transformer: Any, encoder: StyleCrafterEncoder, **more: Any
    ) -> None:
        """Set up.

        Args:
            config: of the run.
            transformer: with the adapter's branch; the rest of it stays frozen.
            encoder: of the adapter.
            more: `null_text` and `provenance` of `FlowMatchTrainer`.
        """
        draws = FlowDraws(config, ("latents", "text", FEATURES), drop_style=True)
        super().__init__(config, transformer, draws, **more)
        self.encoder = encoder
        encoder.requires_grad_(False)
        transformer.style_attention.requires_grad_(False)
        for part in self.parts_to_train():
            trainable(part)

    def parts_to_train(self) -> tuple[nn.Module, ...]:
        """Modules of the adapter that the gradients reach; the others stay frozen."""
        style = (self.transformer.style_attention, self.encoder.image_context_model)
        scales = (self.encoder.scale_predictor,)
        parts = {"all": (*style, *scales), "style": style, "scales": scales}
        return parts[self.config.stylecrafter.train]

    def velocity(self, noisy: Tensor, timestep: Tensor, text: Tensor, batch: Sample) -> Tensor:
        return self.transformer(noisy, timestep, text, style=self.regions(batch))

    def conditions(self, sample: Sample) -> dict[str, Any]:
        return {"style": self.regions(sample)}

    def regions(self, sample: Sample) -> list[StyleRegion]:
        """The style of each sample of a batch; where it is dropped, its gains are 0.

        The scale predictor sees the sample's own text, dropped or not: as when sampling, where it
        sees the prompt, whichever branch is computed.
        """
        tokens = self.encoder(sample[FEATURES])
        gains = self.encoder.gains(sample["text"], tokens)
        if "drop_style" in sample:
            gains = gains.masked_fill(sample["drop_style"][:, None], 0.0)
        return [StyleRegion(tokens, gains=gains)]

    def check(self, shapes: Mapping[str, tuple[int, ...]], num_samples: int) -> None:
        super().check(shapes, num_samples)
        width = self.encoder.image_context_model.queries.shape[-1]
        if shapes[FEATURES][-1] != width:
            raise LayoutError(
                f"the data have image features of width {shapes[FEATURES][-1]}, the adapter takes "
                f"{width}; encode the data with the image encoder it was trained with"
            )

    def outputs(self) -> list[TrainedFile]:
        weights = self.encoder.release_state_dict()
        tensors = stored(weights | self.transformer.style_attention.state_dict(), self.config)
        sizes = stylecrafter_wan_sizes(shapes_of(tensors))
        metadata = self.metadata(
            STYLECRAFTER_WAN_FORMAT,
            base_model=KNOWN_BASE if sizes == StyleCrafterWanSizes() else CUSTOM_BASE,
            num_blocks=str(sizes.encoder.num_scales),
            style_num_heads=str(num_heads_of(self.encoder.image_context_model)),
            scale_num_heads=str(num_heads_of(self.encoder.scale_predictor.scale_predictor)),
        )
        return [TrainedFile("stylecrafter_adapter.safetensors", tensors, metadata)]


class StyleCrafterVideoTrainer(StyleCrafterTrainer):
    """Flow matching on clips and pictures with the adapter frozen: the second stage.

    Source: StyleCrafter, sec. 3.4, stage 2. Deviation: a LoRA on self-attention instead of layers
    of time, and equal batches of clips and pictures.
    """

    name = "stylecrafter-video"

    def __init__(
        self,
        config: TrainConfig,
        transformer: Any,
        encoder: StyleCrafterEncoder,
        lora: MotionAdapter,
        **more: Any,
    ) -> None:
        """Set up.

        Args:
            config: of the run.
            transformer: with the adapter's branch; stays frozen, and so does the branch.
            encoder: of the adapter; stays frozen.
            lora: is trained, at scale 1; it is attached to the transformer for good.
            more: `null_text` and `provenance` of `FlowMatchTrainer`.
        """
        super().__init__(config, transformer, encoder, **more)
        self.lora = trainable(lora)
        lora.scale = 1.0
        lora.attach(transformer)

    def parts_to_train(self) -> tuple[nn.Module, ...]:
        return ()

    def arrange(self, data: TrainingData) -> TrainingData:
        return clips_and_pictures(data, self.config.stylecrafter.image_share)

    def outputs(self) -> list[TrainedFile]:
        weights = motion_adapter_state_dict(self.lora)  # type: ignore[arg-type]
        rank = weights["diffusion_model.blocks.0.self_attn.q.lora_A.weight"].shape[0]
        metadata = self.metadata(
            VIDEO_LORA_FORMAT, rank=str(rank), num_blocks=str(len(self.transformer.blocks))
        )
        name = "stylecrafter_video_lora.safetensors"
        return [TrainedFile(name, stored(weights, self.config), metadata)]


def clips_and_pictures(data: TrainingData, share: float) -> TrainingData:
    """Repeat pictures, or clips, until pictures are the wanted share of the samples.

    Raises:
        ConfigError: if there are none of a kind that is wanted.
    """
    pictures = [i for i, size in enumerate(data.sizes) if size[1] == 1]
    clips = [i for i, size in enumerate(data.sizes) if size[1] > 1]
    if (share > 0 and not pictures) or (share < 1 and not clips):
        raise ConfigError(
            f"stylecrafter.image_share is {share}, and the data hold {len(clips)} clips and "
            f"{len(pictures)} pictures; add samples of the other kind, or set it to 0 or 1"
        )
    if share in (0, 1):
        return Subset(data, pictures if share else clips)
    wanted = round(len(clips) * share / (1 - share))
    if wanted >= len(pictures):
        pictures = _repeated(pictures, wanted)
    else:
        clips = _repeated(clips, round(len(pictures) * (1 - share) / share))
    return Subset(data, [*clips, *pictures])


def _repeated(indices: Sequence[int], count: int) -> list[int]:
    return [indices[i % len(indices)] for i in range(count)]


def num_heads_of(transformer: Any) -> int:
    """Heads of a query transformer."""
    return transformer.transformer_blocks.resblocks[0].attn.num_heads


@torch.no_grad()
def new_stylecrafter_branch(transformer: Any, *, norm: bool = True) -> StyleAttention:
    """A style branch whose K, V and norm of K are those of the text.

    Style tokens then live where the embedded text does, and are as wide as the transformer.

    Args:
        transformer: `StyledWanTransformer`.
        norm: whether there is a LayerNorm; it starts at 0, so that the branch adds nothing yet.

    Source: StyleCrafter's authors on its initialisation (K and V of the text). Deviation: the
    original's LayerNorm starts at 1, which here would add features of size 1 on the first day.
    """
    width, num_blocks = transformer.proj_out.in_features, len(transformer.blocks)
    attention = StyleAttention(num_blocks, width, width, norm_style=norm, bypass=True)
    modules = [m for m in attention.modules() if isinstance(m, StyleProjection)]
    for block, module in zip(transformer.blocks, modules, strict=True):
        text = block.attn2
        for ours, theirs in (
            (module.k_img, text.to_k),
            (module.v_img, text.to_v),
            (module.norm_k_img, text.norm_k),
        ):
            ours.load_state_dict({k: v.float() for k, v in theirs.state_dict().items()})
        if module.norm_style is not None:
            nn.init.zeros_(module.norm_style.weight)
    return attention


def new_encoder(
    config: StyleCrafterConfig,
    seed: int,
    *,
    feature_width: int,
    style_width: int,
    text_width: int,
    num_scales: int,
    scale_width: int,
) -> StyleCrafterEncoder:
    """An encoder with random weights; its gains are 1. Widths: `StyleCrafterSizes`."""
    sizes = StyleCrafterSizes(
        feature_width=feature_width,
        style_width=style_width,
        text_width=text_width,
        num_tokens=config.num_tokens,
        num_layers=config.num_layers,
        num_scales=num_scales,
        scale_width=scale_width,
        scale_num_layers=config.scale_num_layers,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "stylecrafter"))
        encoder = create_stylecrafter_encoder(
            sizes, num_heads=config.num_heads, scale_num_heads=config.scale_num_heads
        )
    last = encoder.scale_predictor.out_proj[-1]
    assert isinstance(last, nn.Linear)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return encoder


def _load_adapter(
    transformer: Any, config: StyleCrafterConfig, adapter: StateDict
) -> StyleCrafterEncoder:
    """Give the transformer an adapter's branch, and make its encoder; both float32."""
    adapter = {key: value.float() for key, value in adapter.items()}
    shapes = shapes_of(adapter)
    sizes = stylecrafter_wan_sizes(shapes)
    check_keys(shapes, expected_stylecrafter_wan_shapes(sizes), "the StyleCrafter adapter")
    num_blocks, width = len(transformer.blocks), transformer.proj_out.in_features
    if (sizes.encoder.num_scales, sizes.width) != (num_blocks, width):
        raise WeightsError(
            f"the adapter is for a transformer of {sizes.encoder.num_scales} blocks of width "
            f"{sizes.width}, this one has {num_blocks} of width {width}; use an adapter that was "
            "trained on this base"
        )
    transformer.style_attention = create_style_attention(adapter)
    return load_stylecrafter_encoder(
        adapter, num_heads=config.num_heads, scale_num_heads=config.scale_num_heads
    )


def heads_as_trained(config: TrainConfig, metadata: Mapping[str, str]) -> TrainConfig:
    """An adapter's header tells what cannot be read off its weights."""
    found = {k: v for k, v in stylecrafter_heads(metadata).items() if v is not None}
    return dataclasses.replace(
        config, stylecrafter=dataclasses.replace(config.stylecrafter, **found)
    )


def create_stylecrafter_trainer(
    config: TrainConfig,
    base: StateDict,
    features: Mapping[str, tuple[int, ...]],
    *,
    adapter: StateDict | None = None,
    num_heads: int | None = None,
    **more: Any,
) -> StyleCrafterTrainer:
    """The first stage's trainer on a base model; see `create_style_trainer`.

    Args:
        config: of the run.
        base: Wan transformer under any of its names.
        features: shapes of a sample.
        adapter: to start from; None for new weights.
        num_heads: of the transformer; None for width / 128.
        more: `null_text` and `provenance` of `FlowMatchTrainer`.

    Raises:
        ConfigError: if only the scales are to be trained and there is no adapter.
    """
    if adapter is None and config.stylecrafter.train == "scales":
        raise ConfigError(
            "stylecrafter.train is scales, and there is no adapter whose scales they could be; "
            "give the adapter, or train all of a new one"
        )
    transformer = frozen_transformer(base, config, num_heads)
    if adapter is None:
        norm = config.stylecrafter.norm
        transformer.style_attention = new_stylecrafter_branch(transformer, norm=norm)
        encoder = new_encoder(
            config.stylecrafter,
            config.run.seed,
            feature_width=features[FEATURES][-1],
            style_width=transformer.proj_out.in_features,
            text_width=transformer.config.text_dim,
            num_scales=len(transformer.blocks),
            scale_width=config.stylecrafter.scale_width,
        )
    else:
        encoder = _load_adapter(transformer, config.stylecrafter, adapter)
    return StyleCrafterTrainer(config, transformer, encoder, **more)


def create_stylecrafter_video_trainer(
    config: TrainConfig,
    base: StateDict,
    adapter: StateDict,
    *,
    lora: StateDict | None = None,
    num_heads: int | None = None,
    **more: Any,
) -> StyleCrafterVideoTrainer:
    """The second stage's trainer on a base model and the first stage's adapter.

    Args:
        config: of the run.
        base: Wan transformer under any of its names.
        adapter: of the first stage.
        lora: to start from; None for a new one.
        num_heads: of the transformer; None for width / 128.
        more: `null_text` and `provenance` of `FlowMatchTrainer`.
    """
    transformer = frozen_transformer(base, config, num_heads)
    encoder = _load_adapter(transformer, config.stylecrafter, adapter)
    if lora is None:
        width = transformer.proj_out.in_features
        module = MotionAdapter(len(transformer.blocks), width, config.stylecrafter.rank)
        module.reset_for_training(generator_of(config.run.seed, "stylecrafter video"))
    else:
        module = load_motion_adapter(lora)
    return StyleCrafterVideoTrainer(config, transformer, encoder, module, **more)
