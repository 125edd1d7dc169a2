"""A store that several servers share. The test holds its answers back, loses them or makes them errors."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.quotas import Usage
from stepwell_server.errors import Unavailable
from stepwell_server.store import counts
from stepwell_server.store.access.remote_reads import RemoteReads
from stepwell_server.store.access.remote_writes import RemoteWrites
from stepwell_server.store.base import (
    Answer,
    Batch,
    CommitResult,
    Store,
    StoredSession,
    StoreHealth,
    UnusedSessions,
    Write,
    new_stamp,
)
from stepwell_server.store.heads import Heads, heads_of
from support.clock import ManualClock
from support.engine.fake_executor import WAIT_S


@dataclasses.dataclass(slots=True)
class Service:
    """Whether servers use a store: one for all of them."""

    is_constant: bool = True
    """They use it all the time, whatever the clock does; else they must claim it, as they do."""


class Gated(Store):
    """One server's view of a shared store. The store behind it does the work; the test decides what comes back.

    Each call waits one turn of the event loop, so that no call is answered at once.
    """

    local = None
    elsewhere = "another server on the same store may have it"

    def __init__(self, inner: Any, service: Service | None = None) -> None:
        self.inner = inner
        """`ValkeyStore`, or the fake of `fake_shared_store`."""
        self.service = service or Service()
        self.own_clock: Clock = ManualClock()
        """The server's. Heads and headers have its time."""
        self.secret = inner.secret
        self.incarnation = inner.incarnation
        self.labels = {"store_id": inner.incarnation, "shared": "true"}
        self.first_revision = inner.first_revision
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        """Each call with the names in it, as it came: read, commit."""
        self.tried: list[Batch] = []
        """Each batch that came to be committed."""
        self.reads_held = self.commits_held = False
        self.answers_held = False
        """Commits are made when they come, and their answers are held back."""
        self.read_error: Exception | None = None
        self.commit_error: Exception | None = None
        self.documents_error: Exception | None = None
        self.told_error: Exception | None = None
        """Raised by `touch` and `claim`."""
        self.refuses: Callable[[Batch], bool] = lambda _batch: False
        """Commits that fail, whichever others share them."""
        self.unknown: dict[str, bool] = {}
        """Sessions whose next commit is not answered; whether it is kept nevertheless."""
        self.is_told = True
        """Of documents that others have written."""
        self.max_commits = 0
        """Concurrent commits, at most."""
        self.is_killed = False
        """The server that used it is gone."""
        self._commits_now = 0
        self._errors: deque[tuple[Exception, bool]] = deque()
        self._gates: list[tuple[str, asyncio.Future[None]]] = []
        self._together: RemoteWrites | None = None
        self._reads: RemoteReads | None = None
        self._came = asyncio.Event()
        self._stalled_at = 0

    @property
    def damage(self) -> str:
        return str(self.inner.damage)

    async def another(self) -> Gated:
        """The same store as another server sees it."""
        raise NotImplementedError

    def serve(self, clock: Clock) -> None:
        """A server with this clock uses it."""
        self.own_clock = clock

    # ------------------------------------------------------------------------------------------- what the test decides

    def fail(self, error: Exception, times: int = 1, *, kept: bool = False) -> None:
        """Let the next commits fail; `kept`: after they were kept."""
        self._errors.extend([(error, kept)] * times)

    def stall(self, *, kept: bool = False) -> None:
        """Hold commits back from now on, until `release`; `kept`: after they were kept."""
        self.commits_held, self.answers_held = not kept, kept
        self._stalled_at = len(self.asked("answer" if kept else "commit"))

    def kill(self) -> None:
        """Keep no more changes of the server."""
        self.is_killed = True
        self.commit_error = self.told_error = Unavailable("the server was killed")

    async def stalled(self) -> None:
        """Return when a commit is held back."""
        await self.until("answer" if self.answers_held else "commit", self._stalled_at + 1)

    def release(self) -> None:
        """Release all answers that are held back, and hold no more."""
        self.reads_held = self.commits_held = self.answers_held = False
        self.release_once()

    def release_once(self, *kinds: str) -> None:
        """Release the answers held back now, of these kinds or of all; later ones are held as before."""
        gates, self._gates = self._gates, []
        for kind, gate in gates:
            if kinds and kind not in kinds:
                self._gates.append((kind, gate))
            elif not gate.done():
                gate.set_result(None)

    def asked(self, kind: str) -> list[tuple[str, ...]]:
        """The names in each call of a kind so far."""
        return [names for found, names in self.calls if found == kind]

    async def until(self, kind: str, count: int = 1) -> None:
        """Return when this many calls of a kind have come."""

        async def wait() -> None:
            while len(self.asked(kind)) < count:
                self._came.clear()
                await self._came.wait()

        await asyncio.wait_for(wait(), WAIT_S)

    # ------------------------------------------------------------------------------------ what the test sees at any time

    async def found(self, *session_ids: str) -> list[StoredSession]:
        """The stored sessions, read past all gates and errors."""
        return list(await self.inner.read(list(session_ids)))

    async def ids(self) -> set[str]:
        """The sessions that the store has now."""
        return {key.decode() for key in (await self.inner.heads(limit=10_000)).keys}

    async def put_back(self, session_id: str, before: StoredSession) -> None:
        """Have the store lose all writes to a session since `before`, as a failover can."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ what the engine asks

    async def _pass(self, kind: str, names: Sequence[str], *, held: bool) -> None:
        self.calls.append((kind, tuple(names)))
        self._came.set()
        if held:
            gate = asyncio.get_running_loop().create_future()
            self._gates.append((kind, gate))
            await gate
        else:
            await asyncio.sleep(0)

    async def _read(self, kind: str, *names: str) -> None:
        await self._pass(kind, names, held=self.reads_held)
        _raise(self.read_error)

    async def _tell(self, kind: str, names: Sequence[str]) -> None:
        await self._pass(kind, names, held=self.commits_held)
        _raise(self.told_error)

    async def fetch(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[StoredSession]:
        if self._reads is None:
            self._reads = RemoteReads(lambda ids, known: self.read(ids, known))  # noqa: PLW0108 - tests replace it
        return await self._reads.fetch(session_ids, known)

    async def read(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[StoredSession]:
        """As `ValkeyStore.read`."""
        await self._read("read", *session_ids)
        return list(await self.inner.read(session_ids, known))

    async def touch(self, session_ids: Sequence[str], stamps: Sequence[int]) -> None:
        await self._tell("touch", session_ids)
        await self.inner.touch(session_ids, stamps)

    async def unused(self, cursor: str = "", *, limits: IdleLimits, limit: int) -> UnusedSessions:
        await self._read("unused")
        return cast("UnusedSessions", await self.inner.unused(cursor, limits=limits, limit=limit))

    async def claim(self, name: str, whose: str, for_s: float) -> float | None:
        if name == "service" and self.service.is_constant:
            return math.inf
        await self._tell(f"claim {name}", [name])
        return cast("float | None", await self.inner.claim(name, whose, for_s))

    def new_stamp(self) -> int:
        return new_stamp()

    def commit(self, write: Write) -> Answer | None:
        if self._together is None:
            self._together = RemoteWrites(lambda batch: self.apply(batch))  # noqa: PLW0108 - tests replace it
        return self._together.commit(write)

    async def end_commits(self, timeout_s: float) -> bool:
        return self._together is None or await self._together.end(timeout_s)

    async def apply(self, batch: Batch) -> CommitResult:
        """As `ValkeyStore.apply`."""
        # as it is now: whoever made it may fill its buffers with the next one
        batch = dataclasses.replace(batch, puts=[(name, bytes(record)) for name, record in batch.puts])
        self.tried.append(batch)
        error, kept = self._errors.popleft() if self._errors else (None, True)
        if self.refuses(batch):
            error, kept = Unavailable("the test says no"), False
        self._commits_now += 1
        self.max_commits = max(self.max_commits, self._commits_now)
        names = [*(name for name, _ in batch.puts), *batch.deletes]
        try:
            await self._pass("commit", names, held=self.commits_held)
        finally:
            self._commits_now -= 1
        _raise(self.commit_error)
        if not kept:
            _raise(error)
        committed = await self._applied(batch)
        if self.answers_held:
            await self._pass("answer", names, held=True)
        _raise(error)
        return committed

    async def _applied(self, batch: Batch) -> CommitResult:
        named = {*(name for name, _ in batch.puts), *batch.deletes}
        unknown = {name: self.unknown.pop(name) for name in list(self.unknown) if name in named}
        lost = {name for name, kept in unknown.items() if not kept}
        committed: CommitResult = await self.inner.apply(_without(batch, lost))
        return (
            dataclasses.replace(committed, unknown=frozenset(unknown) - committed.conflicts)
            if unknown
            else committed
        )

    async def heads(self, *, after: str = "", prefix: str = "", limit: int) -> Heads:
        await self._read("heads")
        return cast("Heads", await self.inner.heads(after=after, prefix=prefix, limit=limit))

    async def count(self) -> int:
        await self._read("count", "")
        return int(await self.inner.count())

    async def usage(self, tenant: str) -> Usage:
        return await counts.usage_of_tenant(self, tenant)

    async def uncounted(self, *, after: str = "", limit: int) -> Heads:
        return heads_of([], [])

    async def count_of(self, model: str) -> int:
        await self._read("count", model)
        return int(await self.inner.count_of(model))

    async def documents(self, prefix: str = "") -> dict[str, bytes]:
        await asyncio.sleep(0)
        _raise(self.documents_error)
        return dict(await self.inner.documents(prefix))

    async def documents_changed(self) -> None:
        await self.inner.documents_changed()
        while not self.is_told:
            await self.inner.documents_changed()

    async def announce(self, listen: str) -> None:
        await self.inner.announce(listen)

    async def check(self) -> StoreHealth:
        return cast("StoreHealth", await self.inner.check())

    async def close(self) -> None:
        self.release()


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error.with_traceback(None)


def _without(batch: Batch, names: Collection[str]) -> Batch:
    """A batch without its changes to some sessions."""
    if not names:
        return batch
    puts = [place for place, (name, _) in enumerate(batch.puts) if name not in names]
    deletes = [place for place, name in enumerate(batch.deletes) if name not in names]
    return dataclasses.replace(
        batch,
        puts=[batch.puts[place] for place in puts],
        follows=batch.follows[puts],
        stamps=batch.stamps[puts],
        deletes=[batch.deletes[place] for place in deletes],
        delete_follows=batch.delete_follows[deletes],
        min_idle_s=batch.min_idle_s[deletes] if len(batch.min_idle_s) else batch.min_idle_s,
        max_idle_s=batch.max_idle_s[deletes] if len(batch.max_idle_s) else batch.max_idle_s,
        forgets=[name for name in batch.forgets if name not in names],
        tombstones=[stone for stone in batch.tombstones if stone.session_id not in names],
    )
