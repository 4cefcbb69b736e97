"""Model illusion: a diffusion model paints one canvas that shows two things under two views."""

from __future__ import annotations

import inspect
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, WeightsError
from ..reading import reading
from .gray_tile import cover_resize_frames
from .images import clip_pixels, read_image
from .pairs import NewPair
from .views import View, ViewName
from .word_lists import MODIFIERS, OBJECTS, STYLES, prompt_of

if TYPE_CHECKING:
    from ..models.clip_text import ClipText
    from ..models.image_encoder import ImageEncoder

logger = logging.getLogger("stylemaster")

# Views whose pieces are large enough that a model can still draw things across them.
PAINTED_VIEWS: tuple[ViewName, ...] = (
    "patches",
    "jigsaw",
    "rotate90",
    "rotate180",
    "flip_vertical",
    "pixels",
)
REARRANGED_VIEWS: tuple[ViewName, ...] = ("patches", "jigsaw", "rotate90", "rotate180")

# Noise predicted for pictures [V, C, H, W] at a timestep, of the same shape.
Predict = Callable[[Tensor, Tensor], Tensor]
# How well pictures fit their prompts, one number a picture.
Score = Callable[[Sequence[np.ndarray], Sequence[str]], list[float]]


class PairPlan(NamedTuple):
    """What a pair is to show."""

    style: str
    prompts: tuple[str, str]
    view: View
    seed: int


def plan_pair(
    index: int, *, seed: int, views: Sequence[ViewName], pixel_grid: int | None = None
) -> PairPlan:
    """Draw style, two objects and a view from the number of a pair.

    Args:
        index: of the pair.
        seed: of the whole set.
        views: of the second picture; the first is seen as it is.
        pixel_grid: cells a side of the view `pixels`: the size of the first stage, which a second
            stage then keeps together.

    Raises:
        ConfigError: without views.
    """
    if not views:
        raise ConfigError("no view to choose from; name at least one, such as patches")
    generator = random.Random(f"{seed} {index}")
    style = f"{generator.choice(MODIFIERS)} {generator.choice(STYLES)}".strip()
    first, second = generator.sample(OBJECTS, 2)
    name = generator.choice(list(views))
    grid = pixel_grid if name == "pixels" else None
    view = View(name, generator.randrange(2**32), grid)
    prompts = (prompt_of(style, first), prompt_of(style, second))
    return PairPlan(style, prompts, view, generator.randrange(2**32))


@torch.no_grad()
def paint_shared_canvas(
    predict: Predict,
    scheduler: Any,
    views: Sequence[View],
    shape: tuple[int, int, int],
    *,
    num_steps: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Denoise one canvas under several views at once.

    At each step every view of the canvas gets its own noise prediction; the predictions are turned
    back, averaged, and the canvas is stepped.

    Args:
        predict: the model with its prompts, one a view.
        scheduler: of diffusers; left as it is. A learned variance is replaced by the fixed small
            one, because it is a prediction about a picture, not about the canvas.
        views: at least one.
        shape: (C, H, W) of the canvas.
        num_steps: of the scheduler.
        seed: of the noise.
        device: where to compute.

    Returns:
        [C, H, W] float32, about -1..1.

    Source: StyleMaster, sec. 3.1, after Visual Anagrams (arXiv 2311.17919); deviation from the
    latter: the variance is fixed, where it averages the learned one.
    """
    scheduler = _with_fixed_variance(scheduler)
    scheduler.set_timesteps(num_steps, device=device)
    generator = torch.Generator("cpu").manual_seed(seed)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    canvas = torch.randn(shape, generator=generator).to(device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = torch.stack([view.apply(canvas) for view in views])
        noise = predict(scheduler.scale_model_input(seen, timestep), timestep).float()
        noise = torch.stack([view.invert(n) for view, n in zip(views, noise, strict=True)]).mean(0)
        options = {"generator": generator} if takes_generator else {}
        canvas = scheduler.step(noise[None], timestep, canvas[None], **options).prev_sample[0]
    return canvas


def _with_fixed_variance(scheduler: Any) -> Any:
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
    changes = {"variance_type": "fixed_small"} if learned else {}
    return type(scheduler).from_config(scheduler.config, **changes)


@dataclass(frozen=True)
class PixelDiffusion:
    """Pixel-space diffusers pipelines whose UNet predicts noise, such as DeepFloyd IF's.

    Attributes:
        base: has `encode_prompt`, `unet` and `scheduler`; paints at `unet.config.sample_size`.
        upscaler: None, or one whose UNet also sees the smaller picture (`image_noising_scheduler`).
        num_steps: of each stage.
        guidance_scale: 1 switches guidance off.
        noise_level: timestep of the noise on the picture that the upscaler sees.
    """

    base: Any
    upscaler: Any = None
    num_steps: int = 30
    guidance_scale: float = 10.0
    noise_level: int = 50

    @property
    def size(self) -> int:
        """Side of the first stage's pictures, pixels."""
        return int(self.base.unet.config.sample_size)

    @torch.no_grad()
    def paint(self, prompts: Sequence[str], views: Sequence[View], seed: int) -> np.ndarray:
        """Paint a canvas that shows each prompt under its view.

        Returns:
            uint8 [H, W, 3].
        """
        unet = self.base.unet
        guided = self.guidance_scale > 1
        positive, negative = self.base.encode_prompt(
            list(prompts), do_classifier_free_guidance=guided, device=unet.device
        )
        embeds = torch.cat([negative, positive]) if guided else positive
        options: dict[str, Any] = {"num_steps": self.num_steps, "device": unet.device}
        canvas = paint_shared_canvas(
            lambda seen, t: self._predict(unet, seen, t, embeds),
            self.base.scheduler,
            views,
            (3, self.size, self.size),
            seed=seed,
            **options,
        )
        if self.upscaler is not None:
            unet = self.upscaler.unet
            size = int(unet.config.sample_size)
            generator = torch.Generator("cpu").manual_seed(seed + 1)
            pictures = torch.stack([view.apply(canvas) for view in views])
            # Each view's own picture is scaled up: on the canvas, pieces would bleed together.
            hint = F.interpolate(pictures, (size, size), mode="bilinear", align_corners=True)
            level = torch.full((len(hint),), self.noise_level, device=hint.device)
            noise = torch.randn(hint.shape, generator=generator).to(hint.device)
            hint = self.upscaler.image_noising_scheduler.add_noise(hint, noise, level)
            canvas = paint_shared_canvas(
                lambda seen, t: self._predict(unet, seen, t, embeds, hint, level),
                self.upscaler.scheduler,
                views,
                (3, size, size),
                seed=seed + 2,
                **options,
            )
        levels = canvas.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return levels.permute(1, 2, 0).contiguous().cpu().numpy()

    def _predict(
        self,
        unet: Any,
        seen: Tensor,
        timestep: Tensor,
        embeds: Tensor,
        hint: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise of every view with guidance; learned variances are dropped."""
        channels = seen.shape[1]
        pictures = seen if hint is None else torch.cat([seen, hint], dim=1)
        copies = len(embeds) // len(seen)
        output = unet(
            torch.cat([pictures] * copies).to(unet.dtype),
            timestep,
            encoder_hidden_states=embeds.to(unet.dtype),
            class_labels=None if level is None else torch.cat([level] * copies),
            return_dict=False,
        )[0][:, :channels].float()
        if copies == 1:
            return output
        uncond, cond = output.chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)


def load_pixel_diffusion(
    base: Path,
    upscaler: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_steps: int = 30,
    guidance_scale: float = 10.0,
    noise_level: int = 50,
) -> PixelDiffusion:
    """Load pipelines from folders in diffusers' format, without safety checker and watermark.

    Raises:
        WeightsError: if a folder is no such pipeline.
        ConfigError: for numbers out of range.
    """
    if num_steps < 1 or guidance_scale < 0 or not 0 <= noise_level < 1000:
        raise ConfigError(
            f"steps {num_steps}, guidance scale {guidance_scale}, noise level {noise_level}; "
            "expected at least 1, at least 0, and 0 to 999"
        )
    needed = ("unet", "scheduler", "text_encoder", "tokenizer")
    with reading(base, "a diffusers pipeline"):
        first = _load_pipeline(base, device, dtype, needed)
    second = None
    if upscaler is not None:
        needed = ("unet", "scheduler", "image_noising_scheduler")
        with reading(upscaler, "a diffusers pipeline"):
            second = _load_pipeline(upscaler, device, dtype, needed)
    return PixelDiffusion(first, second, num_steps, guidance_scale, noise_level)


def _load_pipeline(
    folder: Path, device: torch.device | str, dtype: torch.dtype, needed: tuple[str, ...]
) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        # The upscaler's text encoder is the base's, and 9 GB.
        left_out = ["safety_checker", "watermarker", "feature_extractor"]
        left_out += [name for name in ("text_encoder", "tokenizer") if name not in needed]
        options: dict[str, Any] = {name: None for name in left_out if name in index}
        if "requires_safety_checker" in index:
            options["requires_safety_checker"] = False
        pipeline: Any = DiffusionPipeline.from_pretrained(
            str(folder), torch_dtype=dtype, local_files_only=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{folder} cannot be loaded as a diffusers pipeline ({error}); give the folder of, for "
            "example, DeepFloyd/IF-I-M-v1.0"
        ) from error
    missing = [name for name in needed if getattr(pipeline, name, None) is None]
    if missing:
        raise WeightsError(
            f"{folder} has no {', '.join(missing)}; expected a pixel-space pipeline with "
            f"{', '.join(needed)}"
        )
    return pipeline.to(device)


def clip_score(image_encoder: ImageEncoder, clip_text: ClipText) -> Score:
    """Return a function that gives the cosine of each picture with its prompt in CLIP's space."""

    def score(pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        pixels = torch.stack(
            [clip_pixels(picture, size=image_encoder.image_size) for picture in pictures]
        )
        images = image_encoder.encode(pixels).image_embeds.float()
        texts = clip_text.encode(list(prompts)).to(images)
        return F.cosine_similarity(images, texts, dim=-1).tolist()

    return score


def painted_pair(
    index: int,
    paint: Callable[[Sequence[str], Sequence[View], int], np.ndarray],
    plan: PairPlan,
    *,
    score: Score | None = None,
    min_score: float = 0.0,
) -> NewPair:
    """Paint a pair and, with `score`, reject it if a picture fits its prompt below `min_score`."""
    canvas = paint(plan.prompts, (View("identity"), plan.view), plan.seed)
    fields: dict[str, Any] = {
        "style": plan.style,
        "prompts": list(plan.prompts),
        "seed": plan.seed,
    }
    if score is None:
        return NewPair(canvas, plan.view, fields)
    scores = score([canvas, plan.view.apply_image(canvas)], plan.prompts)
    if not np.isfinite(scores).all():
        raise WeightsError(f"pair {index}: CLIP's scores are {scores}; its weights are damaged")
    fields["scores"] = [round(value, 5) for value in scores]
    kept = min(scores) >= min_score
    if not kept:
        said = ", ".join(f"{p!r} {s:.3f}" for p, s in zip(plan.prompts, scores, strict=True))
        logger.info("left out pair %d: CLIP gives %s, below %g", index, said, min_score)
    return NewPair(canvas, plan.view, fields, kept=kept)


def rearranged_pair(
    index: int, pictures: Sequence[Path], *, size: int, seed: int, views: Sequence[ViewName]
) -> NewPair:
    """Make a pair of a given picture: the centre of it, and its pixels in another order.

    Args:
        index: of the pair; pictures are taken in turn.
        pictures: image files.
        size: side of both pictures, pixels.
        seed: of the whole set.
        views: to draw from.
    """
    source = pictures[index % len(pictures)]
    canvas = cover_resize_frames(read_image(source)[None], size, size)[0]
    plan = plan_pair(index, seed=seed, views=views)
    return NewPair(canvas, plan.view, {"source": source.as_posix()})
