"""The main path: style picture, prompt and perhaps a video in, stylized video out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..data.gray_tile import cover_resize_frames, gray_tile
from ..errors import ConfigError, LayoutError
from ..layouts import (
    Padding,
    check_frames,
    fit_size,
    frames_to_video,
    latent_shape,
    pad_video,
    padded_num_frames,
    video_to_frames,
)
from ..models.decoupled_attention import StyleRegion, check_overlap
from ..models.motion_adapter import attached_motion
from ..models.style_tokens import Style
from ..sampling.denoise import Callback, Lead, denoise
from ..sampling.samplers import SamplerName
from ..sampling.schedules import add_noise, flow_match_sigmas, same_in_every_frame
from ..sampling.speed import SpeedName, velocity_gap
from ..sampling.windows import WindowConfig
from ..seeds import LOWEST_OF_TORCH, check_seed
from .models import Models

Task = Literal["text-to-video", "video-to-video", "text-to-image", "image-to-image"]
DEFAULT_SIZE = (480, 832)
DEFAULT_NUM_FRAMES = 81


@dataclass(frozen=True)
class StylizeConfig:
    """Settings of a generation; the defaults are the release's."""

    task: Task
    prompt: str = ""
    negative_prompt: str = ""
    size: tuple[int, int] | None = None  # (height, width) px; None: the input's, else 480 x 832
    num_frames: int | None = None  # text-to-video: 81; else the input's
    seed: int = 0
    num_steps: int = 50
    shift: float = 5.0
    sampler: SamplerName = "euler"
    text_scale: float = 8.0
    style_scale: float | None = None  # None: 4, with control 3
    denoise: float = 1.0  # below 1: start from the input video
    control: bool = True  # gray-tile control of a given video or image
    control_scale: float = 1.0
    control_range: tuple[float, float] = (0.0, 0.7)
    tile_factor: int = 8
    motion_scale: float | None = None  # None: -0.3, of StyleCrafter's video LoRA 1
    windows: WindowConfig | None = field(default_factory=WindowConfig)
    batch_branches: bool = False
    same_noise: bool = False  # in every frame, from the first: a restyled video flickers less
    noise_frames: int | None = None  # of latents that are drawn, if more than needed
    speed: SpeedName = "exact"  # else fewer steps are computed, with nearly the same result


class Stylized(NamedTuple):
    """Result of `stylize`."""

    frames: np.ndarray  # uint8 [T, H, W, 3], of the input's size and length
    latents: Tensor  # [1, 16, t, h, w] normalised, before cutting back


@torch.no_grad()
def stylize(
    models: Models,
    style: Style | Sequence[StyleRegion] | None,
    config: StylizeConfig,
    *,
    frames: np.ndarray | None = None,
    lead: Tensor | None = None,
    callback: Callback | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> Stylized:
    """Generate or restyle a video (or a single image).

    Args:
        models: where the models come from.
        style: from `encode_style` or `load_style`; regions for strength, range, masks, or several
            styles; None generates without style.
        config: task and settings.
        frames: uint8 [T, H, W, 3] input of video-to-video and image-to-image; any size and length.
        lead: [1, 16, k, h, w] clean latents that the result begins with, to go on from.
        callback: called after each step with `StepProgress`; an exception from it ends the run.
        stage: called with the name of each stage.

    Returns:
        frames of the input's (or the asked) size and length.

    Raises:
        ConfigError, LayoutError, WeightsError: for options, inputs or files that cannot work.

    Source: StyleMaster, sec. 3; deviation: any size and length (padded and cut back), long videos
    by windows.
    """
    source, padding = _prepare_frames(config, frames)
    models.files.require(needed_files(config), config.task)
    t, h, w = latent_shape(*_padded_size(padding))
    regions = [StyleRegion(style.tokens)] if isinstance(style, Style) else style
    check_overlap(regions or [])

    stage("encoding the prompt")
    text, negative = models.encode_text([config.prompt, config.negative_prompt]).split(1)
    regions = models.with_gains(regions, text)

    control_latents = clean = None
    if source is not None:
        stage("encoding the video")
        with models.vae() as vae:
            if config.control:
                tile = gray_tile(source, *source.shape[1:3], factor=config.tile_factor)
                control_latents = vae.encode(tile[None])
            if config.denoise < 1:
                clean = vae.encode(frames_to_video(source))

    sigmas = flow_match_sigmas(config.num_steps, shift=config.shift, denoise=config.denoise)
    drawn = (1, 16, max(t, config.noise_frames or 0), h, w)
    noise = draw_noise(drawn, config.seed, same=config.same_noise)
    latents = noise[:, :, :t].to(models.device)
    known = None if lead is None else Lead(lead.to(latents), latents[:, :, : lead.shape[2]].clone())
    if clean is not None:
        latents = add_noise(clean, latents, sigmas[0].item())

    stage("sampling")
    use_control = control_latents is not None
    with models.transformer() as transformer:
        is_video = config.task.endswith("video")
        motion = attached_motion(transformer, config.motion_scale, is_video=is_video)
        with motion, models.controlnet() if use_control else nullcontext() as controlnet:
            latents = denoise(
                transformer,
                latents,
                sigmas=sigmas,
                text=text,
                negative_text=negative,
                style=regions,
                text_scale=config.text_scale,
                style_scale=_style_scale(config, use_control),
                controlnet=controlnet,
                control_latents=control_latents,
                control_scale=config.control_scale,
                control_range=config.control_range,
                callback=callback,
                sampler=config.sampler,
                batch_branches=config.batch_branches,
                windows=config.windows,
                lead=known,
                speed=config.speed,
            )

    stage("decoding")
    with models.vae() as vae:
        decoded = video_to_frames(vae.decode(latents))
    return Stylized(padding.crop(decoded), latents.cpu())


def draw_noise(shape: Sequence[int], seed: int, *, same: bool = False) -> Tensor:
    """Noise of latents [B, C, t, h, w], on the CPU.

    Args:
        shape: of the latents.
        seed: of the noise.
        same: in every frame, `same_in_every_frame`.
    """
    noise = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed))
    return same_in_every_frame(noise) if same else noise


def needed_files(config: StylizeConfig) -> list[str]:
    """Which of `ModelFiles` a task needs; a style picture needs the image encoder, too."""
    needed = ["transformer", "vae", "text_encoder"]
    restyles = config.task in ("video-to-video", "image-to-image")
    return [*needed, "controlnet"] if restyles and config.control else needed


def _prepare_frames(
    config: StylizeConfig, frames: np.ndarray | None
) -> tuple[np.ndarray | None, Padding]:
    """Padded input frames (None without input) and the size to cut the result back to."""
    check_config(config, frames)
    if frames is None:
        return None, Padding(*result_size(config, None))
    if config.size is not None:
        frames = cover_resize_frames(frames, *config.size)
    return pad_video(frames)


def _padded_size(padding: Padding) -> tuple[int, int, int]:
    return (padded_num_frames(padding.num_frames), *fit_size(padding.height, padding.width))


def _style_scale(config: StylizeConfig, control: bool) -> float:
    if config.style_scale is not None:
        return config.style_scale
    return 3.0 if control else 4.0


def result_size(config: StylizeConfig, source: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """(frames, height, width) of the result; `source` is the same of the input, None without."""
    if source is not None:
        height, width = config.size or source[1:]
        return source[0], height, width
    height, width = config.size or DEFAULT_SIZE
    num_frames = 1 if config.task == "text-to-image" else config.num_frames or DEFAULT_NUM_FRAMES
    return num_frames, height, width


def check_config(config: StylizeConfig, frames: np.ndarray | None) -> None:
    """Refuse settings and inputs that cannot work, or contradict the task; nothing is loaded.

    Args:
        config: settings.
        frames: the input, or an array of its shape and type; None without.

    Raises:
        ConfigError, LayoutError: saying what was expected.
    """
    task = config.task
    if task not in get_args(Task):
        raise ConfigError(f"the task {task!r} is unknown; use one of {get_args(Task)}")
    needs_frames = task in ("video-to-video", "image-to-image")
    if needs_frames and frames is None:
        raise ConfigError(f"{task} needs an input {task.split('-')[0]}; none was given")
    if frames is not None and not needs_frames:
        raise ConfigError(
            f"{task} takes no input video or image, but one was given; use video-to-video or "
            "image-to-image to restyle it"
        )
    if frames is not None:
        check_frames(frames)
        if task == "image-to-image" and len(frames) != 1:
            raise LayoutError(f"image-to-image takes one frame, got {len(frames)}")
        if config.num_frames is not None:
            raise ConfigError(f"the number of frames of {task} is that of its input; leave it out")
        if not config.control and config.denoise == 1:
            raise ConfigError(
                "without control and at denoise 1 nothing of the input would be left; keep the "
                "control, or choose a denoise below 1"
            )
    elif config.denoise != 1:
        raise ConfigError(f"{task} starts from noise: denoise must be 1, got {config.denoise}")
    if config.num_frames is not None and config.num_frames < 1:
        raise ConfigError(f"the number of frames must be at least 1, got {config.num_frames}")
    if config.size is not None and min(config.size) < 16:
        raise ConfigError(
            f"the size must be at least 16 x 16 px, one patch of latents, got "
            f"{config.size[1]} x {config.size[0]}"
        )
    if frames is not None and min(frames.shape[1:3]) < 16:
        raise LayoutError(
            f"the input is {frames.shape[2]} x {frames.shape[1]} px; at least 16 x 16 is needed"
        )
    for name in ("text_scale", "style_scale", "control_scale", "motion_scale"):
        value = getattr(config, name)
        if value is not None and not abs(value) < float("inf"):
            raise ConfigError(f"{name.replace('_', ' ')} must be a finite number, got {value}")
    flow_match_sigmas(config.num_steps, shift=config.shift, denoise=config.denoise)
    velocity_gap(config.speed, config.num_steps)
    check_seed(config.seed, lowest=LOWEST_OF_TORCH)
    start, end = config.control_range
    if not 0 <= start <= end <= 1:
        raise ConfigError(
            f"the control range must satisfy 0 <= start <= end <= 1, got {start}:{end}"
        )

    if config.tile_factor < 1:
        raise ConfigError(f"the tile factor must be at least 1, got {config.tile_factor}")
    if config.control_scale < 0:
        raise ConfigError(f"the control scale must not be negative, got {config.control_scale}")
