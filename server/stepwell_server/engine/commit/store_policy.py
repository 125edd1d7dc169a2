"""Which sessions have records in the store: all of them, or only those that have left the arena.

The application chooses with the store: one whose records end with the process needs only the records that the arena
has no room for.
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.commit.records import Records, current_outcome
from stepwell_server.engine.state.model import Model
from stepwell_server.errors import ServerError
from stepwell_server.store import counts
from stepwell_server.store.base import Answer, Batch, Store, Write
from stepwell_server.store.heads import Heads, heads_of
from stepwell_server.store.record import RecordBytes

Puts: TypeAlias = Sequence[tuple[str, RecordBytes]]


class IdOrder:
    """Finds the ids of a table in their order. Lives on the event loop.

    Each chunk of the table is sorted when that is first needed after a change; a page is merged from all of them. So a
    page costs little while few sessions come and go, and the engine does nothing for it when they do.
    """

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._places: list[tuple[int, npt.NDArray[np.uint16]]] = []
        """Of each chunk: how often it had changed, and the places of its ids in their order."""

    async def after(self, after: str, *, prefix: str, limit: int) -> list[str]:
        """Ids behind `after` that begin with `prefix`, at most `limit`; one chunk is sorted per iteration of the event loop."""
        await self._sort()
        parts: list[Iterator[str]] = []
        for (_, chunk), (_, places) in zip(self._table.id_chunks(), self._places, strict=True):
            if after >= prefix:
                start = bisect.bisect_right(places, after, key=chunk.__getitem__)
            else:
                start = bisect.bisect_left(places, prefix, key=chunk.__getitem__)
            if start < len(places):
                parts.append(map(chunk.__getitem__, places[start : start + limit]))
        merged = itertools.islice(heapq.merge(*parts), limit)
        return list(itertools.takewhile(lambda session_id: session_id.startswith(prefix), merged))

    async def _sort(self) -> None:
        """Sort the chunks that have changed; what changes meanwhile is sorted at once in the end."""
        for is_last in (False, True):
            for at, (changes, chunk) in enumerate(self._table.id_chunks()):
                if at < len(self._places) and self._places[at][0] == changes:
                    continue
                ids = chunk.tolist()
                order = sorted((place for place, i in enumerate(ids) if i), key=ids.__getitem__)
                self._places[at : at + 1] = [(changes, np.array(order, np.uint16))]
                if not is_last:
                    await asyncio.sleep(0)


class StorePolicy(Protocol):
    """Which sessions have a record while nothing changes. Lives on the event loop."""

    others: Store | None
    """The store, if it may have any session that is not in the table; None: only those of versions that were unloaded."""

    async def heads(self, *, after: str, prefix: str, limit: int) -> Heads:
        """The sessions that there are, in the order of their ids: see `LocalStore.heads`.

        Of those in the table only the ids need be right. Sessions that begin or end meanwhile may be in it or not.

        Raises:
            Unavailable: the store cannot be read now.
        """

    async def count(self, tenant: str | None, model: str) -> int:
        """How many sessions there are: see `counts.count`.

        Raises:
            Unavailable: the store cannot be read now.
        """

    def begin(self, ids: Sequence[str], ready: int, records: Callable[[slice], Puts], /) -> Puts:
        """Some sessions of a call are about to begin: the records that the call must commit, of all of them or of none.

        Until the call is done nothing else sees them. If it fails, `after_page_in` takes back what was done here.

        Args:
            ids: Of the sessions.
            ready: As many of them, the first ones, have rows in the arena.
            records: Makes the records of some of them.
        """

    def leave(self, model: Model, handles: Handles, /) -> None:
        """Sessions are about to leave the arena."""

    def after_page_in(self, session_ids: Sequence[str], /) -> None:
        """Sessions are in the arena again."""


class EveryChange(StorePolicy):
    """Each change has its record: what leaves the arena is in the store already, and is there after a restart."""

    def __init__(self, store: Store, _table: SessionTable, _records: Records, _clock: Clock) -> None:
        self.others = self._store = store

    @override
    async def heads(self, *, after: str, prefix: str, limit: int) -> Heads:
        return await self._store.heads(after=after, prefix=prefix, limit=limit)

    @override
    async def count(self, tenant: str | None, model: str) -> int:
        return await counts.count(self._store, tenant, model)

    @override
    def begin(self, ids: Sequence[str], _ready: int, records: Callable[[slice], Puts]) -> Puts:
        return records(slice(0, len(ids)))

    @override
    def leave(self, model: Model, handles: Handles) -> None:
        """Its records are there."""

    @override
    def after_page_in(self, session_ids: Sequence[str]) -> None:
        """Its records stay there."""


class PagedOutOnly(StorePolicy):
    """The arena is the truth, and the store has what is not in it: for a store that ends with the process.

    The store answers at once.
    """

    others = None

    def __init__(self, store: Store, table: SessionTable, records: Records, clock: Clock) -> None:
        self._store = store
        self._table = table
        self._order = IdOrder(table)
        self._records = records
        self._clock = clock

    @override
    async def heads(self, *, after: str, prefix: str, limit: int) -> Heads:
        ids = await self._order.after(after, prefix=prefix, limit=limit)
        keys, records = [session_id.encode() for session_id in ids], [b""] * len(ids)
        if await self._unserved():
            stored = (await self._store.heads(after=after, prefix=prefix, limit=limit)).keys
            keys = sorted({*keys, *stored})[:limit]
            found = await self._store.fetch([str(key, "utf-8") for key in keys])
            records = [bytes(each.record or b"") for each in found]
        return heads_of(keys, records)

    async def _unserved(self) -> int:
        """How many sessions the store alone has: of versions that were unloaded."""
        table, stored = self._table, await self._store.count()
        if not stored:
            return 0
        paged_out = (table.model[: table.end] >= 0) & (table.row[: table.end] < 0)
        return max(0, stored - int(np.count_nonzero(paged_out)))

    @override
    async def count(self, tenant: str | None, model: str) -> int:
        async def total() -> int:
            return len(self._table) + await self._unserved()

        return await counts.count(self._store, tenant, model, total)

    @override
    def begin(self, ids: Sequence[str], ready: int, records: Callable[[slice], Puts]) -> Puts:
        if ready < len(ids):
            self._commit(Batch(puts=records(slice(ready, len(ids)))))
        return ()

    @override
    def leave(self, model: Model, handles: Handles) -> None:
        outcome = current_outcome(self._table, model, handles)
        self._commit(Batch(puts=self._records.of(outcome, self._clock.now())))

    @override
    def after_page_in(self, session_ids: Sequence[str]) -> None:
        self._commit(Batch(deletes=session_ids))

    def _commit(self, batch: Batch) -> None:
        answer = self._store.commit(Write(lambda: batch, len(batch.puts), _nothing))
        if isinstance(answer, ServerError):
            raise answer


def _nothing(_answer: Answer) -> None:
    """The answer is there at once."""


StorePolicyFactory: TypeAlias = Callable[[Store, SessionTable, Records, Clock], StorePolicy]
"""Makes the store policy of an engine: one of these classes."""
