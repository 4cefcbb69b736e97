"""A transformer that notes what the sampling loop asks of it."""

from __future__ import annotations


class Counting:
    """Passes everything on.

    Attributes:
        branches: how many each step asked for.
        levels: noise level of each step, to four places.
    """

    def __init__(self, net):
        self.net, self.branches, self.levels = net, [], []

    def __getattr__(self, name):
        return getattr(self.net, name)

    def velocities(self, latents, timestep, branches, **options):
        self.branches.append(len(branches))
        self.levels.append(round(timestep.item() / 1000, 4))
        return self.net.velocities(latents, timestep, branches, **options)
