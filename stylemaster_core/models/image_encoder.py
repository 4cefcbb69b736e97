"""The frozen CLIP image encoder: patch features and the projected embedding of a style image."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LayoutError, WeightsError
from ..reading import reading
from ..weights.files import read_state_dict
from ..weights.shapes import Shape
from ..weights.state_dict import (
    check_keys,
    describe_kind,
    detect_kind,
    open_clip_to_hf_vision,
    shapes_of,
)

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

# What the weights do not tell: heads of this width make 16 of ViT-H's 1280.
HEAD_WIDTH = 80


class ImageFeatures(NamedTuple):
    """What CLIP sees in images."""

    patch_features: Tensor  # [B, 257, 1280] last hidden state before the post-layernorm, CLS first
    image_embeds: Tensor  # [B, 1024] projected into the joint text-image space


class ImageEncoder:
    """A frozen CLIP image encoder; the sizes named here are ViT-H/14's."""

    def __init__(self, model: CLIPVisionModelWithProjection) -> None:
        self.model = model.requires_grad_(False).eval()

    @property
    def image_size(self) -> int:
        """Side of the square image it takes, pixels."""
        size = self.model.config.image_size
        assert isinstance(size, int)
        return size

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(self, device: torch.device | str) -> ImageEncoder:
        """Move the weights, and return this encoder."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> ImageFeatures:
        """Encode images.

        Args:
            pixels: [B, 3, 224, 224], resized and normalised by `clip_pixels`.

        Returns:
            `ImageFeatures` in the encoder's dtype, on its device.

        Raises:
            LayoutError: for another shape, or NaN or infinity in the images.
        """
        output = self._run(pixels)
        return ImageFeatures(output.last_hidden_state, output.image_embeds)

    @torch.no_grad()
    def penultimate(self, pixels: Tensor) -> Tensor:
        """What StyleCrafter's SDXL adapter sees: [B, 257, 1280] before the last layer, CLS first.

        Args and Raises as `encode`.
        """
        return self._run(pixels, output_hidden_states=True).hidden_states[-2]

    @torch.no_grad()
    def stylecrafter_video(self, pixels: Tensor) -> Tensor:
        """What StyleCrafter's video adapter sees: [B, 257, 1280] of the last layer, CLS first.

        CLS has passed the post-layernorm, the patches have not.

        Args:
            pixels: from `stylecrafter_video_pixels`.
        """
        tokens = self._run(pixels).last_hidden_state
        first = self.model.vision_model.post_layernorm(tokens[:, :1])
        return torch.cat([first, tokens[:, 1:]], dim=1)

    def _run(self, pixels: Tensor, **options: Any) -> Any:
        expected = [3, self.image_size, self.image_size]
        if pixels.ndim != 4 or list(pixels.shape[1:]) != expected:
            raise LayoutError(
                f"the images for CLIP have shape {list(pixels.shape)}; expected "
                f"[batch, {', '.join(map(str, expected))}]: prepare them with clip_pixels"
            )
        if not torch.isfinite(pixels).all():
            raise LayoutError("the images for CLIP hold NaN or infinity; check the style image")
        return self.model(pixel_values=pixels.to(self.device, self.dtype), **options)


def load_image_encoder(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_heads: int | None = None,
) -> ImageEncoder:
    """Load a CLIP image encoder.

    Args:
        path: a folder in Hugging Face format (or one with a sub-folder `image_encoder`), or one
            weight file in Hugging Face, ComfyUI (the same) or open_clip naming. Sizes are read off
            a file; its activation is taken to be GELU, as in the laion models.
        device: where to put it.
        dtype: of weights and results.
        num_heads: of a single file, which does not tell; by default `num_heads` in its metadata,
            else width / 80, which is ViT-H's.

    Raises:
        WeightsError: if the file is missing, damaged, of another kind, or incomplete.
    """
    path = Path(path)
    with reading(path, "a CLIP image encoder"):
        model = _from_folder(path) if path.is_dir() else _from_file(path, num_heads)
        return ImageEncoder(model.to(device=device, dtype=dtype))  # type: ignore[arg-type]


def _from_folder(folder: Path) -> CLIPVisionModelWithProjection:
    from transformers import CLIPVisionModelWithProjection

    if not (folder / "config.json").is_file() and (folder / "image_encoder").is_dir():
        folder = folder / "image_encoder"
    try:
        loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True, **joint_width(folder)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{folder} cannot be loaded as a CLIP image encoder ({error}); expected config.json "
            "and model.safetensors of a CLIPVisionModelWithProjection"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise WeightsError(
            f"{folder} lacks {len(missing)} weights of a CLIP image encoder "
            f"({', '.join(missing[:3])}, ...); download it again"
        )
    return model


def joint_width(folder: Path) -> dict[str, Any]:
    """Width of the joint space of a whole CLIPModel, as an option for loading one of its towers.

    transformers makes a tower of the part of the config that is about it, where the width may lack.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    whole = config.get("model_type") == "clip" and "projection_dim" in config
    return {"projection_dim": config["projection_dim"]} if whole else {}


def _from_file(path: Path, num_heads: int | None) -> CLIPVisionModelWithProjection:
    from transformers import CLIPVisionModelWithProjection

    tensors, metadata = read_state_dict(path)
    kind = detect_kind(shapes_of(tensors))
    if kind == "clip_vision_open_clip":
        tensors = open_clip_to_hf_vision(tensors)
    elif kind != "clip_vision_hf":
        raise WeightsError(
            f"{path} is {describe_kind(kind)}; expected a CLIP image encoder such as "
            "clip_vision_h.safetensors"
        )
    # The file may hold the text tower, too, and positions that were once stored.
    weights = {
        key: value
        for key, value in tensors.items()
        if key.startswith(("vision_model.", "visual_projection."))
        and not key.endswith("position_ids")
    }
    heads = num_heads or int(metadata.get("num_heads", 0))
    config = _config(shapes_of(weights), heads, path)
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    check_keys(shapes_of(weights), shapes_of(model.state_dict()), f"the image encoder {path}")
    model.load_state_dict(weights, assign=True)
    # Not among the weights, so it is still without memory.
    embeddings: Any = model.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    return model


def _config(shapes: Mapping[str, Shape], num_heads: int, path: Path) -> CLIPVisionConfig:
    from transformers import CLIPVisionConfig

    needed = {
        "patch": "vision_model.embeddings.patch_embedding.weight",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "mlp": "vision_model.encoder.layers.0.mlp.fc1.weight",
        "projection": "visual_projection.weight",
    }
    missing = [key for key in needed.values() if key not in shapes]
    if missing:
        raise WeightsError(
            f"{path} lacks {', '.join(missing)}; use a CLIP image encoder with its projection, "
            "such as clip_vision_h.safetensors"
        )
    width, _, patch_size, _ = shapes[needed["patch"]]
    num_heads = num_heads or width // HEAD_WIDTH
    if not num_heads or width % num_heads:
        raise WeightsError(
            f"{path} is {width} wide, and how many heads it has is not known; give num_heads"
        )
    layers = {
        match.group(1)
        for key in shapes
        if (match := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", key))
    }
    grid = round((shapes[needed["positions"]][0] - 1) ** 0.5)
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[needed["mlp"]][0],
        projection_dim=shapes[needed["projection"]][0],
        num_hidden_layers=len(layers),
        num_attention_heads=num_heads,
        image_size=grid * patch_size,
        patch_size=patch_size,
        hidden_act="gelu",
    )
