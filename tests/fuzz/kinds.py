"""All kinds; one line each."""

from __future__ import annotations

from tests.fuzz import cuts, damage, kills, names, servers
from tests.fuzz.attack import Kind

KINDS: tuple[Kind, ...] = (
    damage.KIND,
    damage.PICKLES,
    cuts.KIND,
    names.KIND,
    servers.SERVERS,
    servers.QUEUE,
    kills.KIND,
)
