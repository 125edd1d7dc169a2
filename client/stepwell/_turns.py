"""Turns: at most one change at a time of each member of a group, whichever handle makes it. No I/O.

A group, its sub-groups and the handles of its members share the turns of the members. A change that concerns several
waits until it has the turns of all of them; changes of different members do not wait for each other.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Some: TypeAlias = slice | npt.NDArray[np.intp]
"""Members, as an index of their columns."""


class _Waiter:
    """A change that waits for its turn. Two of them are equal only if they are the same object."""

    __slots__ = ("members", "on_turn")

    def __init__(self, members: Some, on_turn: Callable[[], None]) -> None:
        self.members = members
        self.on_turn = on_turn


class Turns:
    """The turns of `count` members, first come, first served. Thread-safe."""

    def __init__(self, count: int) -> None:
        self._taken = np.zeros(count, np.bool_)
        self._line: list[_Waiter] = []
        self._lock = threading.Lock()

    def take(self, members: Some, on_turn: Callable[[], None]) -> _Waiter | None:
        """Takes the turns of members. None if they are taken; else `on_turn` is called when they are."""
        with self._lock:
            if not self._line and not self._taken[members].any():
                self._taken[members] = True
                return None
            waiter = _Waiter(members, on_turn)
            self._line.append(waiter)
            return None if waiter in self._let_in() else waiter

    def are_free(self, members: Some) -> bool:
        """Whether the turns of members could be taken now."""
        with self._lock:
            return not self._line and not self._taken[members].any()

    def end(self, members: Some) -> None:
        """Ends the turns of members."""
        with self._lock:
            self._taken[members] = False
            due = self._let_in()
        for waiter in due:
            waiter.on_turn()

    def give_up(self, waiter: _Waiter) -> None:
        """Waits no more, or ends the turns if they came meanwhile."""
        with self._lock:
            if waiter in self._line:
                self._line.remove(waiter)
            else:
                self._taken[waiter.members] = False
            due = self._let_in()
        for other in due:
            other.on_turn()

    def _let_in(self) -> list[_Waiter]:
        """Takes the turns of those that need not wait any more, and returns these."""
        if not self._line:
            return []
        due, left = [], []
        blocked = self._taken.copy()
        for waiter in self._line:
            if blocked[waiter.members].any():
                left.append(waiter)
            else:
                due.append(waiter)
                self._taken[waiter.members] = True
            blocked[waiter.members] = True
        self._line = left
        return due


class MemberLock:
    """The turns of some members as a lock for threads: as `threading.Lock` in what handles use of it."""

    __slots__ = ("_members", "_turns")

    def __init__(self, turns: Turns, members: Some) -> None:
        self._turns = turns
        self._members = members

    def acquire(self, timeout: float = -1) -> bool:
        """Waits for the turns, at most so many seconds; -1: for ever. Whether they came."""
        came = threading.Event()
        waiter = self._turns.take(self._members, came.set)
        if waiter is None:
            return True
        try:
            if came.wait(None if timeout < 0 or math.isinf(timeout) else timeout):
                return True
        except BaseException:  # Ctrl-C
            self._turns.give_up(waiter)
            raise
        self._turns.give_up(waiter)
        return False

    def release(self) -> None:
        """Ends the turns."""
        self._turns.end(self._members)


class AsyncMemberLock:
    """As `MemberLock`, for tasks: as `asyncio.Lock` in what handles use of it."""

    __slots__ = ("_members", "_turns")

    def __init__(self, turns: Turns, members: Some) -> None:
        self._turns = turns
        self._members = members

    def locked(self) -> bool:
        """Whether the turns are taken, or waited for by others that came before."""
        return not self._turns.are_free(self._members)

    async def acquire(self) -> bool:
        """Waits for the turns."""
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_turn() -> None:
            if not came.done():  # else its task was cancelled in the same moment
                came.set_result(None)

        waiter = self._turns.take(self._members, on_turn)
        if waiter is None:
            return True
        try:
            await came
        except BaseException:  # a cancelled task
            self._turns.give_up(waiter)
            raise
        return True

    def release(self) -> None:
        """Ends the turns."""
        self._turns.end(self._members)
