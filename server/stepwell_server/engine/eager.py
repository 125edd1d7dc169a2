"""Starts coroutines at once, without a task; a task is needed only if they have to wait.

The engine is written once, for stores that answer now or later. If the answer is available, `start` returns the
result, and nothing else has run meanwhile. Python 3.12's eager tasks do the same (asyncio.eager_task_factory).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Rest(Generic[T]):
    """The remainder of a coroutine that waits. Await it once, on the same event loop."""

    __slots__ = ("_waits_for", "_work")

    def __init__(self, work: Coroutine[Any, Any, T], waits_for: object) -> None:
        self._work = work
        self._waits_for = waits_for

    def close(self) -> None:
        """Abandon the coroutine where it waits. The future it waits for is cancelled, and its error is ignored."""
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
    """Run a coroutine until it ends or waits. Returns its result, or a `Rest` to await. Raises what it raises.

    Before its first wait the coroutine must not use its task, as `asyncio.timeout` does: it has none.
    """
    try:
        waits_for = work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    return Rest(work, waits_for)


async def finish(rest: Rest[T]) -> T:
    """Await the rest of a coroutine. A task can be made of this, but not of a `Rest`."""
    return await rest
