"""A model of one Valkey primary with its replica: compare-and-set by stamps, a log, and what survives a fail-over.

It does at once what a request says when the request arrives. What it has done is durable some time later; in `sync` a
client waits for that. A fail-over takes the last writes back: any of those that are not durable.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from stepwell_server.errors import StateCorrupt
from stepwell_server.store.base import Tombstone
from stepwell_server.store.record import Header, decode_header
from support.linear import Life, Rollback
from support.sim.world import World


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What is under a session's key: a record or a tombstone."""

    stamp: int
    record: bytes | None
    stone: Tombstone | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Put:
    """A record that follows another."""

    session_id: str
    record: bytes
    follows: int
    stamp: int


@dataclasses.dataclass(frozen=True, slots=True)
class Delete:
    """A session that ends, with or without a word."""

    session_id: str
    follows: int
    stone: Tombstone | None
    idle_s: float = 0.0
    most_s: float = math.inf
    """It must have been unused for so long, at least and at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """What is asked for in one request. `documents`: name, content, and what it must be (`...`: anything)."""

    puts: Sequence[Put] = ()
    deletes: Sequence[Delete] = ()
    documents: Sequence[tuple[str, bytes | None, object]] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Wrote:
    """What became of it: ids and names of what was not as it had to be."""

    conflicts: frozenset[str]
    stale: frozenset[str]
    unknown: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """A session as a request sees it."""

    entry: Entry | None
    idle_s: float


class Shard:
    """One primary, for a part of all sessions."""

    def __init__(self, world: World, number: int, *, must_sync: bool, flush_s: float) -> None:
        self.world = world
        self.number = number
        self.must_sync = must_sync
        self.is_down = False
        self.entries: dict[str, Entry] = {}
        self.used: dict[str, float] = {}
        self.documents: dict[str, bytes] = {}
        self.clients: dict[int, float] = {}
        self.claims: dict[str, tuple[str, float]] = {}
        self.rollbacks: list[Rollback] = []
        self.generation = 0
        """Of primaries: requests to an earlier one are never answered."""
        self._log: list[tuple[float, str, Entry | None, bool]] = []
        """When each session was written, what it was before, and whether more than its stamp was changed."""
        self._documents_log: list[tuple[int, dict[str, bytes]]] = []
        self._durable = 0
        self._tombstones = 0
        """Stamps of tombstones are these numbers: no other stamps are so small."""
        self._flushing = False
        self._waiting: list[tuple[int, Callable[[], None]]] = []
        self.flush_s = flush_s
        self.ignores_tombstones = False
        self.ignores_stamps = False
        """A bug to be found: revisions alone are compared."""

    @property
    def offset(self) -> int:
        """How much was written so far."""
        return len(self._log)

    # ------------------------------------------------------------------------------------------------------ requests

    def write(self, asked: Write) -> Wrote:
        """Do what may be done of a request."""
        conflicts: set[str] = set()
        stale: set[str] = set()
        for put in asked.puts:
            there = self.entries.get(put.session_id)
            if there is not None and there.stamp == put.stamp:
                continue  # it was this very commit
            if not self._may_follow(put, there):
                conflicts.add(put.session_id)
                continue
            self._set(put.session_id, Entry(put.stamp, put.record))
            self.used[put.session_id] = self.world.now
        for delete in asked.deletes:
            there = self.entries.get(delete.session_id)
            if delete.stone is not None and there is not None and there.stone == delete.stone:
                continue
            if not self._may_delete(delete, there):
                conflicts.add(delete.session_id)
                continue
            entry = None
            if delete.stone is not None:
                self._tombstones += 1
                entry = Entry(self._tombstones, None, delete.stone)
            if entry is not None or there is not None:
                self._set(delete.session_id, entry)
        for name, content, must_be in asked.documents:
            if (
                must_be is not ...
                and self.documents.get(name) != must_be
                and self.documents.get(name) != content
            ):
                stale.add(name)
                continue
            self._documents_log.append((self.offset, dict(self.documents)))
            if content is None:
                self.documents.pop(name, None)
            else:
                self.documents[name] = content
            self._set("", None)
        return Wrote(frozenset(conflicts), frozenset(stale))

    def _may_follow(self, put: Put, there: Entry | None) -> bool:
        if self.ignores_tombstones and (there is None or there.record is None):
            return True
        if self.ignores_stamps and there is not None and there.record is not None:
            return _revision(put.session_id, there) + 1 == _header(put.session_id, put.record).revision
        return put.follows == (0 if there is None else there.stamp)

    def _may_delete(self, delete: Delete, there: Entry | None) -> bool:
        live = there is not None and there.record is not None
        idle_s = self.world.now - self.used.get(delete.session_id, 0.0)
        if idle_s < delete.idle_s or idle_s > delete.most_s:
            return False
        if not delete.follows:
            return live or delete.stone is None
        if self.ignores_stamps and delete.stone is not None:
            return live and _revision(delete.session_id, there) == delete.stone.revision
        return live and there is not None and there.stamp == delete.follows

    def fetch(self, session_ids: Sequence[str]) -> list[Seen]:
        """What there is of sessions."""
        now = self.world.now
        return [
            Seen(self.entries.get(i), now - self.used[i] if i in self.used else math.nan) for i in session_ids
        ]

    def touch(self, session_ids: Sequence[str], stamps: Sequence[int]) -> None:
        """Sessions are used, if they are as the caller knows them."""
        for session_id, stamp in zip(session_ids, stamps, strict=True):
            there = self.entries.get(session_id)
            if there is not None and there.record is not None and there.stamp == stamp:
                self.used[session_id] = self.world.now

    def fence(self) -> None:
        """A write that changes nothing: all before it is durable when it is."""
        self._set("", None)

    def records(self) -> list[tuple[str, bytes, float, int]]:
        """All sessions that are there, by id; for how long each has been idle, and its stamp."""
        now = self.world.now
        return [
            (i, each.record, now - self.used.get(i, now), each.stamp)
            for i, each in sorted(self.entries.items())
            if each.record is not None
        ]

    def claim(self, name: str, whose: str, for_s: float) -> bool:
        """Whether a task is given to who asks for it."""
        has, until = self.claims.get(name, ("", 0.0))
        if has != whose and until > self.world.now:
            return False
        self.claims[name] = (whose, self.world.now + for_s)
        return True

    def _set(self, session_id: str, entry: Entry | None) -> None:
        there = self.entries.get(session_id)
        is_stamp = entry is not None and there is not None and entry.record == there.record is not None
        self._log.append((self.world.now, session_id, there, not is_stamp))
        if session_id:
            if entry is None:
                self.entries.pop(session_id, None)
            else:
                self.entries[session_id] = entry
        if self.must_sync and not self._flushing:
            self._flushing = True
            self._flush_soon()

    # ---------------------------------------------------------------------------------------------------- durability

    def when_durable(self, offset: int, call: Callable[[], None]) -> None:
        """Call when all that was written before `offset` survives any fail-over."""
        if offset <= self._durable:
            call()
        else:
            self._waiting.append((offset, call))

    def _flush_soon(self) -> None:
        self.world.after(
            self.world.random.expovariate(1 / self.flush_s), self._flush, self.offset, self.generation
        )

    def _flush(self, offset: int, generation: int) -> None:
        if generation != self.generation:
            return
        self._durable = max(self._durable, offset)
        due = [call for at, call in self._waiting if at <= self._durable]
        self._waiting = [(at, call) for at, call in self._waiting if at > self._durable]
        for call in due:
            call()
        self._flushing = self._durable < self.offset
        if self._flushing:
            self._flush_soon()

    def fail_over(self, most_s: float) -> None:
        """The replica takes over, without some of the last writes: none that are durable, none older than `most_s`."""
        first = max(
            self._durable,
            next((n for n, (at, *_) in enumerate(self._log) if at >= self.world.now - most_s), self.offset),
        )
        cut = self.world.random.randint(first, self.offset)
        before: dict[str, Entry | None] = {}
        writes: dict[str, int] = {}
        for _, session_id, entry, is_change in reversed(self._log[cut:]):
            if session_id:
                before[session_id] = entry
                writes[session_id] = writes.get(session_id, 0) + is_change
        del self._log[cut:]
        while self._documents_log and self._documents_log[-1][0] >= cut:
            self.documents = self._documents_log.pop()[1]
        for session_id, entry in before.items():
            if entry is None:
                self.entries.pop(session_id, None)
            else:
                self.entries[session_id] = entry
            if not writes[session_id]:
                continue
            at = self.world.moment()
            life = _life(entry)
            revision = _revision(session_id, entry) if life == "live" else 0
            self.rollbacks.append(Rollback(at, session_id, writes[session_id], life, revision))
            self.world.note("lost", session_id, writes[session_id], life, revision)
        self.generation += 1
        self._durable = min(self._durable, cut)
        self._waiting = []
        self._flushing = False
        if self.must_sync and self._durable < self.offset:
            self._flushing = True
            self._flush_soon()


def _header(session_id: str, record: bytes) -> Header:
    return decode_header(session_id, record)


def _revision(session_id: str, entry: Entry | None) -> int:
    try:
        return 0 if entry is None or entry.record is None else _header(session_id, entry.record).revision
    except StateCorrupt:
        return 0


def _life(entry: Entry | None) -> Life:
    if entry is None:
        return "absent"
    if entry.stone is not None:
        return "expired" if entry.stone.end.name != "CLOSED" else "closed"
    return "live"


Known = Mapping[str, int]
