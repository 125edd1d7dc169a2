"""Sessions end by idleness once, for good, and never because the server was away or a clock was set."""

from __future__ import annotations

import pytest

from stepwell_server.errors import SessionExpired, SessionGone
from stepwell_server.store.base import End
from support.engine.harness import Harness, fails, x
from support.stores.durable import DurableStore, new_durable_store
from support.stores.kinds import DURABLE, ON_DISK

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
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        await at.open("idle", "closed")
        mine = (await at.engine.open_session("plain")).session.session_id
        await at.engine.close_session("closed")
        await at.engine.close_session(mine)
        at.clock.advance(IDLE_S + 1)
        await at.internals.expire_idle()
        wanted = ["SessionExpired", "SessionNotFound", "SessionNotFound", "SessionNotFound", "SessionLost"]
        assert await ends(at, "idle", "closed", mine, "never", elsewhere) == wanted
        await at.settled()
        durable_store.kill()
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
async def test_what_nobody_names_expires_by_the_sweep_alone(durable_store: DurableStore) -> None:
    async with durable_store.engine() as at:
        await at.engine.open_sessions("plain", session_ids=[f"s{i:04}" for i in range(1200)])
        await at.open("z")
        durable_store.kill()
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        await at.state("s0700")
        at.clock.advance(IDLE_S)
        await at.expire()
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
        durable_store.kill()
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
        at.clock.advance(IDLE_S / 2)
        await at.expire()
        assert await ids(at) == ["a", "b"]
        assert (await at.engine.session_info("a")).last_used == at.clock.now() - IDLE_S / 2


async def test_sessions_are_counted_through_everything(durable_store: DurableStore) -> None:
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        await at.open("a", "b", "c", "d")
        await at.engine.open_sessions("plain", session_ids=["e", "f"])
        await at.engine.fork("a", new_session_id="g")
        await at.engine.close_session("b")
        await at.engine.close_sessions(["c", "d", "never"])
        assert await ids(at) == ["a", "e", "f", "g"]
        durable_store.kill()
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        assert (await at.sessions())[0] == 4
        await at.engine.close_session("e")
        at.clock.advance(IDLE_S + 1)
        await at.open("h")
        await fails(at.state("a"), SessionExpired)
        await fails(at.engine.fork("f"), SessionExpired)
        await at.expire()
        assert await ids(at) == ["h"]
        durable_store.kill()
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        assert (await at.sessions())[0] == 1
        await at.open("a")
        assert await ids(at) == ["a", "h"]
