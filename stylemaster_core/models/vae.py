"""The frozen VAE between pixels and latents: Wan's, or the small one that stands in for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, WeightsError
from ..layouts import check_latents, check_video
from ..reading import reading
from ..weights.files import read_state_dict
from ..weights.state_dict import (
    check_keys,
    describe_kind,
    detect_kind,
    shapes_of,
    vae_native_to_diffusers,
)
from .patch_vae import PatchVAE, create_patch_vae

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

Tiling = Literal["auto", "on", "off"]
# From here on `auto` tiles: the activations of one frame at full size outgrow a small GPU.
AUTO_TILING_PX = 1024 * 576


class WanVAE:
    """Wan's VAE with normalised latents, as the transformer sees them."""

    def __init__(self, model: AutoencoderKLWan, *, tiling: Tiling = "auto") -> None:
        _check_tiling(tiling)
        self.model = model.requires_grad_(False).eval()
        self.tiling: Tiling = tiling

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(self, device: torch.device | str) -> WanVAE:
        """Move the weights, and return this VAE; on the CPU it computes in float32."""
        dtype = torch.float32 if torch.device(device).type == "cpu" else None
        _move(self.model, device, dtype)
        return self

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode a video to the mode of its latent distribution.

        Args:
            video: [B, 3, T, H, W] in -1..1, T = 4n+1, H and W multiples of 8.

        Returns:
            [B, 16, t, h, w] normalised latents, float32, on the VAE's device.

        Raises:
            LayoutError: for other shapes, or NaN or infinity.
        """
        check_video(video)
        self._set_tiling(video.shape[-2] * video.shape[-1])
        output: Any = self.model.encode(video.to(self.device, self.dtype))
        latents = output.latent_dist.mode()
        mean, std = self._statistics()
        return (latents.float() - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents.

        Args:
            latents: [B, 16, t, h, w].

        Returns:
            [B, 3, 4t-3, 8h, 8w] in -1..1, float32, on the VAE's device.

        Raises:
            LayoutError: for another shape, or NaN or infinity.
        """
        check_latents(latents)
        self._set_tiling(latents.shape[-2] * latents.shape[-1] * 64)
        mean, std = self._statistics()
        latents = latents.to(self.device, torch.float32) * std + mean
        output: Any = self.model.decode(latents.to(self.dtype))
        return output.sample.float().clamp(-1, 1)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        config: Any = self.model.config
        mean, std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def _set_tiling(self, frame_px: int) -> None:
        on = self.tiling == "on" or (self.tiling == "auto" and frame_px > AUTO_TILING_PX)
        self.model.enable_tiling() if on else self.model.disable_tiling()


def load_vae(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tiling: Tiling = "auto",
) -> WanVAE | PatchVAE:
    """Load a Wan 2.1 VAE, or a patch VAE, which can be used in its place.

    Args:
        path: a folder in diffusers' format (or one with a sub-folder `vae`), or one weight file in
            native (Wan, ComfyUI) or diffusers naming, whose base width is read off the weights. A
            patch VAE is one file, computes in float32 and needs no tiling.
        device: where to put it.
        dtype: of the computation on a GPU; on the CPU it is float32, where bfloat16 is slower.
        tiling: cut large frames into tiles that are blended; `auto` does so above 1024 x 576.

    Raises:
        WeightsError: if the file is missing, damaged, of another kind, or incomplete.
        ConfigError: for an unknown `tiling`.
    """
    path = Path(path)
    _check_tiling(tiling)
    with reading(path, "a Wan VAE"):
        model = _from_folder(path) if path.is_dir() else _from_file(path)
        if isinstance(model, PatchVAE):
            return model.to(device)
        on_cpu = torch.device(device).type == "cpu"
        _move(model, device, torch.float32 if on_cpu else dtype)
        return WanVAE(model, tiling=tiling)


def native_vae_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers' keys of a Wan 2.1 VAE to the native ones, which ComfyUI loads.

    Raises:
        WeightsError: if a key belongs to something else.
    """
    # The converter of diffusers knows one direction; run on names alone, it gives the other.
    names: Any = {key: key for key in _native_key_candidates()}
    native_of: Any = vae_native_to_diffusers(names)
    unknown = [key for key in state_dict if key not in native_of]
    if unknown:
        raise WeightsError(f"{unknown[0]!r} is no key of diffusers' Wan 2.1 VAE; expected one")
    return {native_of[key]: value for key, value in state_dict.items()}


def _native_key_candidates() -> list[str]:
    residual = ["residual.0.gamma", "residual.3.gamma"]
    convolutions = ["residual.2", "residual.6", "shortcut", "resample.1", "time_conv"]
    ends = ["conv1", "head.2", "middle.1.proj", "middle.1.to_qkv"]
    modules = ["conv1", "conv2"]
    keys = []
    for side, stack in (("encoder", "downsamples"), ("decoder", "upsamples")):
        blocks = [f"{side}.{stack}.{index}" for index in range(15)]
        blocks += [f"{side}.middle.0", f"{side}.middle.2"]
        keys += [f"{block}.{norm}" for block in blocks for norm in residual]
        keys += [f"{side}.head.0.gamma", f"{side}.middle.1.norm.gamma"]
        modules += [f"{block}.{name}" for block in blocks for name in convolutions]
        modules += [f"{side}.{name}" for name in ends]
    return keys + [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]


def _check_tiling(tiling: str) -> None:
    if tiling not in get_args(Tiling):
        raise ConfigError(f"VAE tiling {tiling!r}; expected {', '.join(get_args(Tiling))}")


def _move(model: nn.Module, device: torch.device | str, dtype: torch.dtype | None) -> None:
    # The plain method: diffusers' own warns about an empty list of modules.
    nn.Module.to(model, device=device, dtype=dtype)


def _from_folder(folder: Path) -> AutoencoderKLWan:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    if not (folder / "config.json").is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    try:
        loaded: Any = AutoencoderKLWan.from_pretrained(
            str(folder), local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{folder} cannot be loaded as a Wan VAE ({error}); expected config.json and weights "
            "of an AutoencoderKLWan"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        raise WeightsError(
            f"{folder} lacks {len(report['missing_keys'])} weights of a Wan VAE "
            f"({sorted(report['missing_keys'])[0]}, ...); download it again"
        )
    return model


def _from_file(path: Path) -> AutoencoderKLWan | PatchVAE:
    weights = read_state_dict(path).tensors
    kind = detect_kind(shapes_of(weights))
    if kind == "patch_vae":
        return create_patch_vae(weights, str(path))
    if kind == "wan_vae_native":
        weights = vae_native_to_diffusers(weights)
    elif kind != "wan_vae_diffusers":
        raise WeightsError(
            f"{path} is {describe_kind(kind)}; expected a Wan 2.1 VAE such as "
            "wan_2.1_vae.safetensors"
        )
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    shapes = shapes_of(weights)
    widths = [shapes.get(key) for key in ("encoder.conv_in.weight", "decoder.conv_out.weight")]
    if widths[0] is None or widths[1] is None:
        raise WeightsError(f"{path} lacks the first or last convolution; download it again")
    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=widths[0][0], decoder_base_dim=widths[1][1])
    check_keys(shapes, shapes_of(model.state_dict()), f"the VAE {path}")
    model.load_state_dict(weights, assign=True)
    return model
