"""Seeds: whole numbers of 64 bits, everywhere the same."""

from __future__ import annotations

from .errors import ConfigError

MAX_SEED = 2**64 - 1
LOWEST_OF_TORCH = -(2**63)


def check_seed(seed: int, name: str = "seed", *, lowest: int = 0) -> int:
    """Check that every generator takes a seed, and return it.

    Raises:
        ConfigError: if it is below `lowest` or beyond 2**64-1.
    """
    if not lowest <= seed <= MAX_SEED:
        raise ConfigError(f"the {name} is {seed}; expected {lowest} to {MAX_SEED}")
    return seed
