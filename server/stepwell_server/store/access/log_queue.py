"""Changes that wait for a store's log. The event loop appends them; another thread waits for the disk."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from stepwell_server.store.access.batches import MAX_RECORDS, fail
from stepwell_server.store.base import SMALL, LocalStore, LogWrite, LogWriter, Write
from stepwell_server.store.record import Puts, RecordBytes

#: Approximate maximum of bytes in one write, unless a single change has more: small changes wait for it.
MAX_BYTES = 2 << 20

_Puts = Sequence[tuple[str, RecordBytes]]
_Waiting = deque[tuple[Write, _Puts]]


class LogQueue:
    """Appends changes of claimed sessions, in any order. Those that arrive during a write share the next one.

    Small and large changes alternate, so that a small one waits for at most one write of large ones. Lives on the
    event loop.
    """

    def __init__(
        self,
        store: LocalStore,
        *,
        done: Callable[[Sequence[Write]], None],
        refused: Callable[[Sequence[Write]], None],
    ) -> None:
        """`done` gets writes that were kept or failed, `refused` those that the store must commit."""
        self._store = store
        self._done = done
        self._refused = refused
        self._small: _Waiting = deque()
        self._large: _Waiting = deque()
        self._was_small = False
        self._writer: LogWriter | None = None
        self._running: LogWrite | None = None
        self._group: list[tuple[Write, _Puts]] = []
        """The changes of the running write."""
        self._ended: list[Write] = []
        """Changes to report."""
        self._idle: asyncio.Future[None] | None = None
        self._is_stopped = False

    def add(self, write: Write, puts: _Puts) -> None:
        """Append a change; `puts` are its records as `LocalStore.sealed` returned them."""
        (self._small if write.size <= SMALL else self._large).append((write, puts))
        if self._running is not None and self._settle():
            # the event of this write may not come any more
            asyncio.get_running_loop().call_soon(self.settle)
        self._start()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing waits; return False if that takes longer."""
        if self._running is None:
            return True
        self._idle = self._idle or asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait([self._idle], timeout=timeout_s)
        return bool(done)

    def stop(self) -> None:
        """Start no more writes: refuse all changes that wait, or that are added later."""
        self._is_stopped = True

    def close(self, timeout_s: float) -> bool:
        """End the writer's thread, after `stop`; return False if a write is running. For any thread."""
        return self._running is None and (self._writer is None or self._writer.close(timeout_s))

    def settle(self) -> None:
        """Report a write that has ended. Its answers may have been sent."""
        if self._running is not None and self._settle():
            self._start()  # before others are answered: the disk works meanwhile
        if self._ended:
            self._report()
        if self._idle is not None and self._running is None:
            self._idle.set_result(None)
            self._idle = None

    def _settle(self) -> bool:
        """End the running write if it has been made; return whether there is none any more."""
        write, writer = self._running, self._writer
        if write is None or writer is None:
            return True
        result = writer.take()
        if result is None:
            return False
        group, self._running, self._group = self._group, None, []
        error, seconds = result
        changes = [change for change, _ in group]
        try:
            is_kept = self._store.end_append(write, error, seconds)
        except Exception as problem:
            fail(changes, problem)
            self._ended += changes
            return True
        if is_kept:
            self._ended += changes
        elif error is None:  # it made room
            (self._small if self._was_small else self._large).extendleft(reversed(group))
        else:
            self._refused(changes)
        return True

    def _start(self) -> None:
        while self._running is None and (self._small or self._large):
            group = self._take()
            changes = [change for change, _ in group]
            if self._is_stopped:
                self._refused(changes)
                continue
            try:
                writer = self._writer = self._writer or self._store.new_writer(self.settle)
                write = self._store.begin_append([puts for _, puts in group])
            except OSError:  # the process has too many open files for a writer
                self._refused(changes)
                continue
            except Exception as error:
                fail(changes, error)
                self._ended += changes
                asyncio.get_running_loop().call_soon(self._report)
                continue
            if write is None:
                self._refused(changes)
                continue
            self._running, self._group = write, group
            # one that only makes room keeps nothing
            writer.begin(write, [one for change in changes for one in change.steps] if write.count else ())

    def _take(self) -> list[tuple[Write, _Puts]]:
        self._was_small = bool(self._small) and not (self._large and self._was_small)
        waiting = self._small if self._was_small else self._large
        group = [waiting.popleft()]
        count, size = len(group[0][1]), _size(group[0][1])
        while waiting and count + len(waiting[0][1]) <= MAX_RECORDS:
            added = _size(waiting[0][1])
            if size + added > MAX_BYTES:
                break
            count, size = count + len(waiting[0][1]), size + added
            group.append(waiting.popleft())
        return group

    def _report(self) -> None:
        ended, self._ended = self._ended, []
        if ended:
            self._done(ended)


def _size(puts: _Puts) -> int:
    """Return the approximate size of records: most records of a change have the same size."""
    if isinstance(puts, Puts):
        return len(puts.together)
    first = next(iter(puts), None)
    return 0 if first is None else len(puts) * len(first[1])
