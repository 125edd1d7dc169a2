"""After a kill, sessions continue where they were; calls that create or end sessions take effect once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.errors import InvalidInput, RevisionConflict, SessionExists, SessionGone, SessionNotFound
from support.checks.model_of_sessions import ModelOfSessions, Reply
from support.engine.fake_executor import PLAIN, RICH
from support.engine.harness import Answer, Harness, fails, kinds, x
from support.stores.durable import DurableStore, damage, everything, facts, same_reply
from support.stores.kinds import DURABLE

pytestmark = DURABLE


async def test_sessions_are_there_when_they_are_named_and_not_before(durable_store: DurableStore) -> None:
    async with durable_store.engine() as at:
        await at.open("a", "b")
        durable_store.clock.advance(5)
        await at.open("c", batch_size=3)
        for seed, name in enumerate("aab"):
            durable_store.clock.advance(1)
            await at.step(name, x(1, seed=seed))
        await at.step("c", x(3, 4, seed=9))
        before = await everything(at)
        listed, _ = await at.engine.list_sessions()
        wanted = [facts(info) for info in listed]
        durable_store.kill(away_s=1000)
    async with durable_store.engine() as at:
        assert not at.internals.loaded()
        assert (await at.sessions())[0] == 3
        found, total = await at.engine.list_sessions()
        assert total == 3
        assert not any(info.resident for info in found)
        assert not at.internals.loaded(), "to list sessions loads none"
        for info, want in zip(found, wanted, strict=True):
            assert facts(info)[:-1] == want[:-1]
            one = await at.engine.session_info(info.session_id)
            assert facts(one)[:-1] == want[:-1]
            assert not one.resident
        assert len(at.internals.loaded()) == 3
        assert at.slots().resident == 0
        for session_id, facts_and_state in (await everything(at)).items():
            assert facts_and_state[:-2] == before[session_id][:-2]
            assert facts_and_state[-1] == before[session_id][-1]


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize(
    ("batch_size", "steps", "fields"),
    [
        (1, 0, {}),
        (1, 1, {}),
        (1, 5, {}),
        (1, 5, {"select": Select.LAST}),
        (1, 0, {"select": Select.NONE}),
        (1, 5, {"select": Select.NONE}),
        (3, 0, {}),
        (3, 1, {}),
        (3, 5, {}),
        (3, 5, {"select": Select.LAST}),
    ],
)
async def test_the_last_step_sent_again_gets_its_first_answer(
    durable_store: DurableStore, threads: bool, batch_size: int, steps: int, fields: dict[str, Any]
) -> None:
    value = x(batch_size, *([steps] if steps else []), seed=7)
    again = {"expected": 1, "request_ids": 22, **fields}
    async with durable_store.engine(threads=threads, is_killed=True) as at:
        await at.open("a", batch_size=batch_size)
        await at.step("a", x(batch_size, 2), expected=0, request_ids=11)
        first = await at.step("a", value, **again)
        state = await at.state("a")
    async with durable_store.engine(threads=threads, is_killed=True) as at:
        same_reply(await at.step("a", value, **again), first)
        same_reply(await at.step("a", value, request_ids=22, **fields), first)
        for wrong in ({"expected": 1, "request_ids": 23}, {"expected": 0, "request_ids": 22}):
            error = await fails(at.step("a", value, **fields, **wrong), RevisionConflict)
            assert error.actual == 2
        for expected in ({}, {"expected": 1}, {"expected": 2}):
            await fails(
                at.step("a", value + 1, request_ids=22, **fields, **expected),
                InvalidInput,
                "it belongs to a step with other content",
            )
            with pytest.raises(InvalidInput, match="it belongs to a step; got a reset"):
                await at.submit("a", reset=True, sizes=[batch_size], request_ids=22, **expected).only()
        assert (await at.state("a"))["sum"].tobytes() == state["sum"].tobytes()
        assert (await at.step("a", value, expected=2, request_ids=22, **fields)).revision == 3
    async with durable_store.engine() as at:
        await fails(at.step("a", value, **again), RevisionConflict)


async def test_outputs_of_several_kinds_come_back_as_they_were(durable_store: DurableStore) -> None:
    def inputs(rows: int, steps: int) -> dict[str, Any]:
        token = np.arange(rows * steps, dtype=np.int32).reshape(rows, steps)
        return {"x": x(rows, steps), "token": token, "gain": np.linspace(1, 2, rows, dtype=np.float32)}

    async with durable_store.engine(programs={"rich": RICH}, is_killed=True) as at:
        sizes = [1, 3, 2]
        for name, size in zip("abc", sizes, strict=True):
            await at.open(name, batch_size=size, model="rich")
        fields: dict[str, Any] = {"inputs": inputs(6, 4), "expected": [0] * 3, "request_ids": [1, 2, 3]}
        first = await at.submit(list("abc"), sizes=sizes, **fields).all()
    async with durable_store.engine(programs={"rich": RICH}) as at:
        again = await at.submit(list("abc"), sizes=sizes, **fields).all()
        for found, wanted in zip(again, first, strict=True):
            assert isinstance(found, Answer)
            assert isinstance(wanted, Answer)
            same_reply(found, wanted)
        assert [len(answer.outputs["head"]) for answer in first if isinstance(answer, Answer)] == sizes


@pytest.mark.parametrize(
    "fields",
    [{}, {"state": {"": x(3, seed=5)}}, {"rows": (2, 0)}, {"rows": (1,), "state": {"": x(1, seed=6)}}],
)
async def test_a_reset_is_kept_and_sent_again_is_answered_again(
    durable_store: DurableStore, fields: dict[str, Any]
) -> None:
    again = {"reset": True, "expected": 1, "request_ids": 22, "sizes": [3], **fields}
    async with durable_store.engine() as at:
        await at.open("a", batch_size=3)
        await at.step("a", x(3, 5), expected=0, request_ids=11)
        first = await at.submit("a", **again).only()
        assert first.position == (5 if "rows" in fields else 0)
        before = await everything(at)
        durable_store.kill(away_s=0)
    async with durable_store.engine() as at:
        same_reply(await at.submit("a", **again).only(), first)
        assert (await everything(at)) == before
        with pytest.raises(RevisionConflict):
            await at.submit("a", **{**again, "request_ids": 23}).only()


async def test_a_fork_continues_independently_of_its_source(durable_store: DurableStore) -> None:
    async with durable_store.engine() as at:
        await at.open("a", batch_size=2)
        await at.step("a", x(2, 3), expected=0, request_ids=11)
        durable_store.clock.advance(10)
        await at.engine.fork("a", new_session_id="b")
        await at.step("a", x(2, seed=1))
        before = await everything(at)
        durable_store.kill(away_s=0)
    async with durable_store.engine() as at:
        assert (await everything(at)) == before
        twin = await at.engine.session_info("b")
        assert (twin.revision, twin.position, twin.batch_size) == (1, 3, 2)
        assert twin.created == (await at.engine.session_info("a")).created + 10
        with pytest.raises(RevisionConflict):
            await at.step("b", x(2, 3), expected=0, request_ids=11)  # that was the source's
        assert (await at.step("b", x(2), expected=1)).revision == 2


async def test_each_member_of_a_frame_gets_its_own_answer(durable_store: DurableStore) -> None:
    names = ["loaded", "stored", "closed", "never", "other", "damaged", "away", "unserved"]
    async with durable_store.engine(
        programs={"plain": PLAIN, "other": PLAIN, "gone": PLAIN}, is_killed=True
    ) as at:
        await at.open("loaded", "stored", "closed", "damaged", "away")
        await at.open("other", model="other")
        await at.open("unserved", model="gone")
        await at.engine.close_session("closed")
        await damage(durable_store, "damaged")
    new = {"plain": PLAIN, "other": RICH}
    async with durable_store.engine(programs=new, resident_rows=6) as at:
        await at.step("loaded", x(1))
        wanted = ["Answer", "Answer", "SessionNotFound", "SessionNotFound", "ModelMismatch", "StateCorrupt"]
        wanted += ["Answer", "ModelNotFound"]
        for expected in ([1] + [0] * 7, [2] + [1] * 7):
            answers = await at.submit(names, x(8), expected=expected, request_ids=list(range(1, 9))).all()
            assert kinds(answers) == wanted
            for name, answer in zip(names, answers, strict=True):
                assert isinstance(answer, Answer) or name in str(answer)
        again = await at.submit(names, x(8), expected=[1] + [0] * 7, request_ids=list(range(1, 9))).all()
        assert kinds(again)[0] == "RevisionConflict"


async def test_a_thousand_sessions_come_back_by_one_frame(durable_store: DurableStore) -> None:
    model = ModelOfSessions(0)
    async with durable_store.engine(
        resident_rows=2000, max_batch_rows=300, threads=True, is_killed=True
    ) as at:
        ids = list((await at.engine.open_sessions("plain", count=1000)).session_ids)
        value = x(1000, 2)
        await at.submit(ids, value).all()
        for i, session_id in enumerate(ids):
            model.open(session_id, 1, None, 0)
            model.step(session_id, value[i : i + 1], "ALL", None, 0, 0)
    async with durable_store.engine(resident_rows=2000, max_batch_rows=300, threads=True) as at:
        value = x(1000, seed=1)
        answers = await at.submit(ids, value, expected=[1] * 1000, request_ids=range(1, 1001)).all()
        for i, (session_id, answer) in enumerate(zip(ids, answers, strict=True)):
            wanted = model.step(session_id, value[i : i + 1], "ALL", 1, i + 1, 0)
            assert isinstance(answer, Answer)
            assert isinstance(wanted, Reply)
            assert answer.outputs["y"].tobytes() == wanted.outputs["y"].tobytes()


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
    async with durable_store.engine(is_killed=True) as at:
        await at.engine.open_session("plain", session_id="a", request_id=7, must_be_new=True)
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
        await at.open_and_step("a", x(1, 3))
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
    async with durable_store.engine(is_killed=True) as at:
        await at.open("a", "b", "c")
        assert await at.engine.close_session("a", request_id=7) is False
        assert await at.engine.close_session("b") is False
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
    async with durable_store.engine(is_killed=True) as at:
        await at.open("a", "b", "group 1", "group 2")
        uid = (await at.engine.session_info("b")).uid
        await at.engine.close_session("a", request_id=7)
        await at.engine.close_session("b")
        await at.engine.close_sessions(["group 1", "group 2"], request_id=8)
    async with durable_store.engine(is_killed=True) as at:
        await at.open("a", "b", "group 2")
        await at.step("a", x(1))
    for _ in range(2):
        async with durable_store.engine(is_killed=True) as at:
            assert await at.engine.close_session("a", request_id=7) is True
            await fails(
                at.engine.close_session("b", request_id=9, uid=uid),
                SessionNotFound,
                "another one has its id now",
            )
            assert await at.engine.close_sessions(["group 1", "group 2"], request_id=8) == 2
            assert await count(at) == 3
            await at.step("a", x(1))


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


async def test_a_closed_id_can_be_opened_again(durable_store: DurableStore) -> None:
    async with durable_store.engine(is_killed=True) as at:
        await at.engine.open_session("plain", session_id="a", request_id=7)
        await at.step("a", x(1))
        await at.engine.close_session("a", request_id=8)
    async with durable_store.engine(is_killed=True) as at:
        opened = await at.engine.open_session("plain", session_id="a", request_id=9)
        assert not opened.resumed
        assert (opened.session.revision, opened.session.position) == (2, 0)
    async with durable_store.engine() as at:
        assert (await at.engine.session_info("a")).revision == 2
        assert await count(at) == 1
        assert (await durable_store.tombstone("a")) is None
