"""Sessions on durable stores: idle limits, paging and the fields of their records, over restarts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from stepwell_server.engine.api import Select
from stepwell_server.engine.state.fields import split
from stepwell_server.errors import SessionExpired, SessionGone, StateCorrupt
from stepwell_server.store.base import End
from stepwell_server.store.fields import CRITICAL, pack_fields
from support.engine.harness import Harness, fails, x
from support.stores.durable import DurableStore, new_durable_store, same_reply
from support.stores.kinds import DURABLE, ON_DISK
from support.stores.records import decode

pytestmark = DURABLE

IDLE_S = 50.0


async def ids(at: Harness) -> list[str]:
    """The sessions there are, whoever is asked."""
    infos, _ = await at.engine.list_sessions()
    await at.settled()
    infos, total = await at.engine.list_sessions()
    assert total == len(infos) == (await at.sessions())[0]
    return [info.session_id for info in infos]


async def ends(at: Harness, *session_ids: str) -> list[str]:
    found = []
    for session_id in session_ids:
        error = await fails(at.state(session_id), SessionGone)
        assert error.session_id == session_id
        found.append(type(error).__name__)
    return found


@pytest.fixture
async def elsewhere(durable_store: DurableStore) -> str:
    """The id of a session of another data directory."""
    other = await new_durable_store()
    async with other.engine() as at:
        found = (await at.engine.open_session("plain")).session.session_id
    await other.aclose()
    return found


async def test_how_a_session_ended_is_remembered(durable_store: DurableStore, elsewhere: str) -> None:
    async with durable_store.engine(max_session_idle_s=IDLE_S, is_killed=True) as at:
        await at.open("idle", "closed")
        mine = (await at.engine.open_session("plain")).session.session_id
        await at.engine.close_session("closed")
        await at.engine.close_session(mine)
        at.clock.advance(IDLE_S + 1)
        await at.internals.expire_idle()
        wanted = ["SessionExpired", "SessionNotFound", "SessionNotFound", "SessionNotFound", "SessionLost"]
        assert await ends(at, "idle", "closed", mine, "never", elsewhere) == wanted
        await at.settled()
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        assert await ends(at, "idle", "closed", mine, "never", elsewhere) == wanted
        stone = await durable_store.tombstone("idle")
        assert stone is not None
        assert (stone.end, stone.revision) == (End.EXPIRED, 0)
        assert await at.engine.close_sessions(["idle", "closed", "never"]) == 0
        opened = await at.engine.open_session("plain", session_id="idle")
        assert not opened.resumed
        assert (await at.step("idle", x(1))).revision == 2, "no revision of the session before comes again"


@ON_DISK  # other servers may have served a shared store meanwhile
@pytest.mark.parametrize("jump_s", [-1e7, 0.0, 1e7])
async def test_time_that_the_server_was_away_ends_no_session(
    durable_store: DurableStore, jump_s: float
) -> None:
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        await at.open("named", "used", "untouched", "read")
        durable_store.kill(away_s=jump_s)
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        assert (await at.engine.session_info("named")).last_used <= at.clock.now()
        at.clock.advance(IDLE_S)
        await at.step("used", x(1))
        await at.state("read")
        await at.expire()
        assert await ids(at) == ["named", "read", "untouched", "used"]
        at.clock.advance(1)
        if (
            jump_s >= 0
        ):  # else the record says that it was used in the future: it counts from when it is named
            await fails(at.engine.session_info("untouched"), SessionExpired)
        await at.expire()
        assert await ids(at) == ["read", "used"]
        assert ("expired", "untouched") in at.events.sessions
        assert at.events.sessions.count(("expired", "untouched")) == 1
        at.clock.advance(IDLE_S)
        await at.internals.expire_idle()
        assert await ids(at) == []
        assert at.slots().resident == 0


@ON_DISK  # the server alone looks through the records
async def test_unnamed_sessions_expire_by_the_sweep_alone(durable_store: DurableStore) -> None:
    async with durable_store.engine(is_killed=True) as at:
        await at.engine.open_sessions("plain", session_ids=[f"s{i:04}" for i in range(1200)])
        await at.open("z")
    async with durable_store.engine(max_session_idle_s=IDLE_S, is_killed=True) as at:
        await at.state("s0700")
        await at.expire(after_s=IDLE_S)
        assert (await at.sessions())[0] == 1201
        await at.state("z")
        at.clock.advance(0.5)
        # first comes what was noted; and not all at once
        assert [await at.internals.sweep.page() for _ in range(3)] == [0, 500, 500]
        await at.engine.open_sessions("plain", session_ids=["s0001", "s1199x"])
        await at.expire()
        assert at.internals.loaded() == ["s0001", "s1199x", "z"], "to expire sessions loads none"
        assert await ids(at) == ["s0001", "s1199x", "z"]
        assert await ends(at, "s0002", "s0700", "s1199") == ["SessionExpired"] * 3
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        assert await ids(at) == ["s0001", "s1199x", "z"]
        assert await ends(at, "s0002", "s0700", "s1199") == ["SessionExpired"] * 3


@pytest.mark.parametrize("jump_s", [-1e7, 1e7])
async def test_a_clock_that_is_set_ends_no_session(durable_store: DurableStore, jump_s: float) -> None:
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        await at.open("a", "b", "c")
        at.clock.advance(IDLE_S)
        await at.step("a", x(1))
        await at.state("b")
        await durable_store.knows_use_of("b")
        at.clock.jump(jump_s)
        await at.expire(after_s=IDLE_S / 2)
        assert await ids(at) == ["a", "b"]
        assert (await at.engine.session_info("a")).last_used == at.clock.now() - IDLE_S / 2


async def test_sessions_are_counted_through_everything(durable_store: DurableStore) -> None:
    async with durable_store.engine(max_session_idle_s=IDLE_S, is_killed=True) as at:
        await at.open("a", "b", "c", "d")
        await at.engine.open_sessions("plain", session_ids=["e", "f"])
        await at.engine.fork("a", new_session_id="g")
        await at.engine.close_session("b")
        await at.engine.close_sessions(["c", "d", "never"])
        assert await ids(at) == ["a", "e", "f", "g"]
    async with durable_store.engine(max_session_idle_s=IDLE_S, is_killed=True) as at:
        assert (await at.sessions())[0] == 4
        await at.engine.close_session("e")
        at.clock.advance(IDLE_S + 1)
        await at.open("h")
        await fails(at.state("a"), SessionExpired)
        await fails(at.engine.fork("f"), SessionExpired)
        await at.expire()
        assert await ids(at) == ["h"]
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        assert (await at.sessions())[0] == 1
        await at.open("a")
        assert await ids(at) == ["a", "h"]


async def test_to_leave_and_to_come_back_writes_nothing(durable_store: DurableStore) -> None:
    ids = [f"s{i}" for i in range(12)]
    async with durable_store.engine(resident_rows=4) as at:
        await at.engine.open_sessions("plain", session_ids=ids)
        assert len(durable_store.store.tried) == 1
        for i, session_id in enumerate(ids):
            at.clock.advance(1)
            await at.step(session_id, x(1, seed=i))
        assert len(durable_store.store.tried) == 13, "one for each step"
        for session_id in ids:
            at.clock.advance(1)
            await at.state(session_id)
        assert len(durable_store.store.tried) == 13
        assert at.slots().resident <= 4
        assert await durable_store.count() == 12


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize(
    ("size", "steps", "select"),
    [(1, 5, Select.ALL), (3, 2, Select.ALL), (1, 1, Select.ALL), (3, 0, Select.ALL), (2, 5, Select.LAST)],
)
async def test_a_reply_comes_back_with_its_session(
    durable_store: DurableStore, size: int, steps: int, select: Select, killed: bool
) -> None:
    value = x(size, *([steps] if steps else []))
    again: dict[str, Any] = {"expected": 0, "request_ids": 7, "select": select}
    async with durable_store.engine(resident_rows=4) as at:
        await at.open("a", batch_size=size)
        first = await at.step("a", value, **again)
        at.clock.advance(1)
        await at.open("b", batch_size=4)
        assert not (await at.engine.session_info("a")).resident
        assert not at.internals.model("plain").replies.series
        if killed:
            durable_store.kill()
        else:
            for _ in range(2):
                same_reply(await at.step("a", value, **again), first)
                at.clock.advance(1)
                await at.state("b")
                assert not (await at.engine.session_info("a")).resident
    if killed:
        async with durable_store.engine(resident_rows=4) as at:
            same_reply(await at.step("a", value, **again), first)


async def test_a_fork_of_a_session_that_is_away_is_kept(durable_store: DurableStore) -> None:
    async with durable_store.engine(resident_rows=2, is_killed=True) as at:
        await at.open_and_step("a", x(1, 3))
        at.clock.advance(1)
        await at.open("b", "c")
        assert not (await at.engine.session_info("a")).resident
        await at.engine.fork("a", new_session_id="d")
        state = await at.state("a")
    async with durable_store.engine(resident_rows=2) as at:
        for name in "da":
            assert (await at.state(name))["sum"].tobytes() == state["sum"].tobytes()
            assert (await at.engine.session_info(name)).position == 3


FIELDS = pack_fields({2: b"tenant", 77: bytes(range(100))})
NAMES = [f"s{i}" for i in range(20)]


async def give_fields(durable_store: DurableStore, session_id: str, fields: bytes) -> None:
    """Have a session's record be as a later server would have written it."""
    stored = await durable_store.record(session_id)
    assert stored is not None
    record = decode(session_id, stored)
    later = dataclasses.replace(record, fields=fields, revision=record.revision + 1)
    await durable_store.put(session_id, later.encode(session_id))


async def fields_of(durable_store: DurableStore, session_id: str) -> bytes:
    """The fields of a record beside that of its version."""
    stored = await durable_store.record(session_id)
    assert stored is not None
    return split(decode(session_id, stored).fields)[1]


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("names", [["s3"], NAMES])
async def test_a_change_keeps_them(durable_store: DurableStore, names: list[str], steps: int) -> None:
    """Of one session and of a group, of one time step and of several, when the session was paged out in between."""
    async with durable_store.engine(is_killed=True) as at:
        await at.open(*NAMES)
    await give_fields(durable_store, "s3", FIELDS)
    async with durable_store.engine(resident_rows=len(NAMES), is_killed=True) as at:
        for revision in (2, 3):
            rows = x(len(names), *([steps] if steps else []))
            await at.submit(names, rows).all()
            assert (await at.engine.session_info("s3")).revision == revision
            assert await fields_of(durable_store, "s3") == FIELDS
            await at.open(*[f"t{revision}-{i}" for i in range(len(NAMES))])
        await at.single("s3", x(1)).only()
        assert await fields_of(durable_store, "s3") == FIELDS
        await at.submit("s3", reset=True).all()
        assert await fields_of(durable_store, "s3") == FIELDS
        assert await fields_of(durable_store, "s4") == b""
    async with durable_store.engine() as at:
        await at.step("s3", x(1))
        assert await fields_of(durable_store, "s3") == FIELDS


async def test_they_go_with_their_session(durable_store: DurableStore) -> None:
    async with durable_store.engine(is_killed=True) as at:
        await at.open("s")
    await give_fields(durable_store, "s", FIELDS)
    async with durable_store.engine() as at:
        await at.step("s", x(1))
        await at.engine.close_session("s")
        await at.open_and_step("s", x(1))
        assert await fields_of(durable_store, "s") == b""


async def test_a_session_with_a_critical_one_is_not_stepped_and_not_changed(
    durable_store: DurableStore,
) -> None:
    async with durable_store.engine(is_killed=True) as at:
        await at.open("s", "t")
        await at.step("t", x(1))
    await give_fields(durable_store, "s", pack_fields({9 | CRITICAL: b"key"}))
    stored = await durable_store.record("s")
    async with durable_store.engine() as at:
        await fails(
            at.step("s", x(1)), StateCorrupt, "critical field 0x8009, which this server does not know"
        )
        await fails(at.open("s"), StateCorrupt)
        assert await durable_store.record("s") == stored
        assert (await at.step("t", x(1))).revision == 2
