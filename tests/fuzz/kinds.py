"""All kinds; one line each."""

from __future__ import annotations

from tests.fuzz import names, servers
from tests.fuzz.attack import Kind

KINDS: tuple[Kind, ...] = (
    names.KIND,
    servers.SERVERS,
    servers.QUEUE,
)
