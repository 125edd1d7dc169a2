"""Locks of sessions: at most one change of each member of a group at a time, whichever handle makes it. No I/O.

A group, its sub-groups and the handles of its members share the locks of the members; a single session is a group of
one. A change of several members waits until it holds the locks of all of them. Changes of different members do not
wait for each other.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import math
import threading
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Some: TypeAlias = int | slice | npt.NDArray[np.intp]
"""Members, as an index of their columns."""


class Holder(abc.ABC):
    """A change of some members, which holds their locks, waits for them, or is over. Used once."""

    __slots__ = ("is_holding", "members")

    members: Some
    is_holding: bool

    @abc.abstractmethod
    def prepare(self) -> None:
        """It is about to wait for the locks."""

    @abc.abstractmethod
    def wake(self) -> None:
        """It holds the locks now. May be called again."""


class Locks:
    """The locks of `count` members, first come, first served. Thread-safe.

    An interrupt (Ctrl-C) may arrive at any call. So the state of a holder changes without a call in between, and
    `release` may be called for any holder, also repeatedly.
    """

    def __init__(self, count: int) -> None:
        self._held = np.zeros(count, np.bool_)
        self._holders = 0
        """Number of holders."""
        self._queue: list[Holder] = []
        self._lock = threading.Lock()

    def acquire(self, holder: Holder) -> bool:
        """Acquires the locks of the holder's members.

        Returns False if it must wait: `wake` is called when it holds them.
        """
        with self._lock:
            if not self._queue and (not self._holders or not self._held[holder.members].any()):
                self._held[holder.members] = holder.is_holding = True
                self._holders += 1
                return True
            holder.prepare()
            self._queue.append(holder)
            self._admit()
            return holder.is_holding

    def release(self, holder: Holder) -> None:
        """Releases the locks, or ends the wait for them. Does nothing if the holder does neither."""
        with self._lock:
            if holder.is_holding:
                self._held[holder.members] = holder.is_holding = False
                self._holders -= 1
            if self._queue:
                if holder in self._queue:
                    self._queue.remove(holder)
                self._admit()

    def take(self, members: Some) -> bool:
        """Acquires locks for a task of the only event loop that uses them. Returns False if it must wait, as a holder."""
        if self._queue or (self._holders and self._held[members].any()):
            return False
        self._held[members] = True
        self._holders += 1
        return True

    def give(self, members: Some) -> None:
        """Releases locks that `take` acquired."""
        self._held[members] = False
        self._holders -= 1
        if self._queue:
            self._admit()

    def _admit(self) -> None:
        """Gives locks to waiting holders whose members are free, and wakes them."""
        left = []
        blocked = self._held.copy()
        for holder in self._queue:
            if not holder.is_holding:  # otherwise this was interrupted before the call of `wake`
                if blocked[holder.members].any():
                    left.append(holder)
                    blocked[holder.members] = True
                    continue
                self._held[holder.members] = holder.is_holding = True
                self._holders += 1
            blocked[holder.members] = True
            holder.wake()
        self._queue = left


class ThreadHolder(Holder):
    """A change that a thread makes."""

    __slots__ = ("_gate",)

    def __init__(self, members: Some) -> None:
        self.members = members
        self.is_holding = False

    def prepare(self) -> None:
        self._gate = threading.Lock()  # the cheapest thing that a thread can wait for
        self._gate.acquire()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is awake
            self._gate.release()

    def wait(self, timeout_s: float) -> bool:
        """Waits for the locks, at most this many seconds. Returns whether it holds them."""
        return self._gate.acquire(timeout=-1 if math.isinf(timeout_s) else timeout_s)


class TaskHolder(Holder):
    """A change that a task makes."""

    __slots__ = ("_woken",)

    def __init__(self, members: Some) -> None:
        self.members = members
        self.is_holding = False

    def prepare(self) -> None:
        self._woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self) -> None:
        if not self._woken.done():  # otherwise its task was cancelled at the same moment
            self._woken.set_result(None)

    async def wait(self) -> None:
        """Waits for the locks after `acquire` returned False."""
        await self._woken
