"""The stages by which stylemaster-tiny is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from stylemaster_core.data.images import clip_pixels
from stylemaster_core.data.views import View
from stylemaster_core.models.image_encoder import ImageEncoder, load_image_encoder
from stylemaster_core.models.patch_vae import PatchVAE, create_patch_vae
from stylemaster_core.models.vae import WanVAE, load_vae
from stylemaster_core.training.config import (
    ControlConfig,
    FlowConfig,
    MotionConfig,
    OptimizerConfig,
    ProjectionConfig,
    RunConfig,
    StyleConfig,
    StyleCrafterConfig,
    TrainConfig,
    TrainerName,
)
from stylemaster_core.training.global_projection import create_projection_trainer
from stylemaster_core.training.gray_tile_controlnet import create_control_trainer
from stylemaster_core.training.loop import train
from stylemaster_core.training.motion_adapter import create_motion_trainer
from stylemaster_core.training.precision import settle_precision
from stylemaster_core.training.samples import MemoryDataset, Sample, Subset, TrainingData
from stylemaster_core.training.style_modulation import create_style_trainer
from stylemaster_core.training.stylecrafter import (
    create_stylecrafter_trainer,
    create_stylecrafter_video_trainer,
)
from stylemaster_core.training.trainer import Trainer
from stylemaster_core.weights.files import read_state_dict

from .contents import draw_clip
from .encoder import EncoderConfig, create_encoder, train_encoder
from .encoder_paintings import num_held_out
from .encoder_pool import draw_pool, load_or_draw_pool
from .encoder_probe import probe_encoder
from .joint import continue_joint_trainer, create_joint_trainer
from .limit import TimeLimit, TimeOver, logged
from .made import refine_on_made
from .picture_loss import PictureLoss
from .profiles import Profile
from .real_data import RealData
from .refiner import mean_seam, train_refiner, write_refined
from .samples import (
    PICTURES,
    REFERENCE_PX,
    TEXT_LENGTH,
    TinySamples,
    encode_words,
    join_samples,
    still_samples,
    words_encoder,
)
from .shards import draw_shards, read_shards
from .shipping import copy_encoder
from .styles import draw_style
from .vae import clip_pool, draw_clips, evaluate_vae, fit_pca, train_vae

logger = logging.getLogger("stylemaster")

LOG = "training_log.jsonl"
MADE_LR = 4e-4
STILL_FRAMES = 3  # latent ones, of the clips that the motion adapter learns from
STYLECRAFTER = StyleCrafterConfig(num_layers=2, scale_width=128, scale_num_layers=2, rank=16)
PAIR_VIEWS = ("patches", "jigsaw", "rotate180", "flip_horizontal", "flip_vertical")


class Outcome(NamedTuple):
    """What a stage did to a number about held-out data."""

    metric: str
    before: float
    after: float


class Recipe:
    """The stages, in the order in which they need each other."""

    def __init__(
        self,
        out: Path,
        profile: Profile,
        *,
        seed: int,
        minutes: float | None,
        art: Path | None = None,
        photos: Path | None = None,
        start: Path | None = None,
    ) -> None:
        """Set up.

        Args:
            out: folder of the stages.
            profile: how much work they do.
            seed: of everything.
            minutes: after which a call ends.
            art: paintings to learn from beside the drawings; needs `photos`.
            photos: contents for them.
            start: folder of weights to go on from, laid out as the shipped; None for new ones.
        """
        self.out, self.profile, self.seed, self.start = out, profile, seed, start
        self.limit = TimeLimit(minutes)
        self.real: RealData | None = None
        if art is not None and photos is not None:
            self.real = RealData(
                out / "real",
                art,
                photos,
                num_pairs=profile.teacher_pairs,
                num_vectors=profile.teacher_vectors,
                num_clips=profile.vae_pool,
                seed=seed,
                limit=self.limit,
            )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def stages(self) -> dict[str, Callable[[Path], Outcome | None]]:
        """Stage by name; each makes the folder that it is given."""
        real = {"real": self.prepare_real} if self.real else {}
        return {
            **real,
            "vae": self.vae,
            "refiner": self.refiner,
            "encoder": lambda folder: self.encoder(folder, self.seed + 1),
            "judge": self.judge,
            "samples": self.samples,
            "global-projection": self.global_projection,
            "joint": self.joint,
            "style": self.style,
            "control": self.control,
            "motion": self.motion,
            "pictures": self.pictures,
            "stylecrafter": self.stylecrafter,
            "stylecrafter-scales": self.stylecrafter_scales,
            "stylecrafter-video": self.stylecrafter_video,
        }

    def run(self, until: str | None = None) -> None:
        """Do what is not done yet.

        Raises:
            TimeOver: when the time is over.
        """
        for name, stage in self.stages().items():
            folder = self.out / name
            done = folder / "done.json"
            if not done.exists():
                self.limit.check()
                logger.info("stage %s begins", name)
                began = time.monotonic()
                with logged(self.out / LOG, name):
                    outcome = stage(folder)
                seconds = round(time.monotonic() - began)
                report = {"seconds": seconds, **(outcome._asdict() if outcome else {})}
                done.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
                logger.info("stage %s is done after %d s: %s", name, seconds, outcome or "")
            if name == until:
                return

    def prepare_real(self, folder: Path) -> None:
        """Read the paintings, and let the teacher work on them."""
        assert self.real is not None and folder == self.real.folder
        self.real.prepare()

    def vae(self, folder: Path) -> Outcome:
        """The VAE; of one that exists only the decoder, so that its latents stay what they are."""
        pool = clip_pool(self.out, self.profile.vae_pool, self.seed)
        pca_blocks = self.profile.vae_pca_blocks
        if self.real:
            pool = self.real.with_clips(pool)
        train_vae(
            folder,
            steps=self.profile.vae_steps,
            batch=self.profile.vae_batch,
            lr=self.profile.vae_lr,
            seed=self.seed,
            device=self.device,
            pool=pool,
            limit=self.limit,
            pca_blocks=pca_blocks,
            start=self.start and self.start / "vae.safetensors",
        )
        trained = read_state_dict(folder / "vae.safetensors").tensors
        linear = PatchVAE()
        linear.set_linear(*fit_pca(pool, self.seed, pca_blocks))
        clips = draw_clips(self.profile.validation, 128, seed=9, held_out=True)
        before, after = [
            evaluate_vae(vae, clips=clips)["mae"]
            for vae in (linear, create_patch_vae(trained, str(folder)))
        ]
        return Outcome("held-out absolute error, of a PCA and trained", before, after)

    def judge(self, folder: Path) -> Outcome | None:
        """An encoder of another seed, which judges; one that exists stays as it is."""
        if self.start is None:
            return self.encoder(folder, self.seed + 2, through_vae=True)
        folder.mkdir(parents=True, exist_ok=True)
        copy_encoder(self.start / "judge", folder)
        return None

    def encoder(self, folder: Path, seed: int, *, through_vae: bool = False) -> Outcome:
        """A style encoder; the judge learns from reconstructions, too.

        It is to tell styles apart, and else would tell what is real from what the VAE made.
        """
        pool = load_or_draw_pool(
            self.out / f"{folder.name}_pool", seed, **self.profile.encoder_pool
        )
        if through_vae:
            _pass_through(load_vae(self.out / "vae" / "vae.safetensors"), pool.pictures[:, 1])
        steps = self.profile.encoder_steps
        config = EncoderConfig(
            batch_styles=self.profile.encoder_batch,
            warmup_steps=max(min(100, steps // 5), 1),
            lr=1e-3 if self.start else 2e-3,
        )
        train_encoder(
            folder,
            seed=seed,
            steps=steps,
            pool=pool,
            config=config,
            device=self.device,
            limit=self.limit,
            paintings=None if through_vae or self.real is None else self.real.paintings,
            start=self.start and self.start / "image_encoder",
        )
        contents = min(100, self.profile.encoder_pool["contents"])
        held_out = draw_pool(seed, held_out=True, num_styles=96, pictures=2, contents=contents)
        untrained = ImageEncoder(create_encoder(pool, seed))
        before, after = [
            probe_encoder(encoder, pool, held_out).texture
            for encoder in (untrained, load_image_encoder(folder))
        ]
        return Outcome("texture probe, untrained and trained", before, after)

    def samples(self, folder: Path) -> None:
        """Shards of samples, and held-out ones."""
        held_out = range(self.profile.validation)
        draw_shards(folder / "held_out", held_out, self.out, seed=self.seed, held_out=True)
        numbers = range(self.profile.num_styles)
        draw_shards(folder / "train", numbers, self.out, seed=self.seed)
        if self.real:
            self.real.draw_samples(folder, self.out)

    def pictures(self, folder: Path) -> None:
        """Shards of pictures in other styles: for StyleCrafter's adapter, then for its scales."""
        options = {"seed": self.seed, "sizes": PICTURES}
        first = self.profile.num_styles
        second = first + self.profile.stylecrafter_styles
        end = second + self.profile.stylecrafter_scales_styles
        draw_shards(folder / "style", range(first, second), self.out, **options)
        options["cropped_references"] = 0.5
        draw_shards(folder / "scales", range(second, end), self.out, **options)
        held_out = range(4 * self.profile.validation)
        draw_shards(folder / "held_out", held_out, self.out, held_out=True, **options)

    def global_projection(self, folder: Path) -> Outcome:
        """The paper's first stage, on pictures and rearrangements of their own pixels."""
        projection = ProjectionConfig(hidden_width=256, num_negatives=16)
        config = self._config(
            folder,
            "global-projection",
            self.profile.projection_steps,
            64,
            lr=1e-3,
            projection=projection,
        )
        data = self._pairs(self.profile.num_pairs, held_out=False)
        features = {key: tuple(value.shape) for key, value in data[0].items()}
        trainer = create_projection_trainer(config, features, start=self._started("style_adapter"))
        return self._train(
            trainer, data, self._pairs(8 * self.profile.validation, held_out=True), folder
        )

    def joint(self, folder: Path) -> Outcome:
        """Base, style branch and control together, from nothing."""
        data, held_out = self._samples("train"), self._samples("held_out")
        config = self._config(
            folder,
            "control",
            self.profile.joint_steps,
            self.profile.joint_batch,
            lr=self.profile.lr * (0.6 if self.start else 1),
            warmup_steps=min(100, self.profile.joint_steps // 10),
            control=ControlConfig(style="train", drop_control=0.15),
            flow=FlowConfig(**self._flow() | {"shift": 4.0, "timesteps": "uniform"}),
        )
        vae = load_vae(self.out / "vae" / "vae.safetensors")
        assert isinstance(vae, PatchVAE)
        conditions: dict[str, Any] = {
            "contrastive": self._contrastive(),
            "null_text": null_text(),
            "loss": PictureLoss(vae, load_image_encoder(self.out / "encoder")),
        }
        if self.start is not None:
            trainer = continue_joint_trainer(config, _features(data), self.start, **conditions)
        else:
            trainer = create_joint_trainer(config, _features(data), **conditions)
        return self._train(trainer, data, held_out, folder)

    def refiner(self, folder: Path) -> Outcome:
        """The VAE's refiner, which takes the grid of blocks off what is decoded."""
        pool = clip_pool(self.out, self.profile.vae_pool, self.seed)
        if self.real:
            pool = self.real.with_clips(pool)
        source, target = self.out / "vae" / "vae.safetensors", folder / "vae.safetensors"
        weights = train_refiner(
            folder / "checkpoints",
            source,
            pool,
            steps=self.profile.refiner_steps,
            batch=self.profile.vae_batch,
            lr=self.profile.vae_lr,
            seed=self.seed,
            device=self.device,
            limit=self.limit,
            start=self.start and self.start / "vae.safetensors",
        )
        if self.real and self.start:
            weights = refine_on_made(
                create_patch_vae(weights, "the VAE").to(self.device),
                self.real.draw_made(self.start, self.profile.made_pairs, device=self.device),
                self.real.pictures[num_held_out(len(self.real.pictures)) :],
                steps=self.profile.made_steps,
                lr=MADE_LR,
                seed=self.seed,
                limit=self.limit,
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_refined(target, weights, source)
        clips = draw_clips(self.profile.validation, 128, seed=9, held_out=True)
        before, after = (
            mean_seam(create_patch_vae(read_state_dict(path).tensors, str(path)), clips)
            for path in (source, target)
        )
        return Outcome("steps at borders over others, without and with it", before, after)

    def style(self, folder: Path) -> Outcome:
        """The paper's style modulation: only the style branch learns."""
        data, held_out = self._samples("train"), self._samples("held_out")
        config = self._config(folder, "style", self.profile.style_steps, self.profile.joint_batch)
        trainer = create_style_trainer(
            config,
            self._file("joint/transformer"),
            _features(data),
            adapter=self._file("joint/style_adapter"),
            contrastive=self._contrastive(),
            null_text=null_text(),
        )
        return self._train(trainer, data, held_out, folder)

    def control(self, folder: Path) -> Outcome:
        """The paper's gray-tile control: only the control network learns."""
        data, held_out = self._samples("train"), self._samples("held_out")
        config = self._config(
            folder,
            "control",
            self.profile.control_steps,
            self.profile.joint_batch,
            control=ControlConfig(style="frozen", drop_control=0.1),
        )
        trainer = create_control_trainer(
            config,
            self._file("joint/transformer"),
            _features(data),
            controlnet=self._file("joint/controlnet"),
            adapter=self._file("style/style_adapter"),
            contrastive=self._contrastive(),
            null_text=null_text(),
        )
        return self._train(trainer, data, held_out, folder)

    def motion(self, folder: Path) -> Outcome:
        """The paper's motion adapter, on still clips."""
        data, held_out = (
            still_samples(self._samples(name), STILL_FRAMES) for name in ("train", "held_out")
        )
        config = self._config(
            folder,
            "motion",
            self.profile.motion_steps,
            self.profile.joint_batch,
            lr=3e-3,
            motion=MotionConfig(rank=64),
        )
        trainer = create_motion_trainer(
            config,
            self._file("joint/transformer"),
            adapter=self._started("motion_adapter"),
            null_text=null_text(),
        )
        return self._train(trainer, data, held_out, folder)

    def stylecrafter(self, folder: Path) -> Outcome:
        """StyleCrafter's first stage, on pictures: its adapter, all gains 1.

        The scale predictor would learn to say "more" and nothing else while the adapter grows:
        after 6000 steps all its tanh were at 1.
        """
        data = join_samples([self._samples("train"), self._samples("style", "pictures")])
        held_out, steps = self._samples("held_out"), self.profile.stylecrafter_steps
        adapter = self._started("stylecrafter_adapter")
        return self._stylecrafter(
            folder, data, held_out, steps, lr=1e-3, train="style", adapter=adapter
        )

    def stylecrafter_scales(self, folder: Path) -> Outcome:
        """The rest of that stage: its scale predictor, on styles that the adapter has not seen.

        Half of the references are parts of a picture, enlarged (in the paper, all are): such a
        texture is coarser than the target's, and is to be trusted less. At a rate of 1e-3 all gains
        became one number.
        """
        data, held_out = (self._samples(name, "pictures") for name in ("scales", "held_out"))
        steps = self.profile.stylecrafter_scales_steps
        adapter = self._file("stylecrafter/stylecrafter_adapter")
        return self._stylecrafter(
            folder, data, held_out, steps, lr=3e-4, train="scales", adapter=adapter
        )

    def _stylecrafter(
        self,
        folder: Path,
        data: TinySamples,
        held_out: TinySamples,
        steps: int,
        *,
        lr: float,
        train: Literal["style", "scales"],
        adapter: dict[str, Tensor] | None = None,
    ) -> Outcome:
        pictures = [i for i, size in enumerate(data.sizes) if size[1] == 1]
        settings = dataclasses.replace(STYLECRAFTER, train=train)
        config = self._config(
            folder, "stylecrafter", steps, self.profile.joint_batch, lr=lr, stylecrafter=settings
        )
        trainer = create_stylecrafter_trainer(
            config,
            self._file("joint/transformer"),
            _features(data),
            adapter=adapter,
            null_text=null_text(),
        )
        return self._train(trainer, Subset(data, pictures), held_out, folder)

    def stylecrafter_video(self, folder: Path) -> Outcome:
        """StyleCrafter's second stage: a LoRA that carries the adapter to clips."""
        data, held_out = self._samples("train"), self._samples("held_out")
        config = self._config(
            folder,
            "stylecrafter-video",
            self.profile.stylecrafter_video_steps,
            self.profile.joint_batch,
            stylecrafter=STYLECRAFTER,
        )
        trainer = create_stylecrafter_video_trainer(
            config,
            self._file("joint/transformer"),
            self._file("stylecrafter-scales/stylecrafter_adapter"),
            null_text=null_text(),
        )
        return self._train(trainer, data, held_out, folder)

    def _config(
        self,
        folder: Path,
        trainer: TrainerName,
        steps: int,
        batch: int,
        *,
        lr: float = 1e-4,
        warmup_steps: int = 10,
        **sections: Any,
    ) -> TrainConfig:
        run = RunConfig(
            num_steps=steps,
            batch_size=batch,
            seed=self.seed,
            precision="auto",
            save_every=max(min(250, steps // 4), 1),
            keep_checkpoints=1,
            validate_every=max(steps // 4, 1),
            num_workers=6 if self.device == "cuda" else 0,
        )
        optimizer = OptimizerConfig(
            lr=lr,
            betas=(0.9, 0.98),
            schedule="cosine",
            warmup_steps=warmup_steps,
            ema_decay=0.99 if steps < 1000 else 0.998,
        )
        sections.setdefault("flow", FlowConfig(**self._flow()))
        style = StyleConfig(drop_style=0.08, drop_both=0.05, num_layers=2)
        config = TrainConfig(trainer, run, optimizer, style=style, **sections)
        return settle_precision(config, torch.device(self.device), folder)

    def _flow(self) -> dict[str, Any]:
        return {
            "shift": 3.0,
            "timesteps": "logit_normal",
            "weighting": "none",
            "same_noise": 0.6 if self.real else 0.0,
            "text_length": TEXT_LENGTH,
        }

    def _train(
        self, trainer: Trainer, data: TrainingData, held_out: TrainingData, folder: Path
    ) -> Outcome:
        attention = _fast_attention(trainer.config.run.precision, self.device)
        with self.limit.touching(folder / "stop"), attention:
            result = train(trainer, data, folder, validation=held_out, resume=True, progress=True)
        if not result.finished:
            raise TimeOver
        lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
        losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
        return Outcome("held-out loss", losses[0], losses[-1])

    def _file(self, name: str) -> dict[str, Tensor]:
        return dict(read_state_dict(self.out / f"{name}.safetensors").tensors)

    def _started(self, name: str) -> dict[str, Tensor] | None:
        """A file of the weights to go on from, if there are any."""
        if self.start is None:
            return None
        weights = read_state_dict(self.start / f"{name}.safetensors").tensors
        return {key: value.float() for key, value in weights.items()}

    def _contrastive(self) -> dict[str, Tensor]:
        return self._file("global-projection/global_projection")

    def _samples(self, name: str, stage: str = "samples") -> TinySamples:
        return read_shards(self.out / stage / name)

    def _pairs(self, count: int, *, held_out: bool) -> MemoryDataset:
        encoder = load_image_encoder(self.out / "encoder", device=self.device)
        samples: list[Sample] = []
        for first in range(0, count, 64):
            pixels = []
            for number in range(first, min(first + 64, count)):
                rng = np.random.default_rng([self.seed, 7, int(held_out), number])
                picture = self._styled(rng, held_out)
                view = View(str(rng.choice(PAIR_VIEWS)), int(rng.integers(1 << 30)))  # type: ignore[arg-type]
                pixels += [
                    clip_pixels(p, size=REFERENCE_PX) for p in (picture, view.apply_image(picture))
                ]
            embeds = encoder.encode(torch.stack(pixels)).image_embeds.cpu().unflatten(0, (-1, 2))
            samples += [{"first_embeds": a, "second_embeds": b} for a, b in embeds]
        return MemoryDataset(samples)

    def _styled(self, rng: np.random.Generator, held_out: bool) -> np.ndarray:
        """A picture in a style, uint8 [128, 128, 3]: every second one is a painting, if any is."""
        if self.real and rng.random() < 0.5:
            return self.real.reference(rng, held_out=held_out)
        clip, _ = draw_clip(rng, 1, REFERENCE_PX, REFERENCE_PX, held_out=held_out)
        return draw_style(rng, held_out=held_out).apply(clip)[0]


def null_text() -> Tensor:
    """Features of the empty prompt, [24, 4096]."""
    return encode_words(words_encoder(), "")


def _features(data: TrainingData) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in data[0].items()}


@torch.no_grad()
def _pass_through(vae: WanVAE | PatchVAE, pictures: np.ndarray) -> None:
    """Encode and decode uint8 [N, H, W, 3] in place."""
    for first in tqdm(range(0, len(pictures), 16), desc="through the VAE", mininterval=5):
        chunk = torch.from_numpy(pictures[first : first + 16]).permute(0, 3, 1, 2)[:, :, None]
        decoded = vae.decode(vae.encode(chunk.float() / 127.5 - 1))[:, :, 0]
        pixels = ((decoded + 1) * 127.5).round().clamp(0, 255).byte()
        pictures[first : first + 16] = pixels.permute(0, 2, 3, 1).numpy()


def _fast_attention(precision: str, device: str) -> contextlib.AbstractContextManager[object]:
    # For short sequences in bfloat16 the fused kernel of the CPU takes a third of a step.
    slow = device == "cpu" and precision == "bfloat16"
    return sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()
