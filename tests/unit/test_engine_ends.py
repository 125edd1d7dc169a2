"""How sessions end, what is said of them then, and who may have their ids."""

from __future__ import annotations

import pytest

from stepwell_server.engine.sessions import end
from stepwell_server.errors import (
    RevisionConflict,
    SessionExpired,
    SessionLost,
    SessionNotFound,
)
from support.checks.model_of_sessions import initial
from support.engine.harness import Harness, fails, running, x
from support.engine.session_lifetimes import blocked, gone
from support.stores.durable import begun, until


@pytest.mark.stores("memory", "async", "sync")
@pytest.mark.engine(max_session_idle_s=60)
async def test_many_idle_sessions_expire_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    await at.open(*[f"s{i}" for i in range(10)])
    at.clock.advance(61)
    monkeypatch.setattr(end, "BATCH_SIZE", 4)
    expiring = await begun(at.internals.expire_idle())
    await until(lambda: len(at.internals.loaded()) < 10)
    assert len(at.internals.loaded()) == 6
    assert await gone(at, "s0") == "SessionExpired"
    assert await gone(at, "s9") == "SessionExpired", "whoever names it need not wait for its turn"
    assert await expiring == 9
    assert sorted(name for what, name in at.events.sessions if what == "expired") == [
        f"s{i}" for i in range(10)
    ]
    await at.settled()
    assert at.engine.stats()[0].sessions == 0


@pytest.mark.engine(max_session_idle_s=60)
async def test_a_session_that_is_idle_too_long_expires(at: Harness) -> None:
    await at.open("a", "b", "c")
    await at.step("a", x(1))
    at.clock.advance(40)
    await at.state("b")
    at.clock.advance(20)
    assert (await at.internals.expire_idle()) == 0, "idle for 60 s is not longer than 60 s"
    at.clock.advance(1)
    assert (await at.internals.expire_idle()) == 2
    assert at.events.sessions[-2:] == [("expired", "a"), ("expired", "c")]
    assert await gone(at, "a") == "SessionExpired"
    assert await gone(at, "never") == "SessionNotFound"
    assert (await at.engine.session_info("b")).revision == 0
    await fails(at.step("a", x(1)), SessionExpired, "idle for longer than its limit")


@pytest.mark.engine(max_session_idle_s=60)
async def test_a_session_that_is_due_is_gone_even_before_the_timer_comes(at: Harness) -> None:
    await at.open("a", "b", "c")
    at.clock.advance(61)
    answers = await at.submit(["a", "b"], x(2)).all()
    assert [type(answer) for answer in answers] == [SessionExpired, SessionExpired]
    with pytest.raises(SessionExpired):
        await at.single("c", x(1)).only()
    assert (await at.engine.list_sessions())[0] == []


@pytest.mark.parametrize("end", ["close", "expire"])
@pytest.mark.parametrize("begin", ["open", "open many", "fork"])
@pytest.mark.engine(max_session_idle_s=60)
async def test_whoever_has_the_revision_of_a_session_that_ended_does_not_step_the_next_of_its_id(
    end: str, begin: str, at: Harness
) -> None:
    await at.open("x")
    await at.step("x", x(1), expected=0, request_ids=1)
    if end == "close":
        await at.engine.close_session("x")
    at.clock.advance(61)
    await at.open("source")
    if begin == "open":
        await at.open("x")
    elif begin == "open many":
        await at.engine.open_sessions("plain", session_ids=["y", "x"])
    else:
        await at.engine.fork("source", new_session_id="x")
    info = await at.engine.session_info("x")
    assert (info.revision, info.position) == (2, 0)
    await fails(at.step("x", x(1), expected=1, request_ids=2), RevisionConflict)
    with pytest.raises(RevisionConflict):  # the last change, sent again too late
        await at.step("x", x(1), expected=0, request_ids=1)
    assert (await at.step("x", x(1), expected=2, request_ids=3)).revision == 3


async def test_ids_that_servers_make_cannot_be_chosen() -> None:
    async with running() as first:
        gone_now = (await first.engine.open_session("plain", request_id=5)).session.session_id
        await first.engine.close_session(gone_now)
        await fails(first.open(gone_now), SessionNotFound, "was closed")
    async with running() as at:
        await at.open("a")
        await fails(at.open(gone_now), SessionLost)
        await fails(at.engine.open_sessions("plain", session_ids=["b", gone_now]), SessionLost)
        await fails(at.engine.fork("a", new_session_id=gone_now), SessionLost)
        assert (await at.engine.list_sessions())[1] == 1


@pytest.mark.engine(max_session_idle_s=60)
async def test_an_expired_session_may_be_opened_anew_and_then_is_no_longer_expired(at: Harness) -> None:
    for open_again in ("one", "many"):
        await at.open("a")
        await at.step("a", x(1))
        at.clock.advance(61)
        if open_again == "one":
            opened = await at.engine.open_session("plain", session_id="a")
            assert not opened.resumed
            assert (opened.session.revision, opened.session.position) == (2, 0)
        else:
            await at.engine.open_sessions("plain", session_ids=["a"])
        assert (await at.state("a"))["sum"].tobytes() == initial(1).tobytes()
        await at.engine.close_session("a")
        assert await gone(at, "a") == "SessionNotFound"


@pytest.mark.engine(max_session_idle_s=60, threads=True)
async def test_a_session_with_something_under_way_does_not_expire(at: Harness) -> None:
    await at.open("a", "b")
    await blocked(at, "a")
    at.clock.advance(100)
    assert (await at.internals.expire_idle()) == 1
    waiting = at.submit("a", x(1))
    at.hooks.open_gate()
    assert (await waiting.only()).revision == 2


async def test_a_session_of_another_server_process_is_lost_and_not_unknown() -> None:
    async with running() as first:
        session_id = (await first.engine.open_session("plain")).session.session_id
        async with running() as second:
            await fails(second.step(session_id, x(1)), SessionLost, "lost with the store that held it")
            assert await gone(second, session_id) == "SessionLost"
        await first.engine.close_session(session_id)
        assert await gone(first, session_id) == "SessionNotFound"
