"""How much work the recipe does: seconds to try it, hours on a CPU, minutes on a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """How much work each stage does; steps are optimiser steps."""

    vae_steps: int
    vae_batch: int
    vae_pool: dict[int, int]  # clips by size
    encoder_steps: int
    encoder_pool: dict[str, int]
    num_pairs: int
    projection_steps: int
    num_styles: int
    joint_steps: int
    joint_batch: int
    style_steps: int
    control_steps: int
    motion_steps: int
    stylecrafter_styles: int  # more of them, as pictures
    stylecrafter_steps: int
    stylecrafter_scales_styles: int
    stylecrafter_scales_steps: int
    stylecrafter_video_steps: int
    validation: int = 16  # held-out styles
    lr: float = 1e-3  # of the joint training
    vae_lr: float = 1e-3
    refiner_steps: int = 1500
    made_pairs: int = 480  # that a model that exists restyles for the refiner
    made_steps: int = 300
    vae_pca_blocks: int = 400_000  # of pixels, that the PCA sees
    encoder_batch: int = 64  # styles
    teacher_pairs: int = 100  # with real pictures
    teacher_vectors: int = 100


PROFILES = {
    "smoke": Profile(
        vae_steps=40,
        vae_batch=1,
        vae_pool={64: 80, 128: 24},
        encoder_steps=100,
        encoder_pool={"num_styles": 200, "pictures": 2, "contents": 60},
        num_pairs=96,
        projection_steps=40,
        num_styles=60,
        joint_steps=40,
        joint_batch=8,
        style_steps=12,
        control_steps=12,
        motion_steps=12,
        stylecrafter_styles=24,
        stylecrafter_steps=24,
        stylecrafter_scales_styles=24,
        stylecrafter_scales_steps=12,
        stylecrafter_video_steps=12,
        validation=6,
        lr=2e-3,
        vae_lr=4e-4,
        refiner_steps=30,
        made_pairs=16,
        made_steps=6,
        vae_pca_blocks=40_000,
        encoder_batch=16,
    ),
    "cpu": Profile(
        vae_steps=2500,
        vae_batch=2,
        vae_pool={64: 4000, 128: 2000},
        encoder_steps=3000,
        encoder_pool={"num_styles": 8000, "pictures": 3, "contents": 3000},
        num_pairs=4000,
        projection_steps=300,
        num_styles=6000,
        joint_steps=4300,
        joint_batch=32,
        style_steps=120,
        control_steps=200,
        motion_steps=1200,
        stylecrafter_styles=16_000,
        stylecrafter_steps=10_000,
        stylecrafter_scales_styles=4000,
        stylecrafter_scales_steps=900,
        stylecrafter_video_steps=150,
        teacher_pairs=4000,
        teacher_vectors=8000,
    ),
    "refine": Profile(
        vae_steps=2400,
        vae_batch=1,
        vae_pool={64: 500, 128: 400},
        encoder_steps=1500,
        encoder_pool={"num_styles": 1200, "pictures": 2, "contents": 500},
        num_pairs=512,
        projection_steps=60,
        num_styles=1000,
        joint_steps=1750,
        joint_batch=16,
        style_steps=30,
        control_steps=30,
        motion_steps=40,
        stylecrafter_styles=300,
        stylecrafter_steps=200,
        stylecrafter_scales_styles=200,
        stylecrafter_scales_steps=60,
        stylecrafter_video_steps=30,
        validation=8,
        encoder_batch=24,
        teacher_pairs=3000,
        teacher_vectors=10_000,
    ),
    "gpu": Profile(
        vae_steps=20_000,
        vae_batch=16,
        vae_pool={64: 12_000, 128: 6000},
        encoder_steps=8000,
        encoder_pool={"num_styles": 20_000, "pictures": 3, "contents": 6000},
        num_pairs=10_000,
        projection_steps=1500,
        num_styles=40_000,
        joint_steps=8000,
        joint_batch=256,
        style_steps=1000,
        control_steps=1000,
        motion_steps=2000,
        stylecrafter_styles=30_000,
        stylecrafter_steps=10_000,
        stylecrafter_scales_styles=10_000,
        stylecrafter_scales_steps=1000,
        stylecrafter_video_steps=1000,
        refiner_steps=10_000,
        teacher_pairs=20_000,
        teacher_vectors=20_000,
    ),
}
