"""Watches of sessions: which changes they report, when, and what a slow reader misses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select, SessionPolicy
from stepwell_server.engine.watches import watch as watch_module
from stepwell_server.engine.watches import watchers as watchers_module
from stepwell_server.engine.watches.events import Event, Kind, Wanted
from stepwell_server.engine.watches.watch import Watch
from stepwell_server.errors import (
    InvalidInput,
    Overloaded,
    SessionExpired,
    SessionNotFound,
    Stopping,
    Unavailable,
)
from support.checks.model_of_sessions import initial, ran
from support.engine.fake_executor import WAIT_S
from support.engine.harness import BOTH_WAYS, Harness, running, x
from support.engine.two_engines import two
from support.engine.versions import WIDE, serving, widen

ALL = Wanted(inputs=True, outputs=True, states=True)
ALL_STORES = pytest.mark.stores("memory", "async", "sync", "fake_shared", "valkey")


@asynccontextmanager
async def watching(
    at: Harness, *session_ids: str, wanted: Wanted = ALL, caller: str = "me"
) -> AsyncIterator[Watch]:
    """A watch whose first events were read."""
    watch = at.engine.watch_sessions(session_ids, wanted, caller)
    try:
        first = await several(watch, len(session_ids))
        assert {event.kind for event in first} == {Kind.PRESENT}
        assert {event.session_id for event in first} == set(session_ids)
        yield watch
    finally:
        at.engine.end_watch(watch)


async def several(watch: Watch, count: int) -> list[Event]:
    """The next events, this many."""
    found: list[Event] = []
    while len(found) < count:
        found += await asyncio.wait_for(watch.next(), WAIT_S)
    assert len(found) == count, found
    return found


async def one(watch: Watch) -> Event:
    (event,) = await several(watch, 1)
    return event


def same(found: Any, wanted: Sequence[Any]) -> bool:
    """Whether tensors have these values, bit for bit."""
    arrays = list(found.values())
    return len(arrays) == len(wanted) and all(
        a.tobytes() == np.asarray(b, a.dtype).tobytes() for a, b in zip(arrays, wanted, strict=True)
    )


@ALL_STORES
@BOTH_WAYS
async def test_each_change_is_reported_as_the_store_has_it(threads: bool) -> None:
    async with running(threads=threads) as at:
        await each_change_is_reported(at)


async def each_change_is_reported(at: Harness) -> None:
    await at.open("a", "b")
    await at.step("a", x(1, seed=9))
    state = {"a": (await at.state("a"))["sum"], "b": initial(1)}
    watch = at.engine.watch_sessions(["a", "b"], ALL, "me")
    for event in await several(watch, 2):
        assert (event.kind, event.model, event.version) == (Kind.PRESENT, "plain", 1)
        assert (event.revision, event.position) == ((1, 1) if event.session_id == "a" else (0, 0))
        assert same(event.states, [state[event.session_id]])
        assert not event.inputs
        assert not event.outputs
        assert not event.skipped
        assert not event.from_store
    for turn in range(3):
        for name in ("a", "b"):
            value = x(1, seed=turn * 2 + (name == "a"))
            await at.step(name, value)
            outputs, state[name] = ran(state[name], value)
            event = await one(watch)
            assert (event.kind, event.session_id, event.time_steps) == (Kind.STEP, name, 1)
            assert event.revision == event.position == turn + 1 + (name == "a")
            assert same(event.inputs, [value])
            assert same(event.outputs, [outputs])
            assert same(event.states, [state[name]])
            assert same(event.states, [(await at.state(name))["sum"]])
            assert (event.skipped, event.dropped, event.time) == (0, 0, at.clock.now())
    at.engine.end_watch(watch)
    assert at.engine.watch_counts()[:3] == (0, 0, 0)


@pytest.mark.stores("memory", "async", "fake_shared")
async def test_frames_report_only_the_watched_sessions(at: Harness) -> None:
    ids = [f"s{i}" for i in range(20)]
    await at.open(*ids)
    state = initial(20)
    async with watching(at, "s3", "s17") as watch:
        for turn in range(3):
            value = x(20, seed=turn)
            await at.submit(ids, value).require_all_applied()
            outputs, state = ran(state, value)
            events = {event.session_id: event for event in await several(watch, 2)}
            for place in (3, 17):
                event, own = events[f"s{place}"], slice(place, place + 1)
                assert same(event.inputs, [value[own]])
                assert same(event.outputs, [outputs[own]])
                assert same(event.states, [state[own]])


@pytest.mark.stores("memory", "async")
async def test_several_time_steps_report_the_last_one(at: Harness) -> None:
    await at.open("a", batch_size=3)
    value = x(3, 5)
    async with watching(at, "a") as watch:
        await at.submit("a", value, sizes=[3]).only()
        event = await one(watch)
        outputs, after = ran(initial(3), value)
        assert (event.time_steps, event.revision, event.position, list(event.rows)) == (5, 1, 5, [])
        assert same(event.inputs, [value[:, -1]])
        assert same(event.outputs, [outputs[:, -1]])
        assert same(event.states, [after])
        # outputs that the caller does not want are watched all the same
        await at.submit("a", value, sizes=[3], select=Select.NONE).only()
        assert same((await one(watch)).outputs, [ran(after, value)[0][:, -1]])


@pytest.mark.stores("memory", "async")
async def test_steps_and_resets_of_some_rows(at: Harness) -> None:
    await at.open("a", batch_size=4)
    await at.submit("a", x(4), sizes=[4]).only()
    before = (await at.state("a"))["sum"]
    value = x(2, seed=5)
    async with watching(at, "a") as watch:
        await at.submit("a", value, sizes=[2], rows=[3, 1]).only()
        event = await one(watch)
        outputs, after = ran(before[[3, 1]], value)
        assert list(event.rows) == [3, 1]
        assert same(event.inputs, [value])
        assert same(event.outputs, [outputs])
        before[[3, 1]] = after
        assert same(event.states, [before])
        await at.submit("a", reset=True, rows=[2], sizes=[4]).only()
        event = await one(watch)
        before[2] = initial(1)
        assert (event.kind, list(event.rows), event.time_steps) == (Kind.RESET, [2], 0)
        assert not event.inputs
        assert not event.outputs
        assert same(event.states, [before])
        await at.submit("a", reset=True, position=7, sizes=[4]).only()
        event = await one(watch)
        assert (event.kind, event.revision, event.position, list(event.rows)) == (Kind.RESET, 4, 7, [])
        assert same(event.states, [initial(4)])


@ALL_STORES
async def test_a_replayed_or_refused_change_makes_no_event(at: Harness) -> None:
    await at.open("a")
    value = x(1)
    async with watching(at, "a") as watch:
        for _ in range(2):
            await at.step("a", value, expected=0, request_ids=7)
        (refused,) = await at.submit("a", value, expected=0, request_ids=8).all()
        assert type(refused).__name__ == "RevisionConflict"
        await at.step("a", value, expected=1, request_ids=9)
        assert [event.revision for event in await several(watch, 2)] == [1, 2]


@pytest.mark.stores("fake_shared", "valkey")
async def test_a_change_is_reported_after_the_store_has_it_and_never_if_not(at: Harness) -> None:
    await at.open("a")
    async with watching(at, "a") as watch:
        at.store.stall()
        answers = at.submit("a", x(1))
        await at.store.stalled()
        assert not await anything(watch)
        at.store.release()
        await answers.only()
        assert (await one(watch)).revision == 1
        at.store.fail(Unavailable("the store does not answer"))
        (refused,) = await at.submit("a", x(1)).all()
        assert isinstance(refused, Unavailable)
        assert not await anything(watch)
        await at.step("a", x(1, seed=5))
        event = await one(watch)
        assert event.revision == 2
        assert same(event.states, [ran(ran(initial(1), x(1))[1], x(1, seed=5))[1]])


async def test_every_nth_revision(at: Harness) -> None:
    await at.open("a")
    async with watching(at, "a", wanted=Wanted(states=True, revisions=3)) as watch:
        for turn in range(7):
            await at.step("a", x(1, seed=turn))
        assert [(event.revision, event.skipped) for event in await several(watch, 2)] == [(3, 2), (6, 2)]
        assert not (await anything(watch))


async def anything(watch: Watch) -> bool:
    """Whether an event is there already."""
    task = asyncio.ensure_future(watch.next())
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    return task.done() and not task.cancelled()


async def test_an_interval_reports_the_first_change_and_then_the_last(at: Harness) -> None:
    await at.open("a")
    wanted = Wanted(inputs=True, states=True, interval_s=10.0)
    async with watching(at, "a", wanted=wanted) as watch:
        at.clock.advance(10.0)
        for turn in range(4):
            await at.step("a", x(1, seed=turn))
        event = await one(watch)
        assert (event.kind, event.revision, event.skipped) == (Kind.STEP, 1, 0)
        assert not await anything(watch), "the interval has not passed"
        at.clock.advance(10.0)
        assert not await anything(watch), "the next change may come, with inputs"
        at.clock.advance(0.25)
        event = await one(watch)
        assert (event.kind, event.revision, event.skipped, event.dropped) == (Kind.PRESENT, 4, 3, 0)
        assert not event.inputs
        assert same(event.states, [(await at.state("a"))["sum"]])
        at.clock.advance(10.0)
        assert not await anything(watch), "nothing has changed since"
        await at.step("a", x(1))
        assert (await one(watch)).kind is Kind.STEP


async def test_an_interval_reports_steps_while_the_session_is_stepped(at: Harness) -> None:
    await at.open("a")
    async with watching(at, "a", wanted=Wanted(inputs=True, interval_s=0.1)) as watch:
        for turn in range(6):
            value = x(1, seed=turn)
            await at.step("a", value)  # too early
            assert not await anything(watch)
            at.clock.advance(0.12)
            assert not await anything(watch)
            await at.step("a", value)
            event = await one(watch)
            assert (event.kind, event.revision, event.skipped) == (Kind.STEP, turn * 2 + 2, 1)
            assert same(event.inputs, [value])


@BOTH_WAYS
async def test_changes_that_no_watch_reports_ask_none(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    takes = Watch.takes

    def counted(self: Watch, session_id: str, uid: int, revision: int) -> bool:
        asked.append(f"{session_id}{revision}")
        return takes(self, session_id, uid, revision)

    monkeypatch.setattr(Watch, "takes", counted)
    async with running(threads=threads) as at:
        ids = [f"s{place}" for place in range(8)]
        await at.open(*ids)
        async with (
            watching(at, "s1", "s2", wanted=Wanted(revisions=4)) as some,
            watching(at, "s2", wanted=Wanted(states=True, interval_s=1.0)) as sampled,
        ):
            for turn in range(8):
                await at.submit(ids, x(8, seed=turn)).require_all_applied()
            # the first change after a watch began, and those that are due
            assert sorted(set(asked)) == ["s11", "s14", "s18", "s21", "s24", "s28"]
            assert [event.revision for event in await several(some, 4)] == [4, 4, 8, 8]
            at.clock.advance(1.0)
            asked.clear()
            await at.submit(ids, x(8)).require_all_applied()
            assert set(asked) == {"s29"}
            assert [(event.session_id, event.revision) for event in await several(sampled, 1)] == [("s2", 9)]


async def test_a_slow_reader_misses_events_that_later_ones_count(
    at: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "MAX_EVENTS", 3)
    await at.open("a")
    async with watching(at, "a") as watch:
        for turn in range(10):
            await at.step("a", x(1, seed=turn))
        assert [event.revision for event in await several(watch, 3)] == [1, 2, 3]
        event = await one(watch)
        assert (event.kind, event.revision, event.dropped, event.skipped) == (Kind.PRESENT, 10, 7, 0)
        assert same(event.states, [(await at.state("a"))["sum"]])
        await at.step("a", x(1))
        event = await one(watch)
        assert (event.kind, event.revision, event.dropped) == (Kind.STEP, 11, 0)
        assert at.engine.watch_counts()[3:] == (6, 7)


async def test_bytes_of_all_watches_are_bounded(at: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    await at.open("a")
    async with watching(at, "a") as slow, watching(at, "a") as watch:
        monkeypatch.setattr(watch_module, "MAX_BYTES", 1000)
        for turn in range(20):
            await at.step("a", x(1, seed=turn))
            assert at.engine.watch_counts().held_bytes <= 2 * (1000 + 400)
        del watch
        monkeypatch.setattr(watch_module.Budget, "is_full", True)
        with pytest.raises(Overloaded) as caught:
            at.engine.watch_sessions(["a"], ALL, "other")
        assert caught.value.retry_after_s
        del slow
    assert at.engine.watch_counts().held_bytes == 0


async def test_slow_readers_leave_room_for_one_that_keeps_up(
    at: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    await at.open("a")
    async with watching(at, "a"), watching(at, "a") as watch:
        monkeypatch.setattr(watch_module.Budget, "is_full", True)
        for turn in range(3):
            await at.step("a", x(1, seed=turn))
            event = await one(watch)
            assert (event.kind, event.revision, event.dropped) == (Kind.STEP, turn + 1, 0)


async def test_too_much_is_refused(at: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers_module, "MAX_WATCHED", 8)
    await at.open("a")
    for ids, problem in (
        ([], "session_ids must have 1 to 1024 ids; got 0"),
        (["a"] * 1025, "session_ids must have 1 to 1024 ids; got 1025"),
        (["a", "b", "a"], "session_ids must not repeat an id; got 'a' twice"),
        (["a", ""], "session_ids must not be empty ids; got one"),
    ):
        with pytest.raises(InvalidInput) as wrong:
            at.engine.watch_sessions(ids, ALL, "me")
        assert wrong.value.message == problem
    async with watching(at, "a"):
        with pytest.raises(Overloaded):  # half of them are for others
            at.engine.watch_sessions(["b", "c", "d", "e"], ALL, "me")
        other = at.engine.watch_sessions(["b", "c", "d"], ALL, "other")
        at.engine.end_watch(other)
    assert at.engine.watch_counts().sessions == 0


async def test_a_session_has_at_most_so_many_watches(at: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers_module, "MAX_WATCHES_OF_SESSION", 2)
    await at.open("a", "b")
    async with watching(at, "a", caller="one"), watching(at, "a", "b", caller="other"):
        with pytest.raises(Overloaded) as caught:
            at.engine.watch_sessions(["b", "a"], ALL, "third")
        assert caught.value.message == "watches of a session must stay within 2; session 'a' has as many"
        assert at.engine.watch_counts()[:2] == (2, 3), "nothing of the refused watch is left"
        async with watching(at, "b", caller="third"):
            pass
    async with watching(at, "a", caller="third"):
        pass


@ALL_STORES
async def test_the_end_of_a_session_says_why(at: Harness) -> None:
    await at.open("a", "b")
    watch = at.engine.watch_sessions(["a", "b", "never"], ALL, "me")
    events = {event.session_id: event for event in await several(watch, 3)}
    assert events["never"].kind is Kind.ENDED
    assert type(events["never"].error) is SessionNotFound
    await at.step("a", x(1))
    await at.engine.close_session("a")
    step, end = await several(watch, 2)
    assert (step.revision, end.kind, end.revision, type(end.error)) == (1, Kind.ENDED, 1, SessionNotFound)
    await at.open("a")  # another session
    await at.step("a", x(1))
    await at.engine.close_session("b")
    assert (await one(watch)).session_id == "b"
    assert await asyncio.wait_for(watch.next(), WAIT_S) == [], "all have ended"
    at.engine.end_watch(watch)


@pytest.mark.stores("memory", "async", "fake_shared")
@pytest.mark.engine(max_session_idle_s=60.0)
async def test_a_watched_session_expires_all_the_same(at: Harness) -> None:
    await at.open("a")
    async with watching(at, "a", wanted=Wanted(states=True, interval_s=1.0)) as watch:
        at.clock.advance(50.0)
        async with watching(at, "a"):  # reading for a watch is no use
            pass
        await at.expire(11.0)
        end = await one(watch)
        assert (end.kind, type(end.error)) == (Kind.ENDED, SessionExpired)


@ALL_STORES
async def test_a_session_reopened_at_once_is_another_one(at: Harness) -> None:
    await at.open("a")
    async with watching(at, "a") as watch:
        await at.engine.close_session("a")
        await at.open("a")
        await at.step("a", x(1))
        assert (await one(watch)).kind is Kind.ENDED


@pytest.mark.parametrize("policy", [SessionPolicy.RESET, SessionPolicy.MIGRATE])
@ALL_STORES
async def test_a_version_that_replaces_states_is_reported_though_it_makes_no_revision(
    policy: SessionPolicy,
) -> None:
    async with serving(migrations={"widen": widen}) as at:
        await at.open("a")
        await at.step("a", x(1))
        await at.engine.load_version("plain", 2, WIDE)
        seldom = Wanted(states=True, revisions=9)
        later = Wanted(states=True, interval_s=1.0)
        async with (
            watching(at, "a") as always,
            watching(at, "a", wanted=seldom) as ninth,
            watching(at, "a", wanted=later) as calm,
        ):
            at.clock.advance(1.0)
            await at.engine.set_default("plain", 2, policy)
            for watch in (always, ninth, calm):
                event = await one(watch)
                assert (event.kind, event.revision, event.version) == (Kind.PRESENT, 1, 2)
                assert event.position == (0 if policy is SessionPolicy.RESET else 1)
                assert (event.skipped, event.dropped) == (0, 0)
                assert same(event.states, [(await at.state("a"))["wide"]])
            await at.step("a", x(1, seed=1))
            event = await one(always)
            assert (event.kind, event.revision, event.skipped) == (Kind.STEP, 2, 0)


@pytest.mark.stores("memory", "async", "fake_shared")
@pytest.mark.engine(resident_rows=2)
async def test_a_watch_pages_nothing_in(at: Harness) -> None:
    names = ["a", "b", "c", "d"]
    states = {}
    for turn, name in enumerate(names):
        await at.open(name)
        await at.step(name, x(1, seed=turn))
        states[name] = ran(initial(1), x(1, seed=turn))[1]
    resident = {n for n in names if (await at.engine.session_info(n)).resident}
    assert resident < set(names)
    watch = at.engine.watch_sessions(names, ALL, "me")
    for event in await several(watch, 4):
        assert same(event.states, [states[event.session_id]])
    assert resident == {n for n in names if (await at.engine.session_info(n)).resident}
    for turn, name in enumerate(names):  # each comes back to memory, and is watched there
        await at.step(name, x(1, seed=turn))
        event = await one(watch)
        assert (event.session_id, event.kind) == (name, Kind.STEP)
        assert same(event.states, [ran(states[name], x(1, seed=turn))[1]])
    at.engine.end_watch(watch)


@pytest.mark.engine(threads=True)
async def test_a_busy_session_is_shown_when_it_is_free(at: Harness) -> None:
    await at.open("a", "b")
    answers = await at.begin_pass("a", x(1))
    watch = at.engine.watch_sessions(["a", "b"], ALL, "me")
    try:
        assert (await one(watch)).session_id == "b"
    finally:
        at.hooks.open_gate()
    await answers.only()
    event = await one(watch)
    assert (event.session_id, event.kind, event.revision) == ("a", Kind.PRESENT, 1)
    assert same(event.states, [ran(initial(1), x(1))[1]])
    at.engine.end_watch(watch)


async def test_a_watch_ends_with_the_server(at: Harness) -> None:
    await at.open("a")
    async with watching(at, "a") as watch:
        await at.step("a", x(1))
        at.engine.stop_watches(Stopping("the server is stopping"))
        assert (await one(watch)).revision == 1
        with pytest.raises(Stopping):
            await watch.next()


@pytest.mark.stores("fake_shared", "valkey")
async def test_changes_of_another_server_are_read_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers_module, "COMPARE_INTERVAL_S", 0.001)
    async with two() as (first, second):
        await first.open("a")
        async with watching(first, "a") as watch:
            state = initial(1)
            for turn in range(3):
                await second.step("a", x(1, seed=turn))
                state = ran(state, x(1, seed=turn))[1]
            while (event := await one(watch)).revision < 3:
                assert event.from_store
            assert (event.kind, event.from_store) == (Kind.PRESENT, True)
            assert same(event.states, [state])
            assert not event.outputs
            await first.step("a", x(1))
            event = await one(watch)
            assert (event.kind, event.revision, event.from_store, event.skipped) == (Kind.STEP, 4, False, 0)
            await second.engine.close_session("a")
            end = await one(watch)
            assert (end.kind, type(end.error)) == (Kind.ENDED, SessionNotFound)
