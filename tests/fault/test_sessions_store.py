"""A store whose writes fail or do not come back: callers are told, reading goes on, and all is right afterwards."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from support.load.driver import FEATURES, MODEL
from support.load.driver_process import DriverProcess
from support.servers.fault_servers import FaultyServer, verdict

X = np.ones((1, FEATURES), np.float32)
# The last of many attempts may be cut short by the time limit.
GAVE_UP = (stepwell.UnavailableError, stepwell.DeadlineExceededError)
DURABILITIES = ["sync", "async"]


def refused(call: Callable[..., Any]) -> Any:
    """A change that the store cannot keep. It is tried for as long as it takes to be told so: longer if others compute."""
    ended: Any = None
    for limit_s in (0.3, 3.0, 30.0):
        with pytest.raises(GAVE_UP) as caught:
            call(timeout_s=limit_s)
        ended = caught.value
        if _is_told(ended):
            break
    assert _is_told(ended)
    return ended


def _is_told(ended: Any) -> bool:
    """Whether it is told of each session, and no attempt is left that may be made when the store is well again."""
    failures = getattr(ended, "failures", {})
    return all("No space left" in str(each) for each in (failures.values() or [ended]))


@pytest.mark.slow
@pytest.mark.parametrize("durability", DURABILITIES)
def test_writes_that_fail(tmp_path: Path, durability: str) -> None:
    """Nothing is acknowledged while they do, nothing is half done, and then it goes on as if nothing had been."""
    history = tmp_path / "history"
    with (
        FaultyServer(tmp_path / "data", "--durability", durability) as server,
        stepwell.connect(server.address) as client,
        DriverProcess(server.address, history, seed=51, pause_s=0.01) as driver,
    ):
        session = client.open_session(MODEL, session_id="mine")
        first = session.step(X)
        for _ in range(2):
            driver.wait_acknowledged(100)
            server.tell("fail")
            refused(functools.partial(session.step, X))
            refused(functools.partial(client.open_session, MODEL, session_id="another"))
            assert session.get_state().revision == client.session_info("mine").revision == session.revision
            server.tell("well")
            session.step(X)
        server.kill()
        server.restart()
        driver.wait_acknowledged(50)
        driver.stop()
        assert (session.get_state().revision, session.get_state().position) == (3, 3)
        session.reset_states()
        assert session.step(X).tobytes() == first.tobytes()
    verdict(history).require_clean()


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_change_that_was_refused_is_made_once(tmp_path: Path, durability: str) -> None:
    """That no change was made is settled: another one may be made in its place."""
    with (
        FaultyServer(tmp_path / "data", "--durability", durability) as server,
        stepwell.connect(server.address) as client,
    ):
        session, group = client.open_session(MODEL), client.open_sessions(MODEL, 16)
        server.tell("fail")
        refused(functools.partial(session.step, X))
        ended = refused(functools.partial(group.step, np.ones((16, FEATURES))))
        assert len(ended.failures) == 16
        server.tell("well")
        session.reset_states()
        group.reset_states()
        assert (session.revision, session.position) == (1, 0)
        assert group.revisions.tolist() == [1] * 16
        again = group.step(np.ones((16, FEATURES)))
        assert np.array_equal(again, np.repeat(session.step(X), 16, axis=0))


async def test_writes_that_do_not_come_back(tmp_path: Path) -> None:
    """Time limits hold, reading and running without a session go on; then every change is made once."""
    with FaultyServer(tmp_path / "data", "--durability", "sync") as server:
        async with stepwell.aio.connect(server.address) as client:
            sessions = [await client.open_session(MODEL) for _ in range(8)]
            idle = await client.open_session(MODEL)
            before = [await session.step(X) for session in sessions]
            await asyncio.to_thread(server.tell, "stall")
            waiting = [asyncio.ensure_future(session.step(X)) for session in sessions[:4]]
            await asyncio.to_thread(server.wait_for, "stalled")
            assert (await idle.get_state(timeout_s=60.0)).revision == 0
            assert (await client.session_info(idle.id, timeout_s=60.0)).revision == 0
            y, _ = await client.predict(MODEL, X, timeout_s=60.0)
            assert np.array_equal(y, before[0])
            for session in sessions[4:]:
                with pytest.raises(stepwell.DeadlineExceededError):
                    await session.step(X, timeout_s=0.1)
            with pytest.raises(stepwell.DeadlineExceededError):
                await client.open_session(MODEL, timeout_s=0.1)
            assert not any(step.done() for step in waiting)
            await asyncio.to_thread(server.tell, "well")
            answers = [await step for step in waiting]
            answers += [await session.step(X) for session in sessions[4:]]
            assert len({y.tobytes() for y in answers}) == 1
            for session in sessions:
                state = await session.get_state()
                assert (state.revision, state.position, session.revision) == (2, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("durability", DURABILITIES)
def test_stalls_under_load(tmp_path: Path, durability: str) -> None:
    """And a kill in the middle of one: what waited for the store was not acknowledged."""
    history = tmp_path / "history"
    with (
        FaultyServer(tmp_path / "data", "--durability", durability) as server,
        DriverProcess(server.address, history, seed=52, pause_s=0.005) as driver,
    ):
        for killed in (False, True, False, True):
            driver.wait_acknowledged(80)
            server.tell("stall")
            server.wait_for("stalled")
            if killed:
                server.kill()
                server.restart()
            else:
                server.tell("well")
        driver.wait_acknowledged(80)
        driver.stop()
    verdict(history).require_clean()


@pytest.mark.slow
def test_stopping_while_the_store_does_not_come_back(tmp_path: Path) -> None:
    """The server ends all the same, in its time, and nothing that was acknowledged is lost."""
    history = tmp_path / "history"
    options = ("--durability", "sync", "--drain-timeout-s", "0.5")
    with (
        FaultyServer(tmp_path / "data", *options) as server,
        DriverProcess(server.address, history, seed=53) as driver,
    ):
        driver.wait_acknowledged(100)
        server.tell("stall")
        server.wait_for("stalled")
        assert server.stop() >= 0, "it was not killed for taking too long"
        server.restart()
        driver.wait_acknowledged(100)
        driver.stop()
    verdict(history).require_clean()
