"""A close that is sent again closes only what it closed, whoever has opened its id since."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from stepwell_server.engine.api import SessionFilter
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import InvalidInput, ServerError, SessionGone, SessionNotFound
from support.engine.harness import Harness, fails, running, x


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
        at.clock.advance(20.0)
        await at.expire()
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
