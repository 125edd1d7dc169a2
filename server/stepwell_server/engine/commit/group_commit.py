"""Commits to the store, and a limit on what waits for it: a change is answered only when the store has it.

How batches get into the store, in which order and which of them together, is the store's: see `store.access`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from stepwell_server.errors import Overloaded
from stepwell_server.store.base import Answer, Batch, OnAnswer, Store, Write

#: Sessions that may wait for the store before passes wait too.
MAX_WAITING = 32_768

_RETRY_AFTER_S = 0.5


class GroupCommit:
    """Commits to a store, and counts what waits for it. Lives on the event loop."""

    def __init__(self, store: Store, on_room: Callable[[], None] = lambda: None) -> None:
        """`on_room` is called when `is_full` has ended."""
        self._store = store
        self._on_room = on_room
        self.waiting = 0
        """Sessions whose changes wait for the store."""
        self.is_full = False
        """`MAX_WAITING` is reached: nothing more should run until the store has kept some of it."""
        self._changed = asyncio.Event()
        """Set when less waits for the store."""

    @property
    def is_idle(self) -> bool:
        """Nothing waits for the store."""
        return not self.waiting

    def require_room(self) -> None:
        """Refuse another change while too much waits for the store.

        Raises:
            Overloaded: with the time after which to try again.
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
        is_latency_sensitive: bool = False,
    ) -> None:
        """Commit what `build` makes; `done` is called on the event loop, maybe before this returns.

        Args:
            build: May be called on another thread.
            size: Records in it, about.
            done: Gets what became of each session, or why nothing of it was kept. It must not raise.
            is_change: It may be kept before what waits: see `Write`.
            is_latency_sensitive: Such a change, if it is small, does not wait for larger ones either: see `Write`.
        """
        weight = max(1, size)

        def answered(answer: Answer) -> None:
            was_full = self.is_full
            self._add_waiting(-weight)
            done(answer)
            if was_full and not self.is_full:
                self._on_room()
            self._changed.set()

        answer = self._store.commit(Write(build, size, answered, is_change, is_latency_sensitive))
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
        """Return when not too much waits for the store."""
        while self.is_full:
            self._changed.clear()
            await self._changed.wait()
