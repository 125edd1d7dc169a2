"""Stores on a real Valkey for tests: each with a prefix of its own, so that many share a server."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Literal, Protocol

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.engine.types import U64
from stepwell_server.store.base import Batch, CommitResult, Tombstone, new_stamp
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.record import RecordBytes
from stepwell_server.store.valkey.connection import url as urls
from stepwell_server.store.valkey.connection.requests import LIMIT, Requests
from stepwell_server.store.valkey.factory import open_valkey
from stepwell_server.store.valkey.store import ValkeyStore
from support.clock import ManualClock
from support.servers.valkey_servers import patient

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
    """The store at a URL, with a long time limit if it names none; the environment has no user and no password."""
    parsed = urls.parse(patient(url), {})
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


@contextmanager
def time_limit(store: ValkeyStore, timeout_s: float) -> Iterator[None]:
    """Let a store of one server wait for no answer longer than this within the block, as `timeout_ms` does.

    Outside, flushes of a busy disk may take their time.
    """
    requests, url, limit_s = store._requests, store._url, store._limit_s
    wait = requests._min_durable if requests.waits else None
    shorter = Requests(requests._topology, timeout_s=timeout_s, wait=wait)
    names = ("_timeout_s", "_wait", "_confirm")
    was = {name: getattr(requests, name) for name in names}
    store._url, store._limit_s = dataclasses.replace(url, timeout_s=timeout_s), LIMIT * timeout_s
    for name in names:
        setattr(requests, name, getattr(shorter, name))
    try:
        yield
    finally:
        store._url, store._limit_s = url, limit_s
        for name, value in was.items():
            setattr(requests, name, value)


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
