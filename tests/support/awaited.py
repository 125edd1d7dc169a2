"""A store that must be awaited and that other servers use too: its answers come when the test lets them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stepwell_server.errors import StateCorrupt
from stepwell_server.store import counts
from stepwell_server.store.base import Batch, Committed, LocalStore, Store, StoreHealth, Tombstone
from stepwell_server.store.heads import Heads
from stepwell_server.store.record import Header, Stored, decode_header
from support.fake_executor import WAIT_S

_MISSING = Header(
    fingerprint="", model="", batch_size=0, revision=0, position=0, request_id=0, opened_with=0, created=0.0,
    last_used=0.0, reply=0,
)  # fmt: skip


class RemoteStore(Store):
    """One server's way to a store that is shared: `replica` is another's.

    What is kept is in a real local store. A change is kept if the session is as it was when it was read, as
    `base.Store` says; each member has a fate of its own.
    """

    local = None
    is_volatile = False
    damage = ""
    first_revision = 0

    def __init__(self, shared: LocalStore) -> None:
        self.shared = shared
        self.secret = shared.secret
        self.incarnation = shared.incarnation
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        """Each call that names sessions, as it came: read, tombstones, commit."""
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
        return RemoteStore(self.shared)

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

    async def get_many(self, session_ids: Sequence[str]) -> list[Stored | None]:
        await self._pass("read", session_ids, held=self.reads_held)
        if self.read_error is not None:
            raise type(self.read_error)(*self.read_error.args)
        return self.shared.get_many(session_ids)

    async def get(self, session_id: str) -> Stored | None:
        return (await self.get_many([session_id]))[0]

    async def tombstones(self, session_ids: Sequence[str]) -> list[Tombstone | None]:
        await self._pass("tombstones", session_ids, held=False)
        return self.shared.tombstones(session_ids)

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
        if batch.documents:
            self.shared.commit(Batch(documents=batch.documents))
        return self._commit(batch, puts)

    def _commit(self, batch: Batch, puts: Sequence[tuple[str, bytes]]) -> Committed:
        stones = {stone.session_id: stone for stone in batch.tombstones}
        new = set(batch.forgets)
        conflicts: set[str] = set()
        unknown: set[str] = set()
        for session_id, record in puts:
            there = self._header(session_id)
            revision = decode_header(session_id, record).revision
            if (
                (there is not None)
                if session_id in new
                else (there is None or there.revision + 1 != revision)
            ):
                conflicts.add(session_id)
                continue
            if self._is_kept(session_id, unknown):
                model = decode_header(session_id, record).model
                began = [(model, 1)] if session_id in new else []
                forgets = [session_id] if session_id in new else []
                tenants = counts.of_tenants([(session_id, name) for name, _ in began], 1)
                self.shared.commit(
                    Batch(puts=[(session_id, record)], forgets=forgets, counts=began, tenant_counts=tenants)
                )
        for session_id in batch.deletes:
            there, stone = self._header(session_id), stones.get(session_id)
            if stone is not None and (
                there is None or (there is not _MISSING and there.revision != stone.revision)
            ):
                conflicts.add(session_id)
                continue
            if self._is_kept(session_id, unknown):
                gone = there.model if there is not None else ""
                ended = [(gone, -1)] if gone else []
                own = [] if stone is None else [stone]
                tenants = counts.of_tenants([(session_id, name) for name, _ in ended], -1)
                self.shared.commit(
                    Batch(deletes=[session_id], tombstones=own, counts=ended, tenant_counts=tenants)
                )
        return Committed(frozenset(conflicts), frozenset(unknown))

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

    async def announce(self, listen: str) -> None:
        self.shared.announce(listen)

    async def check(self) -> StoreHealth:
        return self.shared.check()

    async def close(self) -> None:
        self.let_go()
