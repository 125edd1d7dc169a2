"""Stored sessions that cannot be stepped here, and replies whose states outlive a kill."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.engine.change import Change
from stepwell_server.engine.state.replies import ReplyArrays
from stepwell_server.errors import (
    ModelMismatch,
    ModelNotFound,
    ServerError,
    SessionExists,
    SessionNotFound,
    StateCorrupt,
    Unavailable,
)
from support.checks.model_of_sessions import initial, traced
from support.engine.fake_executor import PLAIN
from support.engine.harness import Answer, Answers, CallbackAnswers, Harness, fails, kinds, x
from support.stores.durable import DurableStore, damage, same_reply
from support.stores.kinds import DURABLE

pytestmark = DURABLE

NEWER = dataclasses.replace(PLAIN, fingerprint="f-newer")


async def refused(at: Harness, session_id: str, kind: type[ServerError], message: str) -> None:
    """By every call that would have to step, read, make or resume the session."""
    neighbour = (await at.engine.session_info("fine")).revision
    for call in (
        at.step(session_id, x(1)),
        at.step(session_id, x(1, 3)),
        at.submit(session_id, reset=True).only(),
        at.state(session_id),
        at.engine.fork(session_id),
        at.engine.fork("fine", new_session_id=session_id),
        at.engine.open_session("plain", session_id=session_id),
        at.engine.open_sessions("plain", session_ids=["new", session_id]),
    ):
        await fails(call, kind, message)
    # a damaged record does not even say that there is a session
    await fails(
        at.engine.open_session("plain", session_id=session_id, must_be_new=True, request_id=5),
        kind if kind is StateCorrupt else SessionExists,
    )
    if kind is StateCorrupt:
        await fails(at.engine.session_info(session_id), kind, message)
    else:
        listed, _ = await at.engine.list_sessions(prefix=session_id)
        assert [(await at.engine.session_info(session_id))] == listed
    with pytest.raises(kind, match=message):
        await at.single(session_id, x(1)).only()
    await fails(at.engine.session_info(session_id, usable=True), kind, message)
    answers = await at.submit([session_id, "fine"], x(2)).all()
    assert kinds(answers) == [kind.__name__, "Answer"]
    assert (await at.engine.session_info("fine")).revision == neighbour + 1
    infos, total = await at.engine.list_sessions()
    assert total == 2
    assert {info.session_id for info in infos} == {session_id, "fine"}, "nothing was made"


@pytest.mark.parametrize("close", ["one", "many"])
async def test_a_session_of_another_model_can_be_listed_and_closed(
    durable_store: DurableStore, close: str
) -> None:
    async with durable_store.engine(is_killed=True) as at:
        await at.open_and_step("a", x(1, 3))
    async with durable_store.engine({"plain": NEWER}, is_killed=True) as at:
        await at.open("fine")
        await refused(
            at, "a", ModelMismatch, "session 'a' belongs to model 'plain' with fingerprint f-plain;"
        )
        info = (await at.engine.list_sessions(prefix="a"))[0][0]
        assert (info.model, info.fingerprint, info.batch_size) == ("plain", "f-plain", 1)
        assert (info.revision, info.position, info.resident) == (1, 3, False)
        assert (await at.sessions())[0] == 2
    async with durable_store.engine(is_killed=True) as at:  # the old model again
        assert (await at.step("a", x(1), expected=1)).revision == 2
    async with durable_store.engine({"plain": NEWER}) as at:
        if close == "one":
            assert await at.engine.close_session("a", request_id=7) is False
            assert await at.engine.close_session("a", request_id=7) is True
        else:
            assert await at.engine.close_sessions(["never", "a"]) == 1
        await fails(at.engine.session_info("a"), SessionNotFound, "session 'a' was closed")
        assert (await at.sessions())[0] == 1
        assert (await at.engine.list_sessions())[1] == 1
        opened = (await at.engine.open_session("plain", session_id="a")).session
        assert (opened.revision, opened.position) == (3, 0), "one more than the session before had"


async def test_a_session_of_a_model_that_is_not_served_can_be_listed_and_closed(
    durable_store: DurableStore,
) -> None:
    async with durable_store.engine({"plain": PLAIN, "old": PLAIN}, is_killed=True) as at:
        await at.open("a", model="old")
    async with durable_store.engine(is_killed=True) as at:
        await at.open("fine")
        message = r"session 'a' belongs to model 'old', which is not loaded; model must be one of \['plain'\]"
        await refused(at, "a", ModelNotFound, message)
        assert [info.session_id for info in (await at.engine.list_sessions(model="plain"))[0]] == ["fine"]
        assert [info.model for info in (await at.engine.list_sessions(prefix="a"))[0]] == ["old"]
        assert await at.engine.close_session("a") is False
        assert (await at.engine.list_sessions())[1] == await durable_store.count() == 1
    async with durable_store.engine({"plain": PLAIN, "old": PLAIN}) as at:
        assert await at.sessions() == [0, 1]


async def test_a_damaged_record_harms_its_session_alone(durable_store: DurableStore) -> None:
    async with durable_store.engine(is_killed=True) as at:
        await at.open("a", "fine")
        await damage(durable_store, "a")
    async with durable_store.engine() as at:
        await refused(at, "a", StateCorrupt, "the stored record of session 'a' must be intact")
        assert await at.engine.close_session("a", request_id=7) is False
        assert await at.engine.close_session("a", request_id=7) is True
        await fails(at.state("a"), SessionNotFound, "was closed")
        assert (await at.engine.list_sessions())[1] == 1
        opened = await at.engine.open_session("plain", session_id="a")
        assert not opened.resumed


async def test_a_record_that_is_damaged_while_its_session_is_away(durable_store: DurableStore) -> None:
    async with durable_store.engine(resident_rows=2, threads=True) as at:
        await at.open("a", "b")
        await at.open("c", batch_size=2)
        assert not (await at.engine.session_info("a")).resident
        await damage(durable_store, "a")
        for call in (at.step("a", x(1)), at.state("a"), at.engine.fork("a"), at.step("a", x(1, 2))):
            await fails(call, StateCorrupt, "session 'a'")
        assert kinds(await at.submit(["a", "b"], x(2)).all()) == ["StateCorrupt", "Answer"]
        assert (await at.sessions())[0] == 3
        assert await at.engine.close_session("a") is False
        assert (await at.sessions())[0] == 2
        assert (await at.step("b", x(1), expected=1)).revision == 2


async def test_a_damaged_session_is_closed_among_others(durable_store: DurableStore) -> None:
    async with durable_store.engine(is_killed=True) as at:
        await at.open("a", "b", "c")
        await damage(durable_store, "b")
    async with durable_store.engine() as at:
        assert await at.engine.close_sessions(["c", "b", "a", "never"]) == 3
        assert await at.engine.list_sessions() == ([], 0)


async def test_one_of_two_simultaneous_closes_deletes_a_session_that_cannot_be_stepped(
    durable_store: DurableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with durable_store.engine(is_killed=True) as at:
        await at.open("a", "b")
    async with durable_store.engine({"plain": NEWER}) as at:
        at.internals.commit_on_a_thread(monkeypatch)
        closes = [at.engine.close_session("a", request_id=7), at.engine.close_session("a", request_id=7)]
        assert sorted(await asyncio.gather(*closes)) == [False, True]
        assert (await at.sessions())[0] == 1


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("select", Select)
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize(
    "said",
    [
        {"states": Select.ALL},
        {"states": Select.LAST},
        {"states": Select.ALL, "state_rows": [2, 0]},
        {"states": Select.ALL, "rows": [1, 2], "state_rows": [2]},
        {"rows": [1, 2]},
    ],
    ids=str,
)
async def test_a_retry_gets_the_first_states(
    durable_store: DurableStore, said: dict[str, Any], steps: int, select: Select, killed: bool
) -> None:
    value = x(len(said.get("rows", "all")), *([steps] if steps else []))
    again: dict[str, Any] = {"expected": 0, "request_id": 7, "select": select, **said}
    async with durable_store.engine(resident_rows=4, steps=2) as at:
        await at.open("a", batch_size=3)
        first = await at.single("a", value, **again).only()
        at.clock.advance(1)
        await at.open("b", batch_size=4)
        assert not at.internals.model("plain").replies.series
        if killed:
            durable_store.kill()
        else:
            await at.single("a", value, **again).only()
    async with durable_store.engine(resident_rows=4) as at:
        second = await at.single("a", value, **again).only()
    same_reply(second, first)
    assert bool(first.states) == ("states" in said)
    if said == {"states": Select.ALL} and steps:
        assert first.states["sum"].tobytes() == traced(initial(3), value)[1].tobytes()


async def test_a_step_of_some_rows_stays_one_after_its_session_is_reloaded(
    durable_store: DurableStore,
) -> None:
    """Sent from within the answer to a change that the store could not keep: then the session leaves the table."""
    sent: list[Answers] = []
    async with durable_store.engine() as at:
        await at.open("a", batch_size=3)
        durable_store.store.fail(Unavailable("the test says no"))

        def send(answer: Answer | ServerError) -> None:
            assert isinstance(answer, Unavailable)
            sent.append(at.single("a", x(1, 4, seed=1), rows=[2], states=Select.ALL))

        at.engine.submit(Change(["a"], CallbackAnswers(send), inputs={"": x(3)}))
        await at.settled()
        outputs, after = traced(initial(1), x(1, 4, seed=1))
        answer = await sent[0].only()
        assert answer.outputs["y"].tobytes() == outputs.tobytes()
        assert answer.states["sum"].tobytes() == after.tobytes()
        assert (answer.revision, answer.position) == (1, 4)


async def test_replies_beyond_their_share_of_the_memory_are_only_in_the_store(
    durable_store: DurableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = x(1, 5)
    own = ReplyArrays({"y": value}, {"sum": value}).byte_count
    monkeypatch.setattr("stepwell_server.engine.state.replies.MAX_ARRAY_BYTES", 3 * own)
    said: dict[str, Any] = {"states": Select.ALL, "request_ids": 7, "expected": 0}
    async with durable_store.engine() as at:
        names = [f"s{i}" for i in range(8)]
        await at.open(*names)
        firsts = {name: await at.step(name, value, **said) for name in names}
        await at.settled()
        replies = at.internals.model("plain").replies
        assert len(replies.series) <= 4, "the last one may be one too many"
        resident = [name for name in names if (await at.engine.session_info(name)).resident]
        assert resident == names[-len(resident) :], "those that were kept first have gone"
        for name in names:
            again = await at.step(name, value, **said)
            assert again.replayed
            assert again.states["sum"].tobytes() == firsts[name].states["sum"].tobytes()
        for name in names:
            await at.step(name, x(1))
        assert not replies.series
        assert not replies.is_over_limit


async def test_a_reader_without_states_in_records_reads_their_outputs(durable_store: DurableStore) -> None:
    """Servers before there were any, on the same data."""
    async with durable_store.engine() as at:
        replies = at.internals.model("plain").replies
        outputs, states = {"y": x(2, 3)}, {"sum": x(2, 3, seed=1)}
        before = replies.pack(ReplyArrays(outputs, {}))
        assert replies.pack(ReplyArrays(outputs, states)).startswith(before)
        assert before == bytes([3]) + np.array([2, 3, 2], "<u4").tobytes() + outputs["y"].tobytes()
