"""Nodes for tests alone: small stand-ins for models whose sizes ComfyUI fixes, and a comparison."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.ldm.wan.vae
import comfy.sd
import comfy.utils
import folder_paths
import torch

TEXT_WIDTH = 4096  # what ComfyUI's native Wan expects
TEXT_TOKENS = 512  # to which its UMT5 pads


class HashedWordsCLIP:
    """Answers what CLIPTextEncode asks: each word is a fixed random vector, and no weights."""

    def __init__(
        self, tokens: int = TEXT_TOKENS, width: int = TEXT_WIDTH, pooled_width: int = 0
    ) -> None:
        self.shape, self.pooled_width = (tokens, width), pooled_width

    def tokenize(self, text: str, **_options: object) -> list[str]:
        return [*text.lower().split()[: self.shape[0] - 1], "</s>"]

    def encode_from_tokens_scheduled(
        self,
        tokens: list[str],
        unprojected: bool = False,
        add_dict: dict | None = None,
        **_: object,
    ) -> list:
        features = torch.zeros(1, *self.shape)
        for place, word in enumerate(tokens):
            generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
            features[0, place] = torch.randn(self.shape[1], generator=generator)
        pooled = features.mean(1)[:, : self.pooled_width] if self.pooled_width else None
        return [[features, {"pooled_output": pooled, **(add_dict or {})}]]


class StubTextEncoderLoader:
    """In the place of CLIPLoader: UMT5-XXL is 11 GB and its size cannot be chosen there."""

    CATEGORY = "stub"
    FUNCTION = "load"
    RETURN_TYPES = ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        optional = {
            "tokens": ("INT", {"default": TEXT_TOKENS}),
            "width": ("INT", {"default": TEXT_WIDTH}),
        }
        return {"required": {}, "optional": optional}

    def load(self, tokens: int = TEXT_TOKENS, width: int = TEXT_WIDTH) -> tuple:
        return (HashedWordsCLIP(tokens, width),)


class StubCLIPVisionLoader:
    """In the place of CLIPVisionLoader: a random ViT of ComfyUI's own class, with 257 tokens."""

    CATEGORY = "stub"
    FUNCTION = "load"
    RETURN_TYPES = ("CLIP_VISION",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        optional = {
            "width": ("INT", {"default": 80}),
            "projection": ("INT", {"default": 48}),
            "seed": ("INT", {"default": 0}),
        }
        return {"required": {}, "optional": optional}

    def load(self, width: int = 80, projection: int = 48, seed: int = 0) -> tuple:
        config = {
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_attention_heads": 1,
            "num_hidden_layers": 2,
            "num_channels": 3,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "gelu",
            "projection_dim": projection,
        }
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "config.json")
            with open(path, "w") as file:
                json.dump(config, file)
            encoder = comfy.clip_vision.ClipVisionModel(path)
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for key, value in sorted(encoder.get_sd().items()):
            noise = torch.randn(value.shape, generator=generator)
            is_gain = value.ndim == 1 and key.endswith("weight")
            scale = 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
            weights[key] = noise * scale + float(is_gain)
        missing, unexpected = encoder.load_sd(weights)
        if missing or unexpected:
            raise RuntimeError(f"the random ViT lacks {missing} and does not know {unexpected}")
        return (encoder,)


class StubTrackedMask:
    """In the place of SAM 3's tracker: the left third of the frames, one pixel more in each."""

    CATEGORY = "stub"
    FUNCTION = "track"
    RETURN_TYPES = ("MASK",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"images": ("IMAGE",)}}

    def track(self, images: torch.Tensor) -> tuple:
        frames, height, width, _ = images.shape
        edges = width // 3 + torch.arange(frames)
        mask = torch.arange(width) < edges[:, None]
        return (mask[:, None].expand(-1, height, -1).float(),)


class StubVAELoader:
    """In the place of VAELoader: loads a Wan VAE of any base width, which 0.3.64 cannot."""

    CATEGORY = "stub"
    FUNCTION = "load"
    RETURN_TYPES = ("VAE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"vae_name": (folder_paths.get_filename_list("vae"),)}}

    def load(self, vae_name: str) -> tuple:
        weights = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("vae", vae_name))
        width = weights["decoder.head.0.gamma"].shape[0]
        original = comfy.ldm.wan.vae.WanVAE
        # Older versions write 96 into the call and take no other width from anywhere.
        comfy.ldm.wan.vae.WanVAE = lambda **config: original(**{**config, "dim": width})
        try:
            return (comfy.sd.VAE(sd=weights),)
        finally:
            comfy.ldm.wan.vae.WanVAE = original


class StubCheckpointLoader:
    """In the place of CheckpointLoaderSimple: the small SDXL UNet of the recorded numbers."""

    CATEGORY = "stub"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def load(self) -> tuple:
        sys.path.append(str(Path(__file__).resolve().parent))  # after ComfyUI's own `server`
        from scripts import golden_sdxl as sdxl

        _, tokens, width = sdxl.tensors["prompt_embeds"].shape
        clip = HashedWordsCLIP(tokens, width, sdxl.tensors["pooled"].shape[1])
        return (sdxl.load_model(), clip, EnlargingVAE())


class EnlargingVAE:
    """Answers what VAEDecode asks: three channels of the latents, as large as the picture."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels = torch.nn.functional.interpolate(latents[:, :3], scale_factor=8)
        return pixels.movedim(1, -1).div(100).sigmoid()  # latents of random weights are large


class StubEnlargingVAELoader:
    """In the place of VAELoader: SD's VAE has one size there, of 335 MB."""

    CATEGORY = "stub"
    FUNCTION = "load"
    RETURN_TYPES = ("VAE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def load(self) -> tuple:
        return (EnlargingVAE(),)


class StubCompare:
    """How far two images or latents are from each other, as an output that tests can read."""

    CATEGORY = "stub"
    FUNCTION = "compare"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"a": ("IMAGE,LATENT",), "b": ("IMAGE,LATENT",)}}

    def compare(self, a: Any, b: Any) -> dict:
        first, second = (v["samples"] if isinstance(v, dict) else v for v in (a, b))
        if first.shape != second.shape:
            raise ValueError(f"cannot compare {tuple(first.shape)} with {tuple(second.shape)}")
        difference = (first.float() - second.float()).abs()
        numbers = {
            "max_difference": [difference.max().item()],
            "mean_difference": [difference.mean().item()],
            "max_value": [second.abs().max().item()],
            "shape": [list(first.shape)],
        }
        return {"ui": numbers}


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        StubCheckpointLoader,
        StubTextEncoderLoader,
        StubCLIPVisionLoader,
        StubTrackedMask,
        StubVAELoader,
        StubEnlargingVAELoader,
        StubCompare,
    )
}
