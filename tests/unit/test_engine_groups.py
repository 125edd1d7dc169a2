"""Many sessions are read and forked at once: GetStates and ForkSessions."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.sessions import open as opening
from stepwell_server.engine.sessions import read as reading
from stepwell_server.errors import (
    DeadlineExceeded,
    InvalidInput,
    MessageTooLarge,
    Overloaded,
    RevisionConflict,
    ServerError,
    SessionExists,
    SessionExpired,
    SessionNotFound,
)
from support.engine.fake_executor import RICH
from support.engine.harness import Harness, fails, kinds, running, x
from support.engine.session_lifetimes import pass_in_flight
from support.stores.durable import start_task
from support.stores.fake_shared_store import RemoteStore

pytestmark = pytest.mark.stores("memory", "fake_shared", "sync")
#: Calls for several sessions take their places after some turns of the event loop.
in_line = functools.partial(start_task, turns=3)


async def stepped(at: Harness, *session_ids: str, batch_size: int = 1) -> dict[str, bytes]:
    """Open sessions, step each differently, and return their states."""
    await at.open(*session_ids, batch_size=batch_size)
    states = {}
    for seed, session_id in enumerate(session_ids):
        await at.step(session_id, x(batch_size, 1 + seed, seed=seed))
        states[session_id] = (await at.state(session_id))["sum"].tobytes()
    return states


async def test_a_fork_of_many_has_no_later_changes(at: Harness) -> None:
    await at.open_and_step("a", x(1))
    forking = await in_line(at.engine.fork_sessions(["a"], new_session_ids=["z"]))
    later = [at.submit("a", x(1)) for _ in range(3)]
    assert (await forking).revisions.tolist() == [1]
    assert [(await answers.only()).revision for answers in later] == [2, 3, 4]


async def test_states_come_in_the_order_asked_for_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several sessions, resident and paged out, in pieces; those that are paged out stay so."""
    monkeypatch.setattr(reading, "COPY_BATCH_ROWS", 3)
    async with running(resident_rows=6) as at:
        states = await stepped(at, *"abcdefg", batch_size=2)
        resident = {i: at.internals.has_row(i) for i in "abcdefg" if at.internals.table.find(i) is not None}
        assert 1 <= sum(resident.values()) <= 3
        read = await at.engine.get_states(list("gcaebdf"))
        assert read.state["sum"].tobytes() == b"".join(states[i] for i in "gcaebdf")
        assert read.members.tolist() == list(range(7))
        assert read.sizes.tolist() == [2] * 7
        assert (read.revisions.tolist(), read.positions.tolist()) == ([1] * 7, [7, 3, 1, 5, 2, 4, 6])
        assert (read.model, read.fingerprint, read.errors) == ("plain", "f-plain", [])
        assert all(at.internals.has_row(i) == is_here for i, is_here in resident.items())
        alone = await at.engine.get_states(list("gcaebdf"), with_state=False)
        assert alone.positions.tolist() == read.positions.tolist()
        assert not alone.state


@pytest.mark.engine(threads=True)
async def test_each_session_is_read_between_earlier_and_later_requests(at: Harness) -> None:
    await at.open(*"abc")
    first = await pass_in_flight(at, "a", "b")
    waiting = at.submit("a", x(1))
    reading_ = await in_line(at.engine.get_states(list("abc")))
    later = at.submit("a", x(1))
    # c has nothing under way: it is read, and not held up while the others are waited for
    await at.engine.fork("c")
    assert not reading_.done()
    at.hooks.open_gate()
    read = await reading_
    assert read.revisions.tolist() == [2, 1, 0]
    for answers, revision in ((first, 1), (waiting, 2), (later, 3)):
        assert (await answers.all())[0].revision == revision  # type: ignore[union-attr]


@pytest.mark.engine(threads=True)
async def test_two_that_read_the_same_sessions_do_not_wait_for_each_other(at: Harness) -> None:
    await at.open(*"ab")
    pass_ = await pass_in_flight(at, "a", "b")
    both = [await in_line(at.engine.get_states(ids)) for ids in (["a", "b"], ["b", "a"])]
    gone = await in_line(at.engine.get_states(["a", "b"]))
    gone.cancel()
    at.hooks.open_gate()
    reads = await asyncio.wait_for(asyncio.gather(*both), 100)
    assert [read.revisions.tolist() for read in reads] == [[1, 1]] * 2
    assert kinds(await pass_.all()) == ["Answer", "Answer"]


@pytest.mark.engine(threads=True)
async def test_a_session_that_cannot_be_read_fails_alone(at: Harness) -> None:
    """Closed while it was waited for, never there, closed before."""
    states = await stepped(at, *"abcd")
    await at.engine.close_session("c")
    await pass_in_flight(at, "b")
    closing = await in_line(at.engine.close_session("b"))
    read_ = await in_line(at.engine.get_states(["d", "b", "nobody", "c", "a"]))
    at.hooks.open_gate()
    await closing
    read = await read_
    assert read.members.tolist() == [0, 4]
    assert read.state["sum"].tobytes() == states["d"] + states["a"]
    told = {member: type(error) for members, error in read.errors for member in members.tolist()}
    assert told == dict.fromkeys([1, 2, 3], SessionNotFound)
    nobody = await at.engine.get_states(["nobody", "c"])
    assert (nobody.model, len(nobody.members), len(nobody.errors)) == ("", 0, 2)


@pytest.mark.stores("memory")
async def test_one_that_is_closed_between_two_pieces_was_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one has its place in the table then."""
    monkeypatch.setattr(reading, "COPY_BATCH_ROWS", 1)
    async with running(resident_rows=300) as at:
        ids = list((await at.engine.open_sessions("plain", count=200)).session_ids)
        reading_ = await in_line(at.engine.get_states(ids))
        await at.engine.close_session(ids[-1])
        await at.open("another")
        assert not reading_.done(), "this test needs more pieces"
        read = await reading_
        assert read.members.tolist() == list(range(199))
        assert len(read.state["sum"]) == 199
        ((members, error),) = read.errors
        assert (members.tolist(), type(error)) == ([199], SessionNotFound)


@pytest.mark.engine(max_session_idle_s=10)
async def test_an_expired_session_says_so_and_reading_counts_as_use(at: Harness) -> None:
    await at.open(*"ab")
    at.clock.advance(6)
    await at.engine.get_states(["a"])
    at.clock.advance(6)
    read = await at.engine.get_states(["a", "b"])
    assert read.members.tolist() == [0]
    ((members, error),) = read.errors
    assert (members.tolist(), type(error)) == ([1], SessionExpired)
    await fails(at.engine.fork_sessions(["a", "b"]), SessionExpired)


@pytest.mark.engine({"plain": RICH, "rich": RICH})
async def test_what_cannot_be_read_at_all_is_refused(at: Harness) -> None:
    await at.open("a", "b", batch_size=2)
    await at.open("r", model="rich")
    refusals: list[tuple[dict[str, Any], type[ServerError], str]] = [
        ({"session_ids": ["a", "r"]}, InvalidInput, "session_ids must be sessions of one model"),
        (
            {"session_ids": ["a", "b"], "reply_limit": 100, "reply_bytes": 53},
            MessageTooLarge,
            "a reply of 100 bytes; got 2 sessions, which need 101 bytes: name fewer at once",
        ),
        ({"session_ids": ["a", "b"], "deadline": at.clock.monotonic()}, DeadlineExceeded, "deadline"),
    ]
    for arguments, kind, words in refusals:
        await fails(at.engine.get_states(**arguments), kind, words)


async def test_many_are_forked_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there are rows for, one of them twice, by a call that is sent again when all have gone on."""
    monkeypatch.setattr(reading, "COPY_BATCH_ROWS", 2)
    async with running(resident_rows=5) as at:
        states = await stepped(at, *"abc")
        sources = [*"cabc", *"aaa"]
        forked = await at.engine.fork_sessions(sources, request_id=5)
        assert (forked.model, forked.fingerprint, forked.batch_size) == ("plain", "f-plain", 1)
        assert (forked.revisions.tolist(), forked.positions.tolist()) == ([1] * 7, [3, 1, 2, 3, 1, 1, 1])
        read = await at.engine.get_states(forked.session_ids)
        assert read.state["sum"].tobytes() == b"".join(states[i] for i in sources)
        expected = await at.step("b", x(1))
        answer = await at.step(forked.session_ids[2], x(1))
        assert answer.outputs["y"].tobytes() == expected.outputs["y"].tobytes()
        assert (answer.revision, answer.position) == (2, 3)
        assert (await at.engine.get_states(["a", "c"])).revisions.tolist() == [1, 1]
        await at.engine.close_sessions(list("abc"))
        again = await at.engine.fork_sessions(sources, request_id=5)
        assert again.replayed
        assert list(again.session_ids) == list(forked.session_ids)
        assert again.revisions.tolist() == [1, 1, 2, 1, 1, 1, 1]
        assert (await at.engine.list_sessions())[1] == 7


@pytest.mark.engine(threads=True)
async def test_a_fork_under_given_ids_waits_for_its_sources_and_is_found_after_a_restart(at: Harness) -> None:
    await at.open(*"ab")
    await at.step("b", x(1))
    await at.engine.close_session("b")
    await at.open("b2")
    await pass_in_flight(at, "a")
    forking = await in_line(at.engine.fork_sessions(["a", "b2"], new_session_ids=["b", "z"]))
    assert not forking.done()
    at.hooks.open_gate()
    forked = await forking
    # "b" was another session's: it goes on behind that one's revision
    assert (forked.revisions.tolist(), forked.positions.tolist()) == ([2, 0], [1, 0])
    a = await at.state("a")
    assert (await at.state("b"))["sum"].tobytes() == a["sum"].tobytes()


async def test_no_more_is_copied_at_once_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state has 8 bytes; copies of the same session count each."""
    monkeypatch.setattr(opening, "MAX_FORK_BYTES", 32)
    async with running(threads=True) as at:
        await at.open(*"abc")
        await fails(
            at.engine.fork_sessions(list("abcbb")),
            MessageTooLarge,
            "at most 32 bytes together; got 5 sessions, whose copies need 40",
        )
        await fails(at.engine.fork_sessions(["a"] * 5), MessageTooLarge)
        await pass_in_flight(at, "a")
        waiting = await in_line(at.engine.fork_sessions(list("abc")))
        await fails(
            at.engine.fork_sessions(list("bc")),
            Overloaded,
            "must stay within 32; 24 are, and this call adds 16",
        )
        at.hooks.open_gate()
        await waiting
        await at.engine.fork_sessions(["a"] * 4)
        assert (await at.engine.list_sessions())[1] == 10


@pytest.mark.engine({"plain": RICH, "rich": RICH})
async def test_a_fork_that_fails_makes_nothing(at: Harness) -> None:
    await at.open("a", "b")
    await at.open("wide", batch_size=2)
    await at.open("r", model="rich")
    conflict = np.array([0, 7], np.uint64)
    refusals: list[tuple[dict[str, Any], type[ServerError], str]] = [
        ({"session_ids": ["a", "r"]}, InvalidInput, "session_ids must be sessions of one model"),
        ({"session_ids": ["a", "wide"]}, InvalidInput, "must be sessions of one batch_size; got 1 and 2"),
        (
            {"session_ids": ["a", "b"], "new_session_ids": ["z", "b"]},
            SessionExists,
            "session 'b' is open",
        ),
        (
            {"session_ids": ["a", "b"], "expected": conflict},
            RevisionConflict,
            "'b' must be its revision 0",
        ),
    ]
    for arguments, kind, words in refusals:
        await fails(at.engine.fork_sessions(**arguments), kind, words)
    assert (await at.engine.list_sessions())[1] == 4
    assert at.slots().resident == 4


@pytest.mark.stores("fake_shared")
async def test_sessions_changed_by_another_server_are_read_from_the_store(at: Harness) -> None:
    """Sessions that are resident here and went on there, and one that was closed there."""
    assert isinstance(at.store, RemoteStore)
    await at.open(*"abc")
    async with running(store=at.store.replica()) as other:
        states = {}
        for session_id in "ab":
            await other.step(session_id, x(1, 2))
            states[session_id] = (await other.state(session_id))["sum"].tobytes()
        await other.engine.close_session("c")
        read = await at.engine.get_states(list("abc"))
        assert read.members.tolist() == [0, 1]
        assert read.state["sum"].tobytes() == states["a"] + states["b"]
        assert read.revisions.tolist() == [1, 1]
        ((members, error),) = read.errors
        assert (members.tolist(), type(error)) == ([2], SessionNotFound)
