"""The list of the servers that share a store: on a real Valkey, and as one server reads it and reports itself."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from stepwell_server.errors import StoreAway, Unavailable
from stepwell_server.metrics import replica_reports
from stepwell_server.metrics.replica_reports import MISSING_S, ReplicaReports
from stepwell_server.process.readiness import Readiness
from stepwell_server.process.replicas import (
    EXPIRY_S,
    MAX_BYTES,
    MAX_REPLICAS,
    Replica,
    ReplicaState,
    StoredReplica,
    decode,
    encode,
)
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.valkey.store import ValkeyStore
from support.clock import ManualClock
from support.servers.valkey_servers import Cluster, Valkey
from support.stores.valkey_store import shared, time_limit

OWN = Replica("own", "here", "127.0.0.1:1", "http://127.0.0.1:2", "1.0", 1000.0, ReplicaState.READY, 7)
OTHER = dataclasses.replace(OWN, id="other", host="there", started=2000.0)


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


def key(store: ValkeyStore) -> str:
    return store._keys.replicas.decode()


def written(document: bytes, age_s: float = 0.0) -> bytes:
    """An entry of the list, as if a server had written it some time ago."""
    return struct.pack(">q", int((time.time() - age_s) * 1000)) + document


def by_id(found: Sequence[StoredReplica]) -> dict[str, bytes]:
    return {each.replica_id: each.document for each in found}


async def test_servers_of_a_store_see_each_other_until_they_leave(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b), shared(valkey.url()) as (elsewhere,):
        assert by_id(await a.replicas("a", b"1")) == {"a": b"1"}
        assert by_id(await b.replicas("b", b"2")) == {"a": b"1", "b": b"2"}
        assert by_id(await a.replicas("a", b"3")) == {"a": b"3", "b": b"2"}
        assert by_id(await elsewhere.replicas("c", b"4")) == {"c": b"4"}, "it has another store"
        assert by_id(await b.replicas("b", b"")) == {"a": b"3"}
        assert by_id(await a.replicas("a", b"3")) == {"a": b"3"}


@pytest.mark.slow
async def test_servers_of_a_cluster_see_each_other() -> None:
    with Cluster() as cluster:
        async with shared(cluster.url(), 2) as (a, b):
            await a.replicas("a", b"1")
            assert by_id(await b.replicas("b", b"2")) == {"a": b"1", "b": b"2"}


async def test_the_clock_of_the_store_says_who_has_not_reported(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        valkey.ask("HSET", key(store), "late", written(b"1", 60), "old", written(b"2", EXPIRY_S + 5))
        found = await store.replicas("own", b"3")
        assert by_id(found) == {"late": b"1", "own": b"3"}
        ages = {each.replica_id: each.age_s for each in found}
        assert ages["own"] == 0
        assert 59 <= ages["late"] < 120
        assert set(valkey.ask("HKEYS", key(store))) == {b"late", b"own"}


async def test_entries_that_no_server_wrote_are_reported_once_and_removed(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        wrong = {
            "short": b"1234",
            "long": written(b"x" * (MAX_BYTES + 1)),
            "future": written(b"1", -2 * EXPIRY_S),
            "huge": b"\xff" * 9,
            "i" * 100: written(b"1"),
        }
        for name, value in wrong.items():
            valkey.ask("HSET", key(store), name, value)
        found = await store.replicas("own", b"1")
        assert {each.replica_id for each in found if each.age_s < 0} == {name[:64] for name in wrong}
        assert by_id(await store.replicas("own", b"1")) == {"own": b"1"}


async def test_the_list_is_bounded(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        for number in range(MAX_REPLICAS):
            valkey.ask("HSET", key(store), str(number), written(b"1"))
        assert len(await store.replicas("own", b"2")) == MAX_REPLICAS, "no room for it"
        assert "own" not in by_id(await store.replicas("own", b"2"))
        valkey.ask("HSET", key(store), "one more", written(b"1"))
        assert by_id(await store.replicas("own", b"2")) == {"own": b"2"}, "no server adds so many"


async def test_a_list_of_another_type_is_left_alone(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        valkey.ask("SET", key(store), "x")
        assert await store.replicas("own", b"1") == []
        assert valkey.ask("GET", key(store)) == b"x"


async def test_a_store_that_was_emptied_has_its_list_again() -> None:
    with Valkey(append="") as valkey:
        async with shared(valkey.url(), 2) as (a, b):
            await a.replicas("a", b"1")
            await b.replicas("b", b"2")
            valkey.kill()
            with time_limit(a, 0.4), pytest.raises(Unavailable):
                await a.replicas("a", b"1")
            valkey.start()
            assert by_id(await a.replicas("a", b"1")) == {"a": b"1"}
            assert by_id(await b.replicas("b", b"2")) == {"a": b"1", "b": b"2"}


async def test_a_store_of_one_server_has_no_others() -> None:
    clock = ManualClock()
    store = InProcessStore(MemoryStore(), clock)
    at = ReplicaReports(store, Readiness(), clock, lambda: OWN)
    await at.report()
    assert [one.id for one in at.known] == ["own"]
    await at.leave()


# ------------------------------------------------------------------------------------------------- documents


def test_a_description_is_read_as_it_was_written() -> None:
    stored = StoredReplica(OWN.id, encode(OWN), 4.0)
    assert decode(stored, 100.0) == dataclasses.replace(OWN, seen=96.0)
    assert len(encode(dataclasses.replace(OWN, host="h" * 255, address="ü" * 255))) <= MAX_BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host": None}, "host must be a printable text of at most 255 characters"),
        ({"address": "a\x1b[2J"}, "address must be a printable text of at most 255 characters"),
        ({"version": "1" * 256}, "version must be a printable text of at most 255 characters"),
        ({"http_address": 1}, "http_address must be a printable text of at most 255 characters"),
        ({"started": float("nan")}, "started must be a number from 0 to 1.37439e+11"),
        ({"started": "now"}, "started must be a number from 0 to 1.37439e+11"),
        ({"resident_sessions": -1}, "resident_sessions must be a number from 0 to 9.0072e+15"),
        ({"resident_sessions": True}, "resident_sessions must be a number from 0 to 9.0072e+15"),
        ({"state": []}, "state must be a printable text of at most 255 characters"),
    ],
)
def test_a_wrong_description_is_refused(change: dict[str, Any], message: str) -> None:
    document = json.dumps(json.loads(encode(OWN)) | change).encode()
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole message follows
        decode(StoredReplica("other", document, 0.0), 100.0)
    assert str(refused.value) == message


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b"\xff", b"[" * 2000, b"null"])
def test_what_is_no_description_is_refused(document: bytes) -> None:
    with pytest.raises(ValueError, match=r"^it must be (JSON|an object); "):
        decode(StoredReplica("other", document, 0.0), 100.0)


def test_fields_and_states_of_later_releases_are_accepted() -> None:
    document = encode(OWN).replace(b'"ready"', b'"resting"').replace(b"{", b'{"more":1,')
    assert decode(StoredReplica("own", document, 0.0), 0.0).state is ReplicaState.NOT_READY
    assert decode(StoredReplica("own", encode(OWN).replace(b'"ready"', b'"missing"'), 0.0), 0.0).state is (
        ReplicaState.NOT_READY
    )


# ------------------------------------------------------------------------------------- one server among the others


class List(InProcessStore):
    """A store whose list of servers the test writes."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(MemoryStore(), clock)
        self.others: list[StoredReplica] = []
        self.written: dict[str, bytes] = {}
        self.is_away = self.is_full = False
        self.held: asyncio.Event | None = None

    async def replicas(self, replica_id: str, document: bytes) -> Sequence[StoredReplica]:
        if self.is_away:
            raise StoreAway("the test says no", retry_after_s=1.0)
        self.written[replica_id] = document
        if self.held is not None:
            await self.held.wait()
        if not document:
            del self.written[replica_id]
        own = [] if self.is_full else [StoredReplica(replica_id, document, 0.0)]
        return [*self.others, *own]


class Place:
    """One server, its list and its clock."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = List(self.clock)
        self.readiness = Readiness()
        self.readiness.problem("models", "")
        self.reports = ReplicaReports(self.store, self.readiness, self.clock, lambda: OWN)

    @property
    def warning(self) -> str:
        return self.readiness.report.warnings.get("replicas", "")

    async def states(self) -> dict[str, ReplicaState]:
        await self.reports.report()
        return {one.id: one.state for one in self.reports.known}


async def test_a_server_lists_the_others_and_itself() -> None:
    at = Place()
    assert [one.id for one in at.reports.known] == ["own"], "before its first report"
    at.store.others = [StoredReplica("other", encode(OTHER), 1.5)]
    await at.reports.report()
    assert decode(StoredReplica("own", at.store.written["own"], 0.0), 0.0) == OWN
    now = at.clock.now()
    assert at.reports.known == [
        dataclasses.replace(OWN, seen=now),
        dataclasses.replace(OTHER, seen=now - 1.5),
    ]
    assert not at.warning


async def test_a_server_that_disappears_is_missing_and_a_warning() -> None:
    at = Place()
    await at.reports.report()
    at.clock.advance(MISSING_S)
    at.store.others = [StoredReplica("other", encode(OTHER), MISSING_S)]
    assert await at.states() == {"own": ReplicaState.READY, "other": ReplicaState.MISSING}
    assert at.warning == "servers disappeared without stopping: other on there at 127.0.0.1:1"
    at.store.others = []
    assert await at.states() == {"own": ReplicaState.READY}
    assert not at.warning


async def test_nobody_is_missing_just_because_the_store_was_away() -> None:
    at = Place()
    await at.reports.report()
    at.store.others = [StoredReplica("other", encode(OTHER), 0.0)]
    await at.reports.report()
    at.clock.advance(60)
    at.store.is_away = True
    assert await at.states() == {"own": ReplicaState.READY, "other": ReplicaState.READY}, "the last known"
    assert at.reports.known[1].seen == at.clock.now() - 60
    at.store.is_away = False
    at.store.others = [StoredReplica("other", encode(OTHER), 60.0)]
    assert (await at.states())["other"] is ReplicaState.MISSING
    assert not at.warning, "it may not have had the time to report"
    at.clock.advance(MISSING_S)
    await at.reports.report()
    assert at.warning


async def test_nobody_is_missing_just_because_all_servers_were_paused() -> None:
    at = Place()
    await at.reports.report()
    at.clock.advance(60)
    at.store.others = [StoredReplica("other", encode(OTHER), 60.0)]
    assert (await at.states())["other"] is ReplicaState.MISSING
    assert not at.warning, "it may have been paused as this one was"
    at.clock.advance(MISSING_S)
    await at.reports.report()
    assert at.warning


async def test_a_server_that_was_started_again_replaces_the_missing_one() -> None:
    at = Place()
    now = at.clock.now()
    killed = dataclasses.replace(OTHER, started=now - 100)
    again = dataclasses.replace(OTHER, id="again", started=now - 20)
    at.store.others = [
        StoredReplica("other", encode(killed), 30.0),
        StoredReplica("again", encode(again), 1.0),
    ]
    assert await at.states() == {"own": ReplicaState.READY, "again": ReplicaState.READY}
    at.store.others[1] = StoredReplica("again", encode(dataclasses.replace(again, started=now - 40)), 1.0)
    assert (await at.states())["other"] is ReplicaState.MISSING, "it was there when the other one started"


async def test_different_versions_are_a_warning() -> None:
    at = Place()
    newer = dataclasses.replace(OTHER, version="1.1")
    at.store.others = [StoredReplica("a", encode(newer), 0.0), StoredReplica("b", encode(newer), 0.0)]
    await at.reports.report()
    assert at.warning == "the servers of the store run different versions: 1.0 (1), 1.1 (2)"
    at.store.others = [StoredReplica("a", encode(newer), MISSING_S)]
    await at.reports.report()
    assert "versions" not in at.warning, "only those that run count"


async def test_a_server_without_room_in_the_list_says_so() -> None:
    at = Place()
    at.store.is_full = True
    assert await at.states() == {"own": ReplicaState.READY}
    assert (
        at.warning
        == "the store's list of servers must have room for this one; it is full, or its key has another type"
    )


async def test_unreadable_reports_are_ignored_and_logged_once() -> None:
    at = Place()
    at.store.others = [
        StoredReplica("bad", b"{", 0.0),
        StoredReplica("b\x1bd", encode(OTHER), 0.0),
        StoredReplica("strange", b"", -0.001),
        StoredReplica("other", encode(OTHER), 0.0),
    ]
    for _ in range(3):
        assert set(await at.states()) == {"own", "other"}
    assert at.reports._refused == ["bad", "b\x1bd", "strange"]


async def test_a_change_of_its_state_is_reported_at_once() -> None:
    at = Place()
    task = asyncio.create_task(at.reports.run())
    try:
        await until(lambda: b'"ready"' in at.store.written.get("own", b""))
        at.readiness.problem("store", "it is away")
        await until(lambda: b'"not ready"' in at.store.written["own"])
        at.readiness.problem("stopping", "it stops")
        await until(lambda: b'"stopping"' in at.store.written["own"])
    finally:
        task.cancel()


async def test_a_server_that_leaves_is_not_reported_again() -> None:
    at = Place()
    at.store.held = asyncio.Event()
    reporting = asyncio.create_task(at.reports.report())
    await until(lambda: "own" in at.store.written)
    leaving = asyncio.create_task(at.reports.leave())
    await asyncio.sleep(0)
    assert at.store.written["own"], "it waits for the report that is on its way"
    at.store.held.set()
    await asyncio.gather(reporting, leaving)
    await at.reports.report()
    assert at.store.written == {}


async def test_a_server_leaves_without_its_store() -> None:
    at = Place()
    at.store.is_away = True
    await at.reports.leave()


async def test_a_server_that_leaves_a_store_without_answers_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_reports, "_LEAVE_S", 0.01)
    at = Place()
    at.store.held = asyncio.Event()
    with caplog.at_level("INFO"):
        await at.reports.leave()
    (record,) = caplog.records
    assert record.__dict__["fields"]["reason"] == "the store must answer within 0.01 s; it did not"


async def until(is_true: Any) -> None:
    async with asyncio.timeout(100):
        while not is_true():  # noqa: ASYNC110 (a turn of the loop, no time)
            await asyncio.sleep(0)
