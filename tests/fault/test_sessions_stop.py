"""SIGTERM under load: what is acknowledged stays, and callers are told that the server is away."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from support.load.driver import MODEL
from support.load.driver_process import DriverProcess
from support.sdk.client_kinds import SHELLS, connect
from support.servers.fault_servers import local, verdict

X = np.ones((1, 3), np.float32)
AWAY = (stepwell.UnavailableError, stepwell.DeadlineExceededError)


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
async def test_callers_are_told_and_do_not_hang(shell: str) -> None:
    """Each of many callers steps until the server is away: then it has an answer or this error, and soon."""
    with local(None) as server:
        async with connect(shell, server.address) as client:
            sessions = [await client.open_session(MODEL) for _ in range(8)]
            group = await client.open_sessions(MODEL, 8)
            begun, is_gone = asyncio.Event(), False

            async def caller(step: Callable[[], Awaitable[Any]]) -> stepwell.StepwellError:
                while True:
                    try:
                        await step()
                    except stepwell.DeadlineExceededError as error:
                        if is_gone:
                            return error  # before that the machine was busy
                    except stepwell.StepwellError as error:
                        return error
                    else:
                        begun.set()

            steps = [functools.partial(session.step, X, timeout_s=1.0) for session in sessions]
            steps.append(functools.partial(group.step, np.ones((8, 3), np.float32), timeout_s=1.0))
            callers = [asyncio.ensure_future(caller(step)) for step in steps]
            await begun.wait()
            assert await asyncio.to_thread(server.stop) == 0
            is_gone = True
            found = await asyncio.wait_for(asyncio.gather(*callers), 100)
            assert all(isinstance(error, AWAY) for error in found), found
            assert any(isinstance(error, stepwell.UnavailableError) for error in found), found


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["sync", "async"])
def test_what_was_acknowledged_stays(tmp_path: Path, durability: str) -> None:
    history = tmp_path / "history"
    with (
        local(tmp_path / "data", "--durability", durability) as server,
        DriverProcess(server.address, history, seed=4) as driver,
    ):
        for _ in range(3):
            driver.wait_acknowledged(150)
            assert server.stop() == 0
            server.restart()
        driver.wait_acknowledged(150)
        driver.stop()
    report = verdict(history).require_clean()
    assert report.acknowledged >= 600
