"""Stored sessions that cannot be stepped here: of another model, of none, damaged."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from stepwell_server.errors import (
    ModelMismatch,
    ModelNotFound,
    ServerError,
    SessionExists,
    SessionNotFound,
    StateCorrupt,
)
from support.engine.fake_executor import PLAIN
from support.engine.harness import Harness, fails, kinds, x
from support.stores.durable import DurableStore, damage
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
    async with durable_store.engine() as at:
        await at.open("a")
        await at.step("a", x(1, 3))
        durable_store.kill()
    async with durable_store.engine({"plain": NEWER}) as at:
        await at.open("fine")
        await refused(
            at, "a", ModelMismatch, "session 'a' belongs to model 'plain' with fingerprint f-plain;"
        )
        info = (await at.engine.list_sessions(prefix="a"))[0][0]
        assert (info.model, info.fingerprint, info.batch_size) == ("plain", "f-plain", 1)
        assert (info.revision, info.position, info.resident) == (1, 3, False)
        assert (await at.sessions())[0] == 2
        durable_store.kill()
    async with durable_store.engine() as at:  # the old model again
        assert (await at.step("a", x(1), expected=1)).revision == 2
        durable_store.kill()
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
    async with durable_store.engine({"plain": PLAIN, "old": PLAIN}) as at:
        await at.open("a", model="old")
        durable_store.kill()
    async with durable_store.engine() as at:
        await at.open("fine")
        message = r"session 'a' belongs to model 'old', which is not loaded; model must be one of \['plain'\]"
        await refused(at, "a", ModelNotFound, message)
        assert [info.session_id for info in (await at.engine.list_sessions(model="plain"))[0]] == ["fine"]
        assert [info.model for info in (await at.engine.list_sessions(prefix="a"))[0]] == ["old"]
        assert await at.engine.close_session("a") is False
        assert (await at.engine.list_sessions())[1] == await durable_store.count() == 1
        durable_store.kill()
    async with durable_store.engine({"plain": PLAIN, "old": PLAIN}) as at:
        assert await at.sessions() == [0, 1]


async def test_a_damaged_record_harms_its_session_alone(durable_store: DurableStore) -> None:
    async with durable_store.engine() as at:
        await at.open("a", "fine")
        await damage(durable_store, "a")
        durable_store.kill()
    async with durable_store.engine() as at:
        await refused(at, "a", StateCorrupt, "the stored record of session 'a' must be as it was written")
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
    async with durable_store.engine() as at:
        await at.open("a", "b", "c")
        await damage(durable_store, "b")
        durable_store.kill()
    async with durable_store.engine() as at:
        assert await at.engine.close_sessions(["c", "b", "a", "never"]) == 3
        assert await at.engine.list_sessions() == ([], 0)


async def test_one_of_two_closes_at_once_deletes_what_cannot_be_stepped(
    durable_store: DurableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with durable_store.engine() as at:
        await at.open("a", "b")
        durable_store.kill()
    async with durable_store.engine({"plain": NEWER}) as at:
        at.internals.commit_on_a_thread(monkeypatch)
        closes = [at.engine.close_session("a", request_id=7), at.engine.close_session("a", request_id=7)]
        assert sorted(await asyncio.gather(*closes)) == [False, True]
        assert (await at.sessions())[0] == 1
