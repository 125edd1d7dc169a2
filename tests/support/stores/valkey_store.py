"""Stores on a real Valkey for tests: each with a prefix of its own, so that many share a server."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Literal, Protocol

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.engine.types import U64
from stepwell_server.store.base import Batch, CommitResult, Tombstone, new_stamp
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.record import RecordBytes
from stepwell_server.store.valkey.connection import url as urls
from stepwell_server.store.valkey.factory import open_valkey
from stepwell_server.store.valkey.store import ValkeyStore
from support.clock import ManualClock

_NUMBERS = itertools.count(1)


class Shared(Protocol):
    """A store that others use too."""

    def apply(self, batch: Batch) -> Awaitable[CommitResult]:
        """See `ValkeyStore.apply`."""


def fresh_prefix() -> str:
    """A prefix that no other store of this process has."""
    return f"t{next(_NUMBERS)}:"


async def opened(
    url: str,
    *,
    durability: Literal["sync", "async"] = "async",
    clock: Clock | None = None,
    keyring: Keyring | None = None,
) -> ValkeyStore:
    """The store at a URL; user and password are not those of the environment."""
    parsed = urls.parse(url, {})
    return await open_valkey(parsed, durability=durability, clock=clock or ManualClock(), keyring=keyring)


@asynccontextmanager
async def shared(
    url: str, count: int = 1, *, durability: Literal["sync", "async"] = "async", clock: Clock | None = None
) -> AsyncIterator[list[ValkeyStore]]:
    """A new store as several servers see it: `url` is one of `support.servers.valkey_servers`, which says no prefix."""
    whole = f"{url}{'&' if '?' in url else '?'}prefix={fresh_prefix()}"
    stores = [await opened(whole, durability=durability, clock=clock) for _ in range(count)]
    try:
        yield stores
    finally:
        for store in stores:
            await store.close()


def stamps(*values: int) -> U64:
    """Stamps as a batch has them."""
    return np.array(values, np.uint64)


async def put(
    store: Shared,
    records: Sequence[tuple[str, RecordBytes]],
    follows: Sequence[int],
    stamp: int = 0,
    *,
    anew: bool = False,
) -> tuple[CommitResult, int]:
    """Commit records that follow stamps (0, or `anew`: the sessions begin); also the stamp that they have then."""
    stamp = stamp or new_stamp()
    batch = Batch(
        puts=records,
        forgets=[
            session_id for (session_id, _), each in zip(records, follows, strict=True) if anew or not each
        ],
        follows=stamps(*follows),
        stamps=stamps(*[stamp] * len(records)),
    )
    return await store.apply(batch), stamp


async def end(
    store: Shared, stones: Sequence[Tombstone], follows: Sequence[int], *, idle_s: float = 0.0
) -> CommitResult:
    """End sessions whose records have these stamps (0: whatever is there)."""
    batch = Batch(
        deletes=[stone.session_id for stone in stones],
        tombstones=stones,
        delete_follows=stamps(*follows),
        min_idle_s=np.full(len(stones), idle_s),
    )
    return await store.apply(batch)
