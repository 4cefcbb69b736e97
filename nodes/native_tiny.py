"""The parts of stylemaster-tiny as ComfyUI's own objects."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import torch
from torch import Tensor, nn

from ..stylemaster_core.errors import WeightsError
from ..stylemaster_core.models.patch_vae import PatchVAE, create_patch_vae
from ..stylemaster_core.models.text_encoder import HashedWordsTextEncoder, load_text_encoder
from ..stylemaster_core.reading import reading
from ..stylemaster_core.weights.files import read_state_dict

# float32 numbers alive at once for each position of the latents; measured: 2300 and 3700.
ENCODE_VALUES, DECODE_VALUES = 3000, 4500


def load_native_text_encoder(path: Path) -> comfy.sd.CLIP:
    """The text encoder of a .json file as a CLIP; CLIPTextEncode and its like take it."""
    encoder = load_text_encoder(path)
    target: Any = SimpleNamespace(
        params={"encoder": encoder}, clip=_HashedWords, tokenizer=_WholePrompts
    )
    return comfy.sd.CLIP(target)


class _WholePrompts:
    """The tokenizer of a CLIP: parts of the prompt, which the encoder itself cuts into words."""

    def __init__(self, **_options: Any) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> Any:
        parts = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        row = [(comfy.sd1_clip.unescape_important(part), weight) for part, weight in parts]
        if return_word_ids:
            row = [(*part, number) for number, part in enumerate(row)]
        return {"hashed_words": [row]}

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class _HashedWords(nn.Module):
    """The network of a CLIP, without weights; those in the prompt are left out of account."""

    dtypes: frozenset[torch.dtype] = frozenset()

    def __init__(self, encoder: HashedWordsTextEncoder, **_options: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def encode_token_weights(self, tokens: Any) -> tuple[Tensor, None]:
        prompts = ["".join(part[0] for part in row) for row in tokens["hashed_words"]]
        features = self.encoder.encode(prompts)
        return features.to(comfy.model_management.intermediate_device()), None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        del options  # there are no layers to choose from

    def reset_clip_options(self) -> None:
        pass

    def load_sd(self, sd: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        return [], list(sd)


def load_native_patch_vae(path: Path) -> comfy.sd.VAE:
    """A `PatchVAE` as a VAE whose latents are those of a Wan 2.1 VAE: not normalised.

    Raises:
        WeightsError: if the file is of another kind, damaged or incomplete.
    """
    network = _WanLatents(create_patch_vae(read_state_dict(path).tensors, str(path)))
    # ComfyUI's smallest VAE is a complete one of every version; its network and sizes are replaced.
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.first_stage_model = network.eval()
    vae.patcher = comfy.model_patcher.ModelPatcher(
        network,
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    vae.size = None
    vae.latent_channels, vae.latent_dim = 16, 3
    vae.upscale_ratio = (lambda t: max(0, t * 4 - 3), 8, 8)
    vae.downscale_ratio = (lambda t: max(0, (t + 3) // 4), 8, 8)
    vae.upscale_index_formula = vae.downscale_index_formula = (4, 8, 8)
    vae.working_dtypes = [torch.float32]
    vae.memory_used_encode = lambda shape, _dtype: (
        4 * ENCODE_VALUES * (shape[2] + 3) // 4 * (shape[3] // 8) * (shape[4] // 8)
    )
    vae.memory_used_decode = lambda shape, _dtype: (
        4 * DECODE_VALUES * shape[2] * shape[3] * shape[4]
    )
    return vae


class _WanLatents(nn.Module):
    """What ComfyUI calls of a VAE; its Wan models take Wan's own statistics off the latents."""

    def __init__(self, vae: PatchVAE) -> None:
        super().__init__()
        self.vae = vae
        self.format = comfy.latent_formats.Wan21()

    def encode(self, video: Tensor) -> Tensor:
        whole = (video.shape[2] - 1) // 4 * 4 + 1  # Wan's own VAE leaves the rest out, too
        return self.format.process_out(self.vae.encode(video[:, :, :whole]))

    def decode(self, latents: Tensor, **_options: Any) -> Tensor:
        return self.vae.decode(self.format.process_in(latents))


def load_native_image_encoder(folder: Path) -> comfy.clip_vision.ClipVisionModel:
    """A CLIP vision model of any size, from a folder in Hugging Face's format, as a CLIP_VISION.

    Raises:
        WeightsError: for missing or unexpected weights.
    """
    with reading(folder, "a CLIP image encoder"):
        encoder = comfy.clip_vision.ClipVisionModel(str(folder / "config.json"))
        tensors = read_state_dict(folder / "model.safetensors").tensors
        missing, unexpected = encoder.load_sd(tensors)
    if missing or unexpected:
        raise WeightsError(
            f"{folder} is no CLIP image encoder of its config.json: it lacks {missing} and has "
            f"{unexpected} in its place; make it again"
        )
    return encoder
