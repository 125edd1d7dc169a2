"""Two servers on one store: what they remember of sessions is bounded, and what they list and count is the store's."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import SessionFilter
from stepwell_server.errors import SessionNotFound
from support.engine.harness import Harness, fails, kinds, x
from support.engine.two_engines import make_resident_on_both, two_in_time
from support.stores.kinds import SHARED

pytestmark = SHARED


async def listed(at: Harness, **query: Any) -> list[tuple[str, int]]:
    return [(info.session_id, info.revision) for info in (await at.engine.list_sessions(**query))[0]]


async def test_a_table_that_is_too_large_forgets_what_is_paged_out_and_long_unused() -> None:
    async with two_in_time(resident_rows=8) as (first, second, times):
        names = [f"s{number:03}" for number in range(100)]
        for at in range(0, 100, 4):
            times.advance(1.0)
            await first.open(*names[at : at + 4])
            await first.submit(names[at : at + 4], x(4)).all()
        first.internals.sweep.max_paged_out = 40
        assert await first.internals.sweep.trim() > 52
        left = first.internals.loaded()
        assert left == names[-len(left) :], "the last used ones stay"
        assert len(left) <= 40 + 8
        assert await first.internals.sweep.trim() == 0
        assert [name for name, _ in await listed(first)] == names
        answers = await first.submit(names[::-4], x(25), expected=[1] * 25).all()
        assert kinds(answers) == ["Answer"] * 25
        assert (await second.step(names[3], x(1), expected=2)).revision == 3


async def test_what_has_something_under_way_stays_in_the_table() -> None:
    async with two_in_time(resident_rows=2, threads=True) as (first, _, _):
        await first.open("a", "b", "c", "d")
        answers = await first.begin_pass("a", x(1), sizes=[1])
        waiting = first.submit("a", x(1), sizes=[1])
        first.internals.sweep.max_paged_out = 0
        await first.internals.sweep.trim()
        assert "a" in first.internals.loaded()
        first.hooks.open_gate()
        assert (await answers.only()).revision == 1
        assert (await waiting.only()).revision == 2


@pytest.mark.parametrize("wanted", [{}, {"idle_longer_s": -1.0}])
async def test_lists_say_what_the_store_has(wanted: dict[str, Any]) -> None:
    async with two_in_time() as (first, second, times):
        await make_resident_on_both(first, second, "a", "b")
        assert await listed(second, **wanted) == [("a", 1), ("b", 1)]
        times.advance(5.0)
        await first.step("a", x(1))
        times.advance(30.0)
        await first.open("c")
        assert await listed(second, **wanted) == [("a", 2), ("b", 1), ("c", 0)]
        await first.engine.close_session("b")
        assert await listed(second, **wanted) == [("a", 2), ("c", 0)]
        infos = (await second.engine.list_sessions(**wanted))[0]
        idle = {info.session_id: times.second.now() - info.last_used for info in infos}
        assert idle == {"a": pytest.approx(30.0), "c": pytest.approx(0.0)}


async def test_a_session_that_is_over_is_not_listed() -> None:
    async with two_in_time(max_session_idle_s=100.0) as (first, second, times):
        await make_resident_on_both(first, second, "a")
        times.advance(101.0)
        await first.open("b")
        for at in (first, second):
            assert await listed(at) == [("b", 0)]


async def test_models_say_how_many_sessions_there_are_on_all_servers() -> None:
    async with two_in_time() as (first, second, times):
        await first.open("a", "b")
        await second.open("c")
        for at in (first, second):
            await at.engine.refresh_counts()
            assert at.engine.models()[0].sessions == at.engine.stats()[0].sessions == 3
        before = len(first.store.asked("count"))
        for _ in range(5):
            await first.engine.refresh_counts()
        assert len(first.store.asked("count")) == before, "it was just asked"
        await second.open("d")
        times.advance(1.0)
        await first.engine.refresh_counts()
        assert first.engine.models()[0].sessions == 4


async def test_what_is_closed_for_being_idle_was_used_on_no_server() -> None:
    async with two_in_time() as (first, second, times):
        await make_resident_on_both(first, second, "a", "b", "c")
        times.advance(60.0)
        await second.step("a", x(1))
        await second.state("b")
        for _ in range(20):
            await asyncio.sleep(0)
        times.advance(10.0)
        closed, _ = await first.engine.close_matching(SessionFilter(idle_longer_s=50.0), limit=10)
        assert closed == 1
        assert await listed(second) == [("a", 2), ("b", 1)]
        await fails(second.state("c"), SessionNotFound)


async def test_a_session_that_is_used_while_it_is_closed_for_being_idle_stays() -> None:
    async with two_in_time() as (first, second, times):
        await make_resident_on_both(first, second, "a", "b")
        times.advance(60.0)
        first.store.commits_held = True
        closing = asyncio.create_task(
            first.engine.close_matching(SessionFilter(idle_longer_s=50.0), limit=10)
        )
        await first.store.until("commit", len(first.store.asked("commit")) + 1)
        assert (await second.step("a", x(1))).revision == 2
        first.store.let_go()
        closed, _ = await closing
        assert closed == 1
        for at in (first, second):
            assert await listed(at) == [("a", 2)]
        assert np.isfinite((await first.state("a"))["sum"]).all()
