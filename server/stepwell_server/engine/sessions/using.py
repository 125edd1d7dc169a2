"""What a store that others use too has to hear: that sessions are used without being written, and that clients are there.

Each session is told of at most every tenth of the time in which it would end, and each client at most every tenth of its
lease; what comes while the store is being told goes into the next call together. If the store cannot be told nothing is
lost: whoever uses the session the next time has it told again.
"""

from __future__ import annotations

import asyncio
import itertools
import math

import numpy as np

from stepwell_server.alarm import Alarm
from stepwell_server.clock import Clock
from stepwell_server.core.leases import SHORTEST_S, Lease, Leases
from stepwell_server.core.remembered import Remembered
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.errors import InvalidInput, Overloaded, ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import Store, as_server_error

_log = Log("engine.use")

#: Of the time in which a session ends, or of a lease.
SHARE = 1 / 10
#: Sessions, or clients, in one call to the store.
_AT_ONCE = 1024
#: So many may wait to be told of.
MOST_WAITING = 65_536
#: Clients of which it is known when the store was told.
_KNOWN = 65_536
#: Sessions that never end by themselves are told of as if they ended after so many seconds.
_MOST_S = 600.0
#: What has something under way is looked at so often, in seconds: at most, and at least.
_LONGEST_S, _SHORTEST_S = 30.0, 0.1
_AGAIN_S = 1.0


class Usage:
    """Says that sessions are used. Lives on the event loop."""

    def __init__(
        self, table: SessionTable, leases: Leases, store: Store, *, clock: Clock, max_idle_s: float
    ) -> None:
        """`max_idle_s` 0: sessions do not expire."""
        self._table = table
        self._leases = leases
        self._store = store
        self._is_shared = store.local is None
        self._clock = clock
        self._max_idle_s = max_idle_s or math.inf
        self._waiting: dict[str, int] = {}
        """Stamps of sessions of which the store is to be told."""
        self._task: asyncio.Task[None] | None = None
        self._work = Alarm(self._start)
        self._is_away = False

    @property
    def is_idle(self) -> bool:
        """The store is not being told of anything."""
        return self._task is None and not self._waiting

    def used(self, handles: Handles) -> None:
        """Sessions are used now, and not written: the store has just said when they were used before.

        What it said is in the table.
        """
        now, table = self._clock.monotonic(), self._table
        if self._is_shared:
            is_due = now - table.used[handles] >= SHARE * self._limits_s(handles)
            for handle in handles[is_due].tolist():
                if len(self._waiting) < MOST_WAITING:
                    self._waiting[table.session_id(handle)] = int(table.stamp[handle])
            if self._waiting:
                self._work.ring()
        table.used[handles] = now

    async def run(self) -> None:
        """Have sessions count as used that have something under way, until cancelled."""
        while self._is_shared:
            await asyncio.sleep(min(_LONGEST_S, max(_SHORTEST_S, SHARE / 2 * self._shortest_s)))
            self.look()

    def close(self) -> None:
        """Tell the store nothing more."""
        self._waiting = {}
        if self._task is not None:
            self._task.cancel()

    def look(self) -> None:
        """Have sessions count as used that have had something under way for long."""
        table = self._table
        claimed = np.flatnonzero(table.claimed[: table.end] & (table.model[: table.end] >= 0))
        if len(claimed):
            is_due = self._clock.monotonic() - table.used[claimed] >= SHARE * self._limits_s(claimed)
            self.used(claimed[is_due])

    @property
    def _shortest_s(self) -> float:
        return min(self._max_idle_s, self._leases.shortest_s)

    def _limits_s(self, handles: Handles) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """After which time each ends, or would be of interest to people who look for what is idle."""
        limit_s = min(self._max_idle_s, _MOST_S)
        return np.minimum(limit_s, self._leases.durations_s(self._table.lease[handles]))

    def _start(self) -> None:
        if self._task is None and self._waiting:
            self._task = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        some = dict(itertools.islice(self._waiting.items(), _AT_ONCE))
        for session_id in some:
            del self._waiting[session_id]
        try:
            await self._store.touch(list(some), list(some.values()))
            self._is_away = False
        except Exception as error:
            why = as_server_error(error)
            if not self._is_away:
                _log.warning("the store could not be told of the use of sessions", error=why)
            self._is_away = True
        self._task = None
        if self._waiting:
            self._work.ring()


class Clients:
    """Says that clients are there. Lives on the event loop."""

    def __init__(self, leases: Leases, store: Store, *, clock: Clock) -> None:
        self._leases = leases
        self._store = store
        self._is_shared = store.local is None
        self._clock = clock
        self._told: Remembered[int, float] = Remembered(_KNOWN)
        """When the store was told of clients."""
        self._waiting: dict[int, float] = {}
        """Leases of clients of which the store is to be told; 0: not known here."""
        self._next: asyncio.Future[None] | None = None
        """Done when the store was told of those that wait."""
        self._task: asyncio.Task[None] | None = None
        self._work = Alarm(self._start)

    async def renew(self, client_id: int) -> None:
        """A client is there: each of its leases begins anew.

        Raises:
            InvalidInput: it is 0.
            Overloaded: too many wait until the store is told of them.
            Unavailable: the store, which others use too, cannot be told.
        """
        if not client_id:
            raise InvalidInput("client_id must be random and not 0; got 0")
        now = self._clock.monotonic()
        self._leases.renew(client_id, now)
        if not self._is_shared:
            return
        lease_s = self._leases.of_client_s(client_id)
        told = self._told.get(client_id)
        if told is not None and now - told < SHARE * max(SHORTEST_S, lease_s):
            return
        if client_id not in self._waiting and len(self._waiting) >= MOST_WAITING:
            raise Overloaded(
                f"clients of which the store is to be told must stay within {MOST_WAITING}",
                retry_after_s=_AGAIN_S,
            )
        await asyncio.shield(self._tell_of(client_id, lease_s))

    def begin(self, lease: Lease) -> None:
        """A client is there, and gets a session with a lease. Nobody waits until the store is told."""
        client_id, lease_ms = lease
        now = self._clock.monotonic()
        self._leases.renew(client_id, now)
        told = self._told.get(client_id)
        if not self._is_shared or (told is not None and now - told < SHARE * lease_ms / 1000):
            return
        if len(self._waiting) < MOST_WAITING:
            _ = self._tell_of(client_id, lease_ms / 1000)

    async def run(self) -> None:
        """Forget leases that no session of the table has any more, until cancelled."""
        while self._is_shared:
            await asyncio.sleep(_LONGEST_S)
            for _ in self._leases.take_due_in_parts(self._clock.monotonic, _AT_ONCE):
                await asyncio.sleep(0)  # which of them end is the store's to say

    def close(self) -> None:
        """Tell the store nothing more."""
        self._waiting = {}
        for each in (self._task, self._next):
            if each is not None:
                each.cancel()

    def _tell_of(self, client_id: int, lease_s: float) -> asyncio.Future[None]:
        self._waiting[client_id] = max(lease_s, self._waiting.get(client_id, 0.0))
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
            self._next.add_done_callback(_seen)
        self._work.ring()
        return self._next

    def _start(self) -> None:
        if self._task is None and self._waiting:
            self._task = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        waiting, told = self._waiting, self._next
        assert told is not None, "somebody waits"
        self._waiting, self._next = {}, None
        error: ServerError | None = None
        ids = list(waiting)
        for at in range(0, len(ids), _AT_ONCE):
            some, now = ids[at : at + _AT_ONCE], self._clock.monotonic()
            try:
                await self._store.renew_clients(some, [waiting[client_id] for client_id in some])
            except asyncio.CancelledError:
                told.cancel()
                raise
            except Exception as caught:
                error = as_server_error(caught)
                break
            for client_id in some:
                self._told.put(client_id, now)
        self._task = None
        if error is None:
            told.set_result(None)
        else:
            told.set_exception(error)
        if self._waiting:
            self._work.ring()


def _seen(told: asyncio.Future[None]) -> None:
    """Maybe nobody waits for it any more: then the next renewal says whether the store can be told."""
    if not told.cancelled():
        told.exception()
