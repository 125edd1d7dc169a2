"""A store that fails: the caller hears of it, nothing has changed, and the change sent again is applied once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from stepwell_server.errors import Internal, ServerError, Unavailable
from support.engine.harness import Answer, Harness, kinds, x
from support.stores.durable import DurableStore, begun, everything, new_durable_store, same_reply, stalled
from support.stores.kinds import DURABLE, ON_DISK

pytestmark = DURABLE

AWAY = Unavailable("the store must be able to keep the change; the test says no")
Change = Callable[[Harness], Awaitable[Any]]

EXACTLY: dict[str, Any] = {"expected": 1, "request_ids": 22}
CHANGES: dict[str, Change] = {
    "step": lambda at: at.step("a", x(1, seed=1), **EXACTLY),
    "single": lambda at: at.single("a", x(1, seed=1), expected=1, request_id=22).only(),
    "steps": lambda at: at.step("a", x(1, 5, seed=1), **EXACTLY),
    "rows": lambda at: at.step("wide", x(3, 2, seed=1), **EXACTLY),
    "reset": lambda at: at.submit("a", reset=True, **EXACTLY).only(),
    "reset to": lambda at: at.submit("a", reset=True, state={"": x(1, seed=4)}, **EXACTLY).only(),
    "reset rows": lambda at: at.submit("wide", reset=True, rows=(1,), sizes=[3], **EXACTLY).only(),
}
ENDS_AND_BEGINNINGS: dict[str, Change] = {
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


async def fails(call: Awaitable[Any], kind: type[ServerError] = Unavailable) -> None:
    with pytest.raises(kind, match=r"the test says no|internal error [0-9a-f]{12}"):
        await call


@pytest.mark.parametrize("name", [*CHANGES, *ENDS_AND_BEGINNINGS])
@pytest.mark.parametrize("unexpected", [False, True])
async def test_what_is_not_kept_has_not_happened(
    durable_store: DurableStore, options: dict[str, Any], name: str, unexpected: bool
) -> None:
    call = (CHANGES | ENDS_AND_BEGINNINGS)[name]
    async with durable_store.engine(**options) as at:
        before = await begin(at)
        resident = at.slots().resident
        durable_store.store.fail(RuntimeError("a secret detail") if unexpected else AWAY)
        await fails(call(at), Internal if unexpected else Unavailable)
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
        await fails(CHANGES[name](at))
        found = await CHANGES[name](at)
        same_reply(found, wanted)
        assert len(durable_store.store.tried) == 3 + 3 + 1, "it was kept once"


@pytest.mark.parametrize("kept", [False, True])
async def test_the_server_does_not_try_again_by_itself_what_may_have_been_kept(
    durable_store: DurableStore, options: dict[str, Any], kept: bool
) -> None:
    async with durable_store.engine(**options) as at:
        await begin(at)
        durable_store.store.fail(AWAY, kept=kept)
        await fails(at.single("a", x(1, seed=1)).only())
        assert (await at.engine.session_info("b")).revision == 1
        assert (await at.engine.get_state("a")).session.revision == (2 if kept else 1)


async def undisturbed(call: Change) -> Answer:
    other = await new_durable_store()
    async with other.engine() as at:
        await begin(at)
        found = await call(at)
    await other.aclose()
    assert isinstance(found, Answer)
    return found


@pytest.mark.parametrize("name", ENDS_AND_BEGINNINGS)
async def test_what_was_made_or_ended_though_the_store_failed_is_so_when_it_is_sent_again(
    durable_store: DurableStore, name: str
) -> None:
    call = ENDS_AND_BEGINNINGS[name]
    async with durable_store.engine() as at:
        before = await begin(at)
        durable_store.store.fail(AWAY, kept=True)
        await fails(call(at))
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
async def test_what_waits_in_line_is_answered_when_its_session_is_dropped(
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
        tasks = [await begun(call) for call in calls]
        durable_store.store.go_on()
        for answers in (first, *waiting):
            assert "Unavailable" in kinds(await answers.all())
        assert kinds(await waiting[1].all()) == ["Answer", "Unavailable"]
        for task in tasks:
            await fails(task)
        await at.settled()
        assert (await at.engine.session_info("a")).revision == 0
        assert (await at.step("a", x(1), expected=0, request_ids=1)).revision == 1
