"""VideoCrafter's text-to-video UNet on diffusers' blocks: SD 2's UNet, and attention over frames.

A video is a batch of its frames, one after another, as ComfyUI has it too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from ..errors import LayoutError
from ..weights.shapes import Shape
from ..weights.stylecrafter_video_keys import video_layer_names
from ..weights.videocrafter_keys import VideoCrafterSizes, release_names, videocrafter_sizes
from .sdxl_unet import cross_attentions
from .temporal_transformer import TemporalTransformer

logger = logging.getLogger("stylemaster")

NUM_FRAMES = 16  # that the released weights were trained with
LICENCE_NOTE = (
    "VideoCrafter's released weights, and what is made from them, are for research and "
    "non-commercial use only (LICENSE of AILab-CVC/VideoCrafter, clause 10)"
)


class SpatioTemporalTransformer(Transformer2DModel):
    """diffusers' transformer over a picture's places, and the temporal one after it."""

    temporal: TemporalTransformer

    def forward(
        self,
        hidden_states: Tensor,
        *,
        cross_attention_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """As `Transformer2DModel`; `num_frames` is one of the `cross_attention_kwargs`."""
        others = dict(cross_attention_kwargs or {})
        num_frames = others.pop("num_frames")
        output = super().forward(hidden_states, cross_attention_kwargs=others, **options)
        return (self.temporal(output[0], num_frames),)


class VideoCrafterUNet(UNet2DConditionModel):
    """The UNet; its parts have diffusers' names, see `release_names` for those of the release."""

    def __init__(self, sizes: VideoCrafterSizes) -> None:
        """Make the modules with random weights."""
        super().__init__(**_diffusers_config(sizes))
        for module in list(self.modules()):
            attentions = getattr(module, "attentions", None)
            if attentions is not None:
                module.attentions = nn.ModuleList(_with_temporal(a, sizes) for a in attentions)
        self.init_attn = nn.ModuleList(
            [
                TemporalTransformer(
                    sizes.channels[0],
                    sizes.init_width,
                    sizes.init_width // sizes.head_width,
                    sizes.max_distance,
                    linear=False,
                )
            ]
        )
        width = self.time_embedding.linear_2.out_features
        self.fps_embedding = TimestepEmbedding(sizes.channels[0], width) if sizes.has_fps else None

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, text: Tensor, num_frames: int, fps: float = 8.0
    ) -> Tensor:
        """Predict the noise.

        Args:
            sample: [B * T, 4, h, w] noisy latents, the frames of a video one after another; h and w
                multiples of 8.
            timestep: a number, or [B * T], in 0..999.
            text: [B * T, L, Dt] features of the prompts.
            num_frames: T; with 1 the samples are pictures and the temporal layers rest.
            fps: frames per second, for weights that know of it (VideoCrafter2).

        Returns:
            [B * T, 4, h, w].

        Raises:
            LayoutError: for a batch that is no multiple of T, or sizes that cannot be halved.

        Source: VideoCrafter's and StyleCrafter's released code; deviation: none.
        """
        self._check(sample, num_frames)
        emb = self.time_embedding(self.get_time_embed(sample, timestep))
        if self.fps_embedding is not None:
            rate = self.get_time_embed(sample, torch.as_tensor(fps, device=sample.device))
            emb = emb + self.fps_embedding(rate)
        options = {
            "encoder_hidden_states": text,
            "cross_attention_kwargs": {"num_frames": num_frames},
        }
        sample = self.init_attn[0](self.conv_in(sample), num_frames)
        skips = (sample,)
        for block in self.down_blocks:
            sample, made = block(sample, emb, **(options if hasattr(block, "attentions") else {}))
            skips += made
        sample = self.mid_block(sample, emb, **options)
        up_blocks: list[Any] = list(self.up_blocks)
        for block in up_blocks:
            count = len(block.resnets)
            skips, taken = skips[:-count], skips[-count:]
            if hasattr(block, "attentions"):
                sample = block(sample, taken, emb, **options)
            else:
                sample = block(sample, taken, emb)
        head: Any = (self.conv_norm_out, self.conv_act, self.conv_out)  # all of them are there
        for layer in head:
            sample = layer(sample)
        return sample

    def _check(self, sample: Tensor, num_frames: int) -> None:
        step = 2 ** (len(self.down_blocks) - 1)
        height, width = sample.shape[-2:]
        if sample.ndim != 4 or num_frames < 1 or sample.shape[0] % num_frames:
            raise LayoutError(
                f"{list(sample.shape)} is no batch of videos of {num_frames} frames; give "
                "[B * frames, 4, h, w]"
            )
        if height % step or width % step:
            raise LayoutError(
                f"latents of {height} x {width} cannot be halved {len(self.down_blocks) - 1} times "
                f"in the UNet; choose a height and width that are multiples of {8 * step} px"
            )

    @property
    def release_keys(self) -> dict[str, str]:
        """Names of its tensors in the release, by its own."""
        return release_names(self.state_dict(), self.num_layers)

    @property
    def style_layer_names(self) -> list[str]:
        """How StyleCrafter's video adapter names its layers for this UNet, in their order."""
        names = release_names((*self.state_dict(), *cross_attentions(self)), self.num_layers)
        layers = [names[layer].replace(".", "_") for layer in cross_attentions(self)]
        return video_layer_names(f"kv_attn_layers.{layer}_processor.x" for layer in layers)

    @property
    def num_layers(self) -> int:
        """Residual blocks of each level on the way down."""
        return self.config["layers_per_block"]

    def temporal_state_dict(self) -> dict[str, Tensor]:
        """The temporal layers under the names of temporal_v1_1.pth."""
        names = self.release_keys
        return {names[k]: v for k, v in self.state_dict().items() if is_temporal(k)}


def is_temporal(name: str) -> bool:
    """Whether a parameter of the UNet belongs to a temporal layer."""
    return name.startswith("init_attn.") or ".temporal." in name


def _with_temporal(spatial: Any, sizes: VideoCrafterSizes) -> SpatioTemporalTransformer:
    options = {k: v for k, v in spatial.config.items() if not k.startswith("_")}
    made = SpatioTemporalTransformer(**options)
    width = options["in_channels"]
    heads = width // sizes.head_width
    made.temporal = TemporalTransformer(width, width, heads, sizes.max_distance)
    return made


def _diffusers_config(sizes: VideoCrafterSizes) -> dict[str, Any]:
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in sizes.attention]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(sizes.attention)]
    return {
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": list(sizes.channels),
        "layers_per_block": sizes.layers_per_block,
        "cross_attention_dim": sizes.text_width,
        # diffusers' name for the number of heads
        "attention_head_dim": [width // sizes.head_width for width in sizes.channels],
        "use_linear_projection": True,
    }


def load_videocrafter_unet(
    state_dict: Mapping[str, Tensor], temporal: Mapping[str, Tensor] | None = None
) -> VideoCrafterUNet:
    """Build the UNet from the release's weights, and log the licence note.

    Args:
        state_dict: tensors under the names of the release, without prefix; all sizes are read off
            them. Tensors are not copied.
        temporal: of StyleCrafter, temporal_v1_1.pth, or others trained so; they take the place
            of the temporal layers of `state_dict`.

    Returns:
        a frozen module.

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    from ..weights.state_dict import check_keys, shapes_of

    unet = check_unet_keys(shapes_of(state_dict), "VideoCrafter's UNet")
    names = unet.release_keys
    weights = dict(state_dict)
    if temporal is not None:
        wanted = {
            names[key]: tuple(state_dict[names[key]].shape) for key in names if is_temporal(key)
        }
        check_keys(shapes_of(temporal), wanted, "the temporal layers for this UNet")
        weights |= temporal
    unet.load_state_dict({key: weights[name] for key, name in names.items()}, assign=True)
    logger.warning(LICENCE_NOTE)
    return unet.requires_grad_(False).eval()


def check_unet_keys(shapes: Mapping[str, Shape], what: str) -> VideoCrafterUNet:
    """A UNet of these sizes without weights, on the meta device.

    Args:
        shapes: key to shape under the names of the release, without prefix.
        what: the thing in words.

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    from ..weights.state_dict import check_keys

    with torch.device("meta"):
        unet = VideoCrafterUNet(videocrafter_sizes(shapes))
    names = unet.release_keys
    expected = {names[key]: tuple(value.shape) for key, value in unet.state_dict().items()}
    check_keys(shapes, expected, what)
    return unet
