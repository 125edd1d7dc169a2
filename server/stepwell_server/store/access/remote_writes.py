"""Writes to a store over a network: a few at the same time, never two for the same session or document."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from stepwell_server.alarm import Alarm
from stepwell_server.store.access.batches import MAX_RECORDS, fail, merged
from stepwell_server.store.base import Answer, Batch, CommitResult, Write

#: Maximum of commits at the same time.
MAX_CONCURRENT_COMMITS = 8

_Names = set[str | tuple[str]]
"""Ids of sessions, and names of documents, each as a tuple."""


class RemoteWrites:
    """Commits now if no commit is running, else together with other writes of the same event loop iteration. Lives there."""

    def __init__(self, apply: Callable[[Batch], Awaitable[CommitResult]]) -> None:
        """`apply` commits a batch and returns an awaitable; it may start before that is awaited."""
        self._apply = apply
        self._queue: list[Write] = []
        self._busy: _Names = set()
        """Sessions and documents of running commits."""
        self._under_way: set[asyncio.Future[CommitResult]] = set()
        self._work = Alarm(self._start)

    def commit(self, write: Write) -> Answer | None:
        """See `Store.commit`."""
        write.make()
        if write.error is not None:
            return write.error
        self._queue.append(write)
        if self._under_way:
            self._work.ring()
        else:
            self._start()
        return None

    async def end(self, timeout_s: float) -> bool:
        """See `Store.end_commits`."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=timeout_s)
        return not self._under_way

    def _start(self) -> None:
        while self._queue and len(self._under_way) < MAX_CONCURRENT_COMMITS:
            writes, names = self._take()
            if not writes:
                return
            self._commit(writes, names)

    def _take(self) -> tuple[list[Write], _Names]:
        """Take the writes that may be committed together now, in the order of each name; return them and their names."""
        taken: list[Write] = []
        named: _Names = set()
        left: list[Write] = []
        blocked = set(self._busy)
        size = 0
        for write in self._queue:
            names = _names_of(write.batch)
            if size >= MAX_RECORDS or not blocked.isdisjoint(names):
                left.append(write)
            else:
                taken.append(write)
                named |= names
                size += write.size
            blocked |= names
        self._queue = left
        return taken, named

    def _commit(self, writes: Sequence[Write], names: _Names) -> None:
        try:
            committing = self._apply(merged([write.batch for write in writes]))
        except Exception as error:
            fail(writes, error)
            _finish_soon(writes)
            return
        under_way = (
            committing if isinstance(committing, asyncio.Future) else asyncio.ensure_future(committing)
        )
        self._busy |= names
        self._under_way.add(under_way)

        def ended(under_way: asyncio.Future[CommitResult]) -> None:
            self._under_way.discard(under_way)
            self._busy -= names
            if under_way.cancelled():  # the event loop ends
                return
            answer: CommitResult | None = None
            try:
                answer = under_way.result()
            except Exception as error:
                fail(writes, error)
            for write in writes:
                write.done(answer or write.answer)
            if self._queue:
                self._start()

        under_way.add_done_callback(ended)


def _finish_soon(writes: Sequence[Write]) -> None:
    """Report writes later: the one that failed may be the one that is just being handed over."""
    loop = asyncio.get_running_loop()
    for write in writes:
        loop.call_soon(write.done, write.answer)


def _names_of(batch: Batch) -> _Names:
    return {*batch.session_ids, *((name,) for name, _ in batch.documents)}
