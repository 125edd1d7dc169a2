"""Reads a whole shared store while servers use it, and fills a new one."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.errors import ServerError
from stepwell_server.store.base import Batch, CommitResult, StoredSession, StoreError
from stepwell_server.store.record import RecordBytes, is_change, records_of
from stepwell_server.store.valkey import meta
from stepwell_server.store.valkey.connection.client import Reply
from stepwell_server.store.valkey.connection.nodes import topology_of
from stepwell_server.store.valkey.connection.requests import Request, Requests
from stepwell_server.store.valkey.connection.url import StoreUrl
from stepwell_server.store.valkey.keys import META, Keys, store_key
from stepwell_server.store.valkey.losses import Losses
from stepwell_server.store.valkey.meta import Meta
from stepwell_server.store.valkey.store import ValkeyStore

_PAGE_SIZE = 1000
"""Sessions that are read together."""


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A session in the index of a partition."""

    session_id: str
    record: RecordBytes | None
    """The record as stored; empty: the value is not a record. None: the key is missing, though the index has the id."""


class BulkStore:
    """A shared store, with access to records as stored. Lives on one event loop."""

    def __init__(self, url: StoreUrl, requests: Requests, about: Meta, store: ValkeyStore) -> None:
        self.url = url
        self.about = about
        """The description of the store."""
        self.store = store
        """Neither encrypts nor decrypts."""
        self._requests = requests
        self._keys = Keys(url.prefix, about.partitions)

    async def sessions(self, partition: int) -> AsyncIterator[list[Member]]:
        """Iterate over the sessions of a partition in batches, in the order of their ids.

        A session that exists throughout appears once, with everything acknowledged before it was read, or with later
        changes.

        Raises:
            ServerError: the store cannot be read.
        """
        after = b""
        while True:
            ids = await self._ids(partition, after)
            if not ids:
                return
            names = [str(key, "utf-8", "replace") for key in ids]
            found = await self.store.stored(names)
            lost = [name for name, each in zip(names, found, strict=True) if each.record is None]
            # a session that ended meanwhile has left the index; one that was opened again is in it
            lost = [
                name
                for name, is_there in zip(lost, await self._indexed(partition, lost), strict=True)
                if is_there
            ]
            again = (
                dict(zip(lost, await self.store.stored(lost), strict=True))
                if lost
                else dict[str, StoredSession]()
            )
            yield [
                Member(name, each.record if name not in again else again[name].record)
                for name, each in zip(names, found, strict=True)
                if each.record is not None or name in again
            ]
            after = ids[-1]

    async def _ids(self, partition: int, after: bytes) -> Sequence[bytes]:
        low = b"(" + after if after else b"-"
        command = (b"ZRANGEBYLEX", self._keys.ids(partition), low, b"+", b"LIMIT", 0, _PAGE_SIZE)
        (ids,) = await self._requests.ask(Request(partition, command, otherwise=()))
        return ids  # type: ignore[no-any-return]

    async def _indexed(self, partition: int, names: Sequence[str]) -> list[bool]:
        if not names:
            return []
        command = (b"ZMSCORE", self._keys.ids(partition), *(name.encode() for name in names))
        (scores,) = await self._requests.ask(Request(partition, command))
        return [score is not None for score in scores]

    async def counts(self, partition: int) -> Counter[str]:
        """Return the counts of a partition: see `store.counts`."""
        command = (b"HGETALL", self._keys.counts(partition))
        (reply,) = await self._requests.ask(Request(partition, command, otherwise=()))
        pairs = zip(reply[::2], reply[1::2], strict=True)
        return Counter({str(name, "utf-8", "replace"): int(count) for name, count in pairs if int(count)})

    async def put(self, sessions: Sequence[tuple[str, RecordBytes]]) -> None:
        """Put encoded sessions into a new store.

        Raises:
            StoreError: one exists already.
            ServerError: the store does not keep them.
        """
        left = {session_id: _storable(value) for session_id, value in sessions}
        follows = np.zeros(len(left), np.uint64)
        while left:  # a record, and the changes after it: those of all sessions together
            puts = [(session_id, records.pop(0)) for session_id, records in left.items()]
            stamps = np.random.default_rng().integers(1, 2**64, len(puts), np.uint64)
            self._require_kept(await self.store.apply(Batch(puts=puts, follows=follows, stamps=stamps)))
            follows = stamps[[bool(records) for records in left.values()]]
            left = {session_id: records for session_id, records in left.items() if records}

    def _require_kept(self, kept: CommitResult) -> None:
        if kept.conflicts or kept.unknown:
            raise StoreError(
                f"session {min(kept.conflicts | kept.unknown)!r} could not be put into the new store at {self.url}:"
                " another program writes there, or the store did not answer in time"
            )

    async def remove(self) -> None:
        """Delete the whole store, its description last.

        Raises:
            ServerError: it could not be deleted.
        """
        keys = self._keys
        for partition in range(keys.partitions):
            while ids := await self._ids(partition, b""):
                names = [str(key, "utf-8", "replace") for key in ids]
                await self._requests.ask(
                    Request(partition, (b"UNLINK", *map(keys.session, names), *map(keys.earlier, names))),
                    Request(partition, (b"ZREM", keys.ids(partition), *ids)),
                )
            await self._requests.ask(
                Request(partition, (b"UNLINK", keys.counts(partition), keys.mark(partition)))
            )
        await self._requests.ask(Request(META, (b"UNLINK", keys.documents, keys.fence, keys.store)))


def _storable(value: RecordBytes) -> list[RecordBytes]:
    """Return the records of a value that can be put one after the other.

    No change can follow one that lacks the records before it. The last one alone makes the session a lost one.
    """
    records = records_of(value)
    return records[-1:] if is_change(records[0]) else records


@asynccontextmanager
async def open_existing(url: StoreUrl, clock: Clock) -> AsyncIterator[BulkStore]:
    """Open an existing store for reading.

    Raises:
        StoreError: there is none, or it cannot be read.
    """
    topology = topology_of(url, Keys(url.prefix, 1).tag)
    requests = Requests(topology, timeout_s=url.timeout_s, wait=None)
    try:
        fields = await _asked(requests, url, Request(META, (b"HGETALL", store_key(url.prefix))))
        if not fields:
            raise StoreError(f"there is no store at {url}: no server has ever used it")
        about = meta.meta_of(url.prefix, fields, url.partitions)
        losses = Losses(
            requests, Keys(url.prefix, about.partitions), about.incarnation, str(url), may_write=False
        )
        yield BulkStore(
            url, requests, about, ValkeyStore(url, about, topology, requests, clock, None, losses)
        )
    finally:
        topology.close()


@asynccontextmanager
async def create(url: StoreUrl, clock: Clock, about: Meta) -> AsyncIterator[BulkStore]:
    """Create a store and yield it for filling. No server can use it before the block ends without an error.

    Raises:
        StoreError: there is one already, or it cannot be created.
    """
    topology = topology_of(url, Keys(url.prefix, 1).tag)
    requests = Requests(topology, timeout_s=url.timeout_s, wait=None)
    about = dataclasses.replace(about, is_marked=True)
    losses = Losses(requests, Keys(url.prefix, about.partitions), about.incarnation, str(url))
    try:
        try:
            was_made = await meta.make_unfinished(requests, url.prefix, about)
        except ServerError as error:
            raise StoreError(
                f"the store at {url} must be writable: {requests.trouble or error.message}"
            ) from None
        if not was_made:
            raise StoreError(
                f"there must be no store at {url} yet; there is one: use another prefix or database"
            )
        store = BulkStore(
            url, requests, about, ValkeyStore(url, about, topology, requests, clock, None, losses)
        )
        try:
            await losses.begin(must_be_there=False)
            yield store
        except BaseException as error:
            await _remove(store, error)
            raise
        await _asked(requests, url, meta.finishing(url.prefix))
    finally:
        topology.close()


async def _remove(store: BulkStore, error: BaseException) -> None:
    """Delete an unfinished store."""
    try:
        await store.remove()
    except ServerError as failure:
        error.add_note(
            f"the unfinished store at {store.url} could not be deleted ({failure.message}): delete all keys that begin"
            f" with {store.url.prefix!r}"
        )


async def _asked(requests: Requests, url: StoreUrl, request: Request) -> Reply:
    try:
        async with asyncio.timeout(url.timeout_s * 3):
            await requests.send([request], once=True)
    except TimeoutError:
        raise StoreError(f"the store at {url} does not answer") from None
    if request.problem is not None:
        raise StoreError(f"the store at {url} cannot be used: {requests.trouble or request.problem.message}")
    return request.reply
