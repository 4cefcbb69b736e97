"""The gates of stylemaster-tiny: what it must reach on held-out styles and contents.

Every gate has negative controls, inputs that must not pass: a gate that lets them through would say
nothing. The measures are those of `stylemaster_core.metrics`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stylemaster_core.data.images import clip_pixels, write_image
from stylemaster_core.data.videos import write_video
from stylemaster_core.metrics.motion import frame_difference
from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.image_encoder import ImageEncoder
from stylemaster_core.models.patch_vae import PatchVAE
from stylemaster_core.models.small import draw_weights
from stylemaster_core.models.style_tokens import Style, blend_styles
from stylemaster_core.models.texture_selector import SelectionMode
from stylemaster_core.models.vae import WanVAE
from stylemaster_core.pipelines.models import ModelFiles, Models
from stylemaster_core.pipelines.stylize import StylizeConfig
from stylemaster_core.weights.files import read_state_dict, write_state_dict
from stylemaster_core.weights.state_dict import shapes_of

from .contents import draw_clip
from .encoder_pool import Pool, draw_pool
from .encoder_probe import probe_encoder
from .held_out import SEED, Clips, HeldOut, Scores, relative_difference
from .restyle import restyle, style_tokens
from .vae import evaluate_vae

NUM_FEW = 16  # samples of the gates that generate more than one clip for each
MOTION_SCALES = (1.0, 0.5, 0.0, -0.3)
MIN_SELECTION_GAIN = 0.01  # two held-out styles are about 0.2 apart
TIME_LIMIT_S, MEMORY_LIMIT_GB = 60.0, 2.5


@dataclass(frozen=True)
class Gate:
    """What was asked, what was measured, and what the negative controls gave.

    Attributes:
        name: of the metrics, separated by " / " where there are several.
        bound: for each, in words.
        rule: whether numbers reach the bound.
        measured: one number for each metric.
        controls: what was done wrong on purpose, and the numbers then.
    """

    name: str
    bound: str
    rule: Callable[..., bool]
    measured: tuple[float, ...]
    controls: dict[str, tuple[float, ...]]

    @property
    def passed(self) -> bool:
        """Whether the bound is reached."""
        return self.rule(*self.measured)

    @property
    def leaks(self) -> list[str]:
        """Negative controls that reach the bound, too."""
        return [name for name, values in self.controls.items() if self.rule(*values)]


class Studio:
    """The models, their settings and the held-out set, and what they make of each other."""

    def __init__(
        self,
        models: Models,
        held_out: HeldOut,
        config: StylizeConfig,
        on_clip: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.models, self.held_out, self.config, self.on_clip = models, held_out, config, on_clip
        self.tokens = style_tokens(models, held_out.references, held_out.captions)

    def make(self, styles: Tensor | Sequence[StyleRegion], **settings: float) -> list[np.ndarray]:
        """Restyle the first contents, as many as there are styles."""
        regions = [StyleRegion(styles)] if isinstance(styles, Tensor) else styles
        count = len(regions[0].tokens)
        contents, captions = self.held_out.contents[:count], self.held_out.captions[:count]
        config = replace(self.config, **settings)
        return restyle(self.models, contents, captions, regions, config, self.on_clip)

    @property
    def few(self) -> int:
        """How many samples the gates get that generate several clips of each."""
        return min(NUM_FEW, len(self.held_out))

    def others(self, step: int) -> Tensor:
        """For each of the first samples the style of the one `step` further."""
        return self.tokens.roll(-step, 0)[: self.few]


@contextmanager
def untrained_models(models: Models) -> Iterator[Models]:
    """The same models, but transformer, adapter and control have random weights of their shapes."""
    with tempfile.TemporaryDirectory() as scratch:
        replaced = {}
        for name in ("transformer", "adapter", "controlnet"):
            file = read_state_dict(models.files.need(name, "A control of the gates"))
            weights = draw_weights(shapes_of(file.tensors), SEED)
            replaced[name] = Path(scratch) / f"{name}.safetensors"
            write_state_dict(replaced[name], weights, file.metadata)
        files = replace(models.files, **replaced)
        yield Models(files, device=str(models.device), keep_loaded=True)


def vae_gate(vae: WanVAE | PatchVAE, held_out: HeldOut) -> Gate:
    """Stylized clips survive the way to latents and back."""
    bound = 22.0 if isinstance(vae, PatchVAE) else 25.0
    clips = np.stack(list(held_out.true_filter))
    torch.manual_seed(SEED)
    both: tuple[Any, Any] = vae, PatchVAE()
    measured, untrained = ((evaluate_vae(v, clips=clips)["psnr_pooled"],) for v in both)
    return Gate(
        "VAE PSNR on stylized clips at 128 px, dB",
        f">= {bound:g}",
        lambda psnr: psnr >= bound,
        measured,
        {"untrained weights": untrained},
    )


def texture_gate(encoder: ImageEncoder, pools: tuple[Pool, Pool] | None = None) -> Gate:
    """The style encoder tells the texture families apart."""
    from transformers import CLIPVisionModelWithProjection

    fitting, test = pools or (
        _pool(num_styles=1500, pictures=1, contents=600, held_out=False),
        _pool(num_styles=352, pictures=2, contents=300, held_out=True),
    )
    torch.manual_seed(SEED)
    untrained = ImageEncoder(CLIPVisionModelWithProjection(encoder.model.config).float())
    shuffled = test._replace(families=np.random.default_rng(SEED).permutation(test.families))
    return Gate(
        "texture probe of the style encoder, 11 families",
        ">= 0.65",
        lambda share: share >= 0.65,
        (probe_encoder(encoder, fitting, test).texture,),
        {
            "untrained weights": (probe_encoder(untrained, fitting, test).texture,),
            "shuffled families": (probe_encoder(encoder, fitting, shuffled).texture,),
        },
    )


def _pool(num_styles: int, pictures: int, contents: int, held_out: bool) -> Pool:
    return draw_pool(
        SEED,
        num_styles=num_styles,
        pictures=pictures,
        contents=contents,
        siblings=False,
        held_out=held_out,
        progress=sys.stderr.isatty(),
    )


def nearer_gate(styled: Scores, off: Scores, untrained: Scores) -> Gate:
    """A result is nearer to its own reference than to another one."""
    own, shuffled = _own(styled), _shuffled(styled)
    return Gate(
        "P(own reference nearer than a random one), colour / Gabor",
        ">= 0.80 / >= 0.68",
        lambda colour, gabor: colour >= 0.80 and gabor >= 0.68,
        styled.p_nearer(own),
        {
            "shuffled references": styled.p_nearer(shuffled),
            "style guidance 0": off.p_nearer(own),
            "untrained weights": untrained.p_nearer(own),
        },
    )


def retrieval_gate(styled: Scores, off: Scores, untrained: Scores) -> Gate:
    """The judge finds the reference, and only where the style was used."""
    own, shuffled = _own(styled), _shuffled(styled)
    return Gate(
        "style retrieval@1 of 32 by the judge, with style / at style guidance 0",
        ">= 0.75 / <= 0.10",
        lambda styled, off: styled >= 0.75 and off <= 0.10,
        (styled.retrieval(own), off.retrieval(own)),
        {
            "shuffled references": (styled.retrieval(shuffled), off.retrieval(shuffled)),
            "style guidance 0 in both": (off.retrieval(own),) * 2,
            "style in both": (styled.retrieval(own),) * 2,
            "untrained weights": (untrained.retrieval(own), off.retrieval(own)),
        },
    )


def reinhard_gate(styled: Scores, formula: Scores, off: Scores, untrained: Scores) -> Gate:
    """More than a colour transfer by a formula can do."""

    def numbers(scores: Scores) -> tuple[float, ...]:
        pairs = [(s.summary()["gabor"], s.summary()["retrieval"]) for s in (scores, formula)]
        return (pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1])

    return Gate(
        "Gabor distance / Reinhard's / retrieval / Reinhard's",
        "the first below the second, the third above the fourth",
        lambda gabor, other_gabor, found, other_found: gabor < other_gabor and found > other_found,
        numbers(styled),
        {
            "Reinhard itself": numbers(formula),
            "style guidance 0": numbers(off),
            "untrained weights": numbers(untrained),
        },
    )


def content_gate(styled: Scores, untrained: Scores) -> Gate:
    """The content stays recognisable."""
    return Gate(
        "luma correlation to the content / to another content",
        ">= 0.80 / at least 0.4 below",
        lambda own, shuffled: own >= 0.80 and own - shuffled >= 0.4,
        (styled.luma, styled.luma_shuffled),
        {
            "another content": (styled.luma_shuffled, styled.luma),
            "untrained weights": (untrained.luma, untrained.luma_shuffled),
        },
    )


def steadiness_gate(results: Clips, held_out: HeldOut) -> Gate:
    """A result moves as its content does and does not flicker."""
    count = len(results)
    mixed = [
        np.stack([results[(i + t) % count][t] for t in range(len(clip))])
        for i, clip in enumerate(results)
    ]
    return Gate(
        "frame difference over the true filter's",
        "<= 1.3",
        lambda ratio: ratio <= 1.3,
        (relative_difference(results, held_out),),
        {"each frame of another clip": (relative_difference(mixed, held_out),)},
    )


def motion_gate(studio: Studio) -> Gate:
    """The motion adapter stills a video, and below 0 it does the contrary.

    Without control, as in the paper's use of it: a gray tile prescribes the content's motion.
    """
    clips = {
        scale: studio.make(
            studio.tokens[: studio.few], motion_scale=scale, control_scale=0.0, same_noise=False
        )
        for scale in MOTION_SCALES
    }
    measured = tuple(_mean(frame_difference(c) for c in clips[scale]) for scale in MOTION_SCALES)

    def rule(still: float, half: float, off: float, negative: float) -> bool:
        return still < half < off < negative and still <= 0.6 * off

    return Gate(
        "frame difference at motion scale " + " / ".join(f"{s:g}" for s in MOTION_SCALES),
        "rising, the first at most 0.6 of the third",
        rule,
        measured,
        {"adapter off": (measured[2],) * len(MOTION_SCALES)},
    )


def selection_gate(studio: Studio) -> Gate:
    """Texture selection decides which patches of a picture in two styles give the texture.

    The left half of each picture has one style, the right half another, and patches are the more
    like the "prompt" the further left they are: `release` keeps the left ones, `paper` the right.
    (There is no text tower that would rank them by a real prompt.)
    """
    few, held_out = studio.few, studio.held_out
    pairs = [(i, (i + 1) % len(held_out)) for i in range(few)]
    pictures = []
    for left, right in pairs:
        middle = held_out.references[left].shape[2] // 2
        halves = held_out.references[left][0, :, :middle], held_out.references[right][0, :, middle:]
        pictures.append(np.concatenate(halves, axis=1))

    scores: list[list[float]] = []
    for mode in ("release", "paper"):
        clips = studio.make(_selected_tokens(studio.models, pictures, mode))
        distances = [
            [held_out.colour_distance(clip, index) for index in pair]
            for clip, pair in zip(clips, pairs, strict=True)
        ]
        scores.append([to_right - to_left for to_left, to_right in distances])

    def numbers(kept_left: list[float], kept_right: list[float]) -> tuple[float, float]:
        gains = np.subtract(kept_left, kept_right)
        return _mean(gains > 0), _mean(gains)

    left, right = scores
    return Gate(
        "share of pictures in two styles whose result is more like the half that is kept / gain in "
        "colour distance",
        f">= 0.75 / >= {MIN_SELECTION_GAIN}",
        lambda share, gain: share >= 0.75 and gain >= MIN_SELECTION_GAIN,
        numbers(left, right),
        {"`release` twice": numbers(left, left), "halves exchanged": numbers(right, left)},
    )


@torch.no_grad()
def _selected_tokens(models: Models, pictures: Clips, mode: SelectionMode) -> Tensor:
    with models.style_projector() as projector, models.image_encoder() as encoder:
        pixels = [clip_pixels(picture, size=encoder.image_size) for picture in pictures]
        features = encoder.encode(torch.stack(pixels))
        side = round((features.patch_features.shape[1] - 1) ** 0.5)
        leftness = torch.linspace(1, -1, side).repeat(side)
        similarity = torch.cat([torch.zeros(1), leftness]).expand(len(pictures), -1)
        return projector(
            features.patch_features, features.image_embeds, selection=mode, similarity=similarity
        ).tokens


def blend_gate(studio: Studio, results: Clips) -> Gate:
    """The colours of a blend of two styles lie between those of the two."""
    firsts, seconds = studio.tokens[: studio.few], studio.others(1)
    blended = torch.cat(
        [
            blend_styles([Style(a), Style(b)]).tokens
            for a, b in zip(firsts.split(1), seconds.split(1), strict=True)
        ]
    )
    second, blend, third = (studio.make(tokens) for tokens in (seconds, blended, studio.others(2)))

    def share_between(clips: Clips) -> float:
        between = []
        for index, trio in enumerate(zip(results, second, clips, strict=False)):
            other = (index + 1) % len(studio.held_out)
            first_to, second_to, blend_to = (
                [studio.held_out.colour_distance(clip, i) for i in (index, other)] for clip in trio
            )
            between.append(blend_to[0] < second_to[0] and blend_to[1] < first_to[1])
        return _mean(between)

    return Gate(
        "share of blends nearer to each of two references than a result in the other's style",
        ">= 0.75",
        lambda share: share >= 0.75,
        (share_between(blend),),
        {
            "the first style alone": (share_between(results),),
            "a third style": (share_between(third),),
        },
    )


def mask_gate(studio: Studio, results: Clips) -> Gate:
    """Each half of a frame has the style that its mask gives it."""
    few = studio.few
    left = torch.zeros(2, 2)
    left[:, 0] = 1
    regions = [
        StyleRegion(studio.tokens[:few], mask=left),
        StyleRegion(studio.others(1), mask=1 - left),
    ]
    masked = studio.make(regions)

    def share_right(clips: Clips, exchanged: bool = False) -> float:
        right = []
        for index, clip in enumerate(clips[:few]):
            middle, pair = clip.shape[2] // 2, (index, (index + 1) % len(studio.held_out))
            for place, half in enumerate((clip[:, :, :middle], clip[:, :, middle:])):
                own = pair[place != exchanged]
                others = sum(pair) - own
                distances = [studio.held_out.colour_distance(half, i) for i in (own, others)]
                right.append(distances[0] < distances[1])
        return _mean(right)

    return Gate(
        "share of halves under masks that are nearer to their own style",
        ">= 0.75",
        lambda share: share >= 0.75,
        (share_right(masked),),
        {
            "no masks, the first style": (share_right(results),),
            "styles exchanged": (share_right(masked, exchanged=True),),
        },
    )


def cost_gate(files: ModelFiles, config: StylizeConfig) -> Gate:
    """Time and memory of the command line, start and loading included, on two threads."""

    def cost(
        num_frames: int, size: tuple[int, int], num_steps: int, limit_s: float
    ) -> tuple[float, ...]:
        height, width = size
        rng = np.random.default_rng(SEED)
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            clip, caption = draw_clip(rng, num_frames, height, width, held_out=True)
            write_video(place / "in.mp4", clip, fps=16)
            write_image(place / "style.png", draw_clip(rng, 1, 128, 128)[0][0])
            inputs = ["--video", "in.mp4", "--style", "style.png", "--prompt", caption]
            settings = replace(config, num_steps=num_steps)
            command = [sys.executable, "-m", "stylemaster_core", "stylize", "out.mp4", *inputs]
            return run_timed([*command, *_options(files, settings)], place, limit_s)

    return Gate(
        "17 frames of 256 x 256, 12 steps, on 2 CPU threads: s / peak GB / CPU s",
        f"<= {TIME_LIMIT_S:g} / <= {MEMORY_LIMIT_GB} / none: other work on the machine slows it",
        lambda seconds, memory, _: seconds <= TIME_LIMIT_S and memory <= MEMORY_LIMIT_GB,
        cost(17, (256, 256), 12, 10 * TIME_LIMIT_S),
        {
            "81 frames of 480 x 832, 50 steps, ended at the limit": cost(
                81, (480, 832), 50, TIME_LIMIT_S
            )
        },
    )


def run_timed(command: Sequence[str], folder: Path, limit_s: float) -> tuple[float, ...]:
    """Run a command on two threads; one that takes longer than `limit_s` is ended.

    Returns:
        Seconds, the peak of its memory in GB, and seconds of all its threads.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(_root())}
    # A process starts with the peak of the one that forks it, and this one is large.
    watcher = [sys.executable, "-m", "recipes.tiny.cost", str(limit_s), *command]
    done = subprocess.run(watcher, cwd=folder, env=environment, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace")[-1000:]
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {said}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def _root() -> Path:
    return Path(__file__).parents[2]


def _options(files: ModelFiles, config: StylizeConfig) -> list[str]:
    """What the command line needs for these models and settings."""
    paths = {k: v for k, v in vars(files).items() if v is not None and k != "motion_adapter"}
    values = {
        "steps": config.num_steps,
        "shift": config.shift,
        "text-scale": config.text_scale,
        "style-scale": config.style_scale,
        "tile-factor": config.tile_factor,
        "control-range": "{}:{}".format(*config.control_range),
        **{name.replace("_", "-"): path.resolve() for name, path in paths.items()},
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def _own(scores: Scores) -> list[int]:
    return list(range(len(scores.colour)))


def _shuffled(scores: Scores) -> list[int]:
    own = _own(scores)
    return [*own[1:], own[0]]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
