"""Trainers of StyleCrafter on VideoCrafter: the adapter on pictures, then the temporal layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..errors import ConfigError, LayoutError
from ..models.decoupled_attention import BlockStyle, StyleRegion, scaled_norm
from ..models.sdxl_unet import StyledUNet, check_unet, cross_attentions
from ..models.stylecrafter_sdxl import StyleCrafterSdxl, StyleLayer, load_stylecrafter_video
from ..models.temporal_transformer import TemporalTransformer
from ..models.videocrafter_unet import VideoCrafterUNet, load_videocrafter_unet
from ..sampling.denoise import Callback, StepProgress
from ..sampling.denoise_video import create_ddim, denoise_video
from ..weights.videocrafter_keys import VideoCrafterSizes, videocrafter_sizes
from ..weights.videocrafter_parts import ADAPTER_FORMAT, KNOWN_BASE, LICENCE, TEMPORAL_FORMAT
from .config import StyleCrafterConfig, TrainConfig
from .denoising import DenoisingDraws, DenoisingTrainer
from .flow_matching import StateDict, trainable
from .gradient_checkpointing import checkpoint_unet
from .precision import settle_precision
from .samples import Sample, TrainingData, generator_of
from .stylecrafter import FEATURES, clips_and_pictures, new_encoder, num_heads_of
from .trainer import TrainedFile, stored

DEFAULT_FPS = 8.0


class VideoCrafterAdapterTrainer(DenoisingTrainer):
    """Noise prediction under text and style, through the adapter alone: the first stage.

    Source: StyleCrafter, sec. 3.4, stage 1, and its authors on the loss. Deviation: the crop of the
    style picture is drawn once, when the data are encoded.
    """

    name = "videocrafter-adapter"

    def __init__(
        self, config: TrainConfig, unet: VideoCrafterUNet, adapter: StyleCrafterSdxl, **more: Any
    ) -> None:
        """Set up.

        Args:
            config: of the run.
            unet: takes styles from now on; stays frozen.
            adapter: for this UNet.
            more: `null_text` and `provenance` of `DenoisingTrainer`.
        """
        draws = DenoisingDraws(config, ("latents", "text", FEATURES), drop_style=True)
        super().__init__(config, draws, **more)
        check_unet(unet, adapter)
        self.unet, self.adapter = unet, adapter
        self.schedule = create_ddim()
        self.styled = StyledUNet(unet).__enter__()
        checkpoint_unet(unet, self.config.run.checkpoint_blocks)
        for part in self.parts_to_train():
            trainable(part)
        # The file has no place for these: they are unit matrices (`stylecrafter_video_to_sdxl`).
        scales = adapter.encoder.scale_predictor
        for part in (scales.text_proj, scales.style_proj):
            part.requires_grad_(False)
        scales.scale_predictor.projection.requires_grad_(False)

    def parts_to_train(self) -> tuple[nn.Module, ...]:
        """Modules that the gradients reach; the others stay frozen."""
        encoder = self.adapter.encoder
        style = (self.adapter.layers, encoder.image_context_model)
        scales = (encoder.scale_predictor,)
        parts = {"all": (*style, *scales), "style": style, "scales": scales}
        return parts[self.config.stylecrafter.train]

    def forward(self, batch: Sample) -> Tensor:
        """Mean squared error of the predicted noise of each sample."""
        clean, noise, level = batch["latents"], batch["noise"], batch["level"]
        noisy = self.schedule.add_noise(clean, noise, level)  # type: ignore[arg-type]
        predicted = self.predict(noisy, level, batch)
        return F.mse_loss(predicted.float(), noise, reduction="none").flatten(1).mean(1)

    def predict(self, noisy: Tensor, level: Tensor, batch: Sample) -> Tensor:
        """The noise in latents [B, 4, T, h, w] at levels [B] in 0..999."""
        batch_size, num_frames = noisy.shape[0], noisy.shape[2]
        rows = [index for index in range(batch_size) for _ in range(num_frames)]
        self.styled.set([layer.of_rows(rows) for layer in self._styles(batch)], {})
        predicted = self.unet(
            rearrange(noisy, "b c t h w -> (b t) c h w"),
            level[rows],
            repeat(self.text_of(batch), "b l d -> (b t) l d", t=num_frames),
            num_frames,
            self.fps,
        )
        return rearrange(predicted, "(b t) c h w -> b c t h w", t=num_frames)

    def _styles(self, batch: Sample) -> list[BlockStyle]:
        """What each layer adds; where the style is dropped, its gains are 0.

        The scale predictor sees the sample's own text, dropped or not, as when sampling.
        """
        encoder, layers = self.adapter.encoder, self.adapter.layers
        tokens = encoder(batch[FEATURES])
        gains = self.adapter.encoder.gains(batch["text"], tokens)
        if "drop_style" in batch:
            gains = gains.masked_fill(batch["drop_style"][:, None], 0.0)
        styles = []
        for layer, gain in zip(layers, gains.unbind(1), strict=True):
            assert isinstance(layer, StyleLayer)
            keys, values = layer.to_k_style(tokens), layer.to_v_style(tokens)
            norm = scaled_norm(layer.norm_style, gain)
            styles.append(BlockStyle((keys,), (values,), (), None, (norm,)))
        return styles

    @property
    def fps(self) -> float:
        """Frames per second that the UNet is told, if it can be told."""
        return self.config.stylecrafter.fps or DEFAULT_FPS

    def check(self, shapes: Mapping[str, tuple[int, ...]], num_samples: int) -> None:
        """Latents, text and image features of a sample against UNet and adapter."""
        latents, text, features = shapes["latents"], shapes["text"], shapes[FEATURES]
        channels, width = self.unet.config["in_channels"], self.unet.config["cross_attention_dim"]
        step = 2 ** (len(self.unet.down_blocks) - 1)
        if len(latents) != 4 or latents[0] != channels or latents[2] % step or latents[3] % step:
            raise LayoutError(
                f"latents must be [{channels}, t, h, w] with h and w multiples of {step} for this "
                f"UNet, got {list(latents)}; encode the data for VideoCrafter at sides "
                f"that are multiples of {8 * step} px"
            )
        if len(text) != 2 or text[1] != width:
            raise LayoutError(
                f"text features must be [L, {width}] for this UNet, got {list(text)}; encode the "
                "data with the text encoder of its checkpoint"
            )
        wanted = self.adapter.encoder.image_context_model.queries.shape[-1]
        if features[-1] != wanted:
            raise LayoutError(
                f"the data have image features of width {features[-1]}, the adapter takes "
                f"{wanted}; encode the data with the image encoder it was trained with"
            )

    @torch.no_grad()
    def sample(self, dataset: TrainingData, index: int, callback: Callback | None = None) -> Tensor:
        """Generate under the conditions of a sample, from noise that is always the same."""
        run, device = self.config.run, self.unet.device
        sample = {k: v[None].to(device) for k, v in self.draws.read(dataset[index]).items()}
        generator = generator_of(run.seed, "sample", index)
        noise = torch.randn(sample["latents"].shape, generator=generator)
        tokens = self.adapter.encoder(sample[FEATURES])
        gains = self.adapter.gains(sample["text"], tokens)
        null_text = self.null_text if isinstance(self.null_text, Tensor) else sample["text"][0]

        def report(step: int, denoised: Tensor) -> None:
            if callback is not None:
                callback(StepProgress(step, run.sample_steps, math.nan, denoised, denoised))

        self.styled.__exit__(None, None, None)  # `denoise_video` lets styles act in its own way
        try:
            latents = denoise_video(
                self.unet,
                rearrange(noise, "1 c t h w -> t c h w").to(device),
                num_steps=run.sample_steps,
                text=sample["text"],
                negative_text=null_text[None],
                regions=[StyleRegion(tokens, gains=gains)],
                keys_values=[self.adapter.keys_values(tokens)],
                text_scale=run.sample_text_scale,
                style_scale=run.sample_style_scale,
                fps=self.fps,
                generator=generator,
                callback=report,
            )
        finally:
            self.styled.__enter__()
        return rearrange(latents, "t c h w -> 1 c t h w")

    @property
    def base_model(self) -> str:
        """What the header of a trained file says of the base."""
        names = self.unet.release_keys
        shapes = {names[key]: tuple(value.shape) for key, value in self.unet.state_dict().items()}
        return KNOWN_BASE if videocrafter_sizes(shapes) == VideoCrafterSizes() else "custom"

    def outputs(self) -> list[TrainedFile]:
        encoder = self.adapter.encoder
        metadata = self.metadata(
            ADAPTER_FORMAT,
            base_model=self.base_model,
            num_blocks=str(len(self.adapter.layers)),
            style_num_heads=str(num_heads_of(encoder.image_context_model)),
            scale_num_heads=str(num_heads_of(encoder.scale_predictor.scale_predictor)),
            licence=LICENCE,
        )
        tensors = stored(self.adapter.release_state_dict(), self.config)
        return [TrainedFile("stylecrafter_video_adapter.safetensors", tensors, metadata)]


class VideoCrafterTemporalTrainer(VideoCrafterAdapterTrainer):
    """Noise prediction on clips and pictures, through the layers of time alone: the second stage.

    Source: StyleCrafter, sec. 3.4, stage 2. How pictures reach layers that rest on a picture is not
    published. Deviations: here each is a clip of one frame to them, so that they learn to leave a
    style alone; and a step has as many pictures as it would have clips.
    """

    name = "videocrafter-temporal"

    def __init__(
        self, config: TrainConfig, unet: VideoCrafterUNet, adapter: StyleCrafterSdxl, **more: Any
    ) -> None:
        """Set up.

        Args:
            config: of the run.
            unet: its temporal layers are trained.
            adapter: of the first stage; stays frozen.
            more: `null_text` and `provenance` of `DenoisingTrainer`.
        """
        super().__init__(config, unet, adapter, **more)
        for layer in self.parts_to_train():
            layer.rests_on_pictures = False  # type: ignore[assignment]

    def parts_to_train(self) -> tuple[nn.Module, ...]:
        return tuple(m for m in self.unet.modules() if isinstance(m, TemporalTransformer))

    def arrange(self, data: TrainingData) -> TrainingData:
        """Repeat pictures, or clips, until pictures are the share that the config asks for."""
        return clips_and_pictures(data, self.config.stylecrafter.image_share)

    def outputs(self) -> list[TrainedFile]:
        metadata = self.metadata(TEMPORAL_FORMAT, base_model=self.base_model, licence=LICENCE)
        tensors = stored(self.unet.temporal_state_dict(), self.config)
        return [TrainedFile("stylecrafter_temporal.safetensors", tensors, metadata)]


def new_adapter(
    config: StyleCrafterConfig, unet: VideoCrafterUNet, feature_width: int, seed: int
) -> StyleCrafterSdxl:
    """An adapter whose K and V are those of the text, its gains and LayerNorms 1.

    Source: StyleCrafter's authors on its initialisation. Deviation: how its scale predictor starts
    is not published; here all gains start at 1.
    """
    layers: list[Any] = [unet.get_submodule(name) for name in cross_attentions(unet)]
    width = unet.config["cross_attention_dim"]
    encoder = new_encoder(
        config,
        seed,
        feature_width=feature_width,
        style_width=width,
        text_width=width,
        num_scales=len(layers),
        scale_width=width,
    )
    adapter = StyleCrafterSdxl(encoder, [layer.to_k.out_features for layer in layers])
    adapter.video_layers = unet.style_layer_names
    scales = encoder.scale_predictor
    with torch.no_grad():
        for linear in (scales.text_proj, scales.style_proj):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.eye_(scales.scale_predictor.projection)
        for ours, text in zip(adapter.layers, layers, strict=True):
            assert isinstance(ours, StyleLayer)
            ours.to_k_style.weight.copy_(text.to_k.weight)
            ours.to_v_style.weight.copy_(text.to_v.weight)
    return adapter.requires_grad_(False)


def create_videocrafter_adapter_trainer(
    config: TrainConfig,
    base: StateDict,
    features: Mapping[str, tuple[int, ...]],
    *,
    adapter: StateDict | None = None,
    **more: Any,
) -> VideoCrafterAdapterTrainer:
    """The first stage's trainer on a base model.

    Args:
        config: of the run.
        base: VideoCrafter's UNet under the names of the release.
        features: shapes of a sample.
        adapter: to start from, under the names of the release; None for new weights.
        more: `null_text` and `provenance` of `DenoisingTrainer`.

    Raises:
        ConfigError: if only the scales are to be trained and there is no adapter.
    """
    if adapter is None and config.stylecrafter.train == "scales":
        raise ConfigError(
            "stylecrafter.train is scales, and there is no adapter whose scales they could be; "
            "give the adapter, or train all of a new one"
        )
    unet = _frozen_unet(config, base)
    if adapter is None:
        width = features[FEATURES][-1]
        module = new_adapter(config.stylecrafter, unet, width, config.run.seed)
    else:
        module = _load_adapter(config, adapter)
    return VideoCrafterAdapterTrainer(config, unet, module, **more)


def create_videocrafter_temporal_trainer(
    config: TrainConfig,
    base: StateDict,
    adapter: StateDict,
    *,
    temporal: StateDict | None = None,
    **more: Any,
) -> VideoCrafterTemporalTrainer:
    """The second stage's trainer on a base model and the first stage's adapter.

    Args:
        config: of the run.
        base: VideoCrafter's UNet under the names of the release.
        adapter: of the first stage, under the names of the release.
        temporal: layers to start from; None for those of the UNet.
        more: `null_text` and `provenance` of `DenoisingTrainer`.
    """
    unet = _frozen_unet(config, base, temporal)
    return VideoCrafterTemporalTrainer(config, unet, _load_adapter(config, adapter), **more)


def _frozen_unet(
    config: TrainConfig, base: StateDict, temporal: StateDict | None = None
) -> VideoCrafterUNet:
    precision = settle_precision(config).run.precision
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    unet = load_videocrafter_unet(base, temporal)
    # Not with its own `to`, which warns of a list of modules that is empty.
    nn.Module.to(unet, dtype)
    return unet


def _load_adapter(config: TrainConfig, adapter: StateDict) -> StyleCrafterSdxl:
    """An adapter in float32; it is loaded with the heads that the config tells."""
    heads = {
        "style_num_heads": config.stylecrafter.num_heads,
        "scale_num_heads": config.stylecrafter.scale_num_heads,
    }
    metadata = {name: str(value) for name, value in heads.items() if value is not None}
    return load_stylecrafter_video({k: v.float() for k, v in adapter.items()}, metadata)
