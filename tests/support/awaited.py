"""A store that must be awaited and that other servers use too: its answers come when the test lets them."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.quotas import NOTHING
from stepwell_server.errors import StateCorrupt
from stepwell_server.store import counts
from stepwell_server.store.access.reads import Reads
from stepwell_server.store.access.together import Together
from stepwell_server.store.base import (
    ALL_KEPT,
    Answer,
    Batch,
    Committed,
    Fetched,
    LocalStore,
    Store,
    StoreHealth,
    Unused,
    Write,
    new_stamp,
)
from stepwell_server.store.heads import Heads, heads_of
from stepwell_server.store.in_process import fetched
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.record import Header, Stored, decode_header
from support.clock import ManualClock
from support.fake_executor import WAIT_S

_MISSING = Header(
    fingerprint="", model="", batch_size=0, revision=0, position=0, request_id=0, opened_with=0, created=0.0,
    last_used=0.0, reply=0,
)  # fmt: skip


@dataclasses.dataclass(slots=True)
class _Together:
    """What a shared store has beside the records: one for all replicas."""

    clock: Clock | None = None
    stamps: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of the records, by session."""
    used: dict[str, float] = dataclasses.field(default_factory=dict)
    """When they were last used."""
    claims: dict[str, tuple[str, float, float]] = dataclasses.field(default_factory=dict)
    """Who has them, since when and until when."""
    undone: set[int] = dataclasses.field(default_factory=set)
    """Stamps of openings that were undone."""
    is_served: bool = True
    """Servers use it all the time, whatever the clock does; else they must say so as they do, by a claim."""
    listeners: list[tuple[RemoteStore, Callable[[], None]]] = dataclasses.field(default_factory=list)
    """Who is told that a document was written."""


class RemoteStore(Store):
    """One server's way to a store that is shared: `replica` is another's.

    What is kept is in a real local store. A change is kept if the session has the stamp that it had when it was read, as
    `base.Store` says; each member has a fate of its own.
    """

    local = None
    is_volatile = False
    damage = ""
    first_revision = 0

    def __init__(self, shared: LocalStore, clock: Clock | None = None) -> None:
        """`clock` is the store's own; None: that of the first server."""
        self.shared = shared
        self.together = _Together(clock)
        self.own_clock: Clock = ManualClock()
        """Of the server: heads and headers have its time."""
        self.told_error: Exception | None = None
        """Why `touch` and `claim` fail."""
        self.is_told = True
        """Of documents that others have written."""
        self.secret = shared.secret
        self.incarnation = shared.incarnation
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        """Each call that names sessions, as it came: read, commit."""
        self.reads_held = False
        self.commits_held = False
        self.answers_held = False
        """Commits are made when they come, and their answers are held back."""
        self.read_error: Exception | None = None
        self.commit_error: Exception | None = None
        self.documents_error: Exception | None = None
        self.answer_lost: Exception | None = None
        """The next commit is made, and fails all the same."""
        self.unknown: dict[str, bool] = {}
        """Sessions whose next commit is not answered; whether it is kept all the same."""
        self.most_at_once = 0
        """Commits under way at the same time, at most."""
        self._under_way = 0
        self._gates: list[tuple[str, asyncio.Future[None]]] = []
        self._commits: Together | None = None
        self._reads: Reads | None = None
        self._came = asyncio.Event()

    @classmethod
    def of_memory(cls) -> RemoteStore:
        """A new one."""
        return cls(MemoryStore())

    def replica(self) -> RemoteStore:
        """The same store as another server sees it."""
        other = RemoteStore(self.shared)
        other.together = self.together
        return other

    def serve(self, clock: Clock) -> None:
        """A server uses it that has this clock."""
        self.own_clock = clock
        self.together.clock = self.together.clock or clock

    @property
    def stamps(self) -> dict[str, int]:
        """Of the records, by session: one for all replicas."""
        return self.together.stamps

    @property
    def now(self) -> float:
        """By the store's clock."""
        return (self.together.clock or self.own_clock).now()

    def idle_s(self, session_id: str) -> float:
        """For how long nobody has used a session; of one that a test put there by itself its record says it."""
        if session_id not in self.together.used:
            header = self._header(session_id)
            self.together.used[session_id] = self.now if header is None else header.last_used
        return max(0.0, self.now - self.together.used[session_id])

    def let_go(self) -> None:
        """Let what is held back, and what comes, be answered."""
        self.reads_held = self.commits_held = self.answers_held = False
        self.let_go_once()

    def let_go_once(self, *kinds: str) -> None:
        """Let what is held back be answered, of these kinds or of all; what comes is held as before."""
        gates, self._gates = self._gates, []
        for kind, gate in gates:
            if kinds and kind not in kinds:
                self._gates.append((kind, gate))
            elif not gate.done():
                gate.set_result(None)

    def asked(self, kind: str) -> list[tuple[str, ...]]:
        """The sessions of each call of a kind so far."""
        return [ids for found, ids in self.calls if found == kind]

    async def until(self, kind: str, count: int = 1) -> None:
        """Return when so many calls of a kind have come."""

        async def wait() -> None:
            while len(self.asked(kind)) < count:
                self._came.clear()
                await self._came.wait()

        await asyncio.wait_for(wait(), WAIT_S)

    async def _pass(self, kind: str, session_ids: Sequence[str], *, held: bool) -> None:
        self.calls.append((kind, tuple(session_ids)))
        self._came.set()
        if held:
            gate = asyncio.get_running_loop().create_future()
            self._gates.append((kind, gate))
            await gate
        else:
            await asyncio.sleep(0)

    async def fetch(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[Fetched]:
        if self._reads is None:
            self._reads = Reads(lambda ids, known: self.read(ids, known))  # noqa: PLW0108 - tests replace it
        return await self._reads.fetch(session_ids, known)

    async def read(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[Fetched]:
        """As `ValkeyStore.read`."""
        await self._pass("read", session_ids, held=self.reads_held)
        if self.read_error is not None:
            raise self.read_error.with_traceback(None)
        stamps = known or [0] * len(session_ids)
        return [
            Fetched(stamp=stamp, is_known=True, idle_s=self.idle_s(session_id))
            if stamp and stamp == self.stamps.get(session_id)
            else dataclasses.replace(each, stamp=self.stamp_of(session_id), idle_s=self.idle_s(session_id))
            if each.record is not None
            else dataclasses.replace(each, stamp=0 if each.tombstone is None else self.stamp_of(session_id))
            for session_id, stamp, each in zip(
                session_ids, stamps, fetched(self.shared, session_ids), strict=True
            )
        ]

    async def get(self, session_id: str) -> Stored | None:
        return (await self.fetch([session_id]))[0].record

    async def touch(self, session_ids: Sequence[str], stamps: Sequence[int]) -> None:
        await self._tell("touch", session_ids)
        for session_id, stamp in zip(session_ids, stamps, strict=True):
            if self.stamps.get(session_id) == stamp:
                self.together.used[session_id] = self.now

    async def _tell(self, kind: str, names: Sequence[str]) -> None:
        await self._pass(kind, names, held=self.commits_held)
        if self.told_error is not None:
            raise self.told_error.with_traceback(None)

    async def unused(self, cursor: str = "", *, idle_s: float, limit: int) -> Unused:
        await self._pass("unused", [], held=self.reads_held)
        if self.read_error is not None:
            raise self.read_error.with_traceback(None)
        found = self.shared.scan(after=cursor, limit=limit)
        ids = [i for i, _ in found if self.idle_s(i) >= idle_s]
        records = [record or b"" for record in self.shared.get_many(ids)]
        return Unused(
            heads_of([i.encode() for i in ids], records),
            np.array([self.stamp_of(i) for i in ids], np.uint64),
            np.array([self.idle_s(i) for i in ids], np.float64),
            found[-1][0] if len(found) == limit else "",
        )

    async def claim(self, name: str, whose: str, for_s: float) -> float | None:
        if name == "service" and self.together.is_served:
            return math.inf
        await self._tell(f"claim {name}", [name])
        has, since, until = self.together.claims.get(name, ("", self.now, -math.inf))
        if until <= self.now:
            has, since = whose, self.now
        if has != whose:
            return None
        self.together.claims[name] = whose, since, self.now + for_s
        return self.now - since

    def new_stamp(self) -> int:
        return new_stamp()

    def stamp_of(self, session_id: str) -> int:
        """Of a session's record or tombstone; 0 if there is neither. One that a test put there by itself gets one."""
        if self.shared.get(session_id) is None and self.shared.tombstones([session_id]) == [None]:
            return 0
        return self.stamps.setdefault(session_id, new_stamp())

    def commit(self, write: Write) -> Answer | None:
        if self._commits is None:
            self._commits = Together(lambda batch: self.apply(batch))  # noqa: PLW0108 - tests replace it
        return self._commits.commit(write)

    async def end_commits(self, timeout_s: float) -> bool:
        return self._commits is None or await self._commits.end(timeout_s)

    async def apply(self, batch: Batch) -> Committed:
        """As `ValkeyStore.apply`."""
        # as it is now: whoever made it may fill its buffers with the next one
        puts = [(session_id, bytes(record)) for session_id, record in batch.puts]
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            await self._pass("commit", [*(i for i, _ in puts), *batch.deletes], held=self.commits_held)
        finally:
            self._under_way -= 1
        if self.commit_error is not None:
            raise self.commit_error.with_traceback(None)
        if self.answers_held:
            told = self._made(batch, puts)
            await self._pass("answer", [i for i, _ in puts], held=True)
            return told
        return self._made(batch, puts)

    def _made(self, batch: Batch, puts: Sequence[tuple[str, bytes]]) -> Committed:
        stale = self._stale(batch)
        kept = [(name, content) for name, content in batch.documents if name not in stale]
        if kept:
            self.shared.commit(Batch(documents=kept))
            for store, changed in self.together.listeners:
                if store is not self and store.is_told:
                    asyncio.get_running_loop().call_soon(changed)
        committed = self._commit(batch, puts, stale)
        if (lost := self.answer_lost) is not None:
            self.answer_lost = None
            raise lost
        return committed

    def _stale(self, batch: Batch) -> frozenset[str]:
        there = self.shared.documents()
        return frozenset(
            name
            for name, content in batch.documents
            if name in batch.documents_follow
            and there.get(name) not in (batch.documents_follow[name], content)
        )

    def _commit(
        self, batch: Batch, puts: Sequence[tuple[str, bytes]], stale: frozenset[str] = frozenset()
    ) -> Committed:
        stones = {stone.session_id: stone for stone in batch.tombstones}
        conflicts: set[str] = set()
        unknown: set[str] = set()
        last = list(zip(puts, batch.follows.tolist(), batch.stamps.tolist(), strict=True))
        for (session_id, record), follows, stamp in last:
            there = self.stamp_of(session_id)
            if there == stamp:
                self.together.used[session_id] = self.now
                continue  # this very batch, sent again
            begins = self.shared.get(session_id) is None
            if there != follows or (begins and stamp in self.together.undone):
                conflicts.add(session_id)
                continue
            if self._is_kept(session_id, unknown):
                model, is_there = (
                    decode_header(session_id, record).model,
                    self.shared.get(session_id) is not None,
                )
                began = [] if is_there else [(model, 1)]
                forgets = [] if is_there else [session_id]
                self.stamps[session_id] = stamp
                tenants = counts.of_tenants([(session_id, name) for name, _ in began], 1)
                self.together.used[session_id] = self.now
                self.shared.commit(
                    Batch(
                        puts=[(session_id, record)],
                        forgets=forgets,
                        counts=began,
                        tenant_counts=[*tenants, *self._more_usage(session_id, record)],
                    )
                )
        self.together.undone.update(
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
            if self._is_kept(session_id, unknown):
                gone = header.model if header is not None else ""
                ended = [(gone, -1)] if gone else []
                own = [] if stone is None else [stone]
                tenants = counts.of_tenants([(session_id, name) for name, _ in ended], -1)
                tenants += self._more_usage(session_id, None)
                self.shared.commit(
                    Batch(deletes=[session_id], tombstones=own, counts=ended, tenant_counts=tenants)
                )
                self.stamps.pop(session_id, None)
                self.together.used.pop(session_id, None)
        if not (conflicts or unknown or stale):
            return ALL_KEPT
        return Committed(frozenset(conflicts), frozenset(unknown), stale)

    def _more_usage(self, session_id: str, record: bytes | None) -> list[tuple[str, int]]:
        """What the tenant has more of when a record is put in place of that which is there."""
        there = self.shared.get(session_id)
        before = NOTHING if there is None else counts.usage_of_record(session_id, there)[1]
        after = NOTHING if record is None else counts.usage_of(decode_header(session_id, record))
        return counts.of_usage([(session_id, after - before)])

    def _is_kept(self, session_id: str, unknown: set[str]) -> bool:
        if session_id not in self.unknown:
            return True
        unknown.add(session_id)
        return self.unknown.pop(session_id)

    def _header(self, session_id: str) -> Header | None:
        """What the shared store has; `_MISSING` for a record that cannot be read."""
        stored = self.shared.get(session_id)
        try:
            return None if stored is None else decode_header(session_id, stored)
        except StateCorrupt:
            return _MISSING

    async def scan(self, *, after: str = "", prefix: str = "", limit: int) -> list[tuple[str, Header | None]]:
        await self._read("scan")
        found = self.shared.scan(after=after, prefix=prefix, limit=limit)
        own = self.own_clock.now()
        return [
            (i, header and dataclasses.replace(header, last_used=own - self.idle_s(i))) for i, header in found
        ]

    async def heads(self, *, after: str = "", limit: int) -> Heads:
        await self._read("heads")
        heads, own = self.shared.heads(after=after, limit=limit), self.own_clock.now()
        heads.heads["last_used"] = [own - self.idle_s(key.decode()) for key in heads.keys]
        return heads

    async def count(self) -> int:
        await self._count("")
        return self.shared.count()

    async def _count(self, name: str) -> None:
        await self._read("count", name)

    async def _read(self, kind: str, *names: str) -> None:
        await self._pass(kind, names, held=self.reads_held)
        if self.read_error is not None:
            raise self.read_error.with_traceback(None)

    async def count_of(self, model: str) -> int:
        await self._count(model)
        return self.shared.count_of(model)

    async def documents(self, prefix: str = "") -> dict[str, bytes]:
        await asyncio.sleep(0)
        if self.documents_error is not None:
            raise self.documents_error.with_traceback(None)
        return self.shared.documents(prefix)

    def tell_of_documents(self, changed: Callable[[], None]) -> None:
        self.together.listeners.append((self, changed))

    async def announce(self, listen: str) -> None:
        self.shared.announce(listen)

    async def check(self) -> StoreHealth:
        return self.shared.check()

    async def close(self) -> None:
        self.let_go()
