"""What a store has of sessions: a record of each change, or of nothing but what has left the arena.

Chosen once, in `keeping_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from typing_extensions import override

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.durability.records import Records, as_it_is
from stepwell_server.engine.state.model import Model
from stepwell_server.store.base import Batch, LocalStore, Store


class Keeping(Protocol):
    """Which sessions have a record while nothing changes. Lives on the event loop."""

    others: Store | None
    """The store, if it may have sessions that are not in the table; None: the table has all of them."""
    may_part: bool
    """Records of sessions that begin together may be kept a few at a time, in place: those that are not in the table
    yet are seen by nobody."""

    def made(self, ids: Sequence[str], ready: int, /) -> slice:
        """Which of new sessions begin with a record, if so many of them, the first ones, have rows."""

    def leave(self, model: Model, handles: Handles, /) -> None:
        """Sessions are about to leave the arena."""

    def came_back(self, session_ids: Sequence[str], /) -> None:
        """Sessions are in the arena again."""


class EveryChange(Keeping):
    """Each change has its record: what leaves the arena is in the store already, and is there after a restart."""

    may_part = False

    def __init__(self, store: Store) -> None:
        self.others = store

    @override
    def made(self, ids: Sequence[str], _ready: int) -> slice:
        return slice(0, len(ids))

    @override
    def leave(self, model: Model, handles: Handles) -> None:
        """Its records are there."""

    @override
    def came_back(self, session_ids: Sequence[str]) -> None:
        """Its records stay there."""


class PagedOutOnly(Keeping):
    """The arena is the truth, and the store has what is not in it: for a store that ends with the process."""

    others = None
    may_part = True

    def __init__(self, store: LocalStore, table: SessionTable, records: Records, clock: Clock) -> None:
        self._store = store
        self._table = table
        self._records = records
        self._clock = clock

    @override
    def made(self, ids: Sequence[str], ready: int) -> slice:
        return slice(ready, len(ids))

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
