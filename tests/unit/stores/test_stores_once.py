"""Sessions are made and ended once, however often a call is sent and the server killed in between."""

from __future__ import annotations

from typing import Any

import pytest

from stepwell_server.errors import InvalidInput, RevisionConflict, SessionExists, SessionGone, SessionNotFound
from support.engine.harness import Harness, fails, x
from support.stores.durable import DurableStore, everything
from support.stores.kinds import DURABLE

pytestmark = DURABLE


async def count(at: Harness) -> int:
    """How many sessions there are, whoever is asked."""
    infos, total = await at.engine.list_sessions()
    assert total == len(infos) == (await at.sessions())[0]
    return total


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"session_id": "a"},
        {"session_id": "a", "must_be_new": True},
        {"batch_size": 2, "state": {"": x(2, seed=3)}},
        {"session_id": "a", "batch_size": 2, "state": {"": x(2, seed=3)}},
    ],
)
async def test_an_open_sent_again_means_the_session_it_made(
    durable_store: DurableStore, fields: dict[str, Any]
) -> None:
    async with durable_store.engine() as at:
        first = await at.engine.open_session("plain", request_id=7, **fields)
        assert not first.replayed
        durable_store.kill(away_s=0)
    for step in range(2):
        async with durable_store.engine() as at:
            again = await at.engine.open_session("plain", request_id=7, **fields)
            assert again.replayed
            assert not again.resumed
            session = again.session
            assert session.session_id == first.session.session_id
            assert (session.revision, session.created) == (step, first.session.created)
            assert await count(at) == 1
            await at.step(session.session_id, x(session.batch_size), expected=step)
            durable_store.kill(away_s=0)


async def test_another_open_of_the_id_is_not_the_same(durable_store: DurableStore) -> None:
    async with durable_store.engine() as at:
        await at.engine.open_session("plain", session_id="a", request_id=7, must_be_new=True)
        durable_store.kill()
    async with durable_store.engine() as at:
        for request_id in (0, 8):
            await fails(
                at.engine.open_session("plain", session_id="a", request_id=request_id, must_be_new=True),
                SessionExists,
                "session 'a' is open",
            )
            await fails(
                at.engine.open_session("plain", session_id="a", request_id=request_id, batch_size=2),
                SessionExists,
                "got model 'plain' and batch_size 2",
            )
            opened = await at.engine.open_session("plain", session_id="a", request_id=request_id)
            assert opened.resumed
            assert not opened.replayed
        ids = {(await at.engine.open_session("plain", request_id=r)).session.session_id for r in (0, 0, 7, 8)}
        assert len(ids) == 4
        assert await count(at) == 5


@pytest.mark.parametrize("named", [False, True])
async def test_many_opened_again_are_the_same(durable_store: DurableStore, named: bool) -> None:
    fields: dict[str, Any] = {"session_ids": ["c", "a", "b"]} if named else {"count": 3}
    async with durable_store.engine() as at:
        first = await at.engine.open_sessions("plain", request_id=7, batch_size=2, **fields)
        before = await everything(at)
        durable_store.kill(away_s=0)
    async with durable_store.engine() as at:
        again = await at.engine.open_sessions("plain", request_id=7, batch_size=2, **fields)
        assert again.replayed
        assert list(again.session_ids) == list(first.session_ids)
        assert (await everything(at)) == before
        if named:
            for request_id in (0, 8):
                await fails(
                    at.engine.open_sessions("plain", request_id=request_id, **fields),
                    SessionExists,
                    "session_ids must be new; session 'c' is open",
                )
            await fails(
                at.engine.open_sessions("plain", request_id=7, session_ids=["new", "a"]),
                InvalidInput,
                r"request_id must be new .* session 'a'",
            )
            assert await count(at) == 3, "nothing was made"
        else:
            other = await at.engine.open_sessions("plain", request_id=8, count=3)
            assert not other.replayed
            assert await count(at) == 6


@pytest.mark.parametrize("named", [False, True])
async def test_a_fork_sent_again_means_the_session_it_made(durable_store: DurableStore, named: bool) -> None:
    fields: dict[str, Any] = {"new_session_id": "b" if named else "", "request_id": 7, "expected": 1}
    async with durable_store.engine() as at:
        await at.open("a")
        await at.step("a", x(1, 3))
        first = await at.engine.fork("a", **fields)
        await at.step("a", x(1))
        before = await everything(at)
        durable_store.kill(away_s=0)
    async with durable_store.engine() as at:
        again = await at.engine.fork("a", **fields)
        assert again.replayed
        assert again.session.session_id == first.session.session_id
        assert (again.session.revision, again.session.position) == (1, 3)
        assert (await everything(at)) == before
        await fails(
            at.engine.fork("a", **{**fields, "request_id": 8}), SessionExists if named else RevisionConflict
        )
        await at.engine.close_session("a")
        assert (await at.engine.fork("a", **fields)).replayed, "the source is not needed any more"
        await fails(
            at.engine.fork("a", **{**fields, "request_id": 8}), SessionExists if named else SessionNotFound
        )
        assert await count(at) == 1


async def test_a_close_sent_again_succeeds(durable_store: DurableStore) -> None:
    async with durable_store.engine() as at:
        await at.open("a", "b", "c")
        assert await at.engine.close_session("a", request_id=7) is False
        assert await at.engine.close_session("b") is False
        durable_store.kill()
    async with durable_store.engine() as at:
        assert await at.engine.close_session("a", request_id=7) is True
        for name, request_id in (("a", 8), ("a", 0), ("b", 7), ("b", 0), ("never", 7)):
            await fails(at.engine.close_session(name, request_id=request_id), SessionNotFound)
        assert await count(at) == 1
        assert await at.engine.close_sessions(["a", "b", "c", "never"]) == 1
        assert await count(at) == 0


async def test_a_close_sent_again_after_restarts_closes_only_what_it_closed(
    durable_store: DurableStore,
) -> None:
    async with durable_store.engine() as at:
        await at.open("a", "b", "group 1", "group 2")
        uid = (await at.engine.session_info("b")).uid
        await at.engine.close_session("a", request_id=7)
        await at.engine.close_session("b")
        await at.engine.close_sessions(["group 1", "group 2"], request_id=8)
        durable_store.kill()
    async with durable_store.engine() as at:
        await at.open("a", "b", "group 2")
        await at.step("a", x(1))
        durable_store.kill()
    for _ in range(2):
        async with durable_store.engine() as at:
            assert await at.engine.close_session("a", request_id=7) is True
            await fails(
                at.engine.close_session("b", request_id=9, uid=uid),
                SessionNotFound,
                "another one has its id now",
            )
            assert await at.engine.close_sessions(["group 1", "group 2"], request_id=8) == 2
            assert await count(at) == 3
            await at.step("a", x(1))
            durable_store.kill()


@pytest.mark.parametrize("killed", [False, True])
async def test_a_late_duplicate_does_not_bring_a_session_back(
    durable_store: DurableStore, killed: bool
) -> None:
    async with durable_store.engine() as at:
        await at.open("source")
        one = (await at.engine.open_session("plain", request_id=7)).session.session_id
        many = (await at.engine.open_sessions("plain", request_id=8, count=3)).session_ids
        twin = (await at.engine.fork("source", request_id=9)).session.session_id
        for session_id in (one, *many, twin):
            await at.engine.close_session(session_id)
        if killed:
            durable_store.kill()
        else:
            await refuse_duplicates(at)
    if killed:
        async with durable_store.engine() as at:
            await refuse_duplicates(at)


async def refuse_duplicates(at: Harness) -> None:
    for call in (
        at.engine.open_session("plain", request_id=7),
        at.engine.open_sessions("plain", request_id=8, count=3),
        at.engine.fork("source", request_id=9),
    ):
        await fails(call, SessionGone, "was closed")
    assert await count(at) == 1


async def test_an_id_that_was_closed_may_be_opened_anew(durable_store: DurableStore) -> None:
    async with durable_store.engine() as at:
        await at.engine.open_session("plain", session_id="a", request_id=7)
        await at.step("a", x(1))
        await at.engine.close_session("a", request_id=8)
        durable_store.kill()
    async with durable_store.engine() as at:
        opened = await at.engine.open_session("plain", session_id="a", request_id=9)
        assert not opened.resumed
        assert (opened.session.revision, opened.session.position) == (2, 0)
        durable_store.kill()
    async with durable_store.engine() as at:
        assert (await at.engine.session_info("a")).revision == 2
        assert await count(at) == 1
        assert (await durable_store.tombstone("a")) is None
