"""A watch of the async client."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from stepwell._base.flow import drive_async
from stepwell._base.tracebacks import end_here
from stepwell._core.aio_driver import AsyncDriver
from stepwell._watch.core import WatchCore

T = TypeVar("T")
_MAX_WAITING = 16


@end_here
class AsyncWatch(AsyncIterator[T], Generic[T]):
    """What a watch reports, as an async iterator: as `Watch`. Close it, or use it in an `async with` block.

    Example:
        >>> async with client.watch_sessions([session.id], outputs=True) as watch:
        ...     first = await anext(watch)
        ...     y = await session.step(np.ones((1, 3), np.float32))
        ...     event = await anext(watch)
        >>> first.kind, event.kind, event.outputs["y"].shape
        ('present', 'step', (1, 1))
    """

    def __init__(self, driver: AsyncDriver, core: WatchCore[T]) -> None:
        self._reader = _AsyncReader(driver, core)
        # The tasks hold no reference to this object, so that a watch which was not closed can be collected. They end then.
        weakref.finalize(self, self._reader.abandon).atexit = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        return await self._reader.next()

    async def __aenter__(self) -> Self:
        self._reader.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the watch. A task that waits for its next event gets `StopAsyncIteration`."""
        await self._reader.close()


class _AsyncReader(Generic[T]):
    """Reads the streams of a watch in tasks. Lives on the event loop, except `abandon`."""

    def __init__(self, driver: AsyncDriver, core: WatchCore[T]) -> None:
        self._driver = driver
        self._core = core
        self._values: collections.deque[Sequence[T]] = collections.deque()
        self._next: collections.deque[T] = collections.deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        """Where the tasks run; None: none has begun."""
        self._error: BaseException | None = None
        self._is_closed = False

    async def next(self) -> T:
        """Waits for the next event.

        Raises:
            StopAsyncIteration: There is none.
            StepwellError: The server refuses the watch, or cannot be reached.
        """
        self.start()
        async with self._changed:
            while not self._next:
                if self._values:
                    self._next.extend(self._values.popleft())
                    self._changed.notify_all()
                    continue
                if self._is_closed:
                    raise StopAsyncIteration
                if self._error is not None:
                    error, self._error, self._is_closed = self._error, None, True
                    raise error
                if not self._tasks:
                    raise StopAsyncIteration
                await self._changed.wait()
            return self._next.popleft()

    async def close(self) -> None:
        """Ends all streams."""
        self._is_closed = True
        self._values.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with self._changed:
            self._changed.notify_all()

    def abandon(self) -> None:
        """Ends all streams without waiting for their tasks. From any thread: the garbage collector may call it."""
        if self._tasks and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed, and its tasks with it
                self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        self._is_closed = True
        for task in self._tasks:
            task.cancel()

    def start(self) -> None:
        """Begins to read, unless that has begun."""
        if self._loop is None and not self._is_closed:
            self._loop = asyncio.get_running_loop()
            for ids in self._core.streams():
                self._begin(ids)

    def _begin(self, ids: Sequence[str]) -> None:
        self._tasks.add(asyncio.create_task(self._read(ids)))

    async def _read(self, ids: Sequence[str]) -> None:
        def opened(_cancel: Callable[[], object]) -> None:
            """A cancelled task cancels its call."""

        task = asyncio.current_task()
        assert task is not None
        error = None
        try:
            await drive_async(self._core.follow(ids, self._take, opened, self._begin), self._driver.answer)
        except Exception as failed:  # else the program would wait forever
            error = failed
        finally:
            self._tasks.discard(task)
        async with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    async def _take(self, reply: Any) -> None:
        async with self._changed:
            while len(self._values) >= _MAX_WAITING:
                await self._changed.wait()
            if values := self._core.values(reply):
                self._values.append(values)
                self._changed.notify_all()
