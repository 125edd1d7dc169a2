"""Which sessions have records in the store: all, or only those that left the arena.

The application chooses the policy with the store. A store whose records end with the process needs only the records
that do not fit into the arena.
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
    """Iterates over a table's ids in sorted order. Lives on the event loop.

    Each chunk of the table is sorted when it is first needed after a change. A page is merged from all chunks. So a
    page is cheap while few sessions come and go, and opening or closing a session does no extra work.
    """

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._places: list[tuple[int, npt.NDArray[np.uint16]]] = []
        """For each chunk: its change count, and the places of its ids in sorted order."""

    async def after(self, after: str, *, prefix: str, limit: int) -> list[str]:
        """Up to `limit` ids after `after` with the prefix; one chunk is sorted per iteration of the event loop."""
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
        """Sort the chunks that have changed; changes made meanwhile are sorted together at the end."""
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
    """Decides which sessions have a record between changes. Lives on the event loop."""

    others: Store | None
    """The store, if it may have sessions that are not in the table; None: only those of unloaded versions."""

    async def heads(self, *, after: str, prefix: str, limit: int) -> Heads:
        """The existing sessions, sorted by id: see `LocalStore.heads`.

        For sessions in the table only the ids need be current. Sessions that begin or end meanwhile may or may not
        be included.

        Raises:
            Unavailable: the store cannot be read now.
        """

    async def count(self, tenant: str | None, model: str) -> int:
        """The number of sessions: see `counts.count`.

        Raises:
            Unavailable: the store cannot be read now.
        """

    def begin(self, ids: Sequence[str], ready: int, records: Callable[[slice], Puts], /) -> Puts:
        """The records that a call must commit to begin sessions: for all of them or for none.

        Until the call is done nothing else sees the sessions. If it fails, `after_page_in` undoes this.

        Args:
            ids: The sessions.
            ready: The first `ready` of them have rows in the arena.
            records: Makes the records of some of them.
        """

    def leave(self, model: Model, handles: Handles, /) -> None:
        """Prepare for sessions to leave the arena."""

    def after_page_in(self, session_ids: Sequence[str], /) -> None:
        """Note that sessions are in the arena again."""


class EveryChange(StorePolicy):
    """Every change is recorded. A session that leaves the arena is already in the store, also after a restart."""

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
        """Nothing to do: the records exist."""

    @override
    def after_page_in(self, session_ids: Sequence[str]) -> None:
        """Nothing to do: the records stay."""


class PagedOutOnly(StorePolicy):
    """Only paged-out sessions have records: for a store that ends with the process, and answers at once."""

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
        """The number of sessions that only the store has: those of unloaded versions."""
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
