"""Changes that wait for a store's log. The event loop appends them; another thread waits for the disk."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stepwell_server.store.access.batches import MAX_RECORDS, fail
from stepwell_server.store.base import SMALL, LocalStore, LogWrite, LogWriter, Write
from stepwell_server.store.record import Puts, RecordBytes

#: Approximate maximum of bytes in one write, unless a single change has more: small changes wait for it.
MAX_BYTES = 2 << 20
#: A write of small changes that waits for another one is laid out again to add more, up to this many bytes.
MAX_EXTENDED_BYTES = 128 << 10

_Puts = Sequence[tuple[str, RecordBytes]]
_Waiting = deque[tuple[Write, _Puts]]


class _Group(NamedTuple):
    """Changes that share a write."""

    write: LogWrite
    changes: list[tuple[Write, _Puts]]
    is_small: bool
    byte_count: int
    """Approximate size."""


class LogQueue:
    """Appends changes of claimed sessions, in any order. Those that arrive during a write share the next one.

    Small and large changes alternate, so that a small one waits for at most one write of large ones. The writer gets a
    write of small ones while another one runs, so that it need not wait for the event loop. Lives on the event loop.
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
        """Whether the last write was of small changes."""
        self._writer: LogWriter | None = None
        self._begun: deque[_Group] = deque()
        """What the writer has: what it writes, and what it writes next."""
        self._ended: list[Write] = []
        """Changes to report."""
        self._idle: asyncio.Future[None] | None = None
        self._is_stopped = False

    def add(self, write: Write, puts: _Puts) -> None:
        """Append a change; `puts` are its records as `LocalStore.sealed` returned them."""
        (self._small if write.size <= SMALL else self._large).append((write, puts))
        if self._begun and self._settle():
            # the event of this write may not come any more
            asyncio.get_running_loop().call_soon(self.settle)
        self._start(may_add_large=not self._begun)

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing waits; return False if that takes longer."""
        if not self._begun:
            return True
        self._idle = self._idle or asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait([self._idle], timeout=timeout_s)
        return bool(done)

    def stop(self) -> None:
        """Start no more writes: refuse all changes that wait, or that are added later."""
        self._is_stopped = True
        if len(self._begun) > 1:
            self._withdraw()

    def close(self, timeout_s: float) -> bool:
        """End the writer's thread, after `stop`; return False if a write is running. For any thread."""
        return not self._begun and (self._writer is None or self._writer.close(timeout_s))

    def settle(self) -> None:
        """Report writes that have ended. Their answers may have been sent."""
        if self._settle():
            self._start()  # before others are answered: the disk works meanwhile
        if self._ended:
            self._report()
        if self._idle is not None and not self._begun:
            self._idle.set_result(None)
            self._idle = None

    def _settle(self) -> bool:
        """End the writes that have been made; return whether there were any."""
        writer, count = self._writer, len(self._begun)
        while writer is not None and self._begun and (result := writer.take()) is not None:
            self._end(self._begun.popleft(), *result)
        return len(self._begun) < count

    def _end(self, group: _Group, error: Exception | None, seconds: float) -> None:
        changes = _changes_of(group.changes)
        try:
            is_kept = self._store.end_append(group.write, error, seconds)
        except Exception as problem:
            fail(changes, problem)
            self._ended += changes
            return
        if is_kept:
            self._ended += changes
        elif error is None:  # it made room
            self._put_back(group.changes, is_small=group.is_small)
        else:
            self._refused(changes)

    def _start(self, *, may_add_large: bool = True) -> None:
        begun = self._begun
        while (self._small or self._large) and (
            not begun or self._has_room_behind(may_add_large=may_add_large)
        ):
            before = begun[-1].write if begun else None
            group, size = self._take()
            first, puts = group[0]
            is_one = len(group) == 1  # the common case, which takes as few calls as it can
            if self._is_stopped:
                self._refused(_changes_of(group))
                continue
            try:
                self._writer = self._writer or self._store.new_writer(self.settle)
                parts = (puts,) if is_one else [puts for _, puts in group]
                write = self._store.begin_append(parts, before)
            except OSError:  # the process has too many open files for a writer
                self._refused(_changes_of(group))
                continue
            except Exception as error:
                changes = _changes_of(group)
                fail(changes, error)
                self._ended += changes
                asyncio.get_running_loop().call_soon(self._report)
                continue
            if write is not None:
                begun.append(_Group(write, group, self._was_small, size))
                # one that only makes room keeps nothing
                steps: Sequence[object] = ()
                if write.count:
                    steps = first.steps if is_one else [one for change, _ in group for one in change.steps]
                self._writer.begin(write, steps)
                if before is not None:
                    return
            elif before is None:
                self._refused(_changes_of(group))
            else:  # once that one has ended, there may be room
                self._put_back(group, is_small=self._was_small)
                return

    def _has_room_behind(self, *, may_add_large: bool) -> bool:
        """Whether the writer may get a write behind the first. It gives back one of small changes that is to get more."""
        if self._is_stopped:
            return False
        is_small = bool(self._small) and not (self._large and self._begun[0].is_small)
        if len(self._begun) == 1:
            return is_small or may_add_large
        waiting = self._begun[1]
        return is_small and waiting.is_small and waiting.byte_count <= MAX_EXTENDED_BYTES and self._withdraw()

    def _put_back(self, changes: list[tuple[Write, _Puts]], *, is_small: bool) -> None:
        (self._small if is_small else self._large).extendleft(reversed(changes))
        if self._begun:
            self._was_small = self._begun[-1].is_small

    def _withdraw(self) -> bool:
        """Take back the next write, unless it has begun."""
        assert self._writer is not None, "it has writes"
        if not self._writer.withdraw():
            return False
        group = self._begun.pop()
        self._store.withdraw_append(group.write)
        self._put_back(group.changes, is_small=group.is_small)
        return True

    def _take(self) -> tuple[list[tuple[Write, _Puts]], int]:
        """The changes of the next write, and their approximate size in bytes."""
        was_small = self._begun[-1].is_small if self._begun else self._was_small
        self._was_small = bool(self._small) and not (self._large and was_small)
        waiting = self._small if self._was_small else self._large
        group = [waiting.popleft()]
        size = _size(group[0][1])
        if not waiting:
            return group, size
        count = len(group[0][1])
        while waiting and count + len(waiting[0][1]) <= MAX_RECORDS:
            added = _size(waiting[0][1])
            if size + added > MAX_BYTES:
                break
            count, size = count + len(waiting[0][1]), size + added
            group.append(waiting.popleft())
        return group, size

    def _report(self) -> None:
        ended, self._ended = self._ended, []
        if ended:
            self._done(ended)


def _changes_of(group: Sequence[tuple[Write, _Puts]]) -> list[Write]:
    return [change for change, _ in group]


def _size(puts: _Puts) -> int:
    """Return the approximate size of records: most records of a change have the same size."""
    if isinstance(puts, Puts):
        return len(puts.together)
    first = next(iter(puts), None)
    return 0 if first is None else len(puts) * len(first[1])
