"""The VAE and the text encoder of VideoCrafter's checkpoint, which are those of SD 2."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from ..errors import WeightsError
from ..weights.key_maps import open_clip_to_hf_text
from ..weights.state_dict import check_keys, shapes_of
from .sdxl_file import write_tokenizer

LATENT_SCALE = 0.18215
NUM_TOKENS = 77
HEAD_WIDTH = 64  # of CLIP's text tower


class TextEncoder:
    """CLIP's text tower but for its last layer, and its tokenizer."""

    def __init__(self, model: Any) -> None:
        """Take a `CLIPTextModel` and make CLIP's tokenizer; padded with "!", as open_clip does."""
        from transformers import CLIPTokenizer

        self.model = model
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder) / "tokenizer", "!")
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(str(Path(folder) / "tokenizer"))

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """[1, 77, Dt] features; what goes beyond 77 tokens is cut off."""
        tokens = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=NUM_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        device = next(self.model.parameters()).device
        return self.model(input_ids=tokens.input_ids.to(device)).last_hidden_state


class FrameVAE:
    """SD's VAE, which takes a video frame by frame; all of them at once need more memory."""

    def __init__(self, model: AutoencoderKL) -> None:
        self.model = model

    def to(self, device: torch.device | str) -> FrameVAE:
        """Move the weights, and return this VAE; it computes in float32."""
        nn.Module.to(self.model, device, torch.float32)
        return self

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[1, 3, T, H, W] in -1..1 -> latents [1, 4, T, H/8, W/8] of about unit scale.

        Source: VideoCrafter's released code; deviation: the mean of the VAE's distribution instead
        of a draw from it.
        """
        rows = video[0].transpose(0, 1).to(self.model.device)
        made: list[Any] = [self.model.encode(row) for row in rows.split(1)]
        means = torch.cat([encoded.latent_dist.mode() for encoded in made])
        return means.mul(LATENT_SCALE).transpose(0, 1)[None]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [1, 4, T, h, w] of about unit scale -> [1, 3, T, 8 h, 8 w]."""
        rows = latents[0].transpose(0, 1).to(self.model.device, torch.float32) / LATENT_SCALE
        frames = [self.model.decode(row, return_dict=False)[0] for row in rows.split(1)]  # type: ignore[arg-type]
        return torch.cat(frames).transpose(0, 1)[None]


def load_sd_vae(tensors: Mapping[str, Tensor]) -> AutoencoderKL:
    """Build SD's VAE (kl-f8) from the original's names, "encoder.down.0...".

    Sizes are read off the tensors, which are not copied.

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    widths = {
        int(m[1]): value.shape[0]
        for key, value in tensors.items()
        if (m := re.fullmatch(r"encoder\.down\.(\d+)\.block\.0\.norm2\.weight", key))
    }
    layers = {key.split(".")[4] for key in tensors if key.startswith("encoder.down.0.block.")}
    if not widths or "quant_conv.weight" not in tensors:
        raise WeightsError(
            "this is not SD's VAE: there is no encoder.down.N.block.0.norm2.weight, or no "
            "quant_conv.weight; use the file that `stylemaster weights convert` makes of "
            "VideoCrafter's model.ckpt, or an SD 1.5 VAE in the original format"
        )
    config: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": [widths[level] for level in sorted(widths)],
        "layers_per_block": len(layers),
        "latent_channels": tensors["quant_conv.weight"].shape[0] // 2,
        "scaling_factor": LATENT_SCALE,
    }
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    _fill(vae, convert_ldm_vae_checkpoint(dict(tensors), config), "SD's VAE")
    return vae


def load_sd2_text(tensors: Mapping[str, Tensor]) -> Any:
    """Build SD 2's text encoder from open_clip's names, "transformer.resblocks.0...".

    Sizes are read off the tensors. The last layer is left out, as SD 2 and VideoCrafter do.

    Returns:
        `CLIPTextModel`.

    Raises:
        WeightsError: for missing, unexpected or wrongly shaped keys.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    renamed = open_clip_to_hf_text(tensors)
    embedding = renamed.get("embeddings.token_embedding.weight")
    inner = renamed.get("encoder.layers.0.mlp.fc1.weight")
    if embedding is None or inner is None:
        raise WeightsError(
            "this is not open_clip's text tower: there is no token_embedding.weight, or less than "
            "two layers; use the file that `stylemaster weights convert` makes of VideoCrafter's "
            "model.ckpt"
        )
    vocabulary, width = embedding.shape
    with torch.device("meta"):
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=inner.shape[0],
                num_hidden_layers=len({key.split(".")[2] for key in renamed if "layers." in key}),
                num_attention_heads=max(1, width // HEAD_WIDTH),
                max_position_embeddings=NUM_TOKENS,
                hidden_act="gelu",
            )
        )
    if any(key.startswith("text_model.") for key in model.state_dict()):  # older transformers
        renamed = {f"text_model.{key}": value for key, value in renamed.items()}
    _fill(model, renamed, "SD 2's text encoder")
    return model


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    check_keys(shapes_of(tensors), shapes_of(module.state_dict()), what)
    module.load_state_dict(tensors, assign=True)
    for name, value in module.named_buffers():  # positions, which no file holds
        if value.device.type == "meta":
            owner = module.get_submodule(name.rpartition(".")[0])
            numbers = torch.arange(value.shape[-1]).expand(value.shape)
            setattr(owner, name.rpartition(".")[2], numbers)
    module.requires_grad_(False).eval()
