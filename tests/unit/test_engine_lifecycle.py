"""Sessions come and go: open, resume, fork, close, expire."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.sessions import read
from stepwell_server.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    RevisionConflict,
    SessionExists,
    SessionNotFound,
)
from support.checks.model_of_sessions import initial
from support.engine.fake_executor import PLAIN, RICH
from support.engine.harness import Answer, Harness, fails, x
from support.engine.session_lifetimes import error_of_all_calls, pass_in_flight
from support.stores.durable import start_task


@pytest.mark.engine({"rich": RICH})
async def test_a_new_session_begins_at_the_initial_state(at: Harness) -> None:
    opened = await at.engine.open_session("rich", session_id="a", batch_size=2)
    assert not opened.resumed
    assert not opened.replayed
    info = opened.session
    assert (info.session_id, info.model, info.fingerprint) == ("a", "rich", "f-rich")
    assert (info.batch_size, info.revision, info.position, info.resident) == (2, 0, 0, True)
    assert info.created == info.last_used == at.clock.now()
    state = (await at.engine.get_state("a")).state
    assert list(state) == ["sum", "count"]
    assert state["sum"].tolist() == [[0.5, -0.25]] * 2
    assert state["count"].tolist() == [7, 7]
    assert at.events.sessions == [("opened", "a")]


@pytest.mark.engine(resident_rows=1)
async def test_a_reused_row_does_not_show_its_old_content(at: Harness) -> None:
    await at.open_and_step("a", x(1, 3))
    await at.engine.close_session("a")
    await at.open("b")
    assert (await at.state("b"))["sum"].tobytes() == initial(1).tobytes()
    answer = at.submit("b", x(1), expected=9, request_ids=1)
    await fails(answer.only(), RevisionConflict)


async def test_a_session_may_begin_at_a_given_state(at: Harness) -> None:
    value = x(2)
    await at.engine.open_session("plain", session_id="a", batch_size=2, state={"": value})
    assert (await at.state("a"))["sum"].tobytes() == value.tobytes()


async def test_ids_made_here_are_new_each_time(at: Harness) -> None:
    ids = {(await at.engine.open_session("plain")).session.session_id for _ in range(20)}
    ids |= set((await at.engine.open_sessions("plain", count=20)).session_ids)
    assert len(ids) == 40
    assert all(len(session_id) >= 30 for session_id in ids)


@pytest.mark.engine({"plain": PLAIN, "other": PLAIN})
async def test_resuming_continues_from_the_last_state_of_the_session(at: Harness) -> None:
    """A state that the opening brings is for a new session."""
    await at.open("a", batch_size=2)
    await at.step("a", x(2, 3))
    at.clock.advance(10)
    before = (await at.state("a"))["sum"].tobytes()
    opened = await at.engine.open_session("plain", session_id="a", batch_size=2, state={"": x(2)})
    assert opened.resumed
    assert (await at.state("a"))["sum"].tobytes() == before
    assert (opened.session.revision, opened.session.position) == (1, 3)


async def test_opening_again_with_the_same_request_is_the_same_opening(at: Harness) -> None:
    first = await at.engine.open_session("plain", request_id=5)
    again = await at.engine.open_session("plain", request_id=5)
    assert again.replayed
    assert again.session.session_id == first.session.session_id
    named = await at.engine.open_session("plain", session_id="a", request_id=6, must_be_new=True)
    again = await at.engine.open_session("plain", session_id="a", request_id=6, must_be_new=True)
    assert (named.replayed, again.replayed) == (False, True)
    await fails(
        at.engine.open_session("plain", session_id="a", request_id=7, must_be_new=True), SessionExists
    )
    assert (await at.engine.list_sessions())[1] == 2


async def test_many_are_opened_or_none(at: Harness) -> None:
    opened = await at.engine.open_sessions("plain", count=5, batch_size=2, request_id=8)
    again = await at.engine.open_sessions("plain", count=5, batch_size=2, request_id=8)
    assert (opened.replayed, again.replayed) == (False, True)
    assert list(again.session_ids) == list(opened.session_ids)
    assert (await at.engine.list_sessions())[1] == 5


async def test_a_session_has_a_row(at: Harness) -> None:
    """No message asks for none: 0 stands for 1. What else cannot be opened is in `test_refusals_sessions`."""
    for opening in (
        at.engine.open_session("plain", batch_size=0),
        at.engine.open_sessions("plain", count=1, batch_size=0),
    ):
        await fails(opening, InvalidInput, r"^batch_size must be 1 to resident_rows, 64; got 0")
    assert await at.engine.list_sessions() == ([], 0)


@pytest.mark.engine(resident_rows=8)
async def test_more_sessions_are_opened_at_once_than_there_are_rows(at: Harness) -> None:
    ids = list((await at.engine.open_sessions("plain", count=30, batch_size=3)).session_ids)
    assert (await at.engine.list_sessions())[1] == 30
    for session_id in ids:
        assert (await at.state(session_id))["sum"].tobytes() == initial(3).tobytes()


@pytest.mark.engine(resident_rows=4, threads=True)
async def test_many_may_be_opened_while_the_rows_are_taken_and_begin_paged_out(at: Harness) -> None:
    await at.open(*"abc")
    await pass_in_flight(at, *"abc")
    opened = await at.engine.open_sessions("plain", count=3, batch_size=2)
    assert (await at.engine.list_sessions())[1] == 6
    assert [(await at.engine.session_info(i)).resident for i in opened.session_ids] == [False] * 3
    at.hooks.open_gate()
    await at.settled()
    await at.open("fresh", batch_size=2)
    expected = await at.step("fresh", x(2, 3))
    for session_id in opened.session_ids:
        answer = await at.step(session_id, x(2, 3))
        assert answer.outputs["y"].tobytes() == expected.outputs["y"].tobytes()
        assert (answer.revision, answer.position) == (1, 3)


async def test_a_fork_has_the_state_and_goes_its_own_way(at: Harness) -> None:
    await at.open("a", batch_size=2)
    await at.step("a", x(2, 3), request_ids=7)
    before = (await at.state("a"))["sum"].tobytes()
    forked = await at.engine.fork("a", new_session_id="b", expected=1)
    assert (forked.session.revision, forked.session.position, forked.session.batch_size) == (1, 3, 2)
    one = await at.step("b", x(2), expected=1)
    assert (await at.state("a"))["sum"].tobytes() == before
    two = await at.step("a", x(2), expected=1)
    assert one.outputs["y"].tobytes() == two.outputs["y"].tobytes()
    await at.engine.fork("a", new_session_id="c", expected=2)
    await at.step("a", x(2), expected=2, request_ids=8)
    with pytest.raises(RevisionConflict):  # the fork did not make the change that its source remembers
        await at.step("c", x(2), expected=1, request_ids=7)


@pytest.mark.engine(threads=True)
async def test_a_fork_waits_for_its_turn_and_is_refused_with_a_reason(at: Harness) -> None:
    await at.open("a", "b")
    await pass_in_flight(at, "a")
    fork = await start_task(at.engine.fork("a", new_session_id="c"))
    after = at.submit("a", x(1))
    at.hooks.open_gate()
    assert (await fork).session.revision == 1
    assert (await after.only()).revision == 2
    for fields, kind in (
        ({"new_session_id": "b"}, SessionExists),
        ({"new_session_id": "a"}, SessionExists),
        ({"new_session_id": ""}, None),
        ({"new_session_id": "d\n"}, InvalidInput),
        ({"new_session_id": "d", "expected": 1}, RevisionConflict),
    ):
        if kind is None:
            assert len((await at.engine.fork("a", **fields)).session.session_id) > 30
        else:
            await fails(at.engine.fork("a", **fields), kind)


@pytest.mark.parametrize("new", ["", "c"])
@pytest.mark.engine(threads=True)
async def test_a_fork_sent_again_is_the_same_fork(new: str, at: Harness) -> None:
    await at.open("a")
    first = await at.engine.fork("a", new_session_id=new, request_id=4)
    await at.step("a", x(1))
    again = await at.engine.fork("a", new_session_id=new, request_id=4, expected=0)
    assert again.replayed
    assert again.session.session_id == first.session.session_id
    await pass_in_flight(at, "a")
    both = [await start_task(at.engine.fork("a", new_session_id=new and "d", request_id=5)) for _ in range(2)]
    at.hooks.open_gate()
    one, two = await both[0], await both[1]
    assert (one.replayed, two.replayed) == (False, True)
    assert one.session.session_id == two.session.session_id
    assert (await at.engine.list_sessions())[1] == 3


@pytest.mark.engine(threads=True)
async def test_two_forks_to_one_name_that_wait_make_one_session(at: Harness) -> None:
    await at.open("a")
    await pass_in_flight(at, "a")
    both = [await start_task(at.engine.fork("a", new_session_id="c", request_id=r)) for r in (5, 6)]
    at.hooks.open_gate()
    assert (await both[0]).session.session_id == "c"
    await fails(both[1], SessionExists)


@pytest.mark.engine(threads=True)
async def test_closing_refuses_waiting_requests_and_forgets_the_session(at: Harness) -> None:
    await at.open("a", "b")
    first = await pass_in_flight(at, "a", "b")
    before = at.submit("a", x(1))
    closing = await start_task(at.engine.close_session("a", request_id=5))
    late_step, late_reset = at.submit(["a", "b"], x(2)), at.submit("a", reset=True)
    late_read = await start_task(at.state("a"))
    at.hooks.open_gate()
    assert await closing is False
    assert [type(answer) for answer in await first.all()] == [Answer, Answer]
    assert (await before.only()).revision == 2
    refused, applied = await late_step.all()
    assert isinstance(refused, SessionNotFound)
    assert refused.message == "session 'a' was closed"
    assert isinstance(applied, Answer)
    for call in (late_reset.only(), late_read):
        await fails(call, SessionNotFound, "was closed")
    assert await at.engine.close_session("a", request_id=5) is True
    assert await error_of_all_calls(at, "a") == "SessionNotFound"
    assert at.events.sessions[-1] == ("closed", "a")


@pytest.mark.engine(threads=True)
async def test_a_closing_sent_again_while_the_first_one_waits_succeeds(at: Harness) -> None:
    await at.open("a")
    await pass_in_flight(at, "a")
    both = [await start_task(at.engine.close_session("a", request_id=5)) for _ in range(2)]
    other = await start_task(at.engine.close_session("a", request_id=6))
    at.hooks.open_gate()
    assert [await task for task in both] == [False, True]
    await fails(other, SessionNotFound)


async def test_a_closing_that_is_answered_does_not_close_the_next_session_of_that_name(at: Harness) -> None:
    await at.open("a")
    await at.engine.close_session("a", request_id=5)
    await at.open("a")
    assert await at.engine.close_session("a", request_id=5) is True
    assert (await at.engine.session_info("a")).revision == 1
    assert await at.engine.close_session("a", request_id=6) is False
    assert await at.engine.close_session("a", request_id=5) is True
    assert await at.engine.close_session("a", request_id=6) is True
    await fails(at.engine.close_session("a", request_id=7), SessionNotFound)


@pytest.mark.engine(threads=True)
async def test_closing_many_counts_those_that_were_there(at: Harness) -> None:
    await at.open("a", "b", "c")
    await pass_in_flight(at, "b")
    closing = await start_task(at.engine.close_sessions(["a", "gone", "b", "a"]))
    at.hooks.open_gate()
    assert await closing == 2
    assert [info.session_id for info in (await at.engine.list_sessions())[0]] == ["c"]


@pytest.mark.engine(resident_rows=2, threads=True)
async def test_a_session_without_rows_is_closed_even_if_all_rows_are_busy(at: Harness) -> None:
    await at.open("away", "a", "b")
    assert not (await at.engine.session_info("away")).resident
    await pass_in_flight(at, "a", "b")
    assert await at.engine.close_session("away") is False
    assert await error_of_all_calls(at, "away") == "SessionNotFound"
    at.hooks.open_gate()


@pytest.mark.parametrize("what", ["read", "fork", "close"])
@pytest.mark.engine(threads=True)
async def test_a_call_whose_turn_comes_after_its_deadline_fails(what: str, at: Harness) -> None:
    await at.open("a")
    await pass_in_flight(at, "a")
    deadline = at.clock.monotonic() + 5
    call: Any = {"read": at.engine.get_state, "fork": at.engine.fork, "close": at.engine.close_session}[what]
    late, in_time = await start_task(call("a", deadline=deadline)), at.submit("a", x(1))
    at.clock.advance(5)
    at.hooks.open_gate()
    await fails(late, DeadlineExceeded, "deadline passed while it waited")
    assert (await in_time.only()).revision == 2
    assert (await at.engine.list_sessions())[1] == 1


@pytest.mark.engine(threads=True)
async def test_a_reader_that_is_cancelled_in_line_gives_its_turn_away(at: Harness) -> None:
    await at.open("a")
    await pass_in_flight(at, "a")
    reading = await start_task(at.state("a"))
    following = at.submit("a", x(1))
    reading.cancel()
    at.hooks.open_gate()
    assert (await following.only()).revision == 2
    assert reading.cancelled()


@pytest.mark.engine(threads=True)
async def test_a_reader_that_is_cancelled_as_its_turn_comes_gives_it_away(
    monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    await at.open("a")
    await pass_in_flight(at, "a")
    reading = await start_task(at.state("a"))
    following = at.submit("a", x(1))
    lines = at.internals.turns
    for _ in range(100):  # an awaited store is asked before the reader is in line
        await asyncio.sleep(0)
    grant = lines._grant  # nothing outside happens between a turn that comes and the task that wakes

    def grant_and_cancel(hold: Any, handle: int) -> bool:
        taken = grant(hold, handle)
        reading.cancel()
        return taken

    monkeypatch.setattr(lines, "_grant", grant_and_cancel)
    at.hooks.open_gate()
    assert (await following.only()).revision == 2
    assert reading.cancelled()


@pytest.mark.stores("memory")
@pytest.mark.engine(threads=True)
async def test_a_reader_that_is_cancelled_as_the_session_goes_takes_nothing_from_the_next_one(
    monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    await at.open("a")
    await pass_in_flight(at, "a")
    closing = await start_task(at.engine.close_session("a"))
    reading = await start_task(at.state("a"))
    turns, table = at.internals.turns, at.internals.table
    handle, remove = table.find("a"), turns.remove

    def take_out_and_reuse(*args: Any) -> None:
        remove(*args)
        reading.cancel()
        with pytest.raises(StopIteration):  # in memory it is done at once
            at.engine.open_sessions("plain", session_ids=["b"]).send(None)
        at.hooks.close_gate()
        at.submit("b", x(1))

    monkeypatch.setattr(turns, "remove", take_out_and_reuse)
    at.hooks.open_gate()
    await closing
    await asyncio.wait([reading])
    assert reading.cancelled()
    assert table.find("b") == handle, "the next session has the handle of the last one"
    assert handle is not None
    assert table.claimed[handle], "its step is under way"
    at.hooks.open_gate()


@pytest.mark.engine({"plain": PLAIN, "other": PLAIN})
async def test_sessions_are_listed_in_the_order_of_their_ids(
    monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    await at.open("b2", "a1", "b1", "c")
    await at.open("b3", model="other")

    async def listed(**fields: Any) -> tuple[list[str], int]:
        infos, total = await at.engine.list_sessions(**fields)
        return [info.session_id for info in infos], total

    for at_once in (10_000, 2):  # others get a turn after so many
        monkeypatch.setattr(read, "_HEADS_BATCH_SIZE", at_once)
        assert await listed() == (["a1", "b1", "b2", "b3", "c"], 5)
        assert await listed(prefix="b") == (["b1", "b2", "b3"], 3)
        assert await listed(prefix="b", model="plain") == (["b1", "b2"], 2)
        assert await listed(limit=2) == (["a1", "b1"], 5)
        assert await listed(limit=2, after="b1") == (["b2", "b3"], 5)
    await fails(listed(model="x"), ModelNotFound)


async def test_a_reset_to_a_state_may_take_its_position_over(at: Harness) -> None:
    await at.open("a", "b")
    await at.step("a", x(1, 4))
    state = await at.state("a")
    answer = await at.submit("b", reset=True, state=state, position=4, expected=0, request_ids=7).only()
    assert (answer.revision, answer.position) == (1, 4)
    again = await at.submit("b", reset=True, state=state, position=4, expected=0, request_ids=7).only()
    assert (again.replayed, again.position) == (True, 4)
    assert (await at.step("b", x(1))).position == 5
    assert (await at.submit("b", reset=True).only()).position == 0


async def test_session_info_describes_a_session(at: Harness) -> None:
    await at.open("a")
    created = at.clock.now()
    at.clock.advance(5)
    await at.step("a", x(1, 4))
    at.clock.advance(7)
    info = await at.engine.session_info("a")
    assert (info.created, info.last_used) == (created, created + 5)
    assert (info.revision, info.position) == (1, 4)


async def test_a_state_that_was_read_does_not_change_afterwards(at: Harness) -> None:
    await at.open("a")
    read = await at.engine.get_state("a")
    before = read.state["sum"].tobytes()
    await at.step("a", x(1, 4))
    assert read.state["sum"].tobytes() == before
    assert not np.shares_memory(read.state["sum"], at.internals.model("plain").arena.states[0])


@pytest.mark.engine(resident_rows=2048)
async def test_other_tasks_run_while_many_sessions_are_closed(at: Harness) -> None:
    opened = await at.engine.open_sessions("plain", count=2000)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    company = asyncio.create_task(others())
    await asyncio.sleep(0)
    before = turns
    assert await at.engine.close_sessions(opened.session_ids) == 2000
    assert turns - before >= 3
    company.cancel()
