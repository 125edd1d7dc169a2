"""Sessions end by a close, by their idle limit or by a replacement: once, for good, and with the right answer afterwards."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import SessionFilter
from stepwell_server.engine.sessions import end
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import (
    InvalidInput,
    RevisionConflict,
    ServerError,
    SessionExpired,
    SessionGone,
    SessionLost,
    SessionNotFound,
    Unavailable,
)
from stepwell_server.store.base import End
from support.checks.model_of_sessions import initial
from support.engine.harness import Harness, fails, running, x
from support.engine.session_lifetimes import error_of_all_calls, pass_in_flight
from support.stores.durable import Disk, start_task, until
from support.stores.records import decode


async def lived(at: Harness, *session_ids: str) -> list[int]:
    """Sessions that begin and have a change; their uids."""
    await at.open(*session_ids)
    for session_id in session_ids:
        await at.step(session_id, x(1))
    return [(await at.engine.session_info(session_id)).uid for session_id in session_ids]


async def test_a_close_that_is_sent_again_leaves_the_session_that_was_opened_since(at: Harness) -> None:
    await lived(at, "a")
    assert await at.engine.close_session("a", request_id=30) is False
    await lived(at, "a")
    state = (await at.state("a"))["sum"]
    for _ in range(2):
        assert await at.engine.close_session("a", request_id=30) is True
    assert (await at.engine.session_info("a")).revision == 3
    assert np.array_equal((await at.state("a"))["sum"], state)
    assert await at.engine.close_session("a", request_id=31) is False


async def test_an_id_remembers_the_last_four_closes(at: Harness) -> None:
    for request_id in range(1, 7):
        await lived(at, "a")
        assert await at.engine.close_session("a", request_id=request_id) is False
    await lived(at, "a")
    for request_id in range(3, 7):
        assert await at.engine.close_session("a", request_id=request_id) is True
    assert (await at.engine.session_info("a")).revision == 13
    assert await at.engine.close_session("a", request_id=2) is False, "that one is forgotten"


@pytest.mark.parametrize("between", ["close", "expire"])
@pytest.mark.engine(max_session_idle_s=10.0)
async def test_a_close_is_remembered_over_sessions_that_end_in_other_ways(between: str, at: Harness) -> None:
    await lived(at, "a")
    await at.engine.close_session("a", request_id=30)
    await lived(at, "a")
    if between == "close":
        await at.engine.close_session("a")
    else:
        await at.expire(after_s=20.0)
    assert await at.engine.close_session("a", request_id=30) is True, "its own session is closed"
    await fails(at.engine.close_session("a", request_id=31), SessionGone)
    await lived(at, "a")
    assert await at.engine.close_session("a", request_id=30) is True
    assert (await at.engine.session_info("a")).revision == 5


async def test_a_close_with_a_uid_closes_that_session_alone(at: Harness) -> None:
    (old,) = await lived(at, "a")
    await at.engine.close_session("a")
    (new,) = await lived(at, "a")
    assert 0 not in {old, new}
    assert old != new
    await fails(
        at.engine.close_session("a", request_id=30, uid=old),
        SessionNotFound,
        "session 'a' was closed, and another one has its id now",
    )
    assert (await at.engine.session_info("a")).uid == new
    assert await at.engine.close_session("a", request_id=31, uid=new) is False
    assert await at.engine.close_session("a", request_id=31, uid=new) is True


async def test_the_uid_is_that_of_the_session_however_it_is_asked_for(at: Harness) -> None:
    opened = (await at.engine.open_session("plain", session_id="a", request_id=5)).session
    assert (await at.engine.open_session("plain", session_id="a", request_id=5)).session.uid == opened.uid
    assert (await at.engine.open_session("plain", session_id="a")).session.uid == opened.uid
    many = await at.engine.open_sessions("plain", session_ids=["b", "c"])
    listed = {info.session_id: info.uid for info in (await at.engine.list_sessions())[0]}
    assert listed == {"a": opened.uid, "b": int(many.uids[0]), "c": int(many.uids[1])}
    twins = await at.engine.fork_sessions(["b", "c"], request_id=6)
    assert {0, *many.uids.tolist()}.isdisjoint(twins.uids.tolist())
    await at.step("a", x(1))
    await at.state("a")
    assert (await at.engine.session_info("a")).uid == opened.uid


async def test_closing_many_again_counts_what_it_closed_and_leaves_what_was_opened_since(at: Harness) -> None:
    await lived(at, "a", "b", "c")
    await at.engine.close_session("c")
    assert await at.engine.close_sessions(["a", "b", "c", "never"], request_id=40) == 2
    await lived(at, "b", "c")
    assert await at.engine.close_sessions(["a", "b", "c", "never"], request_id=40) == 3, (
        "c is first closed now"
    )
    assert (await at.engine.session_info("b")).revision == 3
    await fails(at.engine.session_info("c"), SessionNotFound)
    await lived(at, "c")
    assert await at.engine.close_sessions(["a", "b", "c", "never"], request_id=40) == 3
    assert [info.session_id for info in (await at.engine.list_sessions())[0]] == ["b", "c"]


async def test_closing_many_by_their_uids_leaves_others(at: Harness) -> None:
    old = await lived(at, "a", "b", "c")
    await at.engine.close_session("b")
    await lived(at, "b")
    uids = np.array(old, np.uint64)
    assert await at.engine.close_sessions(["a", "b", "c"], uids=uids, request_id=41) == 2
    assert [info.session_id for info in (await at.engine.list_sessions())[0]] == ["b"]
    many = await at.engine.open_sessions("plain", session_ids=["d", "e"])
    one = many.uids[:1]
    assert await at.engine.close_sessions(["d", "e", "b"], uids=one) == 2
    await fails(
        at.engine.close_sessions(["a", "b", "c"], uids=uids[:2]),
        InvalidInput,
        r"uids must be empty, one for all .* \(3\); got 2",
    )
    assert [info.session_id for info in (await at.engine.list_sessions())[0]] == ["b"]


async def test_closing_by_a_filter_again_leaves_what_was_opened_since(at: Harness) -> None:
    await lived(at, "a1", "a2", "b")
    wanted = SessionFilter(prefix="a")
    assert (await at.engine.close_matching(wanted, limit=10, request_id=50))[0] == 2
    await lived(at, "a1")
    at.clock.advance(1.0)
    await at.engine.close_matching(wanted, limit=10, request_id=50)
    assert (await at.engine.session_info("a1")).revision == 3
    assert (await at.engine.close_matching(wanted, limit=10, request_id=51))[0] == 1


async def test_all_ways_in_which_a_session_begins_remember_the_closes_of_its_id(at: Harness) -> None:
    await lived(at, "source", "open", "many", "fork", "forks", "import")
    (exported,) = await at.engine.export_sessions(["source"], deadline=float("inf"))
    assert not isinstance(exported, ServerError)
    for name in ("open", "many", "fork", "forks", "import"):
        await at.engine.close_session(name, request_id=30)
    await at.engine.open_session("plain", session_id="open")
    await at.engine.open_sessions("plain", session_ids=["many", "new"])
    await at.engine.fork("source", new_session_id="fork")
    await at.engine.fork_sessions(["source"], new_session_ids=["forks"])
    arriving = SessionRecord("import", "source", bytes(exported))
    assert await at.engine.import_sessions([arriving], ExistingPolicy.REPLACE) == [ImportOutcome.IMPORTED]
    for name in ("open", "many", "fork", "forks", "import"):
        assert await at.engine.close_session(name, request_id=30) is True, name
        revision = (await at.engine.session_info(name)).revision
        assert (await at.step(name, x(1))).revision == revision + 1
        assert await at.engine.close_session(name, request_id=30) is True, name
        await at.engine.session_info(name)
    assert await at.engine.close_session("new", request_id=30) is False


@pytest.mark.stores("async", "sync")
async def test_a_close_whose_session_ends_while_it_waits_leaves_the_one_that_was_opened_since() -> None:
    """To be told to come again would have it close that one."""
    answers: list[bool | BaseException] = []
    opened = 0

    async def close(at: Harness, number: int) -> None:
        for round_ in range(20):
            request_id = 1 + 100 * number + round_
            answers.extend(
                await asyncio.gather(
                    at.engine.close_session("a", request_id=request_id), return_exceptions=True
                )
            )

    async def reopen(at: Harness) -> None:
        nonlocal opened
        for _ in range(20):
            answer = await at.engine.open_session("plain", session_id="a")
            opened += not answer.resumed

    async with running() as at:
        await asyncio.gather(*(close(at, number) for number in range(6)), *(reopen(at) for _ in range(6)))
        await asyncio.gather(at.engine.close_session("a", request_id=9_999), return_exceptions=True)
        others = [each for each in answers if each is not False and not isinstance(each, SessionNotFound)]
        assert not others
        assert answers.count(False) in {opened, opened - 1}, "each session ended once"


@pytest.mark.stores("memory", "async", "sync")
@pytest.mark.engine(max_session_idle_s=60)
async def test_many_idle_sessions_expire_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    await at.open(*[f"s{i}" for i in range(10)])
    at.clock.advance(61)
    monkeypatch.setattr(end, "BATCH_SIZE", 4)
    expiring = await start_task(at.internals.expire_idle())
    await until(lambda: len(at.internals.loaded()) < 10)
    assert len(at.internals.loaded()) == 6
    assert await error_of_all_calls(at, "s0") == "SessionExpired"
    assert await error_of_all_calls(at, "s9") == "SessionExpired", (
        "whoever names it need not wait for its turn"
    )
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
    assert await at.expired_after(20) == 0, "idle for 60 s is not longer than 60 s"
    assert await at.expired_after(1) == 2
    assert at.events.sessions[-2:] == [("expired", "a"), ("expired", "c")]
    assert await error_of_all_calls(at, "a") == "SessionExpired"
    assert await error_of_all_calls(at, "never") == "SessionNotFound"
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
async def test_the_revision_of_an_ended_session_does_not_step_the_next_one_of_its_id(
    end: str, begin: str, at: Harness
) -> None:
    await at.open_and_step("x", x(1), expected=0, request_ids=1)
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
async def test_an_expired_session_can_be_reopened_and_then_is_no_longer_expired(at: Harness) -> None:
    for open_again in ("one", "many"):
        await at.open_and_step("a", x(1))
        at.clock.advance(61)
        if open_again == "one":
            opened = await at.engine.open_session("plain", session_id="a")
            assert not opened.resumed
            assert (opened.session.revision, opened.session.position) == (2, 0)
        else:
            await at.engine.open_sessions("plain", session_ids=["a"])
        assert (await at.state("a"))["sum"].tobytes() == initial(1).tobytes()
        await at.engine.close_session("a")
        assert await error_of_all_calls(at, "a") == "SessionNotFound"


@pytest.mark.engine(max_session_idle_s=60, threads=True)
async def test_a_session_with_something_under_way_does_not_expire(at: Harness) -> None:
    await at.open("a", "b")
    await pass_in_flight(at, "a")
    assert await at.expired_after(100) == 1
    waiting = at.submit("a", x(1))
    at.hooks.open_gate()
    assert (await waiting.only()).revision == 2


async def test_a_session_of_another_server_process_is_lost_and_not_unknown() -> None:
    async with running() as first:
        session_id = (await first.engine.open_session("plain")).session.session_id
        async with running() as second:
            await fails(second.step(session_id, x(1)), SessionLost, "was lost with its store")
            assert await error_of_all_calls(second, session_id) == "SessionLost"
        await first.engine.close_session(session_id)
        assert await error_of_all_calls(first, session_id) == "SessionNotFound"


HOUR_S = 3600.0
OWN = pytest.mark.stores("memory", "async", "sync")
ON_DISK = pytest.mark.stores("async", "sync")


async def opened(at: Harness, max_idle_ms: int | None = None, name: str = "") -> str:
    """The id of a session that is opened; `name` is its id if the caller chooses it."""
    made = await at.engine.open_session("plain", session_id=name, max_idle_ms=max_idle_ms)
    return made.session.session_id


async def ids(at: Harness) -> set[str]:
    await at.settled()
    return {info.session_id for info in (await at.engine.list_sessions())[0]}


async def limit_s(at: Harness, name: str) -> float:
    """What everybody is told of a session's limit."""
    info = await at.engine.session_info(name)
    listed = (await at.engine.list_sessions(prefix=name))[0][0]
    assert listed.max_idle_s == info.max_idle_s
    return info.max_idle_s


async def refused(at: Harness, *names: str) -> None:
    for name in names:
        caught = await fails(at.state(name), SessionExpired, "idle for longer than its limit")
        assert caught.session_id == name


@pytest.mark.engine(unnamed_session_idle_s=HOUR_S)
async def test_each_opening_sets_the_limit_and_a_session_without_an_id_has_that_of_the_server(
    at: Harness,
) -> None:
    engine = at.engine
    unnamed, named = await opened(at), await opened(at, name="named")
    asked, never, short = await opened(at, 5000), await opened(at, 0), await opened(at, 90_000, "short")
    many = await engine.open_sessions("plain", count=2)
    some = await engine.open_sessions("plain", session_ids=["m1", "m2"], max_idle_ms=7000)
    forks = [
        (await engine.fork(short)).session.session_id,
        (await engine.fork(short, new_session_id="f")).session.session_id,
        (await engine.fork(short, max_idle_ms=8000)).session.session_id,
    ]
    forks += (await engine.fork_sessions([short, unnamed], max_idle_ms=9000)).session_ids
    wanted = {unnamed: HOUR_S, named: math.inf, asked: 5.0, never: math.inf, short: 90.0}
    wanted |= {**dict.fromkeys(many.session_ids, HOUR_S), **dict.fromkeys(some.session_ids, 7.0)}
    wanted |= dict(zip(forks, [HOUR_S, math.inf, 8.0, 9.0, 9.0], strict=True))
    assert {name: await limit_s(at, name) for name in wanted} == wanted
    await at.submit(list(wanted), x(len(wanted))).all()  # records of all kinds in one commit
    assert {name: await limit_s(at, name) for name in wanted} == wanted


@pytest.mark.engine(unnamed_session_idle_s=HOUR_S)
async def test_a_session_that_is_resumed_keeps_its_limit(at: Harness) -> None:
    name, unnamed = await opened(at, 5000, "a"), await opened(at)
    for asked in (None, 0, 9000):
        again = await at.engine.open_session("plain", session_id=name, max_idle_ms=asked)
        assert (again.resumed, again.session.max_idle_s) == (True, 5.0)
    await at.engine.open_sessions("plain", session_ids=[name, unnamed, "b"], resume=True, max_idle_ms=0)
    assert [await limit_s(at, each) for each in (name, unnamed, "b")] == [5.0, HOUR_S, math.inf]


@pytest.mark.engine(max_session_idle_s=60.0, unnamed_session_idle_s=HOUR_S)
async def test_the_limit_of_the_server_is_an_upper_bound(at: Harness) -> None:
    for asked, name, limit in (
        (0, "a", 60.0),
        (90_000, "b", 60.0),
        (30_000, "c", 30.0),
        (None, "", 60.0),
    ):
        assert await limit_s(at, await opened(at, asked, name)) == limit
    assert await at.expired_after(30.5) == 1
    await refused(at, "c")
    assert await at.expired_after(30.0) == 3
    assert await ids(at) == set()


async def test_a_request_that_comes_again_must_ask_for_the_same_limit(at: Harness) -> None:
    first = await at.engine.open_session("plain", request_id=5, max_idle_ms=6000)
    again = await at.engine.open_session("plain", request_id=5, max_idle_ms=6000)
    assert (again.replayed, again.session.session_id) == (True, first.session.session_id)
    for other in (None, 0, 7000):
        await fails(
            at.engine.open_session("plain", request_id=5, max_idle_ms=other),
            InvalidInput,
            "with other content",
        )


@OWN
async def test_each_session_ends_by_its_own_limit() -> None:
    """Of very different limits, in whichever order they end."""
    limits_s = [1.0, 1.5, 60.0, 61.0, 7200.0, 86_400.0, 3650 * 86_400.0]
    async with running() as at:
        names = [await opened(at, round(each * 1000)) for each in limits_s]
        stays = await opened(at, 0)
        passed = 0.0
        for name, limit in zip(names, limits_s, strict=True):
            at.clock.advance(limit - passed)
            passed = limit
            assert await at.internals.expire_idle() == 0, f"idle for {limit} s is not longer than that"
            at.clock.advance(0.25)
            passed += 0.25
            assert await at.internals.expire_idle() == 1
            await refused(at, name)
        assert await ids(at) == {stays}
        assert [event for event in at.events.sessions if event[0] == "expired"] == [
            ("expired", n) for n in names
        ]


@pytest.mark.engine(threads=True)
async def test_use_puts_the_end_off_and_a_look_at_the_session_does_not(at: Harness) -> None:
    names = {use: await opened(at, 60_000, use) for use in ("step", "read", "resume", "fork", "describe")}
    for turn in range(4):
        at.clock.advance(45.0)
        if turn == 0:
            await at.engine.session_info("describe")
            await at.engine.list_sessions()
        await at.step("step", x(1))
        await at.state("read")
        await at.engine.open_session("plain", session_id="resume")
        await at.engine.fork("fork", new_session_id=f"of {turn}")
        assert await at.internals.expire_idle() == int(turn == 1)
    assert await ids(at) == {*names, *(f"of {turn}" for turn in range(4))} - {"describe"}


@OWN
@pytest.mark.engine(threads=True)
async def test_a_session_with_a_request_under_way_counts_as_used(at: Harness) -> None:
    name, other = await opened(at, 60_000), await opened(at, 60_000)
    await at.state(name)
    answer = await at.begin_pass(name, x(1))
    assert await at.expired_after(70.0) == 1
    at.hooks.open_gate()
    assert (await answer.only()).revision == 1
    await refused(at, other)
    assert await at.expired_after(60.0) == 0
    assert await at.expired_after(0.5) == 1


async def test_a_call_finds_a_session_expired_before_the_timer(at: Harness) -> None:
    names = [await opened(at, 5000) for _ in range(3)]
    at.clock.advance(5.5)
    answers = await at.submit(names[:2], x(2)).all()
    assert [type(answer) for answer in answers] == [SessionExpired] * 2
    with pytest.raises(SessionExpired):
        await at.single(names[2], x(1)).only()
    again = await at.engine.open_session("plain", session_id="n", max_idle_ms=5000)
    at.clock.advance(5.5)
    anew = await at.engine.open_session("plain", session_id="n")
    assert (anew.resumed, anew.session.max_idle_s) == (False, math.inf)
    assert anew.session.uid != again.session.uid


@ON_DISK
async def test_limits_outlive_a_restart_whose_time_ends_nothing(disk: Disk) -> None:
    async with disk.engine(resident_rows=4, unnamed_session_idle_s=60.0) as at:
        group = list((await at.engine.open_sessions("plain", count=20)).session_ids)
        others = list((await at.engine.open_sessions("plain", count=20, max_idle_ms=600_000)).session_ids)
        named = [f"n{number}" for number in range(20)]
        await at.open(*named)
        for revision in range(3):  # those with a limit and those without share a pass, in a template and not
            answers = await at.submit([*group, *others, *named], x(60)).all()
            assert [getattr(answer, "revision", None) for answer in answers] == [revision + 1] * 60
        await at.submit(group[:1], x(1, 4)).all()
        at.clock.advance(59.0)
        disk.kill(away_s=1000.0)
    stored = {
        name: decode(name, disk.store.get(name)).max_idle_ms for name in (group[0], others[0], named[0])
    }
    assert list(stored.values()) == [60_000, 600_000, 0]
    # a server with other settings: what is stored counts
    async with disk.engine(unnamed_session_idle_s=5.0, is_killed=True) as at:
        assert await ids(at) == {*group, *others, *named}
        await at.expire()
        await at.step(group[3], x(1))  # in the table from here on
        await at.expire(after_s=59.0)
        assert await ids(at) == {*group, *others, *named}
        await at.state(group[4])
        await at.expire(after_s=1.5)
        assert await ids(at) == {group[4], *others, *named}, "the others, in the table and not"
        await refused(at, group[0], group[3])
        assert [await limit_s(at, each) for each in (group[4], others[0], named[0])] == [
            60.0,
            600.0,
            math.inf,
        ]
        stone = disk.store.tombstones(group[:1])[0]
        assert (stone.end, stone.revision) == (End.EXPIRED, 4)
        await at.expire(after_s=545.0)
        assert await ids(at) == {*named}
    async with disk.engine() as at:
        await refused(at, group[0], others[0])


@ON_DISK
async def test_the_records_are_looked_through_in_pages_when_a_limit_ends_and_then_no_more(disk: Disk) -> None:
    async with disk.engine(resident_rows=4096, is_killed=True) as at:
        long = (await at.engine.open_sessions("plain", count=1200, max_idle_ms=50_000)).session_ids
        await at.engine.open_sessions("plain", count=300, max_idle_ms=90_000)
        await at.engine.open_sessions("plain", session_ids=["named"])
    async with disk.engine() as at:
        await at.state(long[0])
        at.clock.advance(5.5)
        heads, searches = at.store.heads, []

        def counted(*, after: str, **more: Any) -> Any:
            searches.append(after)
            return heads(after=after, **more)

        at.store.heads = counted
        await at.expire()
        assert len(searches) == 5, "four pages, and the end"
        await at.expire(after_s=44.0)
        assert len(searches) == 5, "no limit has ended"
        await at.state(long[1])
        await at.expire(after_s=1.0)
        assert at.internals.loaded() == [long[1]], "to expire sessions loads none"
        assert len(await ids(at)) == 302
        await at.expire(after_s=40.0)
        assert await ids(at) == {long[1], "named"}
        at.clock.advance(1e6)
        searches.clear()
        await at.expire()
        assert not searches, "all others are in the table"


@ON_DISK
async def test_a_store_that_cannot_be_read_ends_nothing_and_is_asked_again(disk: Disk) -> None:
    async with disk.engine(is_killed=True) as at:
        await opened(at, 50_000)
    async with disk.engine() as at:
        at.clock.advance(51.0)
        disk.store.read_error = Unavailable("away")
        await fails(at.expire(), Unavailable)
        disk.store.read_error = None
        assert disk.store.count() == 1
        await at.expire(after_s=2.0)
        assert await ids(at) == set()


@ON_DISK
async def test_a_session_that_is_paged_out_or_dropped_ends_by_its_last_use(disk: Disk) -> None:
    async with disk.engine(resident_rows=1) as at:
        names = [await opened(at, 50_000) for _ in range(3)]
        at.clock.advance(40.0)
        await at.state(names[0])
        disk.store.fail(Unavailable("away"))
        assert [type(answer) for answer in await at.submit(names[:1], x(1)).all()] == [Unavailable]
        await at.settled()
        assert names[0] not in at.internals.loaded()
        await at.expire(after_s=20.0)
        assert await ids(at) == {names[0]}
        assert (await at.step(names[0], x(1))).revision == 1
        await at.expire(after_s=50.5)
        assert await ids(at) == set()


@OWN
async def test_the_timer_ends_expired_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """It wakes by itself, whatever the limits are."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def passing(seconds: float, *rest: Any) -> None:
        pauses.append(seconds)
        at.clock.advance(seconds)
        await sleep(0, *rest)

    async with running() as at:
        await opened(at, 1_800_000)
        name, used = await opened(at, 2000), await opened(at, 2000)
        monkeypatch.setattr("stepwell_server.engine.sessions.end.asyncio.sleep", passing)
        timer = asyncio.create_task(at.internals.sweep.run())
        began = at.clock.monotonic()
        while name in at.internals.loaded():
            await at.state(used)
            await sleep(0)
        assert 2.0 < at.clock.monotonic() - began < 2.5
        timer.cancel()
        assert len(await ids(at)) == 2
        assert max(pauses) == 0.5
        assert len(pauses) < 20


@ON_DISK
async def test_a_session_whose_version_was_unloaded_ends_by_its_last_use(disk: Disk) -> None:
    async with disk.engine(is_killed=True) as at:
        used, unused = await opened(at, 50_000, "used"), await opened(at, 50_000, "unused")
    async with disk.engine() as at:
        at.clock.advance(40.0)
        await at.state(used)
        await at.engine.unload_version("plain", 1, force=True)
        assert at.internals.loaded() == []
        await at.expire(after_s=11.0)
        assert disk.store.get(used) is not None
        assert disk.store.tombstones([unused])[0].end is End.EXPIRED
        await at.expire(after_s=40.0)
        assert disk.store.tombstones([used])[0].end is End.EXPIRED


@ON_DISK
async def test_many_sessions_of_an_unloaded_version_end_in_pieces(disk: Disk) -> None:
    async with disk.engine(resident_rows=4096) as at:
        made = (await at.engine.open_sessions("plain", count=1100, max_idle_ms=50_000)).session_ids
        await at.engine.open_sessions("plain", count=300, max_idle_ms=90_000)
        await at.engine.unload_version("plain", 1, force=True)
        at.clock.advance(51.0)
        assert [await at.internals.sweep.page() for _ in range(3)] == [500, 500, 100]
        assert await at.internals.expire_idle() == 0
        await at.settled()
        assert disk.store.count() == 300
        assert disk.store.tombstones(made[:1])[0].end is End.EXPIRED
        assert await at.expired_after(40.0) == 300
