"""Losses of the picture that the joint training predicts, beside that of its numbers.

A model that cannot know where a stroke lies does best by a squared error if it paints none. So
these compare how much light and colour change in each part of the picture, at three scales, and
what the style encoder sees, wherever exactly the strokes lie.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from stylemaster_core.data.images import CLIP_MEAN, CLIP_STD
from stylemaster_core.layouts import SPATIAL_STRIDE, TEMPORAL_STRIDE
from stylemaster_core.models.image_encoder import ImageEncoder
from stylemaster_core.models.patch_vae import PatchVAE

from .pixel_loss import PLANES, PixelLoss

SCALES = 1, 2, 4  # px of a pixel of each
SQUARE = 16  # px, in which changes are gathered
LEAST = 2e-5  # energy of a change that counts as nothing; pixels are in -1..1
TEXTURE_WEIGHT = 0.25
FEATURE_WEIGHTS = 0.3, 0.75  # of parts of the picture, and of the whole


class Picture(nn.Module):
    """Pictures of latents by the VAE's linear map; of a latent frame its last frame is seen."""

    weight: Tensor
    bias: Tensor

    def __init__(self, vae: PatchVAE) -> None:
        super().__init__()
        linear = vae.patch_decoder.linear
        assert linear.bias is not None
        last = linear.weight.shape[0] - linear.weight.shape[0] // TEMPORAL_STRIDE
        weight, bias = linear.weight.detach()[last:, :, 0, 0], linear.bias.detach()[last:]
        self.register_buffer("weight", weight.float(), persistent=False)
        self.register_buffer("bias", bias.float(), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, t, h, w] -> RGB [B, t, 3, 8h, 8w] in -1..1."""
        pixels = torch.einsum("bkthw,pk->btphw", latents.float(), self.weight)
        pixels = pixels + self.bias[:, None, None]
        side = SPATIAL_STRIDE
        return rearrange(pixels, "b t (c y x) h w -> b t c (h y) (w x)", y=side, x=side)


class TextureLoss(nn.Module):
    """Relative differences of the energies of changes, and of the spread over the picture."""

    planes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("planes", torch.tensor(PLANES), persistent=False)

    def forward(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        """Loss [B] of pictures [B, t, 3, H, W]."""
        pairs = list(zip(self.energies(predicted), self.energies(wanted), strict=True))
        total = torch.zeros(len(wanted), device=wanted.device)
        for a, b in pairs:  # [B, t, 3, rows, columns]
            usual = b.mean(dim=(0, 1, 3, 4), keepdim=True)
            total = total + ((a - b).abs() / usual).flatten(1).mean(1)
        return total / len(pairs)

    def energies(self, picture: Tensor) -> list[Tensor]:
        """Energies of each kind [B, t, 3, rows, columns], of RGB [B, t, 3, H, W]."""
        planes = torch.einsum("btchw,pc->btphw", picture, self.planes).flatten(0, 1)
        kinds = [planes.var(dim=(2, 3), keepdim=True)]
        for scale in SCALES:
            coarse = functional.avg_pool2d(planes, scale)
            for change in (coarse.diff(dim=-1), coarse.diff(dim=-2)):
                side = SQUARE // scale
                kinds.append(functional.avg_pool2d(change.square(), side, ceil_mode=True))
        return [(kind + LEAST).sqrt().unflatten(0, (len(picture), -1)) for kind in kinds]


class FeatureLoss(nn.Module):
    """Relative errors of what the style encoder sees, in parts of the picture and on the whole."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder.model
        self.side = encoder.image_size
        for name, values in (("mean", CLIP_MEAN), ("std", CLIP_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        """Loss [B] of the last of pictures [B, t, 3, H, W]."""
        total = torch.zeros(len(wanted), device=wanted.device)
        pairs = zip(self._features(predicted), self._features(wanted), FEATURE_WEIGHTS, strict=True)
        for a, b, weight in pairs:
            error, size = (x.square().flatten(1).mean(1) for x in (a - b, b))
            total = total + weight * error / size
        return total

    def _features(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        last = picture[:, -1, :, : self.side, : self.side]
        if last.shape[-2:] != (self.side, self.side):
            last = functional.interpolate(last, (self.side, self.side), mode="bilinear")
        seen = self.encoder(pixel_values=((last + 1) / 2 - self.mean) / self.std)
        return seen.last_hidden_state, seen.image_embeds


class PictureLoss(nn.Module):
    """What the joint training minimises: `PixelLoss`, and parts of the other two."""

    def __init__(self, vae: PatchVAE, encoder: ImageEncoder) -> None:
        super().__init__()
        self.pixels, self.picture = PixelLoss(vae), Picture(vae)
        self.texture, self.features = TextureLoss(), FeatureLoss(encoder)

    def forward(self, error: Tensor, clean: Tensor, sigmas: Tensor) -> Tensor:
        """Loss [B] of errors of velocities [B, 16, t, h, w] at noise levels [B]."""
        with torch.autocast(clean.device.type, enabled=False):  # differences of likes, squared
            error, clean = error.float(), clean.float()
            predicted = self.picture(clean - sigmas.view(-1, 1, 1, 1, 1) * error)
            wanted = self.picture(clean)
            texture, features = self.texture(predicted, wanted), self.features(predicted, wanted)
            return self.pixels(error) + TEXTURE_WEIGHT * texture + features
