"""Seeds: whole numbers of 64 bits, everywhere the same."""

from __future__ import annotations

import hashlib

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


def seed_of(*parts: object) -> int:
    """A seed from names and numbers: equal parts give equal seeds, on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
