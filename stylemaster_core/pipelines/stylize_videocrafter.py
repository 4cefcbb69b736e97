"""StyleCrafter on VideoCrafter: style pictures and a prompt in, a short video or a picture out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, LayoutError, WeightsError
from ..layouts import video_to_frames
from ..models.sd_parts import FrameVAE, TextEncoder, load_sd2_text, load_sd_vae
from ..models.stylecrafter_sdxl import StyleCrafterSdxl
from ..models.videocrafter_unet import NUM_FRAMES, VideoCrafterUNet, load_videocrafter_unet
from ..sampling.denoise_video import denoise_video
from ..seeds import LOWEST_OF_TORCH, check_seed
from ..weights.files import read_state_dict
from ..weights.lora import merge_videocrafter_loras
from ..weights.numbers import check_weights
from ..weights.state_dict import Kind, describe_kind, detect_kind, shapes_of, strip_prefix
from .stylize_sdxl import PreparedStyle

VIDEO_SCALES = (15.0, 7.5)  # guidance by text and by style, of the release's script for videos
IMAGE_SCALES = (6.0, 0.0)  # and of that for pictures, which has plain guidance


@dataclass(frozen=True)
class VideoCrafterConfig:
    """Settings of a generation; the defaults are the release's."""

    prompt: str = ""
    negative_prompt: str = ""
    size: tuple[int, int] = (320, 512)  # (height, width) px
    num_frames: int = NUM_FRAMES  # 1: a picture, which the temporal layers do not touch
    seed: int = 123
    num_steps: int = 50
    eta: float = 1.0  # noise that each step adds; 0 for none
    text_scale: float | None = None  # None: as the release, for a video or for a picture
    style_scale: float | None = None
    fps: float = 8.0  # that the model is told of, if it can be told (VideoCrafter2)

    @property
    def scales(self) -> tuple[float, float]:
        """Guidance scales of text and style."""
        text, style = IMAGE_SCALES if self.num_frames == 1 else VIDEO_SCALES
        return (
            text if self.text_scale is None else self.text_scale,
            style if self.style_scale is None else self.style_scale,
        )


def check_videocrafter_config(config: VideoCrafterConfig) -> None:
    """Refuse settings that can never work; nothing is loaded.

    Raises:
        ConfigError: saying what was expected.
    """
    if config.num_frames < 1 or config.num_steps < 1:
        raise ConfigError(
            f"the numbers of frames and steps must be at least 1, got {config.num_frames} and "
            f"{config.num_steps}"
        )
    numbers = {"eta": config.eta, "fps": config.fps}
    numbers |= dict(zip(("text scale", "style scale"), config.scales, strict=True))
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, got {value}")
    check_seed(config.seed, lowest=LOWEST_OF_TORCH)


class VideoCrafter(NamedTuple):
    """The models."""

    unet: VideoCrafterUNet
    vae: FrameVAE
    text_encoder: TextEncoder


def load_videocrafter(
    unet: Path,
    vae: Path,
    text_encoder: Path,
    *,
    temporal: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    loras: Sequence[tuple[Path, float]] = (),
    skip_check: bool = False,
) -> VideoCrafter:
    """Load what `stylemaster weights convert` makes of VideoCrafter's model.ckpt.

    Args:
        unet: the UNet.
        vae: SD's VAE, kept in float32.
        text_encoder: SD 2's text encoder.
        temporal: StyleCrafter's temporal layers, which take the place of the UNet's.
        device: where to put them.
        dtype: of UNet and text encoder.
        loras: files with strengths, merged into the UNet.
        skip_check: do not look for NaN and infinity.

    Raises:
        WeightsError: if a file is of another kind, damaged, incomplete or not finite.
    """
    layers = None if temporal is None else _read(temporal, "stylecrafter_temporal", skip_check)
    loaded = load_videocrafter_unet(_read(unet, "videocrafter_unet", skip_check), layers)
    names = loaded.release_keys
    weights = {names[key]: value for key, value in loaded.state_dict().items()}
    weights = merge_videocrafter_loras(weights, loras, torch.float32)
    loaded.load_state_dict({key: weights[name] for key, name in names.items()}, assign=True)
    text = load_text_encoder(text_encoder, device=device, dtype=dtype, skip_check=skip_check)
    # Not with its own `to`, which warns of a list of modules that is empty.
    nn.Module.to(loaded.requires_grad_(False), device, dtype)
    return VideoCrafter(loaded, load_frame_vae(vae, skip_check=skip_check).to(device), text)


def load_frame_vae(path: Path, *, skip_check: bool = False) -> FrameVAE:
    """Read SD's VAE.

    Raises:
        WeightsError: if the file is of another kind, damaged, incomplete or not finite.
    """
    return FrameVAE(load_sd_vae(_read(path, "sd_vae", skip_check))).to("cpu")


def load_text_encoder(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    skip_check: bool = False,
) -> TextEncoder:
    """Read SD 2's text encoder.

    Raises:
        WeightsError: if the file is of another kind, damaged, incomplete or not finite.
    """
    model = load_sd2_text(_read(path, "clip_text_open_clip", skip_check))
    return TextEncoder(model.to(device, dtype))


def _read(path: Path, wanted: Kind, skip_check: bool) -> dict[str, Tensor]:
    tensors = strip_prefix(read_state_dict(path).tensors)
    kind = detect_kind(shapes_of(tensors))
    if kind != wanted:
        raise WeightsError(
            f"{path} is {describe_kind(kind)}; expected {describe_kind(wanted).split(';')[0]} "
            "(`stylemaster weights convert` makes it of the released checkpoint)"
        )
    if not skip_check:
        check_weights(tensors, path)
    return tensors


@torch.no_grad()
def stylize_videocrafter(
    models: VideoCrafter,
    adapter: StyleCrafterSdxl,
    styles: Sequence[PreparedStyle],
    config: VideoCrafterConfig,
    *,
    callback: Callable[[int], object] = lambda step: None,
    stage: Callable[[str], None] = lambda name: None,
) -> np.ndarray:
    """Generate a video.

    Args:
        models: from `load_videocrafter`.
        adapter: predicts how strongly each layer takes a style.
        styles: from `prepare_styles`; none for plain VideoCrafter.
        config: prompt and settings.
        callback: called after each step with its number.
        stage: called with the name of each stage.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        ConfigError, LayoutError, WeightsError: for settings or models that cannot work.

    Source: StyleCrafter's video code; deviation: a row of its noise is drawn for each frame by one
    generator on the CPU, so that a seed gives the same video on every device.
    """
    from ..models.sdxl_unet import check_unet

    height, width = config.size
    levels = len(models.unet.down_blocks) - 1
    factor, step = 8, 8 * 2**levels
    if height < step or width < step or height % step or width % step:
        raise ConfigError(
            f"the size must be multiples of {step}, at least {step}, got {width}x{height}"
        )
    check_videocrafter_config(config)
    check_unet(models.unet, adapter)
    device, dtype = models.unet.device, models.unet.dtype
    stage("encoding the prompt")
    text, negative = (
        models.text_encoder.encode(prompt) for prompt in (config.prompt, config.negative_prompt)
    )
    if text.shape[-1] != models.unet.config["cross_attention_dim"]:
        raise LayoutError(
            f"the text encoder makes features of width {text.shape[-1]}, the UNet takes "
            f"{models.unet.config['cross_attention_dim']}; use the parts of one checkpoint"
        )
    regions = [
        replace(style.region, gains=adapter.gains(text.float().cpu(), style.region.tokens))
        for style in styles
    ]
    generator = torch.Generator("cpu").manual_seed(config.seed)
    channels = models.unet.config["in_channels"]
    shape = (config.num_frames, channels, height // factor, width // factor)
    noise = torch.randn(shape, generator=generator).to(device, dtype)
    stage("sampling")
    text_scale, style_scale = config.scales
    latents = denoise_video(
        models.unet,
        noise,
        num_steps=config.num_steps,
        text=text.to(dtype),
        negative_text=negative.to(dtype),
        regions=regions,
        keys_values=[style.keys_values for style in styles],
        text_scale=text_scale,
        style_scale=style_scale,
        eta=config.eta,
        fps=config.fps,
        generator=generator,
        callback=lambda number, _: callback(number),
    )
    stage("decoding")
    return video_to_frames(models.vae.decode(latents.transpose(0, 1)[None]))
