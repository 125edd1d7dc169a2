"""A fake of a store that several servers share, on a real local store; answers come when the test lets them."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.quotas import NOTHING
from stepwell_server.errors import StateCorrupt
from stepwell_server.store import counts
from stepwell_server.store.base import (
    ALL_KEPT,
    Batch,
    CommitResult,
    LocalStore,
    StoredSession,
    StoreHealth,
    UnusedSessions,
    new_stamp,
)
from stepwell_server.store.changes import joined, merged
from stepwell_server.store.heads import Heads, heads_of
from stepwell_server.store.in_process import fetched
from stepwell_server.store.record import Header, RecordBytes, decode_header
from support.clock import ManualClock
from support.stores.gates import Gated

_MISSING = Header(
    fingerprint="", model="", batch_size=0, revision=0, position=0, request_id=0, opened_with=0, created=0.0,
    last_used=0.0, reply=0,
)  # fmt: skip


@dataclasses.dataclass(slots=True)
class _Kept:
    """The contents of a shared store besides the records: one for all servers."""

    clock: Clock | None = None
    stamps: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of the records, by session."""
    models: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of sessions; a record may be damaged."""
    used: dict[str, float] = dataclasses.field(default_factory=dict)
    """When they were last used."""
    claims: dict[str, tuple[str, float, float]] = dataclasses.field(default_factory=dict)
    """Their holders, with begin and end."""
    undone: set[int] = dataclasses.field(default_factory=set)
    """Stamps of openings that were undone."""
    followers: set[FakeShared] = dataclasses.field(default_factory=set)
    """Stores of servers that wait for changes of documents."""


class FakeShared:
    """A change is kept if the session has the stamp that it had when it was read, as `base.Store` says.

    Records are in a real local store. Each member of a commit has a fate of its own.
    """

    damage = ""
    first_revision = 0

    def __init__(self, shared: LocalStore, kept: _Kept) -> None:
        self.shared = shared
        self.kept = kept
        self.documents_written = asyncio.Event()
        """By another server."""
        self.own_clock: Clock = ManualClock()
        self.secret = shared.secret
        self.incarnation = shared.incarnation

    @property
    def now(self) -> float:
        """By the store's clock."""
        return (self.kept.clock or self.own_clock).now()

    def idle_s(self, session_id: str) -> float:
        """For how long nobody has used a session; of one that a test put there by itself its record says it."""
        if session_id not in self.kept.used:
            header = self._header(session_id)
            self.kept.used[session_id] = self.now if header is None else header.last_used
        return max(0.0, self.now - self.kept.used[session_id])

    async def read(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[StoredSession]:
        stamps = known or [0] * len(session_ids)
        return [
            StoredSession(stamp=stamp, is_known=True, idle_s=self.idle_s(session_id))
            if stamp and stamp == self.kept.stamps.get(session_id)
            else dataclasses.replace(each, stamp=self.stamp_of(session_id), idle_s=self.idle_s(session_id))
            if each.record is not None
            else dataclasses.replace(each, stamp=0 if each.tombstone is None else self.stamp_of(session_id))
            for session_id, stamp, each in zip(
                session_ids, stamps, fetched(self.shared, session_ids), strict=True
            )
        ]

    async def touch(self, session_ids: Sequence[str], stamps: Sequence[int]) -> None:
        for session_id, stamp in zip(session_ids, stamps, strict=True):
            if self.kept.stamps.get(session_id) == stamp:
                self.kept.used[session_id] = self.now

    async def unused(self, cursor: str = "", *, limits: IdleLimits, limit: int) -> UnusedSessions:
        found = [key.decode() for key in self.shared.heads(after=cursor, limit=limit).keys]
        ids = [i for i in found if self.idle_s(i) >= min(limits.max_s, 5.0)]
        records = [record or b"" for record in self.shared.get_many(ids)]
        return UnusedSessions(
            heads_of([i.encode() for i in ids], records),
            np.array([self.stamp_of(i) for i in ids], np.uint64),
            np.array([self.idle_s(i) for i in ids], np.float64),
            found[-1][0] if len(found) == limit else "",
        )

    async def claim(self, name: str, whose: str, for_s: float) -> float | None:
        has, since, until = self.kept.claims.get(name, ("", self.now, -math.inf))
        if until <= self.now:
            has, since = whose, self.now
        if has != whose:
            return None
        self.kept.claims[name] = whose, since, self.now + for_s
        return self.now - since

    def stamp_of(self, session_id: str) -> int:
        """Of a session's record or tombstone; 0 if there is neither. One that a test put there by itself gets one."""
        if self.shared.get(session_id) is None and self.shared.tombstones([session_id]) == [None]:
            return 0
        return self.kept.stamps.setdefault(session_id, new_stamp())

    async def apply(self, batch: Batch) -> CommitResult:
        stale = self._stale(batch)
        documents = [(name, content) for name, content in batch.documents if name not in stale]
        if documents:
            self.shared.commit(Batch(documents=documents))
            for store in self.kept.followers - {self}:
                store.documents_written.set()
        return self._commit(batch, stale)

    def _stale(self, batch: Batch) -> frozenset[str]:
        there = self.shared.documents()
        return frozenset(
            name
            for name, content in batch.documents
            if name in batch.documents_follow
            and there.get(name) not in (batch.documents_follow[name], content)
        )

    def _commit(self, batch: Batch, stale: frozenset[str]) -> CommitResult:
        stones = {stone.session_id: stone for stone in batch.tombstones}
        conflicts: set[str] = set()
        for (session_id, record), follows, stamp in zip(
            batch.puts, batch.follows.tolist(), batch.stamps.tolist(), strict=True
        ):
            there = self.stamp_of(session_id)
            if there == stamp:
                self.kept.used[session_id] = self.now
                continue  # this very batch, sent again
            begins = self.shared.get(session_id) is None
            if there != follows or (begins and stamp in self.kept.undone):
                conflicts.add(session_id)
                continue
            whole = joined(session_id, merged(session_id, [record], self.shared.get(session_id)) or b"")
            before, after = self.kept.models.get(session_id, ""), decode_header(session_id, whole).model
            self.kept.models[session_id] = after
            began = [(after, 1)] if begins else [(before, -1), (after, 1)] if before != after else []
            self.kept.stamps[session_id] = stamp
            self.kept.used[session_id] = self.now
            tenants = [n for name, by in began for n in counts.of_tenants([(session_id, name)], by)]
            self.shared.commit(
                Batch(
                    puts=[(session_id, whole)],
                    forgets=[session_id] if begins else [],
                    counts=began,
                    tenant_counts=[*tenants, *self._more_usage(session_id, whole)],
                )
            )
        self.kept.undone.update(
            stamp
            for session_id, stamp in zip(batch.deletes, batch.delete_follows.tolist(), strict=True)
            if session_id in batch.undoes
        )
        least_s = batch.min_idle_s if len(batch.min_idle_s) else [0.0] * len(batch.deletes)
        most_s = batch.max_idle_s if len(batch.max_idle_s) else [math.inf] * len(batch.deletes)
        for session_id, follows, min_idle_s, max_idle_s in zip(
            batch.deletes, batch.delete_follows.tolist(), least_s, most_s, strict=True
        ):
            header, stone = self._header(session_id), stones.get(session_id)
            is_other = follows and follows != self.stamp_of(session_id)
            is_used = header is not None and not min_idle_s <= self.idle_s(session_id) <= max_idle_s
            if (stone is not None and header is None) or is_other or is_used:
                conflicts.add(session_id)
                continue
            gone = self.kept.models.pop(session_id, "" if header is None else header.model)
            ended = [(gone, -1)] if gone else []
            own = [] if stone is None else [stone]
            tenants = counts.of_tenants([(session_id, name) for name, _ in ended], -1)
            tenants += self._more_usage(session_id, None)
            self.shared.commit(
                Batch(deletes=[session_id], tombstones=own, counts=ended, tenant_counts=tenants)
            )
            self.kept.stamps.pop(session_id, None)
            self.kept.used.pop(session_id, None)
        if not (conflicts or stale):
            return ALL_KEPT
        return CommitResult(frozenset(conflicts), stale=stale)

    def _more_usage(self, session_id: str, record: RecordBytes | None) -> list[tuple[str, int]]:
        """What the tenant has more of when a record is put in place of that which is there."""
        there = self.shared.get(session_id)
        before = NOTHING if there is None else counts.usage_of_record(session_id, there)[1]
        after = NOTHING if record is None else counts.usage_of(decode_header(session_id, record))
        return counts.of_usage([(session_id, after - before)])

    def _header(self, session_id: str) -> Header | None:
        """What the shared store has; `_MISSING` for a record that cannot be read."""
        stored = self.shared.get(session_id)
        try:
            return None if stored is None else decode_header(session_id, stored)
        except StateCorrupt:
            return _MISSING

    async def heads(self, *, after: str = "", prefix: str = "", limit: int) -> Heads:
        heads = self.shared.heads(after=after, prefix=prefix, limit=limit)
        heads.heads["last_used"] = [self.own_clock.now() - self.idle_s(key.decode()) for key in heads.keys]
        return heads

    async def count(self) -> int:
        return self.shared.count()

    async def count_of(self, model: str) -> int:
        return self.shared.count_of(model)

    async def documents(self, prefix: str = "") -> dict[str, bytes]:
        return self.shared.documents(prefix)

    async def documents_changed(self) -> None:
        self.kept.followers.add(self)
        await self.documents_written.wait()
        self.documents_written.clear()

    async def announce(self, listen: str) -> None:
        self.shared.announce(listen)

    async def check(self) -> StoreHealth:
        return self.shared.check()


class RemoteStore(Gated):
    """The fake as one server sees it."""

    def __init__(
        self, shared: LocalStore, clock: Clock | None = None, *, beside: RemoteStore | None = None
    ) -> None:
        """`clock` is the store's own; None: that of the first server. `beside` is another server's view."""
        kept = _Kept(clock) if beside is None else beside.inner.kept
        super().__init__(FakeShared(shared, kept), None if beside is None else beside.service)
        self.shared = shared

    def replica(self) -> RemoteStore:
        """The same store as another server sees it."""
        return RemoteStore(self.shared, beside=self)

    async def another(self) -> RemoteStore:
        return self.replica()

    def serve(self, clock: Clock) -> None:
        super().serve(clock)
        self.inner.own_clock = clock
        self.inner.kept.clock = self.inner.kept.clock or clock

    @property
    def stamps(self) -> dict[str, int]:
        """Of the records, by session: one for all servers."""
        stamps: dict[str, int] = self.inner.kept.stamps
        return stamps

    async def put_back(self, session_id: str, before: StoredSession) -> None:
        self.shared.commit(Batch(puts=[(session_id, bytes(before.record or b""))]))
        self.stamps[session_id] = before.stamp
