"""Scores of published networks: CLIP-T, CSD, LPIPS and ArtFID, where weights and library are there.

Each loader raises an error that says what is missing; no number stands in for one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..data.images import clip_pixels
from ..errors import ConfigError, LayoutError, UnsupportedHostError, WeightsError
from ..layouts import check_frames
from ..reading import reading
from ..weights.files import read_state_dict
from ..weights.key_maps import open_clip_to_hf_vision
from ..weights.numbers import check_weights
from ..weights.state_dict import check_keys, shapes_of
from .retrieval import EmbedPictures

if TYPE_CHECKING:
    from ..models.clip_text import ClipText
    from ..models.image_encoder import ImageEncoder

# [N, H, W, 3] uint8, result and content, to LPIPS [N].
Lpips = Callable[[np.ndarray, np.ndarray], Tensor]
# CSD stands on OpenAI's ViT-L/14, which, unlike laion's, has heads of 64 and QuickGELU.
CSD_HEAD_WIDTH = 64
BATCH_FRAMES = 8


def clip_embedder(image_encoder: ImageEncoder) -> EmbedPictures:
    """Pictures to CLIP's projected embeddings, not normalised."""

    def embed(frames: np.ndarray) -> Tensor:
        batches = _batches(frames, image_encoder.image_size)
        return torch.cat([image_encoder.encode(pixels).image_embeds for pixels in batches])

    return embed


def clip_text_score(
    embed: EmbedPictures, clip_text: ClipText, frames: np.ndarray, prompt: str
) -> float:
    """Cosine of frames and prompt in CLIP's joint space, averaged over frames (CLIP-T).

    Args:
        embed: from `clip_embedder`.
        clip_text: the text tower of the same CLIP model.
        frames: uint8 [T, H, W, 3].
        prompt: what was asked for.

    Returns:
        -1 to 1.

    Raises:
        ConfigError: if the prompt is empty.
        LayoutError: if the two towers do not belong together.

    Source: StyleCrafter, supplement B; deviation: none.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty; CLIP-T compares the frames with one")
    images, text = embed(frames).float(), clip_text.encode([prompt]).float()
    if images.shape[-1] != text.shape[-1]:
        raise LayoutError(
            f"embeddings of {images.shape[-1]} (frames) and {text.shape[-1]} (prompt) numbers; "
            "use the text tower of the same CLIP model"
        )
    return float(F.cosine_similarity(images, text.to(images), dim=-1).mean())


def load_csd(
    path: str | Path, *, device: torch.device | str = "cpu", skip_check: bool = False
) -> EmbedPictures:
    """Load CSD, which embeds the style of pictures.

    Args:
        path: its weights as .safetensors (yuxi-liu-wired/CSD, an unofficial copy), with the
            backbone in OpenAI's or in transformers' naming.
        device: where to put it.
        skip_check: do not look for NaN and infinity.

    Raises:
        WeightsError: if the file is missing, damaged, of another kind, or incomplete.

    Source: Somepalli et al. 2024, Measuring Style Similarity in Diffusion Models; deviation: none.
    """
    with reading(path, "CSD"):
        model, size = _csd(path, skip_check)
        model.requires_grad_(False).eval().to(device)

    def embed(frames: np.ndarray) -> Tensor:
        batches = _batches(frames, size)
        return torch.cat([model(pixel_values=pixels.to(device)).image_embeds for pixels in batches])

    return embed


def _csd(path: str | Path, skip_check: bool) -> tuple[Any, int]:
    """The network, and the side of the pictures it takes."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    found = read_state_dict(path).tensors
    if not skip_check:
        check_weights(found, path)
    tensors = {key.removeprefix("module."): value.float() for key, value in found.items()}
    style = tensors.get("last_layer_style")
    backbone = {
        key.removeprefix("backbone."): value
        for key, value in tensors.items()
        if key.startswith("backbone.") and not key.endswith(("position_ids", ".proj"))
    }
    if style is None or style.ndim != 2 or not backbone:
        raise WeightsError(
            f"{path} is not CSD (no backbone.* and last_layer_style); get model.safetensors of "
            "yuxi-liu-wired/CSD"
        )
    if "conv1.weight" in backbone:
        visual = {f"visual.{key}": value for key, value in backbone.items()}
        backbone = open_clip_to_hf_vision(visual)
    weights = {**backbone, "visual_projection.weight": style.T.contiguous()}
    try:
        width, _, patch, _ = weights["vision_model.embeddings.patch_embedding.weight"].shape
        grid = round((len(weights["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
        ffn_width = len(weights["vision_model.encoder.layers.0.mlp.fc1.weight"])
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{path} has no complete CLIP backbone ({error}); get it again"
        ) from error
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=ffn_width,
        projection_dim=style.shape[1],
        num_hidden_layers=len({k.split(".")[3] for k in weights if ".encoder.layers." in k}),
        num_attention_heads=max(width // CSD_HEAD_WIDTH, 1),
        image_size=grid * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
    )
    model: Any = CLIPVisionModelWithProjection(config)
    check_keys(shapes_of(weights), shapes_of(model.state_dict()), f"CSD {path}")
    model.load_state_dict(weights)
    return model, grid * patch


def csd_score(embed: EmbedPictures, frames: np.ndarray, style_image: np.ndarray) -> float:
    """Cosine of the styles of frames and style picture, averaged over frames (CSD).

    Args:
        embed: from `load_csd`.
        frames: uint8 [T, H, W, 3].
        style_image: uint8 [H, W, 3].

    Returns:
        -1 to 1.
    """
    return float(F.cosine_similarity(embed(frames), embed(style_image[None]), dim=-1).mean())


def load_lpips(*, device: torch.device | str = "cpu") -> Lpips:
    """LPIPS (AlexNet, version 0.1) of the package `lpips`, which downloads AlexNet at first use.

    Raises:
        UnsupportedHostError: if the package is missing or its weights cannot be had.

    Source: Zhang et al. 2018; deviation: none.
    """
    try:
        import lpips  # type: ignore[import-not-found]
    except ImportError as error:
        raise UnsupportedHostError(
            "LPIPS needs the package lpips; run pip install lpips (it brings torchvision)"
        ) from error
    try:
        network = lpips.LPIPS(net="alex", verbose=False).requires_grad_(False).eval().to(device)
    except (OSError, RuntimeError) as error:
        raise UnsupportedHostError(f"the weights of LPIPS cannot be had here: {error}") from error

    def compare(first: np.ndarray, second: np.ndarray) -> Tensor:
        pairs = zip(check_frames(first), check_frames(second), strict=True)
        scores = [network(*(_pixels(x[None]).to(device) * 2 - 1 for x in pair)) for pair in pairs]
        return torch.cat(scores).flatten()

    return compare


def load_art_inception(
    path: str | Path, *, device: torch.device | str = "cpu", skip_check: bool = False
) -> EmbedPictures:
    """Load the Inception network that ArtFID measures with.

    Args:
        path: art_inception.pth (matthias-wright/art_inception).
        device: where to put it.
        skip_check: do not look for NaN and infinity.

    Raises:
        UnsupportedHostError: if the package `art-fid`, which holds the network, is missing.
        WeightsError: if the file is missing or of another kind.
    """
    with reading(path, "ArtFID's network"):
        network = _art_inception(path, skip_check).requires_grad_(False).eval().to(device)

    def embed(frames: np.ndarray) -> Tensor:
        chunks = _pixels(check_frames(frames)).split(BATCH_FRAMES)
        return torch.cat([network(chunk.to(device), return_features=True) for chunk in chunks])

    return embed


def _art_inception(path: str | Path, skip_check: bool) -> Any:
    tensors = read_state_dict(path).tensors
    if not skip_check:
        check_weights(tensors, path)
    try:
        from art_fid.inception import Inception3  # type: ignore[import-not-found]
    except ImportError as error:
        raise UnsupportedHostError(
            "ArtFID's network is in the package art-fid; run pip install art-fid (it brings "
            "torchvision)"
        ) from error
    network = Inception3()
    try:
        missing = network.load_state_dict(tensors, strict=False).missing_keys
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit ArtFID's network: {error}") from error
    if missing:
        raise WeightsError(f"{path} lacks {len(missing)} weights ({missing[0]}, ...); get it again")
    return network


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Fréchet distance of the Gaussians that fit two sets of features (FID with Inception's).

    Args:
        first: [N, D].
        second: [M, D].

    Raises:
        LayoutError: for fewer than two of one set, or another width.

    Source: Heusel et al. 2017; the trace of the covariances' root is computed as the sum of the
    singular values of the product of the centred features, which is exact for any N.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise LayoutError(f"features {list(first.shape)} and {list(second.shape)}; expected [N, D]")
    if min(len(first), len(second)) < 2:
        raise LayoutError("a Fréchet distance needs at least two pictures of each kind")
    scaled = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (first.double(), second.double())]
    root = torch.linalg.svdvals(scaled[0] @ scaled[1].T).sum()
    means = (first.double().mean(0) - second.double().mean(0)).square().sum()
    spreads = sum(x.square().sum() for x in scaled)
    return float((means + spreads - 2 * root).clamp(min=0))


def art_fid(lpips_mean: float, fid: float) -> float:
    """(1 + LPIPS to the content) (1 + FID to the style pictures).

    Source: Wright and Ommer 2022; deviation: FID itself, not its extrapolation to infinite samples.
    """
    return (1 + lpips_mean) * (1 + fid)


def _batches(frames: np.ndarray, size: int) -> list[Tensor]:
    pixels = torch.stack([clip_pixels(frame, size=size) for frame in check_frames(frames)])
    return list(pixels.split(BATCH_FRAMES))


def _pixels(frames: np.ndarray) -> Tensor:
    return rearrange(torch.from_numpy(frames), "t h w c -> t c h w").float() / 255
