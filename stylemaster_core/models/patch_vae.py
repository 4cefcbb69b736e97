"""A small VAE with the latent layout of Wan's: 8 x 8 x 4 blocks of pixels, 16 numbers each.

Everything is computed at the size of the latents: a linear map of each block (a PCA before any
training) plus a residual network. It imports no host, so that both can use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..errors import WeightsError
from ..layouts import (
    LATENT_CHANNELS,
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    check_latents,
    check_video,
)
from ..weights.files import write_state_dict
from ..weights.state_dict import check_keys, describe_kind, detect_kind, shapes_of

FORMAT = "stylemaster_patch_vae"
BLOCK_VALUES = TEMPORAL_STRIDE * 3 * SPATIAL_STRIDE**2
REFINED_SIDE = 4  # pixels of a square of the refiner
SQUARES = 2 * SPATIAL_STRIDE // REFINED_SIDE  # of these along a token's side


class PatchVAE(nn.Module):
    """Stands in for `WanVAE`: normalised latents, 4n+1 frames, the first frame on its own.

    It computes in float32 on every device; it is small enough.

    Args:
        encoder_width: channels of the encoder's residual network.
        decoder_width: channels of the decoder's.
        encoder_depth: its residual blocks.
        decoder_depth: the decoder's.
        refiner_width: channels of the network that refines what was decoded; 0: none.
    """

    def __init__(
        self,
        *,
        encoder_width: int = 128,
        decoder_width: int = 192,
        encoder_depth: int = 1,
        decoder_depth: int = 3,
        refiner_width: int = 0,
    ) -> None:
        super().__init__()
        self.patch_encoder = _LinearPlusResidual(
            BLOCK_VALUES, LATENT_CHANNELS, encoder_width, encoder_depth
        )
        self.patch_decoder = _LinearPlusResidual(
            LATENT_CHANNELS, BLOCK_VALUES, decoder_width, decoder_depth
        )
        self.patch_refiner = PixelRefiner(refiner_width) if refiner_width else None

    @property
    def device(self) -> torch.device:
        return self.patch_encoder.linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_encoder.linear.weight.dtype

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode a video; a frame has no influence on the latents before it.

        Args:
            video: [B, 3, T, H, W] in -1..1, T = 4n+1, H and W multiples of 8.

        Returns:
            [B, 16, t, h, w] normalised latents, float32, on the VAE's device.

        Raises:
            LayoutError: for other shapes, or NaN or infinity.
        """
        check_video(video)
        return self.to_latents(video.to(self.device, self.dtype)).float()

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
        return self.to_video(latents.to(self.device, self.dtype)).float().clamp_(-1, 1)

    def to_latents(self, video: Tensor) -> Tensor:
        """`encode` with gradients and without checks."""
        maps = self.patch_encoder(video_to_blocks(video), len(video))
        return rearrange(maps, "(b t) c h w -> b c t h w", b=len(video))

    def to_video(self, latents: Tensor) -> Tensor:
        """`decode` with gradients, and without checks and limits."""
        maps = rearrange(latents, "b c t h w -> (b t) c h w")
        maps = maps.contiguous(memory_format=torch.channels_last)  # else each result is copied
        video = blocks_to_video(self.patch_decoder(maps, len(latents)), len(latents))
        if self.patch_refiner is None:
            return video
        if torch.is_grad_enabled():
            return self.patch_refiner(video)
        for part in video.split(TEMPORAL_STRIDE, dim=2):  # in place: a long video is large
            part.copy_(self.patch_refiner(part))
        return video

    @torch.no_grad()
    def set_linear(self, mean: Tensor, covariance: Tensor) -> None:
        """Set the linear maps to a whitened PCA and the last layers of the residual networks to 0.

        Args:
            mean: [768] of block vectors in -1..1, in the order of `video_to_blocks`.
            covariance: [768, 768] of the same.
        """
        values, vectors = torch.linalg.eigh(covariance.double())
        values, vectors = values[-LATENT_CHANNELS:].flip(0), vectors[:, -LATENT_CHANNELS:].flip(1)
        std = values.clamp(min=1e-8).sqrt()
        into, back = (vectors / std).T, vectors * std
        encoder, decoder = self.patch_encoder, self.patch_decoder
        encoder.linear.weight.copy_(into[:, :, None, None])
        _bias(encoder.linear).copy_(-into @ mean.double())
        decoder.linear.weight.copy_(back[:, :, None, None])
        _bias(decoder.linear).copy_(mean)
        for part in (encoder, decoder):
            nn.init.zeros_(part.conv_out.weight)
            nn.init.zeros_(_bias(part.conv_out))

    @torch.no_grad()
    def fold_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Normalise the latents without changing what is decoded.

        Args:
            mean: [16] of the latents that `encode` gives now.
            std: [16] of the same.
        """
        encoder, decoder = self.patch_encoder, self.patch_decoder
        for layer in (encoder.linear, encoder.conv_out):
            layer.weight.div_(std.view(-1, 1, 1, 1))
            _bias(layer).div_(std)
        _bias(encoder.linear).sub_(mean / std)
        for layer in (decoder.linear, decoder.conv_in):
            _bias(layer).add_(layer.weight[:, :, 0, 0] @ mean)
            layer.weight.mul_(std.view(1, -1, 1, 1))


class _LinearPlusResidual(nn.Module):
    """A linear map of every position, plus a network that sees positions around and before it."""

    def __init__(self, values_in: int, values_out: int, width: int, depth: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(values_in, values_out, 1)
        self.conv_in = nn.Conv2d(values_in, width, 1)
        self.blocks = nn.ModuleList(_ResidualBlock(width) for _ in range(depth))
        self.conv_out = nn.Conv2d(width, values_out, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(_bias(self.conv_out))

    def forward(self, maps: Tensor, batch: int) -> Tensor:
        """[B*t, C, h, w] -> [B*t, C', h, w]."""
        hidden = self.conv_in(maps)
        for block in self.blocks:
            hidden = block(hidden, batch)
        # In place, as blocks of pixels are large.
        return self.linear(maps).add_(self.conv_out(functional.silu(hidden)))


class _ResidualBlock(nn.Module):
    """Two spatial convolutions; the first also sees the latent frame before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.past = nn.Conv2d(width, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor, batch: int) -> Tensor:
        active = functional.silu(hidden)
        past = self.past(active).unflatten(0, (batch, -1))
        past = torch.cat([torch.zeros_like(past[:, :1]), past[:, :-1]], dim=1).flatten(0, 1)
        return hidden + self.conv2(functional.silu(self.conv1(active) + past))


class PixelRefiner(nn.Module):
    """Residual network on squares of 4 x 4 pixels, which is told where in a token each one lies.

    So it can smooth the borders of the VAE's blocks, and of the tokens of the transformer.

    Args:
        width: of its layers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        values = 3 * REFINED_SIDE**2
        self.conv_in = nn.Conv2d(values + 2 * SQUARES, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.conv_out = nn.Conv2d(width, values, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(_bias(self.conv_out))

    def forward(self, video: Tensor) -> Tensor:
        """[B, 3, T, 8h, 8w] -> the same shape; each frame on its own."""
        frames = video.transpose(1, 2).flatten(0, 1)
        squares = functional.pixel_unshuffle(frames, REFINED_SIDE)
        squares = torch.cat([squares, _places(squares)], dim=1)
        hidden = functional.silu(
            self.conv_in(squares.contiguous(memory_format=torch.channels_last))
        )
        for conv in self.convs:
            hidden = hidden + conv(functional.silu(hidden))
        change = self.conv_out(functional.silu(hidden))
        frames = frames + functional.pixel_shuffle(change, REFINED_SIDE)
        return frames.unflatten(0, (len(video), -1)).transpose(1, 2)


def _places(squares: Tensor) -> Tensor:
    """Row and column of each square in its token, one-hot: [B, C, h, w] -> [B, 8, h, w]."""
    batch, _, height, width = squares.shape
    one_hot = torch.eye(SQUARES, device=squares.device, dtype=squares.dtype)
    rows = one_hot[:, torch.arange(height) % SQUARES, None].expand(-1, -1, width)
    columns = one_hot[:, None, torch.arange(width) % SQUARES].expand(-1, height, -1)
    return torch.cat([rows, columns]).expand(batch, -1, -1, -1)


def video_to_blocks(video: Tensor) -> Tensor:
    """Cut a video [B, 3, 4n+1, 8h, 8w] into blocks [B*(n+1), 768, h, w].

    The first frame comes four times, so that it fills a block of its own.
    """
    first = video[:, :, :1].expand(-1, -1, TEMPORAL_STRIDE - 1, -1, -1)
    blocks = rearrange(
        torch.cat([first, video], dim=2),
        "b c (t f) (h y) (w x) -> (b t) (f c y x) h w",
        f=TEMPORAL_STRIDE,
        y=SPATIAL_STRIDE,
        x=SPATIAL_STRIDE,
    )
    return blocks.contiguous(memory_format=torch.channels_last)


def blocks_to_video(blocks: Tensor, batch: int) -> Tensor:
    """Put blocks [B*(n+1), 768, h, w] together to a video [B, 3, 4n+1, 8h, 8w]."""
    video = rearrange(
        blocks,
        "(b t) (f c y x) h w -> b c (t f) (h y) (w x)",
        b=batch,
        f=TEMPORAL_STRIDE,
        c=3,
        y=SPATIAL_STRIDE,
        x=SPATIAL_STRIDE,
    )
    return video[:, :, TEMPORAL_STRIDE - 1 :]


def save_patch_vae(path: str | Path, vae: PatchVAE, *, overwrite: bool = False) -> Path:
    """Write the weights as float16.

    Raises:
        WeightsError: if the file exists and `overwrite` is False, or cannot be written.
    """
    weights = {key: value.half() for key, value in vae.state_dict().items()}
    return write_state_dict(path, weights, {"format": FORMAT}, overwrite=overwrite)


def create_patch_vae(weights: Mapping[str, Tensor], what: str) -> PatchVAE:
    """Make the VAE that fits the weights; its widths and depths are read off them.

    Args:
        weights: any float dtype.
        what: the file in words, for errors.

    Raises:
        WeightsError: if they are of another kind, or incomplete.
    """
    shapes = shapes_of(weights)
    kind = detect_kind(shapes)
    if kind != "patch_vae":
        raise WeightsError(f"{what} is {describe_kind(kind)}; expected a StyleMaster patch VAE")
    sizes = {}
    for side in ("encoder", "decoder"):
        prefix = f"patch_{side}.blocks."
        width = shapes.get(f"patch_{side}.conv_in.weight", (1,))[0]
        numbers = {key.removeprefix(prefix).split(".")[0] for key in shapes if prefix in key}
        sizes |= {f"{side}_width": width, f"{side}_depth": len(numbers)}
    sizes["refiner_width"] = shapes.get("patch_refiner.conv_in.weight", (0,))[0]
    with torch.device("meta"):
        vae = PatchVAE(**sizes)
    check_keys(shapes, shapes_of(vae.state_dict()), f"the VAE {what}")
    vae.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    return vae.requires_grad_(False).eval()


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
