"""The store on Valkey: `base.Store` for several servers at once."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from typing_extensions import override

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.quotas import Usage
from stepwell_server.errors import Overloaded, ServerError, StateCorrupt, StoreAway, StoreGone, StoreRefuses
from stepwell_server.logs import Log
from stepwell_server.process.replicas import EXPIRY_S, MAX_BYTES, MAX_ID_BYTES, MAX_REPLICAS, StoredReplica
from stepwell_server.store import counts
from stepwell_server.store.access.remote_reads import RemoteReads
from stepwell_server.store.access.remote_writes import RemoteWrites
from stepwell_server.store.base import (
    Answer,
    Batch,
    CommitResult,
    End,
    Store,
    StoredSession,
    StoreHealth,
    Tombstone,
    UnusedSessions,
    Write,
    new_stamp,
)
from stepwell_server.store.changes import joined
from stepwell_server.store.encryption.sealer import Sealer
from stepwell_server.store.heads import Heads, heads_of
from stepwell_server.store.record import RecordBytes, is_sound, key_id_of
from stepwell_server.store.valkey import documents, meta, scripts
from stepwell_server.store.valkey.commits import MAX_KEYS, Commits, Part, outcome_of
from stepwell_server.store.valkey.connection.client import ConnectionLost, Reply
from stepwell_server.store.valkey.connection.nodes import Topology
from stepwell_server.store.valkey.connection.requests import LIMIT, Request, Requests
from stepwell_server.store.valkey.connection.url import StoreUrl
from stepwell_server.store.valkey.health import examine
from stepwell_server.store.valkey.keys import (
    HEAD,
    INCOMPLETE,
    LOST,
    LOST_STAMP,
    META,
    OTHER_TYPE,
    RECORD,
    STAMP_BYTES,
    TOMBSTONE,
    UNMARKED,
    Keys,
    unpack_tombstone,
)
from stepwell_server.store.valkey.listing import ids_after
from stepwell_server.store.valkey.losses import Losses

_log = Log("store.valkey")
_NOTHING = StoredSession()
_MAX_READ_BYTES = 8 * 2**20
"""Maximum of bytes of records in the answers to one read, not counting the last record of each answer."""
_BATCH_SIZE = 2 * MAX_KEYS
_RETRY_AFTER_S = 1.0
#: Pages of unused sessions omit sessions used within this time. So sessions with a shorter limit end a little later.
_MIN_IDLE_S = 5.0
_DOCUMENTS_POLL_S = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Head:
    """The header of a session's record."""

    record: bytes
    """The record without rows and extra; empty if there is none."""
    stamp: int
    idle_s: float


_NO_HEAD, _LOST_HEAD = _Head(b"", 0, math.inf), _Head(b"", 0, 0.0)
_LOST, _OTHER_TYPE, _UNMARKED, _INCOMPLETE = (
    bytes([code]) for code in (LOST, OTHER_TYPE, UNMARKED, INCOMPLETE)
)


class _Group(NamedTuple):
    """Sessions to read in one script."""

    partition: int
    places: list[int]
    with_earlier: bool = False
    """Give the script the keys of their earlier records."""


class ValkeyStore(Store):
    """A store that several servers share. Lives on one event loop, and never blocks it."""

    local = None
    elsewhere = "another server on the same store may have it"

    def __init__(
        self,
        url: StoreUrl,
        found: meta.Meta,
        topology: Topology,
        requests: Requests,
        clock: Clock,
        sealer: Sealer | None,
        losses: Losses,
    ) -> None:
        self.secret = found.secret
        self.incarnation = found.incarnation
        self.labels = {"store_id": found.incarnation, "shared": "true"}
        self.first_revision = found.first_revision
        self._url = url
        self._keys = Keys(url.prefix, found.partitions)
        self._is_cluster = url.kind == "cluster"
        self._commits = Commits(self._keys, is_cluster=self._is_cluster, tombstone_s=url.tombstone_s)
        self._topology = topology
        self._requests = requests
        self._clock = clock
        self._sealer = sealer
        self._found = found
        self._durability: Literal["sync", "async"] = "sync" if requests.waits else "async"
        self._limit_s = LIMIT * url.timeout_s
        self._losses = losses
        self._mark_checks: set[asyncio.Task[None]] = set()
        self._writes = RemoteWrites(self.apply)
        self._reads = RemoteReads(self.read)

    @property
    @override
    def damage(self) -> str:
        return self._losses.damage

    @override
    def damage_of(self, session_id: str) -> str:
        return self._losses.damage_of(session_id)

    @override
    def commit(self, write: Write) -> Answer | None:
        return self._writes.commit(write)

    @override
    async def end_commits(self, timeout_s: float) -> bool:
        return await self._writes.end(timeout_s)

    def apply(self, batch: Batch) -> Awaitable[CommitResult]:
        """Commit a batch, keeping or refusing the change of each session, concurrently with other commits.

        The commit starts before the result is awaited, and no longer needs the batch's buffers when this returns.

        Raises:
            Unavailable: nothing was kept.
        """
        puts = batch.puts
        if self._sealer is not None and puts:
            batch = dataclasses.replace(batch, puts=self._sealer.seal(puts))
        # before the first wait: the caller may reuse the batch's buffers after that
        parts = self._commits.of(batch)
        if batch.documents:
            return self._commit_with_documents(batch, parts)
        committed: asyncio.Future[CommitResult] = asyncio.get_running_loop().create_future()

        def settle(_: object = None) -> None:
            try:
                committed.set_result(outcome_of(parts, frozenset(), documents_kept=False))
            except ServerError as error:
                committed.set_exception(error)

        def done() -> None:
            unmarked = _unmarked(parts)
            if not unmarked:
                settle()
                return
            task = asyncio.create_task(self._check_marks(unmarked))
            self._mark_checks.add(task)
            task.add_done_callback(self._mark_checks.discard)
            task.add_done_callback(settle)

        self._requests.begin([part.request for part in parts], done, waits=True)
        return committed

    async def _commit_with_documents(self, batch: Batch, parts: Sequence[Part]) -> CommitResult:
        stale = await self._write_documents(batch)
        if parts:
            await self._requests.send([part.request for part in parts], waits=True)
            unmarked = _unmarked(parts)
            if unmarked:
                await self._check_marks(unmarked)
        return outcome_of(parts, stale, documents_kept=True)

    async def _check_marks(self, partitions: Sequence[int]) -> None:
        """Check whether partitions were emptied, after their missing marks kept sessions from being created."""
        try:
            await self._losses.look(partitions)
        except ServerError as error:
            _log.warning("the store could not be checked for emptied partitions", error=error)

    async def _write_documents(self, batch: Batch) -> frozenset[str]:
        request = documents.writing(self._keys, batch)
        await self._requests.send([request], waits=True)
        if request.problem is not None:
            raise request.problem
        if not request.is_durable:
            raise _not_durable(self._url.replicas)
        return documents.stale_of(request.reply)

    @override
    async def fetch(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[StoredSession]:
        return await self._reads.fetch(session_ids, known)

    async def read(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[StoredSession]:
        """As `fetch`, without combining reads."""
        found = await self.stored(session_ids, known)
        for session_id, each in zip(session_ids, found, strict=True):
            if not each.record or (key_id := key_id_of(each.record)) is None or self._knows(key_id):
                continue
            if is_sound(session_id, each.record):
                raise StoreAway(self._lacks([key_id]), _RETRY_AFTER_S)
        return [
            dataclasses.replace(each, record=self._opened(session_id, each.record)) if each.record else each
            for session_id, each in zip(session_ids, found, strict=True)
        ]

    def _opened(self, session_id: str, value: RecordBytes) -> RecordBytes:
        """Return the record in a value, with whole rows and decrypted; a value that cannot be read stays unchanged."""
        opened = value if self._sealer is None else self._sealer.opened_or_as_is(session_id, value)
        return joined(session_id, opened)

    def _knows(self, key_id: str) -> bool:
        """Whether this server has a key."""
        return self._sealer is not None and self._sealer.knows(key_id)

    @staticmethod
    def _lacks(key_ids: Sequence[str]) -> str:
        return (
            f"other servers encrypt the store with {'key' if len(key_ids) == 1 else 'keys'}"
            f" {', '.join(sorted(key_ids))}, which this server lacks: restart it with the file that has them"
        )

    @override
    def new_stamp(self) -> int:
        return new_stamp()

    async def stored(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[StoredSession]:
        """As `fetch`, without decrypting records."""
        found = [_NOTHING] * len(session_ids)
        known = known if len(known) else [0] * len(session_ids)
        for at in range(0, len(session_ids), _BATCH_SIZE):
            left = [_Group(*each) for each in self._groups(session_ids[at : at + _BATCH_SIZE], at)]
            changed: list[_Group] = []
            if self._requests.confirms:
                while left:
                    left = await self._read(session_ids, known, left, found, changed)
                left = changed
            while left:
                left = await self._read(session_ids, known, left, found, None)
        return found

    async def _read(
        self,
        session_ids: Sequence[str],
        known: Sequence[int],
        groups: Sequence[_Group],
        found: list[StoredSession],
        changed: list[_Group] | None,
    ) -> list[_Group]:
        """Read sessions into `found`; return those that did not fit into the answers, and those with earlier records.

        If commits wait for replicas, a server's answer counts only if it is still their primary. Confirming that
        takes a moment, but waiting until the replicas have something on disk may take a second. So unchanged and
        missing sessions are
        only confirmed. Changed ones are added to `changed`, and read once more with a wait for the disks.
        """
        confirms, is_fenced = changed is not None, self._requests.waits
        stamps = np.array(known, np.uint64).tobytes() if any(known) else b""
        requests = [
            Request.of(
                partition,
                scripts.FETCH,
                self._keys.sessions([session_ids[place] for place in places], with_earlier=with_earlier),
                b"".join([stamps[STAMP_BYTES * i : STAMP_BYTES * (i + 1)] for i in places]),
                b"2" if self._requests.confirms else b"1" if is_fenced else b"0",
                _MAX_READ_BYTES // len(groups),
                len(places),
                b"1" if self._is_cluster else b"0",
            )
            for partition, places, with_earlier in groups
        ]
        replies = await self._ask(requests, waits=is_fenced, confirms=confirms)
        left, unmarked = list[_Group](), set[int]()
        for request, group, (now_ms, *values) in zip(requests, groups, replies, strict=True):
            partition, places, _ = group
            if self._requests.confirms and not request.is_durable:
                raise _not_durable(self._url.replicas)
            if len(values) < len(places):
                left.append(group._replace(places=places[len(values) :]))
            others, incomplete = list[int](), list[int]()
            for place, value in zip(places, values, strict=False):
                if value is None:
                    continue
                if value == _INCOMPLETE:
                    incomplete.append(place)
                    continue
                if value == _UNMARKED:
                    unmarked.add(self._keys.partition(session_ids[place]))
                    continue
                each = self._fetched(session_ids[place], value, now_ms, known[place])
                if confirms and len(value) > HEAD.size:
                    others.append(place)
                    continue
                found[place] = each
                if not (each.is_known or request.is_durable):
                    raise _not_durable(self._url.replicas)
            if changed is not None and others:
                changed.append(group._replace(places=others))
            if incomplete:
                left.append(_Group(partition, incomplete, with_earlier=True))
        if unmarked:
            await self._losses.look(list(unmarked))
        return left

    def _fetched(self, session_id: str, value: bytes, now_ms: int, known: int) -> StoredSession:
        if value == _LOST:
            self._losses.note([session_id])
            return StoredSession(tombstone=Tombstone(session_id, End.LOST, 0.0), stamp=LOST_STAMP)
        if len(value) < HEAD.size:
            if value == _OTHER_TYPE:
                key = str(self._keys.session(session_id), "utf-8", "replace")
                _log.error("a key of the store has another type: its session cannot be used", key=key)
            return StoredSession(b"")
        kind, packed, used_ms = HEAD.unpack_from(value)
        stamp = int.from_bytes(packed, "little")
        if kind == TOMBSTONE:
            return StoredSession(tombstone=_tombstone(session_id, value[HEAD.size :]), stamp=stamp)
        idle_s = max(0, now_ms - used_ms) / 1000
        if kind != RECORD:
            return StoredSession(b"", stamp=stamp, idle_s=idle_s)
        if known and stamp == known:
            return StoredSession(stamp=stamp, is_known=True, idle_s=idle_s)
        return StoredSession(value[HEAD.size :], stamp=stamp, idle_s=idle_s)

    @override
    async def touch(self, session_ids: Sequence[str], stamps: Sequence[int]) -> None:
        packed = np.array(stamps, np.uint64).tobytes()
        for at in range(0, len(session_ids), MAX_KEYS):
            some = session_ids[at : at + MAX_KEYS]
            own = packed[STAMP_BYTES * at : STAMP_BYTES * (at + len(some))]
            requests = [
                Request.of(
                    partition,
                    scripts.TOUCH,
                    [self._keys.session(some[place]) for place in places],
                    b"".join([own[STAMP_BYTES * i : STAMP_BYTES * (i + 1)] for i in places]),
                )
                for partition, places in self._groups(some)
            ]
            await self._requests.ask(*requests)

    @override
    async def unused(self, cursor: str = "", *, limits: IdleLimits, limit: int) -> UnusedSessions:
        """Return pages of one partition after the other."""
        number, _, after = cursor.partition(":")
        partition, size = int(number or 0), min(limit, MAX_KEYS)
        low = b"(" + after.encode() if after else b"-"
        command = (b"ZRANGEBYLEX", self._keys.ids(partition), low, b"+", b"LIMIT", 0, size)
        (keys,) = await self._requests.ask(Request(partition, command, otherwise=()))
        session_ids = [str(key, "utf-8", "replace") for key in keys]
        idle_s = min(limits.max_s, _MIN_IDLE_S)
        found = await self._read_heads(session_ids, idle_ms=int(idle_s * 1000))
        await self._bury([i for i, head in zip(session_ids, found, strict=True) if head is _LOST_HEAD])
        there = [place for place, head in enumerate(found) if head.record]
        if len(keys) == size:
            cursor = f"{partition}:{session_ids[-1]}"
        else:
            cursor = f"{partition + 1}:" if partition + 1 < self._keys.partitions else ""
        return UnusedSessions(
            heads_of(
                [keys[place] for place in there], [found[place].record for place in there], is_whole=False
            ),
            np.array([found[place].stamp for place in there], np.uint64),
            np.array([found[place].idle_s for place in there], np.float64),
            cursor,
        )

    async def _bury(self, session_ids: Sequence[str]) -> None:
        """Replace sessions that are listed, but whose keys are missing, by tombstones."""
        now = self._clock.now()
        parts = self._commits.burying([Tombstone(session_id, End.LOST, now) for session_id in session_ids])
        if parts:
            await self._requests.send([part.request for part in parts], waits=True)
        for part in parts:
            if part.request.problem is None:
                self._losses.note(set(part.session_ids).difference(part.refused))

    @override
    async def claim(self, name: str, whose: str, for_s: float) -> float | None:
        request = Request.of(META, scripts.CLAIM, [self._keys.claim(name)], whose, math.ceil(for_s * 1000))
        (held_ms,) = await self._requests.ask(request)
        return held_ms / 1000 if held_ms >= 0 else None

    @override
    async def heads(self, *, after: str = "", prefix: str = "", limit: int) -> Heads:
        while keys := await ids_after(self._requests, self._keys, after, prefix, limit):
            session_ids = [str(key, "utf-8", "replace") for key in keys]
            found = await self._read_heads(session_ids)
            there = [place for place, head in enumerate(found) if head is not _LOST_HEAD]
            if there:
                heads = heads_of(
                    [keys[place] for place in there], [found[place].record for place in there], is_whole=False
                )
                used = self._clock.now() - np.array([found[place].idle_s for place in there])
                heads.heads["last_used"] = np.maximum(0.0, used)
                return heads
            after = session_ids[-1]  # all of these were lost
        return heads_of([], [])

    async def _read_heads(self, session_ids: Sequence[str], *, idle_ms: int = 0) -> list[_Head]:
        """Read the headers of sessions that were unused for at least `idle_ms`."""
        found = [_NO_HEAD] * len(session_ids)
        size = 8 * MAX_KEYS
        for begin in range(0, len(session_ids), size):
            groups = [
                (partition, places[at : at + MAX_KEYS])
                for partition, places in self._groups(session_ids[begin : begin + size])
                for at in range(0, len(places), MAX_KEYS)
            ]
            replies = await self._requests.ask(
                *(
                    Request.of(
                        partition,
                        scripts.HEADS,
                        [self._keys.session(session_ids[begin + place]) for place in places],
                        idle_ms,
                    )
                    for partition, places in groups
                )
            )
            for (_, places), (now_ms, *values) in zip(groups, replies, strict=True):
                for place, value in zip(places, values, strict=True):
                    if value == _LOST:
                        found[begin + place] = _LOST_HEAD
                    elif len(value) >= HEAD.size:
                        _, stamp, used_ms = HEAD.unpack_from(value)
                        idle_s = max(0, now_ms - used_ms) / 1000
                        found[begin + place] = _Head(
                            value[HEAD.size :], int.from_bytes(stamp, "little"), idle_s
                        )
        return found

    @override
    async def count(self) -> int:
        every = range(self._keys.partitions)
        counts = (Request(p, (b"ZCARD", self._keys.ids(p)), otherwise=0) for p in every)
        return sum(await self._requests.ask(*counts))

    @override
    async def count_of(self, model: str) -> int:
        every = range(self._keys.partitions)
        counts = await self._requests.ask(
            *(Request(p, (b"HGET", self._keys.counts(p), model), otherwise=0) for p in every)
        )
        return sum(int(count or 0) for count in counts)

    @override
    async def usage(self, tenant: str) -> Usage:
        return await counts.usage_of_tenant(self, tenant)

    @override
    async def uncounted(self, *, after: str = "", limit: int) -> Heads:
        return heads_of([], [])

    @override
    async def documents(self, prefix: str = "") -> dict[str, bytes]:
        *_, read = requests = documents.reading(self._keys, fence=self._requests.waits)
        await self._ask(requests, waits=self._requests.waits)
        if not read.is_durable:
            raise _not_durable(self._url.replicas)
        return documents.found_in(read.reply, prefix)

    @override
    async def documents_changed(self) -> None:
        await asyncio.sleep(_DOCUMENTS_POLL_S)

    @override
    async def announce(self, listen: str) -> None:
        self._topology.call_itself(f"stepwell@{listen}")

    @override
    async def replicas(self, replica_id: str, document: bytes) -> Sequence[StoredReplica]:
        limits = (MAX_REPLICAS, MAX_ID_BYTES, MAX_BYTES, int(EXPIRY_S * 1000))
        request = Request.of(META, scripts.REPLICAS, [self._keys.replicas], replica_id, document, *limits)
        (found,) = await self._requests.ask(request)
        return [
            StoredReplica(str(key, "utf-8", "replace"), content, age_ms / 1000)
            for key, age_ms, content in zip(found[::3], found[1::3], found[2::3], strict=True)
        ]

    @override
    async def check(self) -> StoreHealth:
        try:
            lacking = await self._require_same_store()
            if lacking:
                return StoreHealth(problem=self._lacks(lacking), warns_of="store")
            async with asyncio.timeout(self._limit_s):
                await self._topology.look()
                found = await examine(self._topology, self._url, self._durability, self._url.timeout_s)
            problem = "; ".join([*found.unfit, *found.problems]) or await self._why_no_changes()
        except StoreAway as error:
            return StoreHealth(problem=f"{error.message}: {self._requests.trouble}", warns_of="store")
        except StoreGone:
            raise
        except StoreRefuses as error:
            return StoreHealth(problem=error.why, warns_of="store")
        except ServerError as error:
            return StoreHealth(problem=error.message, warns_of="store")
        except ConnectionLost as error:
            return StoreHealth(problem=str(error), warns_of="store")
        except TimeoutError:
            return StoreHealth(problem="its servers do not report their state", warns_of="store")
        warnings = [*found.warnings, self._losses.warning]
        return StoreHealth(
            problem=problem,
            warning="; ".join(each for each in warnings if each),
            warns_of="store",
            lost_sessions=self._losses.count,
        )

    async def _why_no_changes(self) -> str:
        """Test with an empty change why changes are not kept: a server's own report does not always show it.

        The user may lack a right, or the server may need more replicas or wait for one that hangs.

        Raises:
            ServerError: the server refuses, or does not answer.
        """
        request = documents.writing(self._keys, Batch())
        try:
            await self._ask([request], waits=self._requests.waits)
        except Overloaded:  # sessions can be read and closed without free memory
            return ""
        return "" if request.is_durable else _not_durable(self._url.replicas).message

    async def _require_same_store(self) -> list[str]:
        """Check that this is still the store that was opened. If its description was lost, create it again.

        Returns:
            Ids of keys that other servers encrypt the store with and that this server lacks.

        Raises:
            StoreGone: it is another store.
            Unavailable: it does not answer now.
        """
        was_made, incarnation, key_ids = await meta.ensure(self._requests, self._url.prefix, self._found)
        if incarnation != self._found.incarnation:
            raise StoreGone("the store must be the one that was opened; another one has replaced it")
        if was_made:
            _log.error("the description of the store was lost; it was written again", store=str(self._url))
        await self._losses.look_again()
        return [key_id for key_id in key_ids if not self._knows(key_id)]

    @override
    async def close(self) -> None:
        self._topology.close()

    async def _ask(self, requests: Sequence[Request], *, waits: bool, confirms: bool = False) -> list[Reply]:
        await self._requests.send(requests, waits=waits, confirms=confirms)
        for request in requests:
            if request.problem is not None:
                raise request.problem
        return [request.reply for request in requests]

    def _groups(self, session_ids: Sequence[str], first: int = 0) -> list[tuple[int, list[int]]]:
        """Group sessions that one script may read, by index counted from `first`."""
        if not self._is_cluster:
            return [(META, list(range(first, first + len(session_ids))))] if session_ids else []
        groups: dict[int, list[int]] = {}
        for place, session_id in enumerate(session_ids, first):
            groups.setdefault(self._keys.partition(session_id), []).append(place)
        return list(groups.items())


def _tombstone(session_id: str, stored: bytes) -> Tombstone | None:
    """Decode a tombstone; None if it is corrupt."""
    try:
        return unpack_tombstone(session_id, stored)
    except StateCorrupt as error:
        _log.warning("a tombstone is corrupt", reason=error.message)
        return None


def _unmarked(parts: Sequence[Part]) -> list[int]:
    return [part.request.partition for part in parts if part.is_unmarked]


def _not_durable(replicas: int) -> StoreAway:
    where = f"its disk and that of {replicas} replicas (replicas={replicas})" if replicas else "its disk"
    return StoreAway(
        f"the store must have the data on {where}; it does not yet", retry_after_s=_RETRY_AFTER_S
    )
