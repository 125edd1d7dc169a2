"""While the store takes its time: nobody hears or sees what is not kept, and everybody else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.engine.change import Awaited, Change
from stepwell_server.engine.commit import group_commit as commits
from stepwell_server.engine.sessions import end
from stepwell_server.errors import Overloaded, SessionExpired, SessionNotFound, Unavailable
from stepwell_server.store.base import SMALL
from support.engine.fake_executor import WAIT_S
from support.engine.harness import STORES, CallbackAnswers, Harness, fails, kinds, x
from support.stores.durable import DurableStore, everything, facts, stalled, start_task, until
from support.stores.kinds import DURABLE, ON_DISK

pytestmark = DURABLE

AWAY = Unavailable("the store must be able to keep the change; the test says no")
EXACTLY: dict[str, Any] = {"expected": 1, "request_ids": 22}
CHANGES: dict[str, Callable[[Harness], Awaitable[Any]]] = {
    "step": lambda at: at.step("a", x(1, seed=1), **EXACTLY),
    "single": lambda at: at.single("a", x(1, seed=1), expected=1, request_id=22).only(),
    "steps": lambda at: at.step("a", x(1, 5, seed=1), **EXACTLY),
    "reset": lambda at: at.submit("a", reset=True, **EXACTLY).only(),
    "open": lambda at: at.engine.open_session("plain", session_id="new", request_id=22),
    "open many": lambda at: at.engine.open_sessions("plain", session_ids=["new", "newer"], request_id=22),
    "fork": lambda at: at.engine.fork("a", new_session_id="new", request_id=22),
    "close": lambda at: at.engine.close_session("a", request_id=22),
}


@pytest.fixture(params=[False, True], ids=["here", "threads"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"threads": request.param}


@pytest.fixture
async def at(durable_store: DurableStore) -> AsyncIterator[Harness]:
    async with durable_store.engine() as found:
        yield found


async def turns() -> None:
    """Let the event loop do all it can without the store."""
    for _ in range(30):
        await asyncio.sleep(0)


async def has_ended(task: asyncio.Task[Any], *, is_due: bool) -> bool:
    """Whether a task has ended though a commit is held back; of one that is due, when it has."""
    await turns()
    if is_due:
        await asyncio.wait([task], timeout=WAIT_S)
    return task.done()


async def begin(at: Harness) -> None:
    await at.open("a", "b", "c")
    for name in "abc":
        await at.step(name, x(1, 3), expected=0, request_ids=11)


async def shown(at: Harness) -> list[tuple[Any, ...]]:
    infos, _ = await at.engine.list_sessions()
    assert infos == [(await at.engine.session_info(info.session_id)) for info in infos]
    return [facts(info) for info in infos]


@pytest.mark.parametrize("name", CHANGES)
async def test_no_caller_is_answered_or_shown_a_change_before_it_is_kept(
    durable_store: DurableStore, options: dict[str, Any], name: str
) -> None:
    async with durable_store.engine(**options) as at:
        await begin(at)
        before = await shown(at)
        durable_store.store.stall()
        call = await start_task(CHANGES[name](at))
        await stalled(durable_store.store)
        ran = len(at.hooks.rows)
        at.hooks.inside.clear()
        others: list[Any] = [at.submit(["b", "c"], x(2)), at.single("c", x(1))]
        reading = await start_task(at.state("a"))
        if not options["threads"]:
            await turns()
            assert len(at.hooks.rows) == ran + 1, "others are stepped meanwhile"
        else:
            await at.in_flight()
            await turns()
        assert not call.done()
        assert not any(answers.ended for answers in others)
        begins = name in {"open", "open many", "fork"}
        assert await has_ended(reading, is_due=begins) is begins, "it is read as it will be, not as it was"
        assert await shown(at) == before
        new = await start_task(at.engine.session_info("new"))
        assert await has_ended(new, is_due=not begins) is not begins, "it is seen when it has been made"
        durable_store.store.release()
        await call
        for answers in others:
            assert set(kinds(await answers.all())) == {"Answer"}
        if name == "close":
            await fails(reading, SessionNotFound)
        else:
            assert (await reading) is not None
        if new in (await asyncio.wait([new]))[0] and new.exception() is None:
            assert begins
        else:
            assert isinstance(new.exception(), SessionNotFound)
        after = await shown(at)
        assert after != before


@ON_DISK  # changes are appended to a log beside the commit
async def test_changes_that_arrive_during_a_stall_are_committed_together(durable_store: DurableStore) -> None:
    ids = [f"s{i:02}" for i in range(40)]
    async with durable_store.engine(resident_rows=200) as at:
        await begin(at)
        await at.engine.open_sessions("plain", session_ids=ids)
        durable_store.store.stall()
        first = at.submit("a", x(1))
        await stalled(durable_store.store)
        so_far = len(durable_store.store.tried)
        asked: list[Any] = []
        for session_id in ids:
            asked.append(at.single(session_id, x(1)) if len(asked) % 2 else at.submit(session_id, reset=True))
            await turns()
        calls = [await start_task(at.engine.open_session("plain", session_id=f"n{i}")) for i in range(10)]
        calls += [await start_task(at.engine.fork("b")), await start_task(at.engine.close_session("c"))]
        await turns()
        durable_store.store.release()
        for answers in (first, *asked):
            assert kinds(await answers.all()) == ["Answer"]
        await asyncio.gather(*calls)
        batches = durable_store.store.tried[so_far:]
        assert sum(len(batch.puts) for batch in batches) == 51
        assert len(batches) <= 4, (
            "a commit, and writes of the log: one, one that this writer does not give back, others"
        )


async def test_passes_wait_while_too_much_waits_for_the_store(
    durable_store: DurableStore, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "MAX_WAITING", 3)
    async with durable_store.engine(**options) as at:
        await at.open(*"abcdef")
        durable_store.store.stall()
        first = at.submit(["a", "b", "c"], x(3))
        await stalled(durable_store.store)
        assert at.engine.stats()[0].uncommitted == 3
        ran = len(at.hooks.rows)
        later: list[Any] = [
            at.submit(["d", "e"], x(2, 3), sizes=[1, 1]),
            at.single("f", x(1)),
            at.single("f", x(1)),
        ]
        predict = await start_task(at.engine.predict("plain", {"": x(4, 2)}))
        await turns()
        assert len(at.hooks.rows) == ran
        assert not predict.done()
        drain = await start_task(at.engine.drain())
        await turns()
        assert not drain.done()
        durable_store.store.release()
        for answers in (first, *later):
            assert set(kinds(await answers.all())) == {"Answer"}
        await predict
        await drain
        assert (await at.engine.session_info("f")).revision == 2


async def test_an_expired_id_that_is_opened_at_once_is_a_new_session(durable_store: DurableStore) -> None:
    async with durable_store.engine(max_session_idle_s=50) as at:
        await at.open("a", "b")
        await at.step("a", x(1))
        at.clock.advance(51)
        durable_store.store.stall()
        waiting = await start_task(at.engine.open_session("plain", session_id="c"))
        await stalled(durable_store.store)
        expiring, asked = (
            await start_task(at.internals.expire_idle()),
            await start_task(at.engine.session_info("a")),
        )
        await turns()
        assert not asked.done(), "the store has not said that it has expired"
        assert (await at.engine.list_sessions())[0] == []
        again = await start_task(at.engine.open_session("plain", session_id="a", must_be_new=True))
        many = await start_task(at.engine.open_sessions("plain", session_ids=["d", "b"]))
        await turns()
        durable_store.store.release()
        await waiting
        await expiring
        await fails(asked, SessionExpired)
        assert (await again).session.revision == 2
        await many
        ended = sorted(name for event, name in at.events.sessions if event == "expired")
        assert ended == ["a", "b"], "each once"
        assert (await at.sessions())[0] == 4
        assert (await at.step("a", x(1), expected=2)).revision == 3
        before = await everything(at)
        assert list(before) == ["a", "b", "c", "d"]
        durable_store.kill(away_s=0)
    async with durable_store.engine(max_session_idle_s=50) as at:
        assert (await everything(at)) == before
        assert (await at.sessions())[0] == 4


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", CHANGES)
async def test_a_caller_that_goes_away_leaves_nothing_half_done(
    durable_store: DurableStore, name: str, kept: bool
) -> None:
    cancellable: dict[str, Callable[[Harness], Awaitable[Any]]] = {
        **CHANGES,
        "close many": lambda at: at.engine.close_sessions(["b", "a"]),
        "single": single,
    }
    async with durable_store.engine() as at:
        await begin(at)
        before = await everything(at)
        if not kept:
            durable_store.store.fail(AWAY)
        durable_store.store.stall()
        call = await start_task(cancellable[name](at))
        await stalled(durable_store.store)
        call.cancel()
        await fails(call, asyncio.CancelledError)
        await turns()
        later = await start_task(at.state("b"))
        durable_store.store.release()
        await at.settled()
        await later
        at.check_books()
        assert ((await everything(at)) == before) is (not kept)
        again = await CHANGES[name](at)
        assert again is kept if name == "close" else again.replayed is kept
        after = await everything(at)
        assert (await at.sessions())[0] == len(after)
        durable_store.kill(away_s=0)
    async with durable_store.engine() as at:
        assert (await everything(at)) == after


def single(at: Harness) -> Awaitable[Any]:
    """The step of `CHANGES`, for a task that waits for it."""
    answer, numbers = Awaited(), np.array([1, 22], np.uint64)
    change = Change(["a"], answer, inputs={"": x(1, seed=1)}, expected=numbers[:1], request_ids=numbers[1:])
    at.engine.submit(change)
    return answer.get()


async def test_calls_for_a_session_that_is_being_made_wait_for_it(
    durable_store: DurableStore, at: Harness
) -> None:
    await begin(at)
    durable_store.store.stall(kept=True)
    ask = at.engine.open_session
    first = await start_task(ask("plain", session_id="new", request_id=1, must_be_new=True))
    await stalled(durable_store.store)
    again = await start_task(ask("plain", session_id="new", request_id=1, must_be_new=True))
    other = await start_task(ask("plain", session_id="new", request_id=2))
    taken = await start_task(at.engine.fork("a", new_session_id="new", request_id=3))
    among = await start_task(at.engine.open_sessions("plain", session_ids=["newer", "new"]))
    await turns()
    assert not any(task.done() for task in (first, again, other, taken, among))
    info = await start_task(at.engine.session_info("new"))
    await turns()
    assert not info.done(), "the store has it, but nobody was told"
    durable_store.store.release()
    assert (await info).session_id == "new"
    assert not (await first).replayed
    assert (await again).replayed
    assert (await other).resumed
    for task in (taken, among):
        await fails(task, Exception, "session 'new' is open")
    assert len(await shown(at)) == 4


async def test_when_it_could_not_be_made_the_next_one_tries(durable_store: DurableStore, at: Harness) -> None:
    await begin(at)
    durable_store.store.fail(AWAY)
    durable_store.store.stall()
    first = await start_task(at.engine.open_session("plain", session_id="new", request_id=1))
    await stalled(durable_store.store)
    other = await start_task(at.engine.open_session("plain", session_id="new", request_id=2))
    durable_store.store.release()
    await fails(first, Unavailable, "the test says no")
    opened = await other
    assert not opened.resumed
    assert not opened.replayed


async def test_sessions_keep_their_order_through_a_stall(durable_store: DurableStore, at: Harness) -> None:
    await at.open("a")
    durable_store.store.stall()
    first = at.submit("a", x(1), expected=0, request_ids=1)
    await stalled(durable_store.store)
    again = at.submit("a", x(1), expected=0, request_ids=1)
    second = at.submit("a", x(1), expected=1, request_ids=2)
    twin = await start_task(at.engine.fork("a", new_session_id="twin"))
    third = at.submit("a", x(1), expected=2, request_ids=3)
    close = await start_task(at.engine.close_session("a"))
    fourth = at.submit("a", x(1), expected=3, request_ids=4)
    durable_store.store.release()
    assert [(await answers.only()).revision for answers in (first, again, second, third)] == [1, 1, 2, 3]
    assert (await again.only()).replayed
    assert (await twin).session.revision == 2
    assert await close is False
    assert kinds(await fourth.all()) == ["SessionNotFound"]


async def test_to_stop_waits_for_the_store_and_says_if_it_does_not_come_back(
    durable_store: DurableStore, at: Harness
) -> None:
    await at.open("a", "b")
    durable_store.store.stall()
    answers = at.submit("a", x(1), expected=0, request_ids=np.array([1]))
    await stalled(durable_store.store)
    drain = await start_task(at.engine.drain())
    await turns()
    assert not drain.done()
    assert not answers.ended
    assert await at.engine.close(timeout_s=0.01) is False
    durable_store.store.release()
    await drain
    assert at.engine.stats()[0].uncommitted == 0
    assert kinds(await answers.all()) == ["Answer"]
    assert await at.engine.close() is True


async def too_much_waits(
    durable_store: DurableStore, at: Harness, monkeypatch: pytest.MonkeyPatch
) -> asyncio.Task[Any]:
    """The store stalls, and has as much before it as it may; the reset of `a` that it waits for."""
    monkeypatch.setattr(commits, "MAX_WAITING", 1)
    at.internals.commit_on_a_thread(monkeypatch)
    durable_store.store.stall()
    first = await start_task(at.submit("a", reset=True).only())
    await stalled(durable_store.store)
    return first


async def test_changes_are_refused_while_the_store_has_too_much_to_commit(
    durable_store: DurableStore, monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    await begin(at)
    before = await shown(at)
    first = await too_much_waits(durable_store, at, monkeypatch)
    for call in (
        at.engine.open_session("plain", session_id="new"),
        at.engine.open_sessions("plain", count=3),
        at.engine.fork("b"),
    ):
        await fails(call, Overloaded, "wait for the store must stay within 1")
    with pytest.raises(Overloaded) as refused:
        at.submit("b", reset=True)
    assert refused.value.retry_after_s > 0
    assert await shown(at) == before
    durable_store.store.release()
    await first
    assert (await at.submit("b", reset=True).only()).revision == 2


async def test_no_session_is_closed_behind_a_store_that_has_too_much(
    durable_store: DurableStore, monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    await begin(at)
    before = await shown(at)
    first = await too_much_waits(durable_store, at, monkeypatch)
    for call in (
        at.engine.close_session("b", request_id=5),
        at.engine.close_session("a", request_id=5),
        at.engine.close_sessions(["b", "c", "a", "never"]),
    ):
        closing = await start_task(call)
        assert closing.done(), "it must not wait"
        refused = await fails(closing, Overloaded, "wait for the store must stay within 1")
        assert refused.retry_after_s > 0
    assert await shown(at) == before
    assert not at.internals.are_claimed("b", "c")
    durable_store.store.release()
    await first
    assert await at.engine.close_session("b", request_id=5) is False
    assert await at.engine.close_sessions(["b", "c", "a", "never"]) == 2
    assert await shown(at) == []


@pytest.mark.parametrize("kept", [True, False])
async def test_a_step_that_waits_for_rows_of_new_sessions_runs_once_they_are_made_or_refused(
    durable_store: DurableStore, kept: bool
) -> None:
    async with durable_store.engine(resident_rows=2) as at:
        await at.open("a")
        if not kept:
            # what makes sessions, and not the step: they may share a commit, or not
            durable_store.store.refuses = lambda batch: bool(batch.counts)
        durable_store.store.stall()
        making = [await start_task(at.engine.open_session("plain", session_id="b"))]
        await stalled(durable_store.store)
        making.append(await start_task(at.engine.open_session("plain", session_id="c")))
        await until(lambda: not at.internals.has_row("a"))
        step = at.submit("a", x(1))
        await until(at.internals.someone_waits_for_rows)
        assert not step.ended
        durable_store.store.release()
        made = await asyncio.gather(*making, return_exceptions=True)
        assert [isinstance(one, Unavailable) for one in made] == [not kept] * 2
        assert (await step.only()).revision == 1


@ON_DISK  # batches of a shared store do not wait in the server
async def test_the_timer_does_not_queue_behind_a_store_that_has_too_much(
    durable_store: DurableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "MAX_WAITING", 4)
    monkeypatch.setattr(end, "BATCH_SIZE", 2)
    async with durable_store.engine(max_session_idle_s=5.0) as at:
        names = [f"s{number}" for number in range(40)]
        await at.open(*names)
        durable_store.clock.advance(6.0)
        durable_store.store.stall()
        monkeypatch.setattr(end, "_MIN_REST_S", 0)
        expiring = await start_task(at.internals.expire_idle())
        for _ in range(5):
            await turns()
        assert at.engine.stats()[0].uncommitted == 2
        durable_store.store.release()
        assert await expiring == 40
        await at.settled()
        assert at.store.count() == 0


async def test_a_lone_step_is_under_way_until_the_store_has_it(
    durable_store: DurableStore, at: Harness
) -> None:
    await begin(at)
    durable_store.store.stall()
    ran = len(at.hooks.rows)
    lone = at.single("a", x(1))
    await turns()
    assert len(at.hooks.rows) == ran + 1
    second, other = at.single("a", x(1)), at.single("b", x(1))
    await turns()
    assert len(at.hooks.rows) == ran + 2, "the session's next one waits, another's does not"
    assert not any(answer.ended for answer in (lone, second, other))
    durable_store.store.release()
    assert [(await answer.only()).revision for answer in (lone, second, other)] == [2, 3, 2]


async def test_a_failing_callback_of_a_lone_step_affects_no_other_caller(
    durable_store: DurableStore, caplog: pytest.LogCaptureFixture
) -> None:
    def raises(_answer: object) -> None:
        raise RuntimeError("nobody is there")

    async with durable_store.engine() as at:
        await begin(at)
        durable_store.store.stall()
        at.engine.submit(Change(["a"], CallbackAnswers(raises), inputs={"": x(1)}))
        after = at.single("a", x(1))
        durable_store.store.release()
        assert (await after.only()).revision == 3
        assert "could not be delivered" in caplog.text


async def test_small_jobs_are_committed_apart_from_large_ones_of_their_pass(
    durable_store: DurableStore,
) -> None:
    ids = [f"s{number:03}" for number in range(SMALL + 1)]
    async with durable_store.engine(resident_rows=200, max_batch_rows=200) as at:
        await begin(at)
        await at.engine.open_sessions("plain", session_ids=ids)
        so_far, ran = len(durable_store.store.tried), len(at.hooks.rows)
        many = at.submit(ids, x(len(ids)), states=Select.LAST)  # so it does not run at once
        one = at.submit("a", x(1))
        for answers in (many, one):
            assert set(kinds(await answers.all())) == {"Answer"}
        assert at.hooks.rows[ran:] == [len(ids) + 1], "it is one pass"
        sizes = [len(batch.puts) for batch in durable_store.store.tried[so_far:]]
        # the store's thread may find both
        assert sizes == [1, len(ids)] or (STORES.kind in {"sync", "async"} and sizes == [1 + len(ids)])


@ON_DISK
async def test_a_lone_step_waits_for_one_write_of_large_changes_of_others(
    durable_store: DurableStore,
) -> None:
    ids = [f"s{number:03}" for number in range(2 * (SMALL + 1))]
    some, others = ids[: SMALL + 1], ids[SMALL + 1 :]
    async with durable_store.engine(resident_rows=200, max_batch_rows=200) as at:
        await begin(at)
        await at.engine.open_sessions("plain", session_ids=ids)
        durable_store.store.stall()
        so_far = len(durable_store.store.tried)
        many = at.submit(some, x(len(some)))
        await stalled(durable_store.store)
        more = at.submit(others, x(len(others)))
        await until(lambda: at.engine.stats()[0].uncommitted == len(ids))
        lone = at.single("a", x(1))
        await until(lambda: at.engine.stats()[0].uncommitted == len(ids) + 1)
        assert [len(batch.puts) for batch in durable_store.store.tried[so_far:]] == [len(some)]
        durable_store.store.release()
        assert (await lone.only()).revision == 2
        for answers in (many, more):
            assert set(kinds(await answers.all())) == {"Answer"}
        sizes = [len(batch.puts) for batch in durable_store.store.tried[so_far:]]
        assert sizes == [len(some), 1, len(others)]
