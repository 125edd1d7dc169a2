"""What a step costs in the SDK: the number of Python functions that it calls."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np

import stepwell
from support.sdk.scripted_server import MODEL, ScriptedServer

PACKAGE = str(Path(stepwell.__file__).parent)
X = np.ones((1, 2), np.float32)
# A step makes three or four calls fewer; each resumed generator or coroutine counts as a call.
MAX_CALLS = 48
MAX_AWAITED_CALLS = 76
# Of each of many steps that are awaited together, and of a step of a group.
MAX_GATHERED_CALLS = 20
MAX_GROUP_CALLS = 126
MANY = 100


@contextlib.contextmanager
def counted(calls: collections.Counter[str]) -> Iterator[None]:
    """Counts the calls of functions of the SDK in this thread."""

    def count(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def listed(calls: collections.Counter[str]) -> str:
    names = [f"{count} {name}" for name, count in sorted(calls.items())]
    return f"{calls.total()} calls: {', '.join(names)}"


def test_calls_of_a_step() -> None:
    calls: collections.Counter[str] = collections.Counter()
    with ScriptedServer() as server, stepwell.connect(server.address) as client:
        session = client.open_session(MODEL)
        session.step(X)
        with counted(calls):
            session.step(X)
    assert 10 < calls.total() <= MAX_CALLS, listed(calls)


async def test_calls_of_an_awaited_step() -> None:
    calls: collections.Counter[str] = collections.Counter()
    with ScriptedServer() as server:
        async with stepwell.aio.connect(server.address) as client:
            session = await client.open_session(MODEL)
            await session.step(X)
            with counted(calls):
                await session.step(X)
    assert 10 < calls.total() <= MAX_AWAITED_CALLS, listed(calls)


async def test_calls_of_steps_that_are_awaited_together() -> None:
    calls: collections.Counter[str] = collections.Counter()
    with ScriptedServer() as server:
        async with stepwell.aio.connect(server.address) as client:
            sessions = [await client.open_session(MODEL) for _ in range(MANY)]
            await asyncio.gather(*[session.step(X) for session in sessions])
            with counted(calls):
                await asyncio.gather(*[session.step(X) for session in sessions])
    assert 10 * MANY < calls.total() <= MAX_GATHERED_CALLS * MANY, listed(calls)


def test_calls_of_a_step_of_a_group() -> None:
    calls: collections.Counter[str] = collections.Counter()
    with ScriptedServer() as server, stepwell.connect(server.address) as client:
        group = client.open_sessions(MODEL, MANY)
        x = np.ones((MANY, 2), np.float32)
        group.step(x)
        with counted(calls):
            group.step(x)
    assert 50 < calls.total() <= MAX_GROUP_CALLS, listed(calls)
