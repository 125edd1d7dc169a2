"""Describes a shared store and its servers without using or changing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from stepwell_server.store.base import StoreError
from stepwell_server.store.valkey import meta
from stepwell_server.store.valkey.connection.client import ConnectionLost, Reply
from stepwell_server.store.valkey.connection.nodes import topology_of
from stepwell_server.store.valkey.connection.requests import Request, Requests
from stepwell_server.store.valkey.connection.url import StoreUrl, shown
from stepwell_server.store.valkey.health import Findings, examine
from stepwell_server.store.valkey.keys import META, Keys, store_key
from stepwell_server.store.valkey.losses import Mark, emptied_parts


@dataclasses.dataclass(frozen=True, slots=True)
class Inspection:
    """The description of a shared store."""

    servers: list[str]
    """Addresses of the servers that have a part of the store."""
    partitions: int | None
    """None: no store has this prefix yet."""
    sessions: int
    findings: Findings


async def inspect(url: StoreUrl, durability: Literal["sync", "async"]) -> Inspection:
    """Inspect a shared store.

    Raises:
        StoreError: it does not answer, denies access, or is not a store of ours.
    """
    topology = topology_of(url, Keys(url.prefix, 1).tag)
    try:
        requests = Requests(topology, timeout_s=url.timeout_s, wait=None)
        (fields,) = await _answers(requests, Request(META, (b"HGETALL", store_key(url.prefix))))
        found = meta.meta_of(url.prefix, fields, url.partitions) if fields else None
        sessions, warnings = 0, list[str]()
        if found is not None:
            keys = Keys(url.prefix, found.partitions)
            asked = (Request(p, (b"ZCARD", keys.ids(p)), otherwise=0) for p in range(found.partitions))
            sessions = sum(await _answers(requests, *asked))
            warnings = _losses(await emptied_parts(requests, keys), keys.partitions)
        findings = await examine(topology, url, durability, url.timeout_s)
        findings = findings.joined(Findings(warnings=warnings))
        servers = [shown(node.address) for node in await topology.primaries()]
        return Inspection(servers, None if found is None else found.partitions, sessions, findings)
    except ConnectionLost as error:
        raise StoreError(str(error)) from None
    finally:
        topology.close()


def _losses(emptied: Sequence[Mark], partitions: int) -> list[str]:
    if not emptied:
        return []
    last = max(emptied, key=lambda mark: mark.lost_ms).lost_at
    warning = (
        f"{len(emptied)} of the {partitions} partitions of the store were emptied, the last one at {last}: the sessions"
        " that they had are lost"
    )
    return [warning]


async def _answers(requests: Requests, *asked: Request) -> list[Reply]:
    await requests.send(asked, once=True)
    for request in asked:
        if request.problem is not None:
            raise StoreError(str(requests.trouble or request.problem))
    return [request.reply for request in asked]
