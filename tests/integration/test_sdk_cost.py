"""What a step costs in the SDK: the number of Python functions that it calls, and of objects that it makes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell._transport.retry import Deadline
from support.sdk.scripted_server import MODEL, ScriptedServer

# Finalizers of earlier tests' clients are functions of the SDK, too.
pytestmark = pytest.mark.usefixtures("without_collector")
PACKAGE = str(Path(stepwell.__file__).parent)
X = np.ones((1, 2), np.float32)
# A step makes three or four calls fewer; each resumed generator or coroutine counts as a call.
MAX_CALLS = 48
MAX_AWAITED_CALLS = 68
# Of each of many steps that are awaited together, and of a step of a group.
MAX_GATHERED_CALLS = 17
MAX_GROUP_CALLS = 126
MANY = 100
# Objects that Python's garbage collector visits for a step that waits for its answer, beyond those of a task that waits
# for a future.
MAX_GATHERED_OBJECTS = 0


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


async def test_objects_of_steps_that_are_awaited_together() -> None:
    event = asyncio.Event()
    futures = await _visited(lambda: [event.wait() for _ in range(MANY)], event.set)
    with ScriptedServer() as server:
        async with stepwell.aio.connect(server.address) as client:
            sessions = [await client.open_session(MODEL) for _ in range(MANY)]
            await asyncio.gather(*[session.step(X) for session in sessions])
            steps = await _visited(lambda: [session.step(X) for session in sessions])
    assert steps.total() - futures.total() <= MAX_GATHERED_OBJECTS, (steps, futures)


async def _visited(
    coroutines: Callable[[], list[Coroutine[Any, Any, Any]]], end: Callable[[], None] = lambda: None
) -> collections.Counter[type]:
    """Objects by type that the garbage collector visits for each of these coroutines, once their tasks wait.

    Each type's number is rounded, as threads of the server and of earlier tests make and free some objects meanwhile.
    `end` ends the wait.
    """
    await asyncio.sleep(0)  # frees the tasks before
    gc.collect()
    count = collections.Counter(map(type, gc.get_objects()))
    tasks = [asyncio.create_task(each) for each in coroutines()]
    await asyncio.sleep(0)
    gc.collect()
    after = collections.Counter(map(type, gc.get_objects()))
    assert not any(task.done() for task in tasks)
    end()
    await asyncio.gather(*tasks)
    del after[Deadline]  # steps of the same millisecond share one, and a slow machine takes more of those
    return collections.Counter({each: round((after[each] - count[each]) / MANY) for each in after})


def test_calls_of_a_step_of_a_group() -> None:
    calls: collections.Counter[str] = collections.Counter()
    with ScriptedServer() as server, stepwell.connect(server.address) as client:
        group = client.open_sessions(MODEL, MANY)
        x = np.ones((MANY, 2), np.float32)
        group.step(x)
        with counted(calls):
            group.step(x)
    assert 50 < calls.total() <= MAX_GROUP_CALLS, listed(calls)
