"""Sessions of a store that must be awaited: what names them waits in its order, and nobody else does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from stepwell_server.engine import submission as module
from stepwell_server.errors import (
    DeadlineExceeded,
    Overloaded,
    SessionExpired,
    SessionNotFound,
    Unavailable,
)
from stepwell_server.store.access import remote_reads
from stepwell_server.store.memory import MemoryStore
from support.clock import ManualClock
from support.engine.harness import Answers, Harness, fails, kinds, running, x
from support.stores.durable import start_task
from support.stores.fake_shared_store import RemoteStore

pytestmark = pytest.mark.stores("fake_shared")


@asynccontextmanager
async def after(
    *session_ids: str, reads_held: bool = False, **options: Any
) -> AsyncIterator[tuple[Harness, RemoteStore]]:
    """A server on a store in which another one has opened sessions, each stepped once."""
    store, clock = RemoteStore(MemoryStore()), ManualClock()
    async with running(store=store.replica(), clock=clock) as at:
        await at.open(*session_ids)
        await at.submit(list(session_ids), x(len(session_ids)), request_ids=[7] * len(session_ids)).all()
    async with running(store=store, clock=clock, **options) as at:
        store.reads_held = reads_held
        yield at, store


@pytest.fixture
def store(at: Harness) -> RemoteStore:
    """The store of the fixture `at`."""
    found: RemoteStore = at.store
    return found


CALLS: dict[str, Callable[..., Any]] = {
    "read": lambda at, **fields: at.engine.get_state("a", **fields),
    "fork": lambda at, **fields: at.engine.fork("a", **fields),
    "close": lambda at, **fields: at.engine.close_session("a", **fields),
    "info": lambda at: at.engine.session_info("a"),
    "reset": lambda at: at.submit("a", reset=True).only(),
    "resume": lambda at: at.engine.open_session("plain", session_id="a"),
}


async def turns(count: int = 8) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_sessions_of_another_server_are_loaded_when_they_are_named() -> None:
    async with after("a", "b") as (at, store):
        assert store.asked("read") == [], "none before"
        answers = await at.submit(["a", "never", "b"], x(3), batch_sizes=[1, 1, 1]).all()
        assert kinds(answers) == ["Answer", "SessionNotFound", "Answer"]
        assert [answers[0].revision, answers[2].revision] == [2, 2]  # type: ignore[union-attr]
        assert store.asked("read")[0] == ("a", "never", "b"), "at once"
        reads = len(store.asked("read"))
        await at.step("a", x(1))
        assert len(store.asked("read")) == reads, "it is here now"


async def test_nothing_overtakes_a_request_that_waits_for_one_of_its_sessions() -> None:
    async with after("away") as (at, store):
        await at.open("here")
        store.reads_held = True
        first = at.submit(["here", "away"], x(2), expected=[0, 1])
        second = at.submit("here", x(1), expected=1)
        other = at.submit("away", x(1, seed=1), expected=2)
        read = await start_task(at.engine.get_state("here"))
        third = at.submit("here", x(1), expected=2)
        await store.until("read")
        await turns()
        assert not any(answers.ended for answers in (first, second, other, third))
        assert at.hooks.rows == []
        store.release()
        assert [answer.revision for answer in await first.all()] == [1, 2]  # type: ignore[union-attr]
        assert (await second.only()).revision == 2
        assert (await other.only()).revision == 3
        assert (await read).session.revision == 2, "in its place"
        assert (await third.only()).revision == 3


async def test_a_request_checked_after_its_lookup_keeps_its_place() -> None:
    async with after("a", "b", reads_held=True) as (at, store):
        first = at.submit(
            ["a", "b"], x(3), sizes=[1, 2], batch_sizes=[1, 2]
        )  # another "b" might have two rows
        second = at.submit("a", x(1, seed=1))
        await store.until("read")
        store.release()
        answers = await first.all()
        assert kinds(answers) == ["Answer", "InvalidInput"]
        assert [answers[0].revision, (await second.only()).revision] == [2, 3]  # type: ignore[union-attr]


async def test_a_session_that_leaves_the_table_lets_nobody_overtake() -> None:
    async with after("away") as (at, _store):
        first, second = at.submit("away", x(1)), at.submit("away", x(1, seed=1))
        is_forgotten = False
        while not first.ended:
            if at.internals.is_in_an_inbox() and not is_forgotten:
                is_forgotten = True
                at.internals.removal.forget_idle(
                    ["away"]
                )  # as who makes the table smaller does at any moment
            await turns(1)
        assert [(await first.only()).revision, (await second.only()).revision] == [2, 3]


async def test_other_sessions_run_while_some_are_loaded() -> None:
    async with after("away") as (at, store):
        await at.open("here")
        store.reads_held = True
        waits = at.submit("away", x(1))
        await store.until("read")
        assert (await at.step("here", x(1))).revision == 1
        assert not waits.ended
        store.release()
        assert (await waits.only()).revision == 2


@pytest.mark.parametrize("call", CALLS)
async def test_every_call_waits_for_the_sessions_it_names(call: str) -> None:
    async with after("a", reads_held=True) as (at, store):
        task = await start_task(CALLS[call](at))
        await store.until("read")
        step = at.submit("a", x(1), expected=2 if call == "reset" else 1)
        await turns()
        assert not task.done()
        store.release()
        await task
        (answer,) = await step.all()
        assert kinds([answer]) == ["SessionNotFound" if call == "close" else "Answer"]


async def test_a_waiting_call_that_is_cancelled_lets_nobody_overtake() -> None:
    async with after("a", reads_held=True) as (at, store):
        first = at.submit("a", x(1), expected=1)
        await store.until("read")
        gives_up = await start_task(at.engine.get_state("a"))
        last = at.submit("a", x(1), expected=2)
        gives_up.cancel()
        await turns()
        assert len(store.asked("read")) == 1, "the last one does not look before the first has"
        store.release()
        assert (await first.only()).revision == 2
        assert (await last.only()).revision == 3
        await fails(gives_up, asyncio.CancelledError)


@pytest.mark.parametrize("how", ["late", "cancelled"])
async def test_an_abandoned_request_is_not_applied_after_its_session_is_loaded(how: str) -> None:
    async with after("a", reads_held=True) as (at, store):
        reset = at.submit("a", reset=True, deadline=at.clock.monotonic() + 5)
        step = at.submit("a", x(1), deadline=at.clock.monotonic() + 5)
        await store.until("read")
        if how == "late":
            at.clock.advance(6)
        else:
            at.cancel(step)
            at.cancel(reset)
        store.release()
        error = DeadlineExceeded if how == "late" else Unavailable
        for answers in (step, reset):
            (answer,) = await answers.all()
            assert isinstance(answer, error)
        assert at.hooks.rows == []
        assert (await at.engine.session_info("a")).revision == 1


@pytest.mark.parametrize("call", ["read", "fork", "close"])
async def test_a_call_past_its_deadline_when_its_session_is_loaded_does_nothing(call: str) -> None:
    async with after("a", reads_held=True) as (at, store):
        task = await start_task(CALLS[call](at, deadline=at.clock.monotonic() + 5))
        await store.until("read")
        at.clock.advance(6)
        store.release()
        await fails(task, DeadlineExceeded)
        assert store.shared.count() == 1


async def test_a_store_that_cannot_be_read_fails_those_that_need_it() -> None:
    async with after("away") as (at, store):
        await at.open("here")
        store.read_error = Unavailable("the store is away")
        answers = await at.submit(["here", "away"], x(2), batch_sizes=[1, 1]).all()
        assert kinds(answers) == ["Answer", "Unavailable"]
        for call in (at.engine.get_state("away"), at.engine.open_session("plain", session_id="new")):
            await fails(call, Unavailable, "the store is away")
        store.read_error = None
        assert (await at.step("away", x(1))).revision == 2


async def test_a_store_that_breaks_while_it_is_read_fails_those_that_need_it() -> None:
    async with after("away") as (at, store):
        store.read_error = ZeroDivisionError("a secret detail")
        (answer,) = await at.submit("away", x(1)).all()
        assert kinds([answer]) == ["Internal"]
        assert "secret" not in str(answer)


@pytest.mark.parametrize(
    ("limit", "most", "waiting", "message", "revision"),
    [
        ("MAX_LOADING_ROWS", 3, ["a", ["a", "b"]], "must stay within 3; 3 wait, and this call adds 1", 3),
        (
            "MAX_WAITING_BYTES",
            20,
            ["b", "b"],
            "bytes waiting must stay within 20; 16 wait, and this call adds 8",
            4,
        ),
    ],
)
async def test_only_a_limited_amount_waits_for_loading(
    limit: str, most: int, waiting: list[Any], message: str, revision: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, limit, most)
    async with after("a", "b", reads_held=True) as (at, store):
        accepted = [at.submit(ids, x(len(ids))) for ids in waiting]
        with pytest.raises(Overloaded, match=message) as refused:
            at.submit("b", x(1))
        assert refused.value.retry_after_s > 0
        store.release()
        for answers in accepted:
            await answers.require_all_applied()
        assert (await at.step("b", x(1))).revision == revision


async def test_sessions_are_read_many_at_once_and_with_few_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_reads, "MAX_READ_SIZE", 8)
    monkeypatch.setattr(remote_reads, "MAX_CONCURRENT_READS", 2)
    names = [f"s{number:02}" for number in range(24)]
    async with after(*names, reads_held=True) as (at, store):
        steps = [at.submit(name, x(1)) for name in names]
        await store.until("read", 2)
        await turns()
        assert [len(ids) for ids in store.asked("read")] == [8, 8], "no third while two are under way"
        store.release()
        for answers in steps:
            assert (await answers.only()).revision == 2
        loads = store.asked("read")[:3]
        assert sorted(i for ids in loads for i in ids) == names


async def test_unknown_ids_cost_one_look_at_what_is_remembered() -> None:
    async with after("a") as (at, store):
        ids = [f"never-{number}" for number in range(100)]
        answers = await at.submit(ids, x(100), batch_sizes=[1] * 100).all()
        assert set(kinds(answers)) == {"SessionNotFound"}
        assert len(store.asked("read")) == 1


@pytest.mark.engine(resident_rows=2)
async def test_passes_run_while_sessions_are_paged_in(at: Harness, store: RemoteStore) -> None:
    for name in "abc":  # a has to go
        at.clock.advance(1.0)
        await at.open(name)
    assert not (await at.engine.session_info("a")).resident
    store.reads_held = True
    waits = [at.submit("a", x(1)), at.submit("a", x(1))]
    await store.until("read")
    assert (await at.step("c", x(1))).revision == 1
    read = await start_task(at.engine.get_state("a"))
    await turns()
    assert not any(answers.ended for answers in waits)
    store.release()
    assert [(await answers.only()).revision for answers in waits] == [1, 2]
    assert (await read).session.revision == 2


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.engine(resident_rows=1)
async def test_an_abandoned_request_that_waits_for_a_page_in_is_dropped(
    reset: bool, at: Harness, store: RemoteStore
) -> None:
    await at.open("a")
    await at.open("b")
    store.reads_held = True
    fields: dict[str, Any] = {"reset": True} if reset else {"x": x(1)}
    late = at.submit("a", deadline=at.clock.monotonic() + 5, **fields)
    await store.until("read")
    behind = at.submit("a", x(1))
    at.clock.advance(6)
    store.release()
    assert kinds(await late.all()) == ["DeadlineExceeded"]
    assert (await behind.only()).revision == 1


@pytest.mark.engine(resident_rows=1)
async def test_a_read_that_is_cancelled_while_its_session_is_paged_in_frees_it(
    at: Harness, store: RemoteStore
) -> None:
    await at.open("a")
    await at.open("b")
    store.reads_held = True
    read = await start_task(at.engine.get_state("a"))
    await store.until("read")
    store.release_once()  # it has not changed; now it is to come back
    await store.until("read", 2)
    read.cancel()
    await turns()
    step = at.submit("a", x(1))
    store.release()
    assert (await step.only()).revision == 1


@pytest.mark.engine(resident_rows=2)
async def test_a_page_in_that_fails_costs_its_members_and_nobody_else(
    at: Harness, store: RemoteStore
) -> None:
    await at.open("a", "b", "c")
    store.read_error = Unavailable("the store is away")
    answers = await at.submit(["a", "c"], x(2)).all()
    assert kinds(answers) == ["Unavailable", "Answer"]
    store.read_error = None
    assert (await at.step("a", x(1))).revision == 1


async def drains_when_read(at: Harness, store: RemoteStore) -> None:
    """The engine has ended when what it reads for a step has come, and not before."""
    store.reads_held = True
    step = at.submit("a", x(1))
    await store.until("read")
    drain = await start_task(at.engine.drain())
    await turns(20)
    assert not drain.done()
    store.release()
    await drain
    assert step.ended


async def test_the_engine_has_ended_when_loads_have() -> None:
    async with after("a") as (at, store):
        await drains_when_read(at, store)


@pytest.mark.engine(resident_rows=1)
async def test_the_engine_has_ended_when_page_ins_have(at: Harness, store: RemoteStore) -> None:
    await at.open("a")
    await at.open("b")
    await drains_when_read(at, store)


async def test_the_engine_is_closed_when_commits_have_ended_or_its_time_is_over(
    at: Harness, store: RemoteStore
) -> None:
    await at.open("here")
    store.commits_held = True
    step = at.submit("here", x(1))
    await store.until("commit", 2)
    assert await at.engine.close(0.01) is False
    closing = await start_task(at.engine.close(20.0))
    await turns(20)
    assert not closing.done()
    store.release()
    assert await closing is True
    assert step.ended


async def test_a_session_that_ends_while_others_are_read_has_ended() -> None:
    async with after("away", max_session_idle_s=10.0) as (at, store):
        await at.open("gone")
        at.clock.advance(11.0)
        store.reads_held = store.commits_held = True
        reads = len(store.asked("read"))
        answers = at.submit(["away", "gone"], x(2), batch_sizes=[1, 1])
        await store.until("read", reads + 1)
        store.reads_held = False
        store.release_once("read")
        await store.until("commit", 2)
        assert store.asked("commit")[-1] == ("gone",), "the store knows of no use elsewhere"
        store.release_once("commit")
        await store.until("commit", 3)
        assert store.asked("commit")[-1] == ("away",)
        store.release()
        assert kinds(await answers.all()) == ["SessionExpired"] * 2


async def test_the_sessions_of_another_server_do_not_expire_unless_that_one_lets_them() -> None:
    async with after("used", "left", max_session_idle_s=10.0) as (at, store):
        async with running(store=store.replica(), clock=at.clock, max_session_idle_s=10.0) as other:
            at.clock.advance(8.0)
            await other.step("used", x(1))
            assert await at.expired_after(4.0) == 1
            assert (await other.step("used", x(1))).revision == 3
        assert [info.session_id for info in (await at.engine.list_sessions())[0]] == ["used"]


async def test_a_session_that_another_server_uses_does_not_expire() -> None:
    async with after("a", max_session_idle_s=10.0) as (at, store):
        await at.step("a", x(1))
        async with running(store=store.replica(), clock=at.clock, max_session_idle_s=10.0) as other:
            await other.step("a", x(1))
            at.clock.advance(8.0)
            await other.step("a", x(1))
            assert await at.expired_after(4.0) == 0, "the store knows better"
            assert (await other.step("a", x(1))).revision == 5, "it was used there"
            assert (await at.step("a", x(1))).revision == 6


async def test_a_session_that_is_due_here_is_looked_for_before_it_is_said_to_have_expired() -> None:
    async with after("a", "b", max_session_idle_s=10.0) as (at, store):
        await at.submit(["a", "b"], x(2)).all()
        async with running(store=store.replica(), clock=at.clock, max_session_idle_s=10.0) as other:
            at.clock.advance(8.0)
            await other.step("a", x(1))
            at.clock.advance(4.0)
            answers = await at.submit(["a", "b"], x(2)).all()
            assert kinds(answers) == ["Answer", "SessionExpired"]
            await fails(at.state("b"), SessionExpired)


async def test_sessions_of_a_server_that_has_ended_expire() -> None:
    async with after("a", "b", max_session_idle_s=10.0) as (at, store):
        assert await at.expired_after(11.0) == 2
        assert store.shared.count() == 0
        await fails(at.state("a"), SessionExpired)


async def test_counts_and_lists_are_those_of_the_store() -> None:
    async with after("a", "b", "c") as (at, _store):
        await at.engine.refresh_counts()
        assert at.engine.models()[0].sessions == at.engine.stats()[0].sessions == 3
        page, total = await at.engine.list_sessions(limit=2)
        assert ([info.session_id for info in page], total) == (["a", "b"], 3)
        assert await at.engine.close_sessions(["a", "never", "c"]) == 2
        assert [info.session_id for info in (await at.engine.list_sessions())[0]] == ["b"]
        await fails(at.state("a"), SessionNotFound, "was closed")


async def test_few_commits_are_under_way_at_once_and_never_two_of_a_session() -> None:
    names = [f"s{number}" for number in range(12)]
    async with running() as at:
        store: RemoteStore = at.store
        await at.open(*names)
        before = len(store.asked("commit"))
        store.commits_held = True
        steps: list[Answers] = []
        for count, name in enumerate(names):
            steps.append(at.submit(name, x(1)))
            if count < 8:
                await store.until("commit", before + count + 1)
        await turns()
        assert [len(ids) for ids in store.asked("commit")[before:]] == [1] * 8
        store.release()
        for answers in steps:
            assert (await answers.only()).revision == 1
        assert len(store.asked("commit")[before:]) == 9, "what came meanwhile is kept together"


@pytest.mark.engine(max_session_idle_s=10.0)
async def test_an_id_is_used_again_only_when_its_last_session_is_gone_from_the_store(
    at: Harness, store: RemoteStore
) -> None:
    await at.open("a")
    at.clock.advance(11.0)
    store.commits_held = True
    opening = await start_task(at.engine.open_session("plain", session_id="a"))
    await store.until("commit", 2)
    await turns()
    assert len(store.asked("commit")) == 2, "the opening waits for the end"
    store.release()
    assert (await opening).session.revision == 1
    assert (await at.step("a", x(1))).revision == 2
