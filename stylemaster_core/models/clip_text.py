"""CLIP's joint text-image space, in which texture mode `paper` compares patches with the prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LayoutError, UnsupportedHostError, WeightsError
from ..reading import reading
from ..weights.files import read_state_dict
from ..weights.numbers import check_module
from .image_encoder import ImageEncoder, joint_width

OPEN_CLIP_MODEL = "ViT-H-14"


class ClipText:
    """A frozen CLIP text encoder: prompts to embeddings in the joint space."""

    def __init__(self, encode: Callable[[list[str]], Tensor]) -> None:
        self._encode = encode

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Embed prompts, [B, 1024] for ViT-H/14, not normalised; long prompts are cut at 77 tokens.

        Raises:
            LayoutError: if there is no prompt.
        """
        if not prompts:
            raise LayoutError("no prompt to encode; give a list of at least one")
        return self._encode(list(prompts))


def load_clip_text(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    skip_check: bool = False,
) -> ClipText:
    """Load the text tower that belongs to the image encoder (laion's ViT-H/14 for the release).

    Args:
        path: a folder in Hugging Face format with the weights of a CLIPTextModelWithProjection or a
            whole CLIPModel, and its tokenizer (beside them, or in a sub-folder `tokenizer`); or
            an open_clip checkpoint of ViT-H-14, which needs the extra `stylemaster[open-clip]`.
        device: where to put it.
        dtype: of the weights.
        skip_check: do not look for NaN and infinity.

    Raises:
        WeightsError: if the weights or the tokenizer are missing or of another kind, or the weights
            not finite.
        UnsupportedHostError: if open_clip is needed and not installed.
    """
    path = Path(path)
    with reading(path, "a CLIP text encoder"):
        load = _from_folder if path.is_dir() else _from_open_clip
        model, clip_text = load(path, device, dtype)
        if not skip_check:
            check_module(model, path)
        return clip_text


def project_patches(image_encoder: ImageEncoder, patch_features: Tensor) -> Tensor:
    """Bring every patch token into the joint space, as CLIP does with the CLS token alone.

    Args:
        image_encoder: the encoder that made them.
        patch_features: [B, 257, 1280].

    Returns:
        [B, 257, 1024].

    Raises:
        LayoutError: for features of another width.
    """
    model = image_encoder.model
    if patch_features.ndim != 3 or patch_features.shape[-1] != model.config.hidden_size:
        raise LayoutError(
            f"patch features of shape {list(patch_features.shape)}; this image encoder makes "
            f"[batch, patches, {model.config.hidden_size}]"
        )
    features = patch_features.to(image_encoder.device, image_encoder.dtype)
    return model.visual_projection(model.vision_model.post_layernorm(features))


def joint_similarity(
    image_encoder: ImageEncoder, patch_features: Tensor, text_embeds: Tensor
) -> Tensor:
    """Cosine similarity of every patch with the prompt in the joint space.

    Args:
        image_encoder: the encoder that made the patches.
        patch_features: [B, 257, 1280].
        text_embeds: [B or 1, 1024], from `ClipText.encode`.

    Returns:
        [B, 257] in -1..1, float32; the `similarity` that `select_patches` takes.

    Raises:
        LayoutError: for another width, so for another text tower.

    Source: StyleMaster, sec. 3.1; the paper does not name the space, this is CLIP's own.
    """
    patches = project_patches(image_encoder, patch_features).float()
    if text_embeds.ndim != 2 or text_embeds.shape[-1] != patches.shape[-1]:
        raise LayoutError(
            f"text embeddings of shape {list(text_embeds.shape)}; expected [batch, "
            f"{patches.shape[-1]}]: use the text tower of the same CLIP model"
        )
    return F.cosine_similarity(patches, text_embeds.to(patches)[:, None], dim=-1)


def _from_folder(
    folder: Path, device: torch.device | str, dtype: torch.dtype
) -> tuple[nn.Module, ClipText]:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    tokenizer_folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    weights_folder = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
        loaded: Any = CLIPTextModelWithProjection.from_pretrained(
            str(weights_folder),
            local_files_only=True,
            output_loading_info=True,
            **joint_width(weights_folder),
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise WeightsError(
            f"{folder} cannot be loaded as a CLIP text encoder ({error}); expected config.json, "
            "weights and tokenizer of a CLIPTextModelWithProjection"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        raise WeightsError(
            f"{folder} lacks {len(report['missing_keys'])} weights of a CLIP text encoder "
            f"({sorted(report['missing_keys'])[0]}, ...); use a folder with the text projection"
        )
    model = model.requires_grad_(False).eval().to(device=device, dtype=dtype)
    length = model.config.max_position_embeddings

    def encode(prompts: list[str]) -> Tensor:
        tokens = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return model(input_ids=tokens.input_ids.to(device)).text_embeds

    return model, ClipText(encode)


def _from_open_clip(
    path: Path, device: torch.device | str, dtype: torch.dtype
) -> tuple[nn.Module, ClipText]:
    try:
        import open_clip  # type: ignore[import-not-found]
    except ImportError as error:
        raise UnsupportedHostError(
            f"{path} is one file, which only open_clip can read as a text encoder; run "
            "pip install 'stylemaster[open-clip]', or give a folder in Hugging Face format"
        ) from error
    tensors = read_state_dict(path).tensors
    if "text_projection" not in tensors:
        raise WeightsError(
            f"{path} has no text tower in open_clip's naming (no text_projection); expected "
            f"open_clip_model.safetensors of {OPEN_CLIP_MODEL}"
        )
    model = open_clip.create_model(OPEN_CLIP_MODEL, pretrained=None)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(f"{path} is not an open_clip {OPEN_CLIP_MODEL}: {error}") from error
    model.visual = None
    model = model.requires_grad_(False).eval().to(device=device, dtype=dtype)
    tokenizer = open_clip.get_tokenizer(OPEN_CLIP_MODEL)
    return model, ClipText(lambda prompts: model.encode_text(tokenizer(prompts).to(device)))
