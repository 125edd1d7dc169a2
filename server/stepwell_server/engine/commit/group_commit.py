"""Commits to the store, and limits how many sessions wait for it.

The store decides how batches are written, in which order and which of them together: see `store.access`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from stepwell_server.errors import Overloaded
from stepwell_server.store.base import Answer, Batch, OnAnswer, Store, Write
from stepwell_server.store.record import Puts

#: Sessions that may wait for the store before passes wait too.
MAX_WAITING = 32_768

_RETRY_AFTER_S = 0.5


class GroupCommit:
    """Commits to a store, and counts what waits for it. Lives on the event loop."""

    def __init__(self, store: Store, on_room: Callable[[], None] = lambda: None) -> None:
        """`on_room` is called when `is_full` becomes False."""
        self._store = store
        self._on_room = on_room
        self.waiting = 0
        """Sessions whose changes wait for the store."""
        self.is_full = False
        """`MAX_WAITING` is reached: nothing more should run until the store has kept some changes."""
        self._changed = asyncio.Event()
        """Set when less waits for the store."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits for the store."""
        return not self.waiting

    def require_room(self) -> None:
        """Refuse another change while too much waits for the store.

        Raises:
            Overloaded: with the retry delay.
        """
        if self.is_full:
            raise Overloaded(
                f"sessions whose changes wait for the store must stay within {MAX_WAITING};"
                f" {self.waiting} wait",
                retry_after_s=_RETRY_AFTER_S,
            )

    def submit(
        self,
        build: Callable[[], Batch],
        size: int,
        done: OnAnswer,
        *,
        is_change: bool = False,
        steps: Sequence[object] = (),
        puts: Puts | None = None,
    ) -> None:
        """Commit the batch that `build` makes; `done` is called on the event loop, possibly before this returns.

        Args:
            build: May be called on another thread.
            size: The approximate number of records.
            done: Gets the result of each session, or the error if nothing was kept. It must not raise.
            is_change: The batch may overtake others that wait: see `Write`.
            steps: See `Write`.
            puts: See `Write`.
        """
        weight = max(1, size)

        def answered(answer: Answer) -> None:
            was_full = self.is_full
            self._add_waiting(-weight)
            done(answer)
            if was_full and not self.is_full:
                self._on_room()
            self._changed.set()

        answer = self._store.commit(Write(build, size, answered, is_change, steps=steps, puts=puts))
        if answer is None:
            self._add_waiting(weight)
        else:
            done(answer)

    async def keep(self, batch: Batch, size: int, done: OnAnswer = lambda _answer: None) -> Answer:
        """Commit a batch and wait for the answer: see `submit`. If the caller is cancelled, `done` still gets it."""
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def kept(answer: Answer) -> None:
            done(answer)
            answered.set_result(answer)

        self.submit(lambda: batch, size, kept)
        return await asyncio.shield(answered)

    def _add_waiting(self, count: int) -> None:
        self.waiting += count
        self.is_full = self.waiting >= MAX_WAITING

    async def idle(self) -> None:
        """Return when nothing waits for the store."""
        while self.waiting:
            self._changed.clear()
            await self._changed.wait()

    async def room(self) -> None:
        """Return when the number of waiting sessions is below the limit."""
        while self.is_full:
            self._changed.clear()
            await self._changed.wait()
