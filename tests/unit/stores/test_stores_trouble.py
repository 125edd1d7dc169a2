"""A store that fails: callers get an error, nothing has changed, no session ends early, and no claim is left behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.change import Change
from stepwell_server.errors import Internal, ServerError, SessionExpired, SessionGone, Unavailable
from stepwell_server.logs import REPEAT_S
from support.engine.harness import Answer, CallbackAnswers, Harness, fails, kinds, x
from support.stores.durable import (
    DurableStore,
    everything,
    new_durable_store,
    same_reply,
    stalled,
    start_task,
)
from support.stores.kinds import DURABLE, ON_DISK

pytestmark = DURABLE

AWAY = Unavailable("the store must be able to keep the change; the test says no")
IDLE_S = 50.0


async def expired(at: Harness) -> list[str]:
    """The sessions that the timer ends now."""
    before = len(at.events.sessions)
    await at.expire()
    return sorted(name for event, name in at.events.sessions[before:] if event == "expired")


async def dropped(at: Harness, *session_ids: str) -> None:
    """The store fails to keep a change of sessions."""
    at.store.fail(AWAY)
    answers = at.submit(list(session_ids), x(len(session_ids)))
    assert kinds(await answers.all()) == ["Unavailable"] * len(session_ids)
    await at.settled()
    assert not any(session_id in at.internals.loaded() for session_id in session_ids)


@pytest.mark.parametrize("jump_s", [-1e7, 0.0, 1e7])
async def test_trouble_counts_neither_as_use_nor_as_idleness(
    durable_store: DurableStore, jump_s: float
) -> None:
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        await at.open("a", "b", "c")
        at.clock.advance(IDLE_S)
        await at.step("a", x(1))
        await at.state("b")  # a use that a store on disk is not told of
        await durable_store.knows_use_of("b")
        at.clock.jump(jump_s)
        at.clock.advance(0.5)
        await dropped(at, "a", "b")
        assert (await at.engine.session_info("b")).revision == 0
        assert await expired(at) == ["c"]
        at.clock.advance(IDLE_S - 0.5)
        assert await expired(at) == []
        at.clock.advance(0.1)
        for name in "ab":
            await fails(at.state(name), SessionExpired)


async def test_sessions_that_leave_memory_one_after_the_other_are_logged_once_in_a_while(
    durable_store: DurableStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk refuses every commit: its lines must not fill the log."""
    async with durable_store.engine() as at:
        await at.open("a")
        for _ in range(5):
            await dropped(at, "a")
        at.clock.advance(REPEAT_S)
        await dropped(at, "a")
        told = [
            line.__dict__["fields"] for line in caplog.records if line.message == "sessions left the arena"
        ]
        assert [(each["sessions"], each.get("more_before", 0)) for each in told] == [(1, 0), (1, 4)]


async def test_the_sweep_keeps_dropped_sessions_that_were_used(durable_store: DurableStore) -> None:
    async with durable_store.engine() as at:
        await at.open("a", "b")
        durable_store.kill(away_s=0)
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        at.clock.advance(IDLE_S)
        await at.state("a")
        await durable_store.knows_use_of("a")
        await dropped(at, "a")
        at.clock.advance(1)
        assert await expired(at) == ["b"]
        assert (await at.step("a", x(1))).revision == 1


async def test_dropped_sessions_that_are_never_named_again_expire(durable_store: DurableStore) -> None:
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        at.clock.advance(IDLE_S + 1)
        assert await expired(at) == [], "the sweep of the start is over"
        await at.open("a", "b")
        await dropped(at, "a", "b")
        at.clock.advance(IDLE_S)
        assert await expired(at) == []
        at.clock.advance(1)
        durable_store.store.read_error = AWAY
        await fails(at.expire(), Unavailable)
        durable_store.store.read_error = None
        at.clock.advance(2)
        assert await expired(at) == ["a", "b"]
        assert await durable_store.count() == (await at.sessions())[0] == 0
        assert await expired(at) == []


@pytest.mark.parametrize("by", ["timer", "name"])
async def test_expired_sessions_that_could_not_be_deleted_are_deleted_later(
    durable_store: DurableStore, by: str
) -> None:
    async with durable_store.engine(max_session_idle_s=IDLE_S, is_killed=True) as at:
        at.clock.advance(IDLE_S + 1)
        assert await expired(at) == []
        await at.open("a")
        at.clock.advance(IDLE_S + 1)
        durable_store.store.fail(AWAY)
        await fails(at.expire(), Unavailable)
        await at.settled()
        assert await durable_store.count() == (await at.sessions())[0] == 1
        at.clock.jump(-1000)  # it must not come back to life
        if by == "timer":
            assert await expired(at) == ["a"]
        else:
            await fails(at.state("a"), SessionExpired)
            await at.settled()
        assert await durable_store.count() == (await at.sessions())[0] == 0
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        await fails(at.state("a"), SessionExpired)


async def test_an_id_whose_old_session_could_not_be_deleted_can_be_opened_again(
    durable_store: DurableStore,
) -> None:
    async with durable_store.engine(max_session_idle_s=IDLE_S) as at:
        await at.open_and_step("a", x(1))
        at.clock.advance(IDLE_S + 1)
        durable_store.store.fail(AWAY)
        await fails(at.expire(), Unavailable)
        await at.settled()
        await at.open("a")
        await at.settled()
        assert await expired(at) == []
        assert (await at.engine.session_info("a")).revision == 2
        assert await durable_store.count() == (await at.sessions())[0] == 1


async def test_a_retry_sent_from_within_an_answer_is_answered(durable_store: DurableStore) -> None:
    told: list[Answer | ServerError] = []
    async with durable_store.engine() as at:
        await at.open("a")
        durable_store.store.fail(AWAY)
        durable_store.store.stall()
        first = at.submit("a", x(1))
        await stalled(durable_store.store)

        def again(answer: Answer | ServerError) -> None:
            told.append(answer)
            if isinstance(answer, ServerError) and len(told) < 5:
                at.engine.submit(Change(["a"], CallbackAnswers(again), inputs={"": x(1)}))

        at.engine.submit(Change(["a"], CallbackAnswers(again), inputs={"": x(1)}))
        at.internals.drain_inboxes()
        durable_store.store.release()
        assert kinds(await first.all()) == ["Unavailable"]
        await at.settled()
        assert kinds(told) == ["Unavailable", "Answer"]
        assert (await at.engine.session_info("a")).revision == 1


async def test_a_retry_sent_when_a_session_is_closed_is_answered(durable_store: DurableStore) -> None:
    refused: list[str] = []
    async with durable_store.engine() as at:
        await at.open("a")
        durable_store.store.stall()
        close = await start_task(at.engine.close_session("a"))
        await stalled(durable_store.store)

        def again(answer: Answer | ServerError) -> None:
            assert len(refused) < 5
            refused.append(type(answer).__name__)
            if len(refused) == 1:
                at.engine.submit(Change(["a"], CallbackAnswers(again), inputs={"": x(1)}))

        at.engine.submit(Change(["a"], CallbackAnswers(again), inputs={"": x(1)}))
        at.internals.drain_inboxes()
        durable_store.store.release()
        assert await close is False
        await at.settled()
        assert refused == ["SessionNotFound"] * 2


@pytest.mark.parametrize("unexpected", [False, True])
async def test_a_store_that_cannot_be_read_harms_no_resident_session(
    durable_store: DurableStore, unexpected: bool
) -> None:
    kind = Internal if unexpected else Unavailable
    async with durable_store.engine(resident_rows=2, threads=True) as at:
        await at.open("a", "b", "c")
        before = await everything(at)
        await at.state("b")
        await at.state("c")
        assert not (await at.engine.session_info("a")).resident
        durable_store.store.read_error = RuntimeError("a secret detail") if unexpected else AWAY
        calls: list[Any] = [at.step("a", x(1)), at.state("a"), at.step("a", x(1, 2))]
        for call in calls:
            await fails(call, kind, r"the test says no|internal error [0-9a-f]{12}")
        assert kinds(await at.submit(["a", "b"], x(2)).all()) == [kind.__name__, "Answer"]
        at.check_books()
        durable_store.store.read_error = None
        assert (await everything(at))["a"] == before["a"]
        assert (await at.step("a", x(1), expected=0)).revision == 1


async def test_a_session_outside_the_table_is_not_reported_as_gone(durable_store: DurableStore) -> None:
    async with durable_store.engine(is_killed=True) as at:
        await at.open("a", "b")
    async with durable_store.engine() as at:
        await at.state("b")
        durable_store.store.read_error = AWAY
        for call in (
            at.step("a", x(1)),
            at.state("a"),
            at.engine.fork("a"),
            at.engine.close_session("a"),
            at.engine.open_session("plain", session_id="a"),
            at.engine.open_sessions("plain", session_ids=["a", "c"]),
            at.engine.open_session("plain", request_id=5),
        ):
            await fails(call, Unavailable, "the test says no")
        assert kinds(await at.submit(["a", "b"], x(2)).all()) == ["Unavailable", "Answer"]
        durable_store.store.read_error = None
        assert kinds(await at.submit(["a", "b"], x(2)).all()) == ["Answer", "Answer"]
        await fails(at.state("c"), SessionGone)


async def test_members_of_a_group_are_stored_as_themselves_in_reused_places(
    durable_store: DurableStore,
) -> None:
    ids = [[f"{turn}-{i}" for i in range(20)] for turn in range(3)]
    async with durable_store.engine() as at:
        for turn, group in enumerate(ids):
            at.clock.advance(1)
            await at.engine.open_sessions("plain", session_ids=group, request_id=turn)
            for step in range(3):
                at.clock.advance(1)
                requests = np.arange(1, 21) + 100 * step
                answers = at.submit(group, x(20, seed=step), expected=[step] * 20, request_ids=requests)
                assert kinds(await answers.all()) == ["Answer"] * 20
            if turn < 2:
                assert await at.engine.close_sessions(group) == 20
        before = await everything(at)
        durable_store.kill(away_s=0)
    async with durable_store.engine(is_killed=True) as at:
        assert (await everything(at)) == before
        answers = at.submit(ids[2], x(20, seed=2), expected=[2] * 20, request_ids=np.arange(1, 21) + 200)
        found = await answers.all()
        assert all(getattr(answer, "replayed", False) for answer in found)


EngineCall = Callable[[Harness], Awaitable[Any]]

EXACTLY: dict[str, Any] = {"expected": 1, "request_ids": 22}
CHANGES: dict[str, EngineCall] = {
    "step": lambda at: at.step("a", x(1, seed=1), **EXACTLY),
    "single": lambda at: at.single("a", x(1, seed=1), expected=1, request_id=22).only(),
    "steps": lambda at: at.step("a", x(1, 5, seed=1), **EXACTLY),
    "rows": lambda at: at.step("wide", x(3, 2, seed=1), **EXACTLY),
    "reset": lambda at: at.submit("a", reset=True, **EXACTLY).only(),
    "reset to": lambda at: at.submit("a", reset=True, state={"": x(1, seed=4)}, **EXACTLY).only(),
    "reset rows": lambda at: at.submit("wide", reset=True, rows=(1,), sizes=[3], **EXACTLY).only(),
}
ENDS_AND_BEGINNINGS: dict[str, EngineCall] = {
    "open": lambda at: at.engine.open_session("plain", session_id="new", request_id=22),
    "open unnamed": lambda at: at.engine.open_session("plain", batch_size=2, request_id=22),
    "open with state": lambda at: at.engine.open_session("plain", state={"": x(1)}, request_id=22),
    "open many": lambda at: at.engine.open_sessions("plain", count=5, request_id=22),
    "open many named": lambda at: at.engine.open_sessions("plain", session_ids=["n", "m"], request_id=22),
    "fork": lambda at: at.engine.fork("a", new_session_id="new", request_id=22),
    "fork unnamed": lambda at: at.engine.fork("wide", request_id=22),
    "close": lambda at: at.engine.close_session("a", request_id=22),
}


@pytest.fixture(params=[False, True], ids=["here", "threads"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"threads": request.param}


async def begin(at: Harness) -> dict[str, tuple[Any, ...]]:
    await at.open("a", "b")
    await at.open("wide", batch_size=3)
    for name, rows in (("a", 1), ("b", 1), ("wide", 3)):
        await at.step(name, x(rows, 3), expected=0, request_ids=11)
    return await everything(at)


async def store_refuses(call: Awaitable[Any], kind: type[ServerError] = Unavailable) -> None:
    with pytest.raises(kind, match=r"the test says no|internal error [0-9a-f]{12}"):
        await call


@pytest.mark.parametrize("name", [*CHANGES, *ENDS_AND_BEGINNINGS])
@pytest.mark.parametrize("unexpected", [False, True])
async def test_a_change_that_is_not_kept_has_no_effect(
    durable_store: DurableStore, options: dict[str, Any], name: str, unexpected: bool
) -> None:
    call = (CHANGES | ENDS_AND_BEGINNINGS)[name]
    async with durable_store.engine(**options) as at:
        before = await begin(at)
        resident = at.slots().resident
        durable_store.store.fail(RuntimeError("a secret detail") if unexpected else AWAY)
        await store_refuses(call(at), Internal if unexpected else Unavailable)
        await at.settled()
        at.check_books()
        assert at.slots().resident <= resident
        assert (await everything(at)) == before
        answer = await call(at)
        assert answer is False or not answer.replayed
        again = await call(at)
        assert again is True or again.replayed
        await at.settled()
        after = await everything(at)
        durable_store.kill(away_s=0)
    async with durable_store.engine(**options) as at:
        assert (await everything(at)) == after


@pytest.mark.parametrize("name", CHANGES)
async def test_a_change_that_was_kept_though_the_store_failed_is_answered_when_it_is_sent_again(
    durable_store: DurableStore, options: dict[str, Any], name: str
) -> None:
    wanted = await undisturbed(CHANGES[name])
    async with durable_store.engine(**options) as at:
        await begin(at)
        durable_store.store.fail(AWAY, kept=True)
        await store_refuses(CHANGES[name](at))
        found = await CHANGES[name](at)
        same_reply(found, wanted)
        assert len(durable_store.store.tried) == 3 + 3 + 1, "it was kept once"


@pytest.mark.parametrize("kept", [False, True])
async def test_the_server_does_not_retry_a_change_that_may_have_been_kept(
    durable_store: DurableStore, options: dict[str, Any], kept: bool
) -> None:
    async with durable_store.engine(**options) as at:
        await begin(at)
        durable_store.store.fail(AWAY, kept=kept)
        await store_refuses(at.single("a", x(1, seed=1)).only())
        assert (await at.engine.session_info("b")).revision == 1
        assert (await at.engine.get_state("a")).session.revision == (2 if kept else 1)


async def undisturbed(call: EngineCall) -> Answer:
    other = await new_durable_store()
    async with other.engine() as at:
        await begin(at)
        found = await call(at)
    await other.aclose()
    assert isinstance(found, Answer)
    return found


@pytest.mark.parametrize("name", ENDS_AND_BEGINNINGS)
async def test_a_retry_finds_a_session_that_was_made_or_ended_although_the_store_failed(
    durable_store: DurableStore, name: str
) -> None:
    call = ENDS_AND_BEGINNINGS[name]
    async with durable_store.engine() as at:
        before = await begin(at)
        durable_store.store.fail(AWAY, kept=True)
        await store_refuses(call(at))
        answer = await call(at)
        assert answer is True or answer.replayed
        after = await everything(at)
        assert after != before
        assert (await at.sessions())[0] == len(after)
        durable_store.kill(away_s=0)
    async with durable_store.engine() as at:
        assert (await everything(at)) == after
        answer = await call(at)
        assert answer is True or answer.replayed
        assert (await at.sessions())[0] == len(after)


async def test_a_frame_that_is_not_kept_fails_whole_and_alone(
    durable_store: DurableStore, options: dict[str, Any]
) -> None:
    ids = [f"s{i}" for i in range(20)]
    async with durable_store.engine(**options) as at:
        await at.open("apart")
        await at.engine.open_sessions("plain", session_ids=ids)
        frame: dict[str, Any] = {"x": x(20, 3), "expected": [0] * 20, "request_ids": range(1, 21)}
        durable_store.store.fail(AWAY)
        assert kinds(await at.submit(ids, **frame).all()) == ["Unavailable"] * 20
        await at.settled()
        assert at.internals.loaded() == ["apart"], "they are loaded when they are next named"
        assert at.slots().resident == 1
        assert (await at.step("apart", x(1))).revision == 1
        first = await at.submit(ids, **frame).all()
        assert {answer.replayed for answer in first if isinstance(answer, Answer)} == {False}
        again = await at.submit(ids, **frame).all()
        for found, wanted in zip(again, first, strict=True):
            assert isinstance(found, Answer)
            assert isinstance(wanted, Answer)
            same_reply(found, wanted)


@ON_DISK  # what is behind a failed commit of a shared store looks its session up again
async def test_waiting_requests_are_answered_when_their_session_is_dropped(
    durable_store: DurableStore, options: dict[str, Any]
) -> None:
    async with durable_store.engine(**options) as at:
        await at.open("a", "b")
        durable_store.store.fail(AWAY)
        durable_store.store.stall()
        first = at.submit("a", x(1), expected=0, request_ids=1)
        await stalled(durable_store.store)
        waiting = [
            at.submit("a", x(1), expected=1, request_ids=2),
            at.submit(["b", "a"], x(2), expected=[0, 1], request_ids=[3, 4]),
            at.submit("a", reset=True, expected=2, request_ids=5),
        ]
        calls = [at.state("a"), at.engine.fork("a"), at.engine.close_session("a")]
        tasks = [await start_task(call) for call in calls]
        durable_store.store.release()
        for answers in (first, *waiting):
            assert "Unavailable" in kinds(await answers.all())
        assert kinds(await waiting[1].all()) == ["Answer", "Unavailable"]
        for task in tasks:
            await store_refuses(task)
        await at.settled()
        assert (await at.engine.session_info("a")).revision == 0
        assert (await at.step("a", x(1), expected=0, request_ids=1)).revision == 1
