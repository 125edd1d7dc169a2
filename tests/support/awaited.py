"""A store that must be awaited and that other servers use too: its answers come when the test lets them."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

from stepwell_server.engine.durability.stamps import new_stamp
from stepwell_server.errors import StateCorrupt
from stepwell_server.store import counts
from stepwell_server.store.awaited import fetched
from stepwell_server.store.base import ALL_KEPT, Batch, Committed, Fetched, LocalStore, Store, StoreHealth
from stepwell_server.store.heads import Heads
from stepwell_server.store.record import Header, Stored, decode_header
from support.fake_executor import WAIT_S

_MISSING = Header(
    fingerprint="", model="", batch_size=0, revision=0, position=0, request_id=0, opened_with=0, created=0.0,
    last_used=0.0, reply=0,
)  # fmt: skip


class RemoteStore(Store):
    """One server's way to a store that is shared: `replica` is another's.

    What is kept is in a real local store. A change is kept if the session has the stamp that it had when it was read, as
    `base.Store` says; each member has a fate of its own.
    """

    local = None
    is_volatile = False
    damage = ""
    first_revision = 0

    def __init__(self, shared: LocalStore) -> None:
        self.shared = shared
        self.stamps: dict[str, int] = {}
        """Of the records, by session: one for all replicas."""
        self.listeners: list[tuple[RemoteStore, Callable[[], None]]] = []
        """Who is told that a document was written; one list for all replicas."""
        self.is_told = True
        """Of documents that others have written."""
        self.secret = shared.secret
        self.incarnation = shared.incarnation
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        """Each call that names sessions, as it came: read, commit."""
        self.reads_held = False
        self.commits_held = False
        self.read_error: Exception | None = None
        self.commit_error: Exception | None = None
        self.unknown: dict[str, bool] = {}
        """Sessions whose next commit is not answered; whether it is kept all the same."""
        self.most_at_once = 0
        """Commits under way at the same time, at most."""
        self._under_way = 0
        self._gates: list[tuple[str, asyncio.Future[None]]] = []
        self._came = asyncio.Event()

    def replica(self) -> RemoteStore:
        """The same store as another server sees it."""
        other = RemoteStore(self.shared)
        other.stamps, other.listeners = self.stamps, self.listeners
        return other

    def let_go(self) -> None:
        """Let what is held back, and what comes, be answered."""
        self.reads_held = self.commits_held = False
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
        await self._pass("read", session_ids, held=self.reads_held)
        if self.read_error is not None:
            raise type(self.read_error)(*self.read_error.args)
        stamps = known or [0] * len(session_ids)
        return [
            Fetched(stamp=stamp, is_known=True, idle_s=0.0)
            if stamp and stamp == self.stamps.get(session_id)
            else dataclasses.replace(each, stamp=self.stamp_of(session_id), idle_s=0.0)
            for session_id, stamp, each in zip(
                session_ids, stamps, fetched(self.shared, session_ids), strict=True
            )
        ]

    async def get(self, session_id: str) -> Stored | None:
        return (await self.fetch([session_id]))[0].record

    async def touch(self, session_ids: Sequence[str], stamps: Sequence[int]) -> None:
        await asyncio.sleep(0)

    def stamp_of(self, session_id: str) -> int:
        """Of a session's record; 0 if there is none. One that a test put there by itself gets one."""
        if self.shared.get(session_id) is None:
            return 0
        return self.stamps.setdefault(session_id, new_stamp())

    async def commit(self, batch: Batch) -> Committed:
        # as it is now: whoever made it may fill its buffers with the next one
        puts = [(session_id, bytes(record)) for session_id, record in batch.puts]
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            await self._pass("commit", [*(i for i, _ in puts), *batch.deletes], held=self.commits_held)
        finally:
            self._under_way -= 1
        if self.commit_error is not None:
            raise type(self.commit_error)(*self.commit_error.args)
        stale = self._stale(batch)
        kept = [(name, content) for name, content in batch.documents if name not in stale]
        if kept:
            self.shared.commit(Batch(documents=kept))
            for store, changed in self.listeners:
                if store is not self and store.is_told:
                    asyncio.get_running_loop().call_soon(changed)
        return self._commit(batch, puts, stale)

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
                continue  # this very batch, sent again
            if there != follows:
                conflicts.add(session_id)
                continue
            if self._is_kept(session_id, unknown):
                model = decode_header(session_id, record).model
                began = [] if follows else [(model, 1)]
                forgets = [] if follows else [session_id]
                self.stamps[session_id] = stamp
                tenants = counts.of_tenants([(session_id, name) for name, _ in began], 1)
                self.shared.commit(
                    Batch(puts=[(session_id, record)], forgets=forgets, counts=began, tenant_counts=tenants)
                )
        for session_id, follows in zip(batch.deletes, batch.delete_follows.tolist(), strict=True):
            header, stone = self._header(session_id), stones.get(session_id)
            if (stone is not None and header is None) or (follows and follows != self.stamp_of(session_id)):
                conflicts.add(session_id)
                continue
            if self._is_kept(session_id, unknown):
                gone = header.model if header is not None else ""
                ended = [(gone, -1)] if gone else []
                own = [] if stone is None else [stone]
                tenants = counts.of_tenants([(session_id, name) for name, _ in ended], -1)
                self.shared.commit(
                    Batch(deletes=[session_id], tombstones=own, counts=ended, tenant_counts=tenants)
                )
                self.stamps.pop(session_id, None)
        if not (conflicts or unknown or stale):
            return ALL_KEPT
        return Committed(frozenset(conflicts), frozenset(unknown), stale)

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
        await asyncio.sleep(0)
        return self.shared.scan(after=after, prefix=prefix, limit=limit)

    async def heads(self, *, after: str = "", limit: int) -> Heads:
        await asyncio.sleep(0)
        return self.shared.heads(after=after, limit=limit)

    async def count(self) -> int:
        await asyncio.sleep(0)
        return self.shared.count()

    async def count_of(self, model: str) -> int:
        await asyncio.sleep(0)
        return self.shared.count_of(model)

    async def documents(self, prefix: str = "") -> dict[str, bytes]:
        await asyncio.sleep(0)
        return self.shared.documents(prefix)

    def tell_of_documents(self, changed: Callable[[], None]) -> None:
        self.listeners.append((self, changed))

    async def announce(self, listen: str) -> None:
        self.shared.announce(listen)

    async def check(self) -> StoreHealth:
        return self.shared.check()

    async def close(self) -> None:
        self.let_go()
