"""Two servers on one store: calls that open many sessions, and sessions that the other server closed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import (
    OutcomeUnknown,
    RevisionConflict,
    SessionExists,
    SessionNotFound,
)
from stepwell_server.store.base import Batch
from support.engine.harness import Answers, Harness, fails, x
from support.engine.two_engines import held, make_resident_on_both
from support.stores.durable import start_task
from support.stores.kinds import SHARED
from support.stores.valkey_store import stamps

pytestmark = SHARED


def make_many(at: Harness, how: str, ids: list[str], request_id: int) -> Any:
    if how == "open":
        return at.engine.open_sessions("plain", session_ids=ids, request_id=request_id)
    return at.engine.fork_sessions(["source"] * len(ids), new_session_ids=ids, request_id=request_id)


HOW = pytest.mark.parametrize("how", ["open", "fork"])


@HOW
@pytest.mark.parametrize("kept", [True, False])
async def test_a_retried_opening_keeps_stored_sessions_and_makes_the_rest(
    how: str, kept: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "source")
    await first.open("new")
    second.store.unknown = {"x": kept, "z": kept}
    await fails(make_many(second, how, ["x", "y", "z"], 4), OutcomeUnknown, "may have kept it")
    assert await first.store.ids() == {"source", "new", "y"} | ({"x", "z"} if kept else set())
    opened = await make_many(first, how, ["x", "y", "z"], 4)
    assert (opened.replayed, list(opened.session_ids)) == (True, ["x", "y", "z"])
    again = await make_many(second, how, ["x", "y", "z"], 4)
    assert again.replayed
    assert again.revisions.tolist() == opened.revisions.tolist() == [0 if how == "open" else 1] * 3
    assert await first.store.ids() == {"source", "new", "x", "y", "z"}
    assert await first.store.count_of("plain") == 5
    wanted = (await first.state("source" if how == "fork" else "new"))["sum"].tobytes()
    for session_id in ("x", "y", "z"):
        assert (await second.state(session_id))["sum"].tobytes() == wanted
        assert (await second.step(session_id, x(1))).revision == opened.revisions[0] + 1


async def test_a_call_that_cannot_come_again_is_undone(first: Harness, second: Harness) -> None:
    second.store.unknown["x"] = True
    await fails(make_many(second, "open", ["x", "y"], 0), OutcomeUnknown, "may have kept it")
    assert await first.store.ids() == set()
    assert len((await make_many(second, "open", ["x", "y"], 0)).session_ids) == 2


async def beaten(first: Harness, second: Harness, how: str) -> Any:
    """A call of the second for three sessions, one of which the first has meanwhile; its answer is held back."""
    await make_resident_on_both(first, second, "source")
    slow = await held(second, lambda: make_many(second, how, ["x", "taken", "y"], 7))
    await first.open("taken")
    second.store.answers_held, second.store.commits_held = True, False
    second.store.release_once("commit")
    await second.store.until("answer")
    return slow


@HOW
async def test_a_call_that_is_refused_leaves_nothing(how: str, first: Harness, second: Harness) -> None:
    slow = await beaten(first, second, how)
    assert await first.store.ids() == {"source", "taken", "x", "y"}
    second.store.release()
    await fails(slow, SessionExists, "session 'taken' is open")
    assert await first.store.ids() == {"source", "taken"}
    assert await first.store.count_of("plain") == 2


@HOW
async def test_sessions_that_another_server_took_over_are_not_taken_back(
    how: str, first: Harness, second: Harness
) -> None:
    slow = await beaten(first, second, how)
    before = len(second.store.asked("commit"))
    second.store.answers_held, second.store.commits_held = False, True
    second.store.release_once("answer")
    await second.store.until("commit", before + 1)  # which takes back what was made
    # of a call that was refused itself: nothing is remembered of it
    await first.store.inner.apply(Batch(deletes=["taken"], delete_follows=stamps(0)))
    opened = await make_many(first, how, ["x", "taken", "y"], 7)
    second.store.release()
    await fails(slow, SessionExists, "session 'taken' is open")
    assert await first.store.ids() == {"source", "taken", "x", "y"}, "they were acknowledged"
    for session_id in ("x", "taken", "y"):
        assert (await first.step(session_id, x(1))).revision == opened.revisions[0] + 1


@HOW
async def test_two_servers_that_do_the_same_call_make_its_sessions_once(
    how: str, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "source")
    slow = await held(second, lambda: make_many(second, how, ["x", "y"], 7))
    first.store.unknown["y"] = False
    await fails(make_many(first, how, ["x", "y"], 7), OutcomeUnknown)
    second.store.release()
    assert (await slow).replayed, "one of them was there"
    assert (await make_many(first, how, ["x", "y"], 7)).replayed
    assert await first.store.count_of("plain") == 3


async def test_an_answer_to_a_call_that_came_again_cannot_be_taken_back(
    first: Harness, second: Harness
) -> None:
    """Each attempt that answers gives the sessions a stamp of its own, also where it made nothing."""
    second.store.answers_held = True
    slow = await start_task(make_many(second, "open", ["x", "y"], 7))
    await second.store.until("answer")
    made = await first.store.found("x", "y")
    assert (await make_many(first, "open", ["x", "y"], 7)).replayed
    again = await first.store.found("x", "y")
    assert all(now.stamp not in (0, before.stamp) for now, before in zip(again, made, strict=True))
    second.store.release()
    assert not (await slow).replayed
    assert (await second.step("x", x(1))).revision == 1, "it looks again when its stamp is an old one"
    assert (await first.step("y", x(1))).revision == 1


async def test_a_session_that_was_closed_is_not_made_again_with_the_others(
    first: Harness, second: Harness
) -> None:
    await make_many(second, "open", ["x", "y"], 4)
    await second.engine.close_session("y")
    await fails(make_many(first, "open", ["x", "y"], 4), SessionExists, "session 'x' is open")
    assert await first.store.ids() == {"x"}


@HOW
async def test_sessions_taken_over_are_deleted_when_the_call_is_refused(
    how: str, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "source")
    second.store.unknown["y"] = False
    await fails(make_many(second, how, ["x", "y"], 4), OutcomeUnknown)
    first.store.commits_held = True
    before = len(first.store.asked("commit"))
    slow = await start_task(make_many(first, how, ["x", "y"], 4))
    await first.store.until("commit", before + 1)
    first.store.release_once("commit")  # it has taken "x" over
    await first.store.until("commit", before + 2)
    await second.open("y")
    first.store.release()
    await fails(slow, SessionExists, "session 'y' is open")
    assert await first.store.ids() == {"source", "y"}
    assert await first.store.count_of("plain") == 2


async def test_sessions_taken_over_are_deleted_when_there_is_nothing_to_fork(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "source")
    second.store.unknown["y"] = False
    await fails(make_many(second, "fork", ["x", "y"], 4), OutcomeUnknown)
    await second.engine.close_session("source")
    await fails(make_many(first, "fork", ["x", "y"], 4), SessionNotFound)
    assert await first.store.ids() == set()


@pytest.mark.parametrize(("is_used", "request_id"), [(True, 4), (False, 5)])
async def test_an_opening_takes_over_no_session_that_was_used_or_is_of_another_call(
    is_used: bool, request_id: int, first: Harness, second: Harness
) -> None:
    second.store.unknown["y"] = False
    await fails(make_many(second, "open", ["x", "y"], 4), OutcomeUnknown)
    if is_used:
        await first.step("x", x(1), expected=0, request_ids=9)
    await fails(make_many(first, "open", ["x", "y"], request_id), SessionExists, "session 'x' is open")
    assert await first.store.ids() == {"x"}


async def test_a_step_that_is_under_way_is_judged_again_when_its_session_is_taken_over(
    first: Harness, second: Harness
) -> None:
    await make_many(second, "open", ["x", "y"], 4)
    second.store.commits_held = True
    step = second.submit("x", x(1), expected=0, request_ids=9)
    await second.store.until("commit", 2)
    assert (await make_many(first, "open", ["x", "y"], 4)).replayed
    second.store.release()
    assert (await step.only()).revision == 1
    await fails(first.step("x", x(1), expected=0, request_ids=10), RevisionConflict)


async def test_a_session_that_changes_while_it_is_taken_over_is_read_again(
    first: Harness, second: Harness
) -> None:
    await make_many(second, "open", ["x", "y"], 4)
    again = await held(first, lambda: make_many(first, "open", ["x", "y"], 4))
    await second.step("x", x(1), expected=0, request_ids=9)
    first.store.release()
    assert (await asyncio.wait_for(again, 60)).replayed
    assert (await first.step("x", x(1), expected=1)).revision == 2


async def closed_behind(first: Harness, second: Harness) -> Any:
    """The first closes a session for which a step of the second waits for the store: its answers."""
    if "a" not in second.internals.loaded():
        await make_resident_on_both(first, second, "a")
    step = await held(second, lambda: second.submit("a", x(1)))
    await first.engine.close_session("a")
    return step


async def result_of(second: Harness, call: Any, step: Answers) -> Any:
    """The result of a call, after the step under way has ended."""
    before = len(second.store.asked("read"))
    task: asyncio.Task[Any] = await start_task(call)
    await second.store.until("read", before + 1)
    for _ in range(20):  # it has seen what the store says, and goes on as far as it can
        await asyncio.sleep(0)
    second.store.release()
    await fails(step.only(), SessionNotFound)
    return await asyncio.wait_for(task, 60)


async def test_many_are_opened(first: Harness, second: Harness) -> None:
    step = await closed_behind(first, second)
    opened = await result_of(
        second, second.engine.open_sessions("plain", session_ids=["a", "b"], request_id=3), step
    )
    assert opened.revisions.tolist() == [2, 0]
    assert (await first.step("a", x(1), expected=2)).revision == 3


def fork_of(at: Harness, source: str, *new_ids: str) -> Any:
    """A fork by the call for one session, or by that for many."""
    if len(new_ids) == 1:
        return at.engine.fork(source, new_session_id=new_ids[0], request_id=3)
    return at.engine.fork_sessions([source] * len(new_ids), new_session_ids=list(new_ids), request_id=3)


@pytest.mark.parametrize("ids", [["a"], ["a", "b"]])
async def test_a_closed_id_may_be_forked_to(ids: list[str], first: Harness, second: Harness) -> None:
    await first.open("source")
    step = await closed_behind(first, second)
    found = await result_of(second, fork_of(second, "source", *ids), step)
    assert (found.revisions.tolist() if len(ids) > 1 else [found.session.revision]) == [2, 0][: len(ids)]


@pytest.mark.parametrize("many", [False, True])
async def test_it_is_not_forked(many: bool, first: Harness, second: Harness) -> None:
    step = await closed_behind(first, second)
    if not many:
        fork: Any = second.engine.fork("a", new_session_id="b", request_id=3)
    else:
        fork = second.engine.fork_sessions(["a"], new_session_ids=["b"], request_id=3)
    await fails(result_of(second, fork, step), SessionNotFound, "session 'a' was closed")


async def test_the_session_is_forked_that_has_the_id_now(first: Harness, second: Harness) -> None:
    """Also where the fork waits in the line of the one that was closed."""
    step = await closed_behind(first, second)
    await first.open("a", batch_size=2)
    fork = second.engine.fork("a", new_session_id="b", request_id=3)
    assert (await result_of(second, fork, step)).session.batch_size == 2


@pytest.mark.parametrize("existing", list(ExistingPolicy))
async def test_it_is_imported(existing: ExistingPolicy, first: Harness, second: Harness) -> None:
    await make_resident_on_both(first, second, "a")
    record = await first.exported("a")
    step = await closed_behind(first, second)
    arriving = [SessionRecord("a", "a", record)]
    assert await result_of(second, second.engine.import_sessions(arriving, existing), step) == [
        ImportOutcome.IMPORTED
    ]
    assert (await first.engine.session_info("a")).revision == 1


@pytest.mark.parametrize("is_busy", [False, True])
async def test_it_is_not_exported_and_it_is_said_why(is_busy: bool, first: Harness, second: Harness) -> None:
    if is_busy:
        step = await closed_behind(first, second)
        (why,) = await result_of(second, second.engine.export_sessions(["a"], deadline=float("inf")), step)
    else:
        await make_resident_on_both(first, second, "a")
        await first.engine.close_session("a")
        (why,) = await second.engine.export_sessions(["a"], deadline=float("inf"))
    assert isinstance(why, SessionNotFound)
    assert why.message == "session 'a' was closed"
