"""The gates of stylemaster-tiny on real pictures, each with negative controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from stylemaster_core.models.decoupled_attention import StyleRegion
from stylemaster_core.models.patch_vae import PatchVAE
from stylemaster_core.models.vae import WanVAE
from stylemaster_core.pipelines.encode_style import encode_style, encode_stylecrafter
from stylemaster_core.pipelines.models import Models
from stylemaster_core.pipelines.stylize import StylizeConfig

from .gates import Gate
from .held_out import SEED, Clips
from .judges import TOKEN_PX
from .real_set import RealScores, RealSet
from .restyle import restyle

NUM_FEW = 6  # stills of the gates that generate one for each of several strengths
STRENGTHS = (0.0, 0.5, 1.0, 1.5)
GUIDANCES = (0.0, 1.0, 2.0, 3.0)
CUT_AT = 6  # frame of a clip of 9, inside a group of 4


@dataclass(frozen=True)
class Bounds:
    """What is asked; `eased` is the share of it that is enough."""

    magenta: float = 0.60
    gram: float = 0.50
    colours: float = 0.75
    colour_distance: float = 0.065
    texture: float = 0.72
    luma: float = 0.70
    luma_margin: float = 0.40
    seam: float = 1.08
    chroma: tuple[float, float] = (0.7, 1.3)
    flicker: tuple[float, float] = (0.6, 1.6)
    vae: tuple[float, float, float] = (28.0, 28.0, 24.0)

    def eased(self, share: float) -> Bounds:
        """Lower bounds times the share, upper ones divided by it; the seam's excess over 1 is."""
        return replace(
            self,
            magenta=self.magenta * share,
            gram=self.gram * share,
            colours=self.colours * share,
            colour_distance=self.colour_distance / share,
            texture=self.texture * share,
            luma=self.luma * share,
            luma_margin=self.luma_margin * share,
            seam=1 + (self.seam - 1) / share,
            chroma=(self.chroma[0] * share, self.chroma[1] / share),
            flicker=(self.flicker[0] / share, self.flicker[1] / share),
        )


class RealStudio:
    """The models, their settings and the real set, and what they make of each other."""

    def __init__(
        self,
        models: Models,
        real: RealSet,
        config: StylizeConfig,
        on_clip: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.models, self.real, self.config, self.on_clip = models, real, config, on_clip
        self.tokens = torch.cat([self._tokens(real.references[own]) for own in real.own])

    def _tokens(self, reference: np.ndarray) -> torch.Tensor:
        if self.models.has_stylecrafter:
            return encode_stylecrafter(self.models, [reference]).tokens
        return encode_style(self.models, reference, "").style.tokens

    def make(
        self, chosen: Sequence[int] | None = None, *, strength: float = 1.0, **settings: float
    ) -> list[np.ndarray]:
        """Restyle all contents, or chosen ones; those of one length go together."""
        numbers = list(range(len(self.real)) if chosen is None else chosen)
        results: dict[int, np.ndarray] = {}
        for length in sorted({len(self.real.contents[i]) for i in numbers}):
            same = [i for i in numbers if len(self.real.contents[i]) == length]
            region = StyleRegion(self.tokens[same], scale=strength)
            made = restyle(
                self.models,
                [self.real.contents[i] for i in same],
                [""] * len(same),
                self.models.with_gains([region], self.models.encode_text([""])) or [region],
                replace(self.config, **settings),
                self.on_clip,
            )
            results |= dict(zip(same, made, strict=True))
        return [results[i] for i in numbers]

    @property
    def few(self) -> list[int]:
        """Numbers of the stills that are made at several strengths."""
        moving = set(self.real.moving)
        return [i for i in range(len(self.real)) if i not in moving][:NUM_FEW]


def shuffled(own: Sequence[int], works: int) -> list[int]:
    """Another reference for each content."""
    return [(number + works // 2) % works for number in own]


def style_gate(scores: RealScores, content: RealScores, bounds: Bounds, works: int) -> Gate:
    """Two networks find the style picture that a result has its style from."""

    def numbers(found: RealScores, own: Sequence[int] | None = None) -> tuple[float, ...]:
        return found.nearest("magenta", own), found.nearest("gram", own)

    return Gate(
        f"own style nearest of {works}, Magenta's vector / Gram of EfficientNet-Lite0",
        f">= {bounds.magenta:.3g} / >= {bounds.gram:.3g}",
        lambda magenta, gram: magenta >= bounds.magenta and gram >= bounds.gram,
        numbers(scores),
        {
            "content unchanged": numbers(content),
            "shuffled references": numbers(scores, shuffled(scores.own, works)),
        },
    )


def colour_gate(
    scores: RealScores, reinhard: RealScores, content: RealScores, bounds: Bounds, works: int
) -> Gate:
    """The colours are those of the style picture, better than by a formula."""
    formula = reinhard.colours()[1]

    def numbers(found: RealScores, own: Sequence[int] | None = None) -> tuple[float, ...]:
        return *found.colours(own), formula

    return Gate(
        f"own colours nearest of {works} / colour distance / Reinhard's",
        f">= {bounds.colours:.3g} / <= {bounds.colour_distance:.3g} and below the third",
        lambda nearest, distance, other: (
            nearest >= bounds.colours and distance <= bounds.colour_distance and distance < other
        ),
        numbers(scores),
        {
            "Reinhard itself": numbers(reinhard),
            "content unchanged": numbers(content),
            "shuffled references": numbers(scores, shuffled(scores.own, works)),
        },
    )


def texture_gate(scores: RealScores, content: RealScores, bounds: Bounds, works: int) -> Gate:
    """The texture is nearer to that of the own style picture than to that of another."""
    return Gate(
        "P(own reference nearer than a random one), Gabor / patches",
        f">= {bounds.texture:.3g} / >= {bounds.texture:.3g}",
        lambda gabor, patches: min(gabor, patches) >= bounds.texture,
        scores.texture(),
        {
            "content unchanged": content.texture(),
            "shuffled references": scores.texture(shuffled(scores.own, works)),
        },
    )


def content_gate(scores: RealScores, bounds: Bounds) -> Gate:
    """The content stays recognisable."""
    own, other = scores.content()
    return Gate(
        "luma correlation to the content / to other contents",
        f">= {bounds.luma:.3g} / at least {bounds.luma_margin:.3g} below",
        lambda own, other: own >= bounds.luma and own - other >= bounds.luma_margin,
        (own, other),
        {"another content": (other, own)},
    )


def seam_gate(results: Clips, scores: RealScores, bounds: Bounds, seam: Callable) -> Gate:
    """Nothing shows where the tokens border on each other."""
    return Gate(
        "step at the borders of the tokens over elsewhere",
        f"<= {bounds.seam:.3g}",
        lambda ratio: ratio <= bounds.seam,
        (float(scores.seam.mean()),),
        {"tokens brighter by chance": (float(np.mean([seam(c) for c in patchy(results)])),)},
    )


def patchy(clips: Clips) -> list[np.ndarray]:
    """Each token's square brighter or darker by chance, by 8 of 255 in the mean."""
    rng = np.random.default_rng(SEED)
    changed = []
    for clip in clips:
        rows, columns = (-(-n // TOKEN_PX) for n in clip.shape[1:3])
        light = rng.normal(0, 10, (rows, columns)).repeat(TOKEN_PX, 0).repeat(TOKEN_PX, 1)
        light = light[: clip.shape[1], : clip.shape[2], None]
        changed.append((clip + light).clip(0, 255).astype(np.uint8))
    return changed


def chroma_gate(scores: RealScores, gray: RealScores, bounds: Bounds) -> Gate:
    """Neither dull nor garish."""
    low, high = bounds.chroma
    return Gate(
        "spread of the chroma over the reference's",
        f"{low:.3g} to {high:.3g}",
        lambda ratio: low <= ratio <= high,
        (float(scores.chroma.mean()),),
        {"gray": (float(gray.chroma.mean()),)},
    )


def flicker_gate(scores: RealScores, mixed: RealScores, bounds: Bounds) -> Gate:
    """What moves is the content, and nothing else."""

    def numbers(found: RealScores) -> tuple[float, ...]:
        return tuple(float(value) for value in found.flicker.mean(0))

    return Gate(
        "warp error over that of Magenta per frame / of the content",
        f"<= {bounds.flicker[0]:.3g} / <= {bounds.flicker[1]:.3g}",
        lambda teacher, content: teacher <= bounds.flicker[0] and content <= bounds.flicker[1],
        numbers(scores),
        {"each frame of another result": numbers(mixed)},
    )


def mixed_frames(results: Clips, moving: Sequence[int]) -> list[np.ndarray]:
    """Clips whose frames come from one after another of the results; stills are left out."""
    clips = [results[i] for i in moving]
    return [
        np.stack([clips[(i + t) % len(clips)][t] for t in range(len(clip))])
        for i, clip in enumerate(clips)
    ]


def falling_gate(name: str, distances: Mapping[float, float]) -> Gate:
    """More of something brings a result nearer to its style, at every step."""
    measured = tuple(distances.values())
    return Gate(
        f"style distance at {name} " + " / ".join(f"{value:g}" for value in distances),
        "strictly falling",
        lambda *values: bool(np.all(np.diff(values) < 0)),
        measured,
        {f"{name} without effect": (measured[0],) * len(measured), "reversed": measured[::-1]},
    )


def vae_gate(vae: WanVAE | PatchVAE, real: RealSet, bounds: Bounds) -> Gate:
    """Paintings, clips, and the frame after a cut survive the way to latents and back."""
    torch.manual_seed(SEED)
    both = (vae, PatchVAE())
    measured, untrained = (_psnr(v, real) for v in both)
    wanted = bounds.vae
    return Gate(
        "VAE PSNR of held-out paintings / clips / the frame after a cut, dB",
        " / ".join(f">= {bound:g}" for bound in wanted),
        lambda *values: all(v >= bound for v, bound in zip(values, wanted, strict=True)),
        measured,
        {"untrained weights": untrained},
    )


def _psnr(vae: WanVAE | PatchVAE, real: RealSet) -> tuple[float, ...]:
    paintings = []
    for picture in real.references:
        height, width = (n // 16 * 16 for n in picture.shape[:2])
        paintings.append(_frames_db(vae, picture[None, :height, :width])[0])
    clips = [real.contents[i] for i in real.moving]
    cuts = [
        np.concatenate([first[:CUT_AT], second[CUT_AT:]])
        for first, second in zip(clips, [*clips[1:], clips[0]], strict=True)
    ]
    whole = [float(np.mean(_frames_db(vae, clip))) for clip in clips]
    after = [_frames_db(vae, clip)[CUT_AT] for clip in cuts]
    return tuple(float(np.mean(values)) for values in (paintings, whole, after))


def _frames_db(vae: WanVAE | PatchVAE, frames: np.ndarray) -> list[float]:
    """PSNR of each frame of uint8 [T, H, W, 3]."""
    video = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    decoded = vae.decode(vae.encode(video)).cpu()
    error = (decoded - video).square().mean((0, 1, 3, 4)).clamp(min=1e-12)
    return (10 * torch.log10(4 / error)).tolist()
