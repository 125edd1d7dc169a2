"""Reads from a store over a network: many sessions per read, few reads at the same time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from stepwell_server.alarm import Alarm
from stepwell_server.store.base import StoredSession, as_server_error

#: Maximum of sessions in one read.
MAX_READ_SIZE = 1024
#: Maximum of reads at the same time.
MAX_CONCURRENT_READS = 4

_Asked = tuple[Sequence[str], Sequence[int], "asyncio.Future[list[StoredSession]]"]


class RemoteReads:
    """Reads records and, for sessions that have none, tombstones. Lives on the event loop.

    Requests are combined into one read if they arrive in the same iteration of the event loop, or while the maximum
    of reads is running.
    """

    def __init__(
        self, read: Callable[[Sequence[str], Sequence[int]], Awaitable[list[StoredSession]]]
    ) -> None:
        """`read` queries the store, with the arguments and result of `Store.fetch`."""
        self._ask_store = read
        self._loop = asyncio.get_running_loop()
        self._wanted: deque[_Asked] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._work = Alarm(self._start)

    async def fetch(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[StoredSession]:
        """Fetch sessions, in the state of some moment after this call: see `Store.fetch`.

        Raises:
            Unavailable: the store cannot be read now.
        """
        stamps = known or [0] * len(session_ids)
        cuts = [slice(at, at + MAX_READ_SIZE) for at in range(0, len(session_ids), MAX_READ_SIZE)]
        parts = [self._ask(session_ids[cut], stamps[cut]) for cut in cuts]
        return [found for part in await asyncio.gather(*parts) for found in part]

    def _ask(self, session_ids: Sequence[str], known: Sequence[int]) -> asyncio.Future[list[StoredSession]]:
        answer: asyncio.Future[list[StoredSession]] = self._loop.create_future()
        self._wanted.append((session_ids, known, answer))
        self._work.ring()
        return answer

    def _start(self) -> None:
        while self._wanted and len(self._tasks) < MAX_CONCURRENT_READS:
            task = self._loop.create_task(self._read(self._take()))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._work.ring()

    def _take(self) -> list[_Asked]:
        taken = [self._wanted.popleft()]
        count = len(taken[0][0])
        while self._wanted and count + len(self._wanted[0][0]) <= MAX_READ_SIZE:
            taken.append(self._wanted.popleft())
            count += len(taken[-1][0])
        return taken

    async def _read(self, asked: Sequence[_Asked]) -> None:
        asked = [each for each in asked if not each[2].done()]  # the callers of the others were cancelled
        if not asked:
            return
        try:
            found = await self._ask_store(
                [session_id for ids, _, _ in asked for session_id in ids],
                [stamp for _, known, _ in asked for stamp in known],
            )
        except Exception as error:
            why = as_server_error(error)
            for _, _, answer in asked:
                if not answer.done():
                    answer.set_exception(why)
            return
        at = 0
        for ids, _, answer in asked:
            if not answer.done():  # otherwise its caller was cancelled
                answer.set_result(found[at : at + len(ids)])
            at += len(ids)
