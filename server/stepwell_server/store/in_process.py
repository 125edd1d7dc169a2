"""The `Store` interface for the store of one server, in memory or on disk."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import math
import secrets
from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleLimits
from stepwell_server.errors import ServerError
from stepwell_server.store.access.local_writes import LocalWrites
from stepwell_server.store.base import (
    KNOWN,
    SOLE,
    Answer,
    LocalStore,
    Store,
    StoredSession,
    StoreHealth,
    UnusedSessions,
    Write,
)
from stepwell_server.store.changes import joined
from stepwell_server.store.heads import Heads, heads_of
from stepwell_server.store.record import F64, header_or_none

_NOTHING = StoredSession()
#: The first search of the records for unused sessions starts at most this long after the start of the server. After a
#: search of some duration there is a pause of at least this many times that duration.
_FIRST_SEARCH_S, _REST = 5.0, 10.0
#: Cursors: more noted sessions may be due; or the search of the records continues after the id that follows.
_NOTED, _RECORDS = "noted", ">"


class InProcessStore(Store):
    """Commits go through `LocalWrites`, `check` and `close` run on a thread, and everything else on the event loop.

    Only this server uses the sessions. So it notes the last use of each session that leaves its table, and other
    records were not used since the start. Time before the start does not count as idle, because nobody could use them
    then.
    """

    fetch_size = 64

    def __init__(self, local: LocalStore, clock: Clock) -> None:
        self.local = local
        self._clock = clock
        self._opened = clock.monotonic()
        self._used: dict[str, float] = {}
        """Monotonic time of the last use of sessions that left the server's table."""
        self._ends: list[tuple[float, str, float]] = []
        """A heap of the times when their idle limits end, with the last uses; outdated entries stay in it."""
        self._next_search = self._opened + _FIRST_SEARCH_S if local.count() else math.inf
        """When the next search of the records starts, for sessions that were not used since the start."""
        self._search_began = self._opened
        self._next_end = math.inf
        """The earliest end of a limit that the last search saw, among those in the future."""
        self.secret = local.secret
        self.incarnation = local.incarnation
        # several servers may have been set up from one backup
        self.labels = {"store_id": f"{local.incarnation}-{secrets.token_hex(4)}", "shared": "false"}
        self.first_revision = local.first_revision
        self._lanes = LocalWrites(local)

    @property
    @override
    def damage(self) -> str:
        return self.local.damage

    @override
    def commit(self, write: Write) -> Answer | None:
        return self._lanes.commit(write)

    @override
    def settle(self) -> None:
        self._lanes.settle()

    @override
    async def end_commits(self, timeout_s: float) -> bool:
        return await self._lanes.end(timeout_s)

    @override
    async def fetch(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[StoredSession]:
        if len(known) and all(known):
            return [KNOWN] * len(known)
        unknown = (
            [i for i, stamp in zip(session_ids, known, strict=True) if not stamp]
            if len(known)
            else session_ids
        )
        found = fetched(self.local, unknown)
        for place, session_id in enumerate(unknown if self._used else ()):
            if found[place].record is not None and (used := self._used.get(session_id)) is not None:
                found[place] = dataclasses.replace(found[place], idle_s=self._clock.monotonic() - used)
        answers = iter(found)
        return [KNOWN if stamp else next(answers) for stamp in known] if len(known) else found

    @override
    def new_stamp(self) -> int:
        return SOLE

    @override
    async def touch(self, session_ids: Sequence[str], stamps: Sequence[int]) -> None:
        """Nothing to do: the server's table knows the last use, and `note_use` reports it later."""

    @override
    def note_use(self, session_id: str, *, idle_s: float, limit_s: float) -> None:
        if limit_s < math.inf:
            self._used[session_id] = used = self._clock.monotonic() - idle_s
            heapq.heappush(self._ends, (max(used, self._opened) + limit_s, session_id, used))

    @override
    async def unused(self, cursor: str = "", *, limits: IdleLimits, limit: int) -> UnusedSessions:
        """Return noted sessions first, then search the records, but only if a limit can have ended."""
        now, due = self._clock.monotonic(), dict[str, float]()
        if cursor.startswith(_RECORDS):
            return self._search(cursor.removeprefix(_RECORDS), limits, limit)
        while self._ends and self._ends[0][0] < now and len(due) < limit:
            _, session_id, used = heapq.heappop(self._ends)
            if self._used.get(session_id) == used:
                due[session_id] = self._used.pop(session_id)
        try:
            page = self._page([*due], now - np.array([*due.values()], np.float64))
        except ServerError:
            for session_id, used in due.items():
                self.note_use(session_id, idle_s=now - used, limit_s=-math.inf)
            raise
        if len(due) == limit:
            return dataclasses.replace(page, cursor=_NOTED)
        if now <= self._next_search:
            return page
        self._search_began, self._next_end = now, math.inf
        return dataclasses.replace(page, cursor=_RECORDS)

    def _search(self, after: str, limits: IdleLimits, limit: int) -> UnusedSessions:
        heads, now = self.local.heads(after=after, limit=limit), self._clock.monotonic()
        ids = [str(key, "utf-8", "replace") for key in heads.keys]
        ends = self._opened + limits.seconds_of(heads.heads["max_idle_ms"].astype(np.int64))
        over = [ids[place] for place in np.flatnonzero(ends < now).tolist() if ids[place] not in self._used]
        page = self._page(over, np.full(len(over), now - self._opened))
        self._next_end = min(self._next_end, float(ends[ends >= now].min(initial=math.inf)))
        if ids:
            return dataclasses.replace(page, cursor=_RECORDS + ids[-1])
        # sessions that began since the start are in the table, or were noted
        self._next_search = max(self._next_end, now + _REST * (now - self._search_began))
        return page

    def _page(self, session_ids: Sequence[str], idle_s: F64) -> UnusedSessions:
        """Return a page of those sessions whose records exist and are intact: others have no readable limit."""
        values = self.local.get_many(session_ids) if session_ids else []
        records = [
            value if value is None else joined(session_id, value)
            for session_id, value in zip(session_ids, values, strict=True)
        ]
        sound = [
            place
            for place, (session_id, record) in enumerate(zip(session_ids, records, strict=True))
            if record is not None and header_or_none(session_id, record) is not None
        ]
        heads = heads_of([session_ids[i].encode() for i in sound], [records[i] or b"" for i in sound])
        return UnusedSessions(heads, np.full(len(sound), SOLE, np.uint64), idle_s[sound], "")

    @override
    async def claim(self, name: str, whose: str, for_s: float) -> float | None:
        """No other server exists: this one has held every claim since its start."""
        return self._clock.monotonic() - self._opened

    @override
    async def heads(self, *, after: str = "", prefix: str = "", limit: int) -> Heads:
        return self.local.heads(after=after, prefix=prefix, limit=limit)

    @override
    async def count(self) -> int:
        return self.local.count()

    @override
    async def count_of(self, model: str) -> int:
        return self.local.count_of(model)

    @override
    async def usage(self, tenant: str) -> None:
        """Only this server begins and ends sessions."""

    @override
    async def uncounted(self, *, after: str = "", limit: int) -> Heads:
        return self.local.heads(after=after, limit=limit)

    @override
    def count_now(self, model: str) -> int:
        return self.local.count_of(model)

    @override
    async def documents(self, prefix: str = "") -> dict[str, bytes]:
        return self.local.documents(prefix)

    @override
    async def documents_changed(self) -> None:
        """No other server writes documents."""
        await asyncio.get_running_loop().create_future()

    @override
    async def announce(self, listen: str) -> None:
        self.local.announce(listen)

    @override
    async def check(self) -> StoreHealth:
        """Runs on a thread: a hanging disk must not block the event loop."""
        return await asyncio.to_thread(self.local.check)

    @override
    async def close(self) -> None:
        await asyncio.to_thread(self.local.close)


def fetched(local: LocalStore, session_ids: Sequence[str]) -> list[StoredSession]:
    """Fetch sessions from a local store.

    Raises:
        Unavailable: the store cannot be read now.
    """
    records = local.get_many(session_ids)
    missing = [i for i, record in zip(session_ids, records, strict=True) if record is None]
    stones = iter(local.tombstones(missing)) if missing else iter(())
    found: list[StoredSession] = []
    for session_id, record in zip(session_ids, records, strict=True):
        whole = None if record is None else joined(session_id, record)
        stone = next(stones) if record is None else None
        found.append(_NOTHING if whole is None and stone is None else StoredSession(whole, stone, SOLE))
    return found
