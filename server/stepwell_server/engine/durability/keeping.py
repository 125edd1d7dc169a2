"""What a store has of sessions: a record of each change, or of nothing but what has left the arena.

Chosen once, in `keeping_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from typing_extensions import override

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.durability.records import Records, as_it_is
from stepwell_server.engine.state.model import Model
from stepwell_server.store.base import Batch, LocalStore, Store
from stepwell_server.store.record import Stored

Puts: TypeAlias = Sequence[tuple[str, Stored]]


class Keeping(Protocol):
    """Which sessions have a record while nothing changes. Lives on the event loop."""

    others: Store | None
    """The store, if it may have sessions that are not in the table; None: the table has all of them."""

    def begin(self, ids: Sequence[str], ready: int, records: Callable[[slice], Puts], /) -> Puts:
        """Some sessions of a call are about to begin: the records that the call must commit, of all of them or of none.

        Until the call is done nobody else sees them. If it fails, `came_back` takes back what was done here.

        Args:
            ids: Of the sessions.
            ready: As many of them, the first ones, have rows in the arena.
            records: Makes the records of some of them.
        """

    def leave(self, model: Model, handles: Handles, /) -> None:
        """Sessions are about to leave the arena."""

    def came_back(self, session_ids: Sequence[str], /) -> None:
        """Sessions are in the arena again."""


class EveryChange(Keeping):
    """Each change has its record: what leaves the arena is in the store already, and is there after a restart."""

    def __init__(self, store: Store) -> None:
        self.others = store

    @override
    def begin(self, ids: Sequence[str], _ready: int, records: Callable[[slice], Puts]) -> Puts:
        return records(slice(0, len(ids)))

    @override
    def leave(self, model: Model, handles: Handles) -> None:
        """Its records are there."""

    @override
    def came_back(self, session_ids: Sequence[str]) -> None:
        """Its records stay there."""


class PagedOutOnly(Keeping):
    """The arena is the truth, and the store has what is not in it: for a store that ends with the process."""

    others = None

    def __init__(self, store: LocalStore, table: SessionTable, records: Records, clock: Clock) -> None:
        self._store = store
        self._table = table
        self._records = records
        self._clock = clock

    @override
    def begin(self, ids: Sequence[str], ready: int, records: Callable[[slice], Puts]) -> Puts:
        puts = records(slice(ready, len(ids))) if ready < len(ids) else ()
        self._store.commit(Batch(puts=puts, forgets=ids))
        return ()

    @override
    def leave(self, model: Model, handles: Handles) -> None:
        outcome = as_it_is(self._table, model, handles)
        self._store.commit(Batch(puts=self._records.of(outcome, self._clock.now())))

    @override
    def came_back(self, session_ids: Sequence[str]) -> None:
        self._store.commit(Batch(deletes=session_ids))


def keeping_of(store: Store, table: SessionTable, records: Records, clock: Clock) -> Keeping:
    """How a store is used: one whose records end with the process need not have more than the arena has no room for."""
    if store.local is not None and store.local.is_volatile:
        return PagedOutOnly(store.local, table, records, clock)
    return EveryChange(store)
