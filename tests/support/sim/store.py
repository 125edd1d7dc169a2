"""One replica's way to the shards: a client of the modelled Valkey, with the face that the engine knows."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.errors import Unavailable
from stepwell_server.store.base import ALL_KEPT, Batch, Committed, Fetched, Store, StoreHealth, Unused
from stepwell_server.store.heads import Heads, heads_of
from stepwell_server.store.record import Header, header_or_none
from support.sim.network import Network, Refused, answer_on
from support.sim.shard import Delete, Put, Seen, Shard, Write, Wrote
from support.sim.world import NodeLoop

T = TypeVar("T")
_TIMEOUT_S = 1.0
_ATTEMPTS = 3


@dataclasses.dataclass
class Bugs:
    """What may be wrong with a client on purpose, for tests of what finds it."""

    unknown_is_kept: bool = False
    fences_nothing: bool = False
    ignores_stamps: bool = False
    ignores_tombstones: bool = False
    conflicts_after_attempts: bool = False
    waits_for_no_disk: bool = False


class SimStore(Store):
    """See the module."""

    local = None
    is_volatile = False
    damage = ""
    first_revision = 0
    secret = b"s" * 32
    incarnation = "5eed5eed"

    def __init__(
        self, loop: NodeLoop, network: Network, shards: Sequence[Shard], clock: Clock, bugs: Bugs
    ) -> None:
        self.loop = loop
        self.network = network
        self.shards = shards
        self.clock = clock
        self.bugs = bugs

    def _shard(self, session_id: str) -> int:
        return zlib.crc32(session_id.encode()) % len(self.shards)

    # ------------------------------------------------------------------------------------------------------- requests

    async def _ask(
        self, shard: Shard, what: str, ask: Callable[[], T], *, waits: Callable[[T], bool] = lambda _: False
    ) -> T:
        """One request, sent once.

        Raises:
            Refused: it was not taken.
            TimeoutError: nobody answered: it may have been done, or may be done yet.
        """
        answer: asyncio.Future[T] = self.loop.create_future()
        world, name, generation = self.loop.world, self.loop.name, shard.generation
        there = f"shard-{shard.number}"

        def arrive() -> None:
            if shard.is_down or generation != shard.generation:
                world.note(name, what, "meets nobody at", there)
                self.network.send(there, name, answer_on, self.loop, answer, Refused(there))
                return
            result = ask()
            world.note(name, what, "at", there)
            now = shard.generation

            def tell() -> None:
                if now == shard.generation:
                    self.network.send(there, name, answer_on, self.loop, answer, result)

            if shard.must_sync and waits(result):
                shard.when_durable(shard.offset, tell)
            else:
                tell()

        self.network.send(name, there, arrive)
        return await asyncio.wait_for(answer, _TIMEOUT_S)

    async def _read(self, shard: Shard, what: str, ask: Callable[[], T], **more: Any) -> T:
        """A request that may be made again and again.

        Raises:
            Unavailable: nobody answered it.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return await self._ask(shard, what, ask, **more)
            except (Refused, TimeoutError):
                await asyncio.sleep(0.05 * (attempt + 1) * self.loop.world.random.random())
        raise Unavailable("the store must answer; it did not")

    async def _write(self, shard: Shard, what: str, write: Write) -> Wrote | bool:
        """What became of a write, or whether it may have been done."""
        may_have = False
        for attempt in range(_ATTEMPTS):
            try:
                wrote = await self._ask(shard, what, lambda: self._do(shard, write), waits=self._waits)
                if not may_have or self.bugs.conflicts_after_attempts:
                    return wrote
                # what is in conflict now may have been kept by an attempt before, and been followed by another's change
                return Wrote(frozenset(), wrote.stale, wrote.unknown | wrote.conflicts)
            except Refused:
                pass
            except TimeoutError:
                may_have = True
            await asyncio.sleep(0.05 * (attempt + 1) * self.loop.world.random.random())
        return may_have

    def _waits(self, _wrote: Wrote) -> bool:
        return not self.bugs.waits_for_no_disk

    def _do(self, shard: Shard, write: Write) -> Wrote:
        wrote = shard.write(write)
        if shard.must_sync:
            shard.fence()  # WAITAOF is for writes of the same connection, and this may be an attempt after the first
        return wrote

    # ------------------------------------------------------------------------------------------------------- the face

    async def commit(self, batch: Batch) -> Committed:
        writes = self._writes(batch)
        parts = await asyncio.gather(
            *(self._write(self.shards[n], _name_of(write), write) for n, write in writes.items())
        )
        if not any(isinstance(part, Wrote) or part for part in parts):
            raise Unavailable("the store must take the change; it was not reached")
        conflicts: set[str] = set()
        unknown: set[str] = set()
        stale: set[str] = set()
        for write, part in zip(writes.values(), parts, strict=True):
            if isinstance(part, Wrote):
                conflicts |= part.conflicts
                unknown |= part.unknown
                stale |= part.stale
            elif not self.bugs.unknown_is_kept:
                unknown |= {put.session_id for put in write.puts}
                unknown |= {gone.session_id for gone in write.deletes}
                if write.documents:
                    raise Unavailable("the store must say that it kept a document; it did not answer")
        if not (conflicts or unknown or stale):
            return ALL_KEPT
        return Committed(frozenset(conflicts), frozenset(unknown), frozenset(stale))

    def _writes(self, batch: Batch) -> dict[int, Write]:
        """The batch by shard, as it is now: whoever made it may fill its buffers with the next one."""
        puts: dict[int, list[Put]] = {}
        deletes: dict[int, list[Delete]] = {}
        stones = {stone.session_id: stone for stone in batch.tombstones}
        for (session_id, record), follows, stamp in zip(
            batch.puts, batch.follows.tolist(), batch.stamps.tolist(), strict=True
        ):
            puts.setdefault(self._shard(session_id), []).append(
                Put(session_id, bytes(record), follows, stamp)
            )
        most_s = batch.idle_most_s.tolist() or [math.inf] * len(batch.deletes)
        for session_id, follows, most in zip(
            batch.deletes, batch.delete_follows.tolist(), most_s, strict=True
        ):
            gone = Delete(session_id, follows, stones.get(session_id), batch.idle_s, most)
            deletes.setdefault(self._shard(session_id), []).append(gone)
        follow = batch.documents_follow
        documents = [(name, content, follow.get(name, ...)) for name, content in batch.documents]
        numbers = sorted({*puts, *deletes, *([0] if documents else [])})
        return {n: Write(puts.get(n, ()), deletes.get(n, ()), documents if n == 0 else ()) for n in numbers}

    async def fetch(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[Fetched]:
        places: dict[int, list[int]] = {}
        for place, session_id in enumerate(session_ids):
            places.setdefault(self._shard(session_id), []).append(place)
        stamps = list(known) or [0] * len(session_ids)
        found: dict[int, Fetched] = {}

        async def ask(number: int, own: Sequence[int]) -> None:
            shard, ids = self.shards[number], [session_ids[place] for place in own]
            wanted = [stamps[place] for place in own]

            def read() -> list[Seen]:
                seen = shard.fetch(ids)
                if needs_fence(seen):
                    shard.fence()
                return seen

            def needs_fence(seen: Sequence[Seen]) -> bool:
                if self.bugs.fences_nothing:
                    return False
                return any(
                    each.entry is None or each.entry.stamp != stamp
                    for each, stamp in zip(seen, wanted, strict=True)
                )

            for place, stamp, each in zip(
                own,
                wanted,
                await self._read(shard, f"fetch {' '.join(ids)}", read, waits=needs_fence),
                strict=True,
            ):
                found[place] = _fetched(each, stamp)

        await asyncio.gather(*(ask(number, own) for number, own in sorted(places.items())))
        return [found[place] for place in range(len(session_ids))]

    async def touch(self, session_ids: Sequence[str], stamps: Sequence[int]) -> None:
        for session_id, stamp in zip(session_ids, stamps, strict=True):
            await self._touch(session_id, int(stamp))

    async def _touch(self, session_id: str, stamp: int) -> None:
        shard = self.shards[self._shard(session_id)]
        await self._read(shard, f"touch {session_id}", lambda: shard.touch([session_id], [stamp]))

    async def renew_clients(self, client_ids: Sequence[int], leases_s: Sequence[float]) -> None:
        shard = self.shards[0]
        await self._read(
            shard, "renew", lambda: shard.clients.update(dict.fromkeys(client_ids, shard.world.now))
        )

    async def claim(self, name: str, whose: str, for_s: float) -> bool:
        shard = self.shards[0]
        return await self._read(shard, f"claim {name}", lambda: shard.claim(name, whose, for_s))

    async def unused(self, cursor: str = "", *, idle_s: float, limit: int) -> Unused:
        found = await self._records(cursor, "", limit)
        some = [each for each in found if each[2] >= idle_s]
        return Unused(
            heads_of([i.encode() for i, *_ in some], [record for _, record, *_ in some]),
            np.array([stamp for *_, stamp in some], np.uint64),
            np.array([age_s for _, _, age_s, _ in some], np.float64),
            found[-1][0] if len(found) == limit else "",
        )

    async def clients_unseen(self, client_ids: Sequence[int]) -> list[float]:
        shard = self.shards[0]
        return await self._read(
            shard,
            "unseen",
            lambda: [shard.world.now - shard.clients.get(i, -math.inf) for i in client_ids],
        )

    async def _records(self, after: str, prefix: str, limit: int) -> list[tuple[str, bytes, float, int]]:
        parts = await asyncio.gather(*(self._read(shard, "scan", shard.records) for shard in self.shards))
        found = sorted(each for part in parts for each in part)
        return [each for each in found if each[0] > after and each[0].startswith(prefix)][:limit]

    async def scan(self, *, after: str = "", prefix: str = "", limit: int) -> list[tuple[str, Header | None]]:
        found = await self._records(after, prefix, limit)
        now = self.clock.now()
        headers = [(i, header_or_none(i, record), idle_s) for i, record, idle_s, _ in found]
        return [
            (i, None if head is None else dataclasses.replace(head, last_used=now - idle_s))
            for i, head, idle_s in headers
        ]

    async def heads(self, *, after: str = "", limit: int) -> Heads:
        found = await self._records(after, "", limit)
        made = heads_of([i.encode() for i, *_ in found], [record for _, record, *_ in found])
        made.heads["last_used"] = self.clock.now() - np.array([idle_s for _, _, idle_s, _ in found])
        return made

    async def count(self) -> int:
        return len(await self._records("", "", 2**31))

    async def count_of(self, model: str) -> int:
        found = await self.scan(limit=2**31)
        return sum(head is not None and head.model == model for _, head in found)

    async def documents(self, prefix: str = "") -> dict[str, bytes]:
        shard = self.shards[0]

        def read() -> dict[str, bytes]:
            if shard.must_sync:
                shard.fence()
            return {
                name: shard.documents[name] for name in sorted(shard.documents) if name.startswith(prefix)
            }

        return await self._read(shard, "documents", read, waits=lambda _: True)

    def tell_of_documents(self, changed: Callable[[], None]) -> None:
        """Nobody is told: whoever has to know asks."""

    async def announce(self, listen: str) -> None:
        """Nobody finds it."""

    async def check(self) -> StoreHealth:
        return StoreHealth()

    async def close(self) -> None:
        """There is nothing."""


def _fetched(seen: Seen, known: int) -> Fetched:
    entry = seen.entry
    if entry is None:
        return Fetched(None, None)
    if entry.record is None:
        return Fetched(None, entry.stone, entry.stamp, idle_s=seen.idle_s)
    if known and entry.stamp == known:
        return Fetched(None, None, known, is_known=True, idle_s=seen.idle_s)
    return Fetched(entry.record, None, entry.stamp, idle_s=seen.idle_s)


def _name_of(write: Write) -> str:
    puts = [f"{'put' if put.follows else 'begin'} {put.session_id}" for put in write.puts]
    return " ".join(
        [*puts, *(f"end {gone.session_id}" for gone in write.deletes), *(d[0] for d in write.documents)]
    )
