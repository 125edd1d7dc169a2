"""More sessions than rows with a store that has every change: to leave the arena costs nothing, to come back a read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from support.durable import Disk, same_reply
from support.engine import kinds, x
from support.model_of_sessions import ModelOfSessions, Reply

pytestmark = pytest.mark.stores("async", "sync")


async def test_to_leave_and_to_come_back_writes_nothing(disk: Disk) -> None:
    ids = [f"s{i}" for i in range(12)]
    async with disk.engine(resident_rows=4) as at:
        await at.engine.open_sessions("plain", session_ids=ids)
        assert len(disk.store.tried) == 1
        for i, session_id in enumerate(ids):
            at.clock.advance(1)
            await at.step(session_id, x(1, seed=i))
        assert len(disk.store.tried) == 13, "one for each step"
        for session_id in ids:
            at.clock.advance(1)
            await at.state(session_id)
        assert len(disk.store.tried) == 13
        assert at.slots().resident <= 4
        assert disk.store.count() == 12


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize(
    ("size", "steps", "select"),
    [(1, 5, Select.ALL), (3, 2, Select.ALL), (1, 1, Select.ALL), (3, 0, Select.ALL), (2, 5, Select.LAST)],
)
async def test_a_reply_comes_back_with_its_session(
    disk: Disk, size: int, steps: int, select: Select, killed: bool
) -> None:
    value = x(size, *([steps] if steps else []))
    again: dict[str, Any] = {"expected": 0, "request_ids": 7, "select": select}
    async with disk.engine(resident_rows=4) as at:
        await at.open("a", batch_size=size)
        first = await at.step("a", value, **again)
        at.clock.advance(1)
        await at.open("b", batch_size=4)
        assert not (await at.engine.session_info("a")).resident
        assert not at.inside.model("plain").replies.series
        if killed:
            disk.kill()
        else:
            for _ in range(2):
                same_reply(await at.step("a", value, **again), first)
                at.clock.advance(1)
                await at.state("b")
                assert not (await at.engine.session_info("a")).resident
    if killed:
        async with disk.engine(resident_rows=4) as at:
            same_reply(await at.step("a", value, **again), first)


async def test_a_fork_of_a_session_that_is_away_is_kept(disk: Disk) -> None:
    async with disk.engine(resident_rows=2) as at:
        await at.open("a")
        await at.step("a", x(1, 3))
        at.clock.advance(1)
        await at.open("b", "c")
        assert not (await at.engine.session_info("a")).resident
        await at.engine.fork("a", new_session_id="d")
        state = await at.state("a")
        disk.kill()
    async with disk.engine(resident_rows=2) as at:
        for name in "da":
            assert (await at.state(name))["sum"].tobytes() == state["sum"].tobytes()
            assert (await at.engine.session_info(name)).position == 3


@pytest.mark.parametrize("threads", [False, True])
async def test_many_more_sessions_than_rows_are_what_they_should_be(disk: Disk, threads: bool) -> None:
    rng = np.random.default_rng(5)
    model, request = ModelOfSessions(0), 0
    sizes = {f"s{i:02}": int(rng.integers(1, 4)) for i in range(60)}
    for run in range(3):
        async with disk.engine(resident_rows=9, max_batch_rows=5, threads=threads) as at:
            for name, size in sizes.items():
                opened = await at.engine.open_session("plain", session_id=name, batch_size=size)
                assert opened.resumed == (run > 0)
                model.open(name, size, None, 0)
            for turn in range(120):
                at.clock.advance(1)
                request += 1
                name = f"s{rng.integers(60):02}"
                revision = model.sessions[name].revision
                fields: dict[str, Any] = {"expected": revision, "request_ids": request}
                if rng.random() < 0.2:
                    found = await at.submit(name, reset=True, sizes=[sizes[name]], **fields).only()
                    wanted = model.reset(name, None, None, revision, request, 0)
                else:
                    steps = int(rng.integers(0, 4))
                    value = x(sizes[name], *([steps] if steps else []), seed=1000 * run + turn)
                    found = await at.step(name, value, **fields)
                    wanted = model.step(name, value, "ALL", revision, request, 0)
                assert isinstance(wanted, Reply)
                assert (found.revision, found.position) == (wanted.revision, wanted.position)
                for output, array in wanted.outputs.items():
                    assert found.outputs[output].tobytes() == array.tobytes()
            disk.kill()
    async with disk.engine(resident_rows=9) as at:
        for name, session in model.sessions.items():
            assert (await at.state(name))["sum"].tobytes() == session.state.tobytes()


async def test_a_frame_of_more_sessions_than_rows_goes_through_in_portions(disk: Disk) -> None:
    ids = [f"s{i}" for i in range(10)]
    async with disk.engine() as at:
        await at.engine.open_sessions("plain", session_ids=ids)
        disk.kill()
    async with disk.engine(resident_rows=4, threads=True) as at:
        answers = await at.submit(ids, x(10), expected=[0] * 10).all()
        assert kinds(answers) == ["Answer"] * 10
        disk.kill()
    async with disk.engine(resident_rows=4) as at:
        assert [(await at.engine.session_info(session_id)).revision for session_id in ids] == [1] * 10
