"""A flow-matching loss that counts what an error means in pixels.

The latents are whitened: brightness and colour of a block are three numbers of sixteen, of which a
plain loss takes as much notice as of the thirteen of its fine detail.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from stylemaster_core.layouts import SPATIAL_STRIDE, TEMPORAL_STRIDE
from stylemaster_core.models.patch_vae import PatchVAE

BORDER_WEIGHT = 0.3  # of the steps between blocks, which the eye sees as a grid
# Light, and two planes of colour, of RGB. Colours differ by less than light within a picture, and
# are what a palette is made of: without the factor nothing of them was learned there.
PLANES = (0.299, 0.587, 0.114), (0.5, -0.419, -0.081), (-0.169, -0.331, 0.5)
COLOUR_FACTOR = 2.0


class PixelLoss(nn.Module):
    """Squared errors of latents, weighted by channel, and of the steps between decoded blocks.

    Decoding is the VAE's linear map; its residual networks change little and cost much.
    """

    weights: Tensor
    edges: Tensor

    def __init__(self, vae: PatchVAE) -> None:
        super().__init__()
        linear = vae.patch_decoder.linear.weight.detach().float()[:, :, 0, 0]
        side = SPATIAL_STRIDE
        pixels = rearrange(linear, "(f c y x) k -> f c y x k", f=TEMPORAL_STRIDE, y=side, x=side)
        factors = torch.tensor([1, COLOUR_FACTOR, COLOUR_FACTOR])
        planes = (torch.tensor(PLANES) * factors[:, None]).to(pixels)
        seen = torch.einsum("fcyxk,nc->fnyxk", pixels, planes)
        deviation = seen.flatten(0, 3).norm(dim=0)
        self.register_buffer("weights", deviation / deviation.mean(), persistent=False)
        last = seen[-1]
        sides = [last[:, :, 0], last[:, :, -1], last[:, 0], last[:, -1]]
        edges = torch.stack([edge.flatten(0, 1) for edge in sides])
        # Borders of independent errors that cost 1 in all channels cost 1, too.
        edges = edges / (2 * edges.square().sum(-1).mean()).sqrt()
        self.register_buffer("edges", edges, persistent=False)

    def forward(self, error: Tensor) -> Tensor:
        """Loss [B] of errors [B, 16, t, h, w]."""
        error = error.float()
        plain = (error.square() * self.weights[:, None, None, None]).flatten(1).mean(1)
        left, right, top, bottom = torch.einsum("bkthw,spk->sbpthw", error, self.edges).unbind()
        across = (left[..., 1:] - right[..., :-1]).square().flatten(1).mean(1)
        down = (top[..., 1:, :] - bottom[..., :-1, :]).square().flatten(1).mean(1)
        # Sums over the 16 channels, as the edges are scaled.
        return plain + BORDER_WEIGHT * (across + down) / 2
