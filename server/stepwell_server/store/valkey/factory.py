"""Opens or creates a store on Valkey, after checking that its servers and keys are usable."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Literal

from stepwell_server.clock import Clock
from stepwell_server.errors import StoreAway, StoreRefuses
from stepwell_server.logs import Log
from stepwell_server.store.base import StoreError, require_no_keys
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.encryption.sealer import Sealer
from stepwell_server.store.valkey import meta
from stepwell_server.store.valkey.connection.client import AccessDenied, ConnectionLost
from stepwell_server.store.valkey.connection.nodes import Topology, topology_of
from stepwell_server.store.valkey.connection.requests import LIMIT, Requests
from stepwell_server.store.valkey.connection.url import StoreUrl
from stepwell_server.store.valkey.health import examine
from stepwell_server.store.valkey.keys import Keys
from stepwell_server.store.valkey.losses import Losses
from stepwell_server.store.valkey.store import ValkeyStore

_log = Log("store.valkey")
_RETRY_AFTER_S = 1.0


async def open_valkey(
    url: StoreUrl, *, durability: Literal["sync", "async"], clock: Clock, keyring: Keyring | None = None
) -> ValkeyStore:
    """Open a shared store, or create it.

    Raises:
        StoreError: it cannot be used: login, certificates, settings of the server, layout, keys.
        StoreAway: it does not answer now.
    """
    wait = (1, url.replicas) if durability == "sync" else None
    keys = Keys(url.prefix, 1)
    topology = topology_of(url, keys.tag)
    requests = Requests(topology, timeout_s=url.timeout_s, wait=wait)
    try:
        found = await _asked(requests, url)
        await _require_fit(topology, url, durability)
        found = await _with_keys(requests, url, found, keyring)
        losses = Losses(requests, Keys(url.prefix, found.partitions), found.incarnation, str(url))
        await losses.begin(must_be_there=found.is_marked)
        if not found.is_marked:
            await meta.set_marked(requests, url.prefix)
            found = dataclasses.replace(found, is_marked=True)
    except BaseException as error:
        topology.close()
        if isinstance(error, StoreRefuses):
            raise StoreAway(error.why, _RETRY_AFTER_S) from None
        raise
    sealer = None if keyring is None else Sealer(keyring)
    return ValkeyStore(url, found, topology, requests, clock, sealer, losses)


async def _asked(requests: Requests, url: StoreUrl) -> meta.Meta:
    try:
        return await meta.read(requests, url.prefix, url.partitions)
    except StoreAway as error:
        if isinstance(requests.trouble, AccessDenied):
            raise StoreError(str(requests.trouble)) from None
        raise StoreAway(f"{error.message}: {requests.trouble}", error.retry_after_s) from None


async def _require_fit(topology: Topology, url: StoreUrl, durability: Literal["sync", "async"]) -> None:
    try:
        async with asyncio.timeout(LIMIT * url.timeout_s):
            found = await examine(topology, url, durability, url.timeout_s)
    except ConnectionLost as error:
        raise StoreAway(str(error), _RETRY_AFTER_S) from None
    except TimeoutError:
        raise StoreAway("the servers of the store do not report their state", _RETRY_AFTER_S) from None
    if found.unfit:
        raise StoreError("; ".join(found.unfit))
    for finding in (*found.problems, *found.warnings):
        _log.warning("the store has a problem", reason=finding)


async def _with_keys(
    requests: Requests, url: StoreUrl, found: meta.Meta, keyring: Keyring | None
) -> meta.Meta:
    """Check the keys of the store; store the check of a new one, and return the updated description."""
    known = found.key_checks
    if keyring is None:
        require_no_keys(f"at {url}", known)
        return found
    keyring.require(known)
    if keyring.first and keyring.first not in known:
        await meta.add_key_check(requests, url.prefix, keyring.first, keyring.checks[keyring.first])
    return dataclasses.replace(found, key_checks={**known, **keyring.first_check})
