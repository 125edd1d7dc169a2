"""Coroutines that begin at once, without a task, and need one only if they have to wait for something.

The engine is written once, for stores that answer now or later. Where the answer is there, `start` returns what came of it,
and nothing else has run meanwhile; so do the eager tasks of Python 3.12 (asyncio.eager_task_factory).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Rest(Generic[T]):
    """What is left of a coroutine that waits for something. To be awaited once, on the same event loop."""

    __slots__ = ("_waits_for", "_work")

    def __init__(self, work: Coroutine[Any, Any, T], waits_for: object) -> None:
        self._work = work
        self._waits_for = waits_for

    def close(self) -> None:
        """Give it up: it ends where it waits. What it waits for is cancelled; an error of that is nobody's."""
        self._work.close()
        if isinstance(self._waits_for, asyncio.Future):
            self._waits_for.add_done_callback(_ignore)
            self._waits_for.cancel()

    def __await__(self) -> Generator[Any, Any, T]:
        waits_for = self._waits_for
        try:
            while True:
                try:
                    came = yield waits_for
                except BaseException as error:
                    waits_for = self._work.throw(error)
                else:
                    waits_for = self._work.send(came)
        except StopIteration as end:
            result: T = end.value
            return result


def _ignore(given_up: asyncio.Future[Any]) -> None:
    if not given_up.cancelled():
        given_up.exception()


def start(work: Coroutine[Any, Any, T]) -> T | Rest[T]:
    """Run a coroutine until it ends or waits: its result, or what has to be awaited for it. What it raises is raised.

    Before it waits for the first time the coroutine must not ask for its task, as `asyncio.timeout` does: it has none.
    """
    try:
        waits_for = work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    return Rest(work, waits_for)


async def finish(rest: Rest[T]) -> T:
    """Await the rest of a coroutine: for a task, which has to be one of a coroutine."""
    return await rest
