"""Forgetting `await`: the error says so, and Python's warning names the call that the caller has written."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import stepwell
from stepwell._core.core import Core
from stepwell._core.group_core import GroupCore
from stepwell._core.group_tracker import GroupTracker
from stepwell._core.tracker import SessionTracker
from stepwell.aio_group import AsyncSessionGroup
from stepwell.aio_session import AsyncSession
from stepwell.config import ClientConfig
from stepwell.v1 import sessions_pb2

_CALLS: dict[str, Callable[[Any], Any]] = {
    "AsyncClient.open_session": lambda client: client.open_session("m"),
    "AsyncClient.open_sessions": lambda client: client.open_sessions("m", 2),
    "AsyncSession.fork": lambda client: _session(client).fork(),
    "AsyncSessionGroup.fork": lambda client: _group(client).fork(),
}


def _session(client: Any) -> AsyncSession:
    return AsyncSession(
        client._driver, SessionTracker(sessions_pb2.Session(session_id="a"), resumed=False), owned=False
    )


def _group(client: Any) -> AsyncSessionGroup:
    core = GroupCore(Core(ClientConfig("127.0.0.1:1")), GroupTracker("m", "f", 1, ["a", "b"]))
    return AsyncSessionGroup(client._driver, core, owned=False)


@pytest.mark.parametrize("name", _CALLS)
async def test_what_was_not_awaited_says_so(name: str) -> None:
    async with stepwell.aio.connect("127.0.0.1:1") as client:
        made = _CALLS[name](client)
        rule = rf"^{name}\(\.\.\.\) is not awaited yet: await it first, or use `async with`; got "
        with pytest.raises(AttributeError, match=rule + r"\.step$"):
            _ = made.step
        with pytest.raises(TypeError, match=rule + r"\[0\]$"):
            made[0]
        with pytest.raises(TypeError, match=rule + "`with`$"), made:
            pass
        assert asyncio.iscoroutine(made)
        made.close()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _CALLS[name](client)
            gc.collect()
        assert [str(each.message) for each in caught] == [f"coroutine '{name}' was never awaited"]


async def test_a_list_that_was_not_awaited_says_so() -> None:
    async with stepwell.aio.connect("127.0.0.1:1") as client:
        found: Any = client.sessions()
        rule = (
            r"^AsyncClient\.sessions\(\.\.\.\) is not awaited yet: await it first, or use `async for`; got "
        )
        with pytest.raises(TypeError, match=rule + r"\[0\]$"):
            found[0]
        with pytest.raises(TypeError, match=rule):
            list(found)
        with pytest.raises(AttributeError, match=rule + r"\.count$"):
            _ = found.count
