"""All sessions as columns in the order of their ids: for lists in other orders than the store has, and of what is idle.

It is made when it is first needed, a few records at a time, and given up when nobody has needed it for a while. What
came into the table since then is looked up, or stands beside; what left it is passed over. So a page costs some array
operations over all sessions, which a thread does, and no page sorts or reads all of them.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.clock import Clock
from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Order, Position, SessionFilter
from stepwell_server.engine.models import Models
from stepwell_server.engine.sessions.end import Removal
from stepwell_server.engine.types import Mask
from stepwell_server.store.base import Store
from stepwell_server.store.record import F64

#: Sessions looked at before others get a turn: about a millisecond.
_AT_ONCE = 1000
#: With more sessions beside it than this, and than an eighth of it, it is made anew.
_MOST_BESIDE = 4096
#: Nobody needed it for so long: it is given up.
_KEPT_S = 300.0
#: Where others use the store it is made anew after so many seconds, and so many times the time that it took.
_FRESH_S, _REST = 10.0, 10.0
#: Bytes of an id by which ids are sorted at once; those that are longer and alike so far are compared one by one.
_SORTED_BYTES = 96
#: No session has this birth.
_GONE = np.iinfo(np.uint64).max
_ANY_MODEL, _NO_MODEL = -1, -2
#: Behind all ids that begin alike: stands in no UTF-8.
_LAST = b"\xff"
_SEPARATOR = SEPARATOR.encode()

Candidate = tuple[float, bytes]
"""Where a session stands in an order, and its id as UTF-8."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which sessions are asked for, in which order, from where on."""

    filter: SessionFilter
    order: Order = Order.ID
    descending: bool = False
    after: Position | None = None
    limit: int
    count: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class _Sorted:
    """What was there when the catalogue was made, in the order of the ids."""

    keys: bytes
    """The ids as UTF-8, one after the other."""
    ends: npt.NDArray[np.int64]
    """Where each ends."""
    model: npt.NDArray[np.int32]
    """Numbers of names, see `Catalogue._models`."""
    created: F64
    used: F64
    """Seconds since the epoch, as the store has it: of what is in the table that knows better."""
    handle: Handles
    """-1: it was not in the table."""
    birth: npt.NDArray[np.uint64]
    """Of `handle`."""

    is_a_tenants: Mask | None = None
    """Which of the sessions are tenants'; None: none of them."""

    def key(self, place: int) -> bytes:
        return self.keys[int(self.ends[place - 1]) if place else 0 : int(self.ends[place])]

    def with_tenants(self) -> _Sorted:
        """The same, and it is known which of the sessions are tenants'."""
        if _SEPARATOR not in self.keys:
            return self
        is_a_tenants = np.zeros(len(self.ends), np.bool_)
        places = np.flatnonzero(np.frombuffer(self.keys, np.uint8) == _SEPARATOR[0])
        is_a_tenants[np.searchsorted(self.ends, places, side="right")] = True
        return dataclasses.replace(self, is_a_tenants=is_a_tenants)

    def find(self, key: bytes, *, behind: bool = False) -> int:
        """The place of an id, or the one before which (`behind`: behind which) it would be."""
        search = bisect.bisect_right if behind else bisect.bisect_left
        return search(range(len(self.ends)), key, key=self.key)


class Catalogue:
    """Chooses sessions by filters and order. Lives on the event loop."""

    def __init__(
        self, table: SessionTable, models: Models, others: Store | None, removal: Removal, clock: Clock
    ) -> None:
        self._table = table
        self._served = models
        self._others = others
        """The store, if it may have sessions that are not in the table."""
        self._removal = removal
        self._is_shared = others is not None and others.local is None
        self._clock = clock
        self._ahead = clock.now() - clock.monotonic()
        """Makes a time of the table one since the epoch, always by as much: an order must not change between pages."""
        self._sorted: _Sorted | None = None
        self._forgotten = -1
        """What `Removal.forgotten` was when it was made."""
        self._stale_at = math.inf
        """When it is made anew, as other servers make and end sessions."""
        self._births = 0
        """The table's sessions up to this birth are in here."""
        self._beside: list[tuple[int, int, bytes]] = []
        """Handles, births and ids of sessions that came later."""
        self._models: dict[str, int] = {}
        self._making = asyncio.Lock()
        self._updates: set[asyncio.Task[Any]] = set()
        self._end: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Give it up, and what is being made of it."""
        for update in self._updates:
            update.cancel()
        self._give_up()

    def _give_up(self) -> None:
        self._table.departures = None
        if self._end is not None:
            self._end.cancel()
        self._end = self._sorted = None
        self._beside = []

    async def choose(self, query: Query) -> tuple[list[Candidate], int]:
        """The next sessions, at most `limit`, and how many fit over all pages (0 if that is not asked for).

        What they are is to be looked at: some may be gone, or used, since.
        """
        # whoever asked may give up: the next one finds what was made
        update = asyncio.create_task(self._update(is_first=query.after is None))
        self._updates.add(update)
        update.add_done_callback(self._updates.discard)
        made, beside = await asyncio.shield(update)
        self._keep()
        code = self._models.get(query.filter.model, _NO_MODEL) if query.filter.model else _ANY_MODEL
        now = self._clock.monotonic() + self._ahead
        choice = _Choice(self._table, self._codes(), query, code, now, self._ahead, is_shared=self._is_shared)
        return await asyncio.to_thread(choice.of, made, beside)

    async def _update(self, *, is_first: bool) -> tuple[_Sorted, list[tuple[int, int, bytes]]]:
        async with self._making:
            return await self._up_to_date(is_first=is_first), list(self._beside)

    async def _up_to_date(self, *, is_first: bool) -> _Sorted:
        made = self._sorted
        is_stale = self._forgotten != self._removal.forgotten or self._clock.monotonic() > self._stale_at
        if made is not None and not (is_first and is_stale):
            await self._take_in(made)
            if len(self._beside) <= max(_MOST_BESIDE, len(made.ends) // 8):
                return made
        made = await self._make()
        await self._take_in(made)
        return made

    def _keep(self) -> None:
        if self._end is not None:
            self._end.cancel()
        self._end = asyncio.get_running_loop().call_later(_KEPT_S, self._give_up)

    def _codes(self) -> npt.NDArray[np.int32]:
        """What the table's numbers of models are here."""
        served = self._served.by_index
        codes = np.full(max(served, default=0) + 2, _NO_MODEL, np.int32)
        for index, model in served.items():
            codes[index] = self._models.setdefault(model.name, len(self._models))
        return codes

    # ---------------------------------------------------------------------------------------------------- making it

    async def _make(self) -> _Sorted:
        self._sorted, self._beside = None, []
        self._forgotten = self._removal.forgotten
        self._know(self._table.births)
        # what was in the table only in between would be missed else
        self._table.departures = [] if self._others is not None else None
        self._codes()
        began = self._clock.monotonic()
        made = await (self._of_table() if self._others is None else self._of_store(self._others))
        if self._is_shared:
            now = self._clock.monotonic()
            self._stale_at = now + max(_FRESH_S, _REST * (now - began))
        self._sorted = made
        return made

    async def _of_store(self, store: Store) -> _Sorted:
        parts: list[tuple[bytes, F64, F64, npt.NDArray[np.int32]]] = []
        sizes: list[int] = []
        handles: list[Handles] = []
        births: list[npt.NDArray[np.uint64]] = []
        after = ""
        while len(heads := await store.heads(after=after, limit=_AT_ONCE)):
            ids = [str(key, "utf-8", "replace") for key in heads.keys]
            after = ids[-1]
            handles.append(self._table.find_all(ids) if len(self._table) else np.full(len(ids), -1, np.intp))
            births.append(self._table.birth[handles[-1]])
            sizes += map(len, heads.keys)
            codes = [self._models.setdefault(name, len(self._models)) for name in heads.models]
            models = np.array(codes, np.int32)[heads.model]
            columns = heads.heads["created"].copy(), heads.heads["last_used"].copy()
            parts.append((b"".join(heads.keys), *columns, models))
            await asyncio.sleep(0)
        empty = np.zeros(0)
        return _Sorted(
            b"".join([part[0] for part in parts]),
            np.cumsum(sizes, dtype=np.int64),
            np.concatenate([empty.astype(np.int32), *(part[3] for part in parts)]),
            np.concatenate([empty, *(part[1] for part in parts)]),
            np.concatenate([empty, *(part[2] for part in parts)]),
            np.concatenate([empty.astype(np.intp), *handles]),
            np.concatenate([empty.astype(np.uint64), *births]),
        ).with_tenants()

    async def _of_table(self) -> _Sorted:
        table, births = self._table, self._births
        handles = np.flatnonzero((table.birth[: table.end] > 0) & (table.birth[: table.end] <= births))
        born = table.birth[handles]  # as they are now: one that goes meanwhile is told by it
        keys: list[bytes] = []
        async for part in _pieces(len(handles)):
            keys += [table.session_id(handle).encode() for handle in handles[part].tolist()]
        order = await asyncio.to_thread(_sorted_places, keys)
        ordered: list[bytes] = []
        async for part in _pieces(len(order)):
            ordered += [keys[place] for place in order[part].tolist()]
        handles = handles[order]
        sizes = np.fromiter(map(len, ordered), np.int64, len(ordered))
        empty = np.zeros(len(handles))
        return _Sorted(
            b"".join(ordered),
            np.cumsum(sizes),
            np.full(len(handles), _NO_MODEL, np.int32),
            empty,
            empty,
            handles,
            born[order],
        ).with_tenants()

    async def _take_in(self, made: _Sorted) -> None:
        """Take in what has come into the table since."""
        table = self._table
        is_of_store = self._others is not None
        while self._births < table.births or table.departures:
            departed = table.departures or []
            table.departures = None if table.departures is None else []
            async for part in _pieces(len(departed)):
                for session_id in departed[part]:
                    place = made.find(key := session_id.encode())
                    if place < len(made.ends) and made.key(place) == key:
                        made.birth[place], made.handle[place] = _GONE, 0
            until = table.births
            births = table.birth[: table.end]
            new = np.flatnonzero(births > self._births)
            new = new[np.argsort(births[new], kind="stable")]
            async for part in _pieces(len(new)):
                for handle in new[part].tolist():
                    birth = int(table.birth[handle])
                    if not self._births < birth <= until:
                        continue  # it is gone, or another one by now
                    key = table.session_id(handle).encode()
                    place = made.find(key) if is_of_store else len(made.ends)
                    if place < len(made.ends) and made.key(place) == key:
                        made.birth[place], made.handle[place] = birth, handle
                    else:
                        self._beside.append((handle, birth, key))
            self._know(until)

    def _know(self, births: int) -> None:
        self._births = self._table.departures_after = births


class _Choice:
    """Chooses from columns, on a thread: what it gives is looked at again by whoever asked."""

    def __init__(
        self,
        table: SessionTable,
        codes: npt.NDArray[np.int32],
        query: Query,
        model: int,
        now: float,
        ahead: float,
        *,
        is_shared: bool,
    ) -> None:
        """`model` is the number of a name. The columns are taken as they are now.

        `is_shared`: other servers may have used sessions after this one did.
        """
        self._is_shared = is_shared
        self._used, self._created = table.used, table.created
        self._born, self._model_of = table.birth, table.model
        self._codes = codes
        self._query = query
        self._model = model
        self._ahead = ahead
        idle = query.filter.idle_longer_s
        self._used_before = np.inf if idle is None else now - idle

    def of(self, made: _Sorted, beside: Sequence[tuple[int, int, bytes]]) -> tuple[list[Candidate], int]:
        wanted = self._query.filter
        prefix = wanted.ids_begin_with.encode()
        low = made.find(prefix) if prefix else 0
        high = made.find(prefix + _LAST) if prefix else len(made.ends)
        fits, keys = self._columns(
            made.handle[low:high],
            made.birth[low:high],
            made.model[low:high],
            made.created[low:high],
            made.used[low:high],
        )
        others = [each for each in beside if each[2].startswith(prefix)]
        if wanted.tenant == "":
            others = [each for each in others if _SEPARATOR not in each[2]]
            if made.is_a_tenants is not None:
                fits &= ~made.is_a_tenants[low:high]
        handles = np.array([each[0] for each in others], np.intp)
        births = np.array([each[1] for each in others], np.uint64)
        nothing = np.zeros(len(others))
        other_fits, other_keys = self._columns(handles, births, nothing.astype(np.int32), nothing, nothing)
        total = int(np.count_nonzero(fits) + np.count_nonzero(other_fits)) if self._query.count else 0
        found = list(self._first(made, low, fits, keys))
        for place in np.flatnonzero(other_fits).tolist():
            candidate = (float(other_keys[place]), others[place][2])
            if self._is_after(candidate):
                found.append(candidate)
        found.sort(reverse=self._query.descending)
        return found[: self._query.limit], total

    def _columns(
        self,
        handles: Handles,
        births: npt.NDArray[np.uint64],
        models: npt.NDArray[np.int32],
        created: F64,
        used: F64,
    ) -> tuple[Mask, F64]:
        """Which sessions fit the filters, and where each stands in the order."""
        here = handles >= 0
        alive = here & (self._born[handles] == births)
        fits = alive | ~here
        if self._model == _NO_MODEL:
            fits[:] = False
        elif self._model != _ANY_MODEL:
            codes = self._codes[np.minimum(self._model_of[handles], len(self._codes) - 1)]
            fits &= np.where(alive, codes, models) == self._model
        used_here = self._used[handles] + self._ahead
        used = np.where(alive, np.maximum(used_here, used) if self._is_shared else used_here, used)
        if self._used_before != np.inf:
            fits &= used < self._used_before
        if self._query.order is Order.LAST_USED:
            return fits, used
        if self._query.order is Order.CREATED:
            return fits, np.where(alive, self._created[handles], created)
        return fits, np.zeros(len(handles))

    def _first(self, made: _Sorted, low: int, fits: Mask, keys: F64) -> Iterator[Candidate]:
        """The first of those that fit and come after where the page begins."""
        query, limit = self._query, self._query.limit
        places = np.flatnonzero(fits)
        if query.descending:
            places = places[::-1]
        sign = -1.0 if query.descending else 1.0
        if query.after is not None:
            key, session_id = query.after
            at = made.find(session_id.encode(), behind=not query.descending) - low
            is_behind = places < at if query.descending else places >= at
            own = keys[places]
            places = places[(sign * own > sign * key) | ((own == key) & is_behind)]
        if len(places) > limit and query.order is not Order.ID:
            own = sign * keys[places]
            last = np.partition(own, limit - 1)[limit - 1]
            ties = np.flatnonzero(own == last)[: limit - int(np.count_nonzero(own < last))]
            chosen = own < last
            chosen[ties] = True
            places = places[chosen]
        for place in places[:limit].tolist():
            yield float(keys[place]), made.key(low + place)

    def _is_after(self, candidate: Candidate) -> bool:
        if self._query.after is None:
            return True
        key, session_id = self._query.after
        if self._query.descending:
            return candidate < (key, session_id.encode())
        return candidate > (key, session_id.encode())


def _sorted_places(keys: Sequence[bytes]) -> npt.NDArray[np.intp]:
    """The places of ids in their order. For a thread: numpy sorts without Python's lock."""
    if not keys:
        return np.zeros(0, np.intp)
    width = min(_SORTED_BYTES, max(map(len, keys)))
    cut = np.array(keys, f"S{width}")
    order = np.argsort(cut, kind="stable")
    alike = np.flatnonzero(cut[order][1:] == cut[order][:-1])
    if not len(alike):
        return order
    for run in np.split(alike, np.flatnonzero(np.diff(alike) > 1) + 1):
        part = slice(int(run[0]), int(run[-1]) + 2)
        order[part] = sorted(order[part].tolist(), key=keys.__getitem__)
    return order


async def _pieces(count: int) -> AsyncIterator[slice]:
    for start in range(0, count, _AT_ONCE):
        if start:
            await asyncio.sleep(0)
        yield slice(start, start + _AT_ONCE)
