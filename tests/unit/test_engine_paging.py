"""More sessions than rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from stepwell_server.engine.state.arena import Arena
from stepwell_server.errors import Overloaded, SessionLost
from stepwell_server.program import StateSpec
from stepwell_server.store.base import Batch
from stepwell_server.store.memory import MemoryStore
from support.checks.model_of_sessions import ModelOfSessions, Reply
from support.engine.fake_executor import RICH
from support.engine.harness import Harness, fails, kinds, running, x
from support.stores.durable import begun
from support.stores.fake_shared_store import RemoteStore


async def resident(at: Harness, names: str) -> str:
    return "".join([name for name in names if (await at.engine.session_info(name)).resident])


async def away(at: Harness) -> int:
    """How many sessions are only in the store."""
    infos, _ = await at.engine.list_sessions()
    return sum(not info.resident for info in infos)


def test_packed_rows_come_back_bit_for_bit_whatever_their_types() -> None:
    rng = np.random.default_rng(1)
    program = dataclasses.replace(
        RICH,
        state=(*RICH.state, StateSpec("flag", (3,), "bool"), StateSpec("half", (2, 2), "float16")),
        initial=(*RICH.initial, np.zeros(3, bool), np.zeros((2, 2), np.float16)),
    )
    arena, rows = Arena(program, 8), np.array([6, 1, 3], np.intp)
    for array in (*arena.states, *arena.outputs):
        array[...] = rng.integers(0, 2, array.shape)
        if array.dtype.kind == "f":
            array[...] = np.where(rng.random(array.shape) < 0.3, np.nan, -0.0)
    before = [array[rows].tobytes() for array in (*arena.states, *arena.outputs)]
    packed = arena.pack(rows)
    assert packed.shape == (3, program.state_row_bytes + 4 * (2 + 3))
    other = Arena(program, 4)
    other.unpack(np.array([2, 0, 3], np.intp), np.frombuffer(packed.tobytes(), np.uint8).reshape(3, -1))
    after = [array[[2, 0, 3]].tobytes() for array in (*other.states, *other.outputs)]
    assert after == before
    assert not any(array[1].any() for array in other.states), "no other row is touched"


def test_the_memory_store_replaces_finds_and_forgets() -> None:
    store = MemoryStore()
    store.commit(Batch(puts=[("a", b"1"), ("b", b"2")]))
    store.commit(Batch(puts=[("a", b"3")]))
    assert store.get("a") == b"3"
    store.commit(Batch(deletes=["a", "never there"]))
    assert store.get("a") is None
    assert store.count() == 1


@pytest.mark.engine(resident_rows=3)
async def test_the_least_recently_used_leaves_and_comes_back_as_it_was(at: Harness) -> None:
    model = ModelOfSessions(0)
    for name in "abc":
        at.clock.advance(1)
        await at.open(name)
        model.open(name, 1, None, 0)
    for name in "ab":
        at.clock.advance(1)
        await at.step(name, x(1))
        model.step(name, x(1), "ALL", None, 0, 0)
    await at.open("d")
    assert await resident(at, "abcd") == "abd"
    assert (await away(at)) == 1
    at.clock.advance(1)
    await at.state("c")
    assert await resident(at, "abcd") == "bcd", "reading is a use too"
    answer = await at.step("a", x(1, 2, seed=1))
    wanted = model.step("a", x(1, 2, seed=1), "ALL", None, 0, 0)
    assert isinstance(wanted, Reply)
    assert answer.outputs["y"].tobytes() == wanted.outputs["y"].tobytes()
    assert (answer.revision, answer.position) == (2, 3)
    for name in "abc":
        assert (await at.state(name))["sum"].tobytes() == model.sessions[name].state.tobytes()


@pytest.mark.parametrize("threads", [False, True])
async def test_sessions_of_several_rows_share_few_rows(threads: bool) -> None:
    rng = np.random.default_rng(3)
    async with running(resident_rows=7, threads=threads, max_batch_rows=5) as at:
        model, sizes = ModelOfSessions(0), dict(zip("abcdefgh", [1, 3, 2, 4, 1, 2, 7, 3], strict=True))
        for name, size in sizes.items():
            await at.open(name, batch_size=size)
            model.open(name, size, None, 0)
        for i in range(120):
            name = "abcdefgh"[rng.integers(8)]
            at.clock.advance(1)
            value = x(sizes[name], *([int(rng.integers(1, 4))] if rng.random() < 0.5 else []), seed=i)
            answer = await at.step(name, value)
            wanted = model.step(name, value, "ALL", None, 0, 0)
            assert isinstance(wanted, Reply)
            assert answer.outputs["y"].tobytes() == wanted.outputs["y"].tobytes()
            assert (answer.revision, answer.position) == (wanted.revision, wanted.position)
        for name, session in model.sessions.items():
            assert (await at.state(name))["sum"].tobytes() == session.state.tobytes()


@pytest.mark.engine(resident_rows=2, threads=True)
async def test_a_session_with_something_under_way_keeps_its_rows(at: Harness) -> None:
    for name in "zabc":
        at.clock.advance(1)
        await at.open(name)
    assert await resident(at, "zabc") == "bc"
    busy = await at.begin_pass(["b", "c"], x(2))
    for refused in (at.state("z"), at.open("d"), at.engine.fork("z")):
        error = await fails(refused, Overloaded, "must leave 1 free of resident_rows 2 of model 'plain'")
        assert error.retry_after_s > 0
    waiting = at.submit("a", x(1))
    at.hooks.open_gate()
    assert kinds(await busy.all()) == ["Answer", "Answer"]
    assert (await waiting.only()).revision == 1


@pytest.mark.stores("memory", "async", "sync")
@pytest.mark.engine(resident_rows=3)
async def test_a_session_whose_record_is_gone_is_lost_and_nobody_else_is(at: Harness) -> None:
    await at.open("a", "b", "c")
    await at.open("d", batch_size=3)
    at.store.commit(Batch(deletes=["b"]))
    answers = await at.submit(["a", "b", "c"], x(3)).all()
    assert kinds(answers) == ["Answer", "SessionLost", "Answer"]
    await fails(at.state("b"), SessionLost, "session 'b' was paged out and is not in the store")
    assert await at.engine.close_session("b") is False


@pytest.mark.engine(resident_rows=1, max_session_idle_s=10)
async def test_closing_and_expiring_reach_sessions_that_are_away(at: Harness) -> None:
    await at.open("a", "b", "c")
    assert (await away(at)) == 2
    await at.engine.close_session("a")
    at.clock.advance(11)
    await at.internals.expire_idle()
    assert (await away(at)) == 0


@pytest.mark.engine(resident_rows=2)
async def test_a_fork_of_a_session_that_is_away_brings_it_back(at: Harness) -> None:
    await at.open("a")
    await at.step("a", x(1, 3))
    before = (await at.state("a"))["sum"].tobytes()
    await at.open("b", "c")
    await at.engine.fork("a", new_session_id="d")
    for name in "ad":
        assert (await at.state(name))["sum"].tobytes() == before


async def test_rows_of_the_first_sessions_are_theirs_while_these_are_made() -> None:
    """Before any session is there, rows that were taken for some are nobody's by the table; they are not free."""
    store = RemoteStore(MemoryStore())
    async with running(store=store, resident_rows=1) as at:
        store.commits_held = True
        first = await begun(at.open("a"))
        await store.until("commit")
        await fails(at.open("b"), Overloaded)
        store.let_go()
        await first
        assert await resident(at, "a") == "a"
