"""VideoCrafter's UNet on ComfyUI's own: SD 2's, with the temporal layers that the core has too.

A video is a batch of its frames, so that stock nodes make its latents, sample and decode them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.latent_formats
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from torch import Tensor, nn

from ..stylemaster_core.models.temporal_transformer import TemporalTransformer
from ..stylemaster_core.weights.state_dict import check_keys, shapes_of
from ..stylemaster_core.weights.videocrafter_keys import (
    TEMPORAL_KEY,
    VideoCrafterSizes,
    videocrafter_sizes,
)

FPS = "videocrafter_fps"  # in `transformer_options`
Options = dict[str, Any]


class VideoCrafterUNet(openaimodel.UNetModel):
    """ComfyUI's UNet with temporal layers behind its transformers (names of the release)."""

    def __init__(self, *, temporal: VideoCrafterSizes, **config: Any) -> None:
        super().__init__(**config)
        device, operations = config.get("device"), config["operations"]
        factory = {"layers": operations, "device": device, "dtype": self.dtype}
        for block in (*self.input_blocks, self.middle_block, *self.output_blocks):
            places = [i for i, layer in enumerate(block) if isinstance(layer, SpatialTransformer)]
            for place in places:
                width = block[place].in_channels
                heads = width // temporal.head_width
                layer = TemporalTransformer(width, width, heads, temporal.max_distance, **factory)
                block.insert(place + 1, layer)
        width, heads = temporal.init_width, temporal.init_width // temporal.head_width
        first = TemporalTransformer(
            temporal.channels[0], width, heads, temporal.max_distance, linear=False, **factory
        )
        self.init_attn = nn.ModuleList([first])
        if temporal.has_fps:
            linear, inner = operations.Linear, 4 * self.model_channels
            self.fps_embedding = nn.Sequential(
                linear(self.model_channels, inner, device=device, dtype=self.dtype),
                nn.SiLU(),
                linear(inner, inner, device=device, dtype=self.dtype),
            )
        else:
            self.fps_embedding = None

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: Options | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = transformer_options or {}
        # Each conditioning of the batch has all frames of the video, or of a context window of it.
        num_frames = x.shape[0] // len(options.get("cond_or_uncond", (0,)))
        options = {**options, "patches": self._patches(options, num_frames)}
        return super()._forward(x, timesteps, context, y, control, options, **kwargs)

    def _patches(self, options: Options, num_frames: int) -> Options:
        """ComfyUI's own hooks, by which the temporal layers are run; those of others come after."""

        def temporal(layer: Any, h: Tensor, *_others: Any) -> Tensor:
            return layer(h, num_frames)

        def after_first(h: Tensor, options: Options) -> Tensor:
            return self.init_attn[0](h, num_frames) if options["block"] == ("input", 0) else h

        def told_of_fps(emb: Tensor, width: int, options: Options) -> Tensor:
            rate = torch.full((1,), options.get(FPS, 8.0), device=emb.device)
            made = openaimodel.timestep_embedding(rate, width).to(emb.dtype)
            return emb + self.fps_embedding(made)  # type: ignore[misc]

        patches = dict(options.get("patches", {}))
        ours: dict[str, Any] = {
            "forward_timestep_embed_patch": (TemporalTransformer, temporal),
            "input_block_patch": after_first,
        }
        if self.fps_embedding is not None:
            ours["emb_patch"] = told_of_fps
        return patches | {name: [patch, *patches.get(name, ())] for name, patch in ours.items()}


class VideoCrafter(comfy.model_base.BaseModel):
    """What ComfyUI's samplers run."""

    def __init__(self, config: Any, device: Any = None) -> None:
        super().__init__(
            config, comfy.model_base.ModelType.EPS, device=device, unet_model=VideoCrafterUNet
        )


class VideoCrafterModelConfig(comfy.supported_models_base.BASE):
    """What ComfyUI wants to know of a model; as of SD 2."""

    unet_extra_config = {}
    latent_format = comfy.latent_formats.SD15
    memory_usage_factor = 1.0

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> VideoCrafter:
        """The model, without weights."""
        return VideoCrafter(self, device)


def load_videocrafter(
    tensors: Mapping[str, Tensor],
    temporal: Mapping[str, Tensor] | None = None,
    *,
    fps: float = 8.0,
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of VideoCrafter's UNet.

    Args:
        tensors: under the names of the release, without prefix; sizes are read off them.
        temporal: other temporal layers, which take the place of theirs.
        fps: frames per second that the model is told of, if it can be told.

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    config = VideoCrafterModelConfig(_unet_config(videocrafter_sizes(shapes_of(tensors))))
    weights = dict(tensors)
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    dtypes = list(config.supported_inference_dtypes)
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, dtypes))
    model = config.get_model({})
    expected = shapes_of(model.diffusion_model.state_dict())
    check_keys(shapes_of(tensors), expected, "VideoCrafter's UNet")
    if temporal is not None:
        wanted = {key: shape for key, shape in expected.items() if TEMPORAL_KEY.fullmatch(key)}
        check_keys(shapes_of(temporal), wanted, "the temporal layers for this UNet")
        weights |= temporal
    model = model.to(offload)
    model.load_model_weights(weights, "")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)
    patcher.model_options["transformer_options"][FPS] = fps
    return patcher


def _unet_config(sizes: VideoCrafterSizes) -> dict[str, Any]:
    levels, layers = len(sizes.channels), sizes.layers_per_block
    down = [int(has) for has in sizes.attention for _ in range(layers)]
    up = [int(has) for has in sizes.attention for _ in range(layers + 1)]
    first = sizes.channels[0]
    return {
        "image_size": 32,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "model_channels": first,
        "num_res_blocks": [layers] * levels,
        "channel_mult": [width // first for width in sizes.channels],
        "transformer_depth": down,
        "transformer_depth_output": up,  # taken from the end
        "transformer_depth_middle": 1,
        "num_heads": -1,
        "num_head_channels": sizes.head_width,
        "context_dim": sizes.text_width,
        "adm_in_channels": None,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
        "attn_precision": torch.float32,  # as SD 2
        "temporal": sizes,
    }
