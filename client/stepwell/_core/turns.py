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


class Turn:
    """A change of some members, which has their turns, waits for them, or is over."""

    __slots__ = ("has_come", "members", "on_turn")

    def __init__(self, members: Some, on_turn: Callable[[], None]) -> None:
        self.members = members
        self.on_turn = on_turn
        self.has_come = False
        """It has the turns of its members."""


class Turns:
    """The turns of `count` members, first come, first served. Thread-safe.

    Ctrl-C may arrive after any call. So what is noted of a turn is noted without a call in between, and `end` may be
    called for any turn, again too if it was interrupted.
    """

    def __init__(self, count: int) -> None:
        self._taken = np.zeros(count, np.bool_)
        self._line: list[Turn] = []
        self._lock = threading.Lock()

    def take(self, turn: Turn) -> bool:
        """Takes the turns of its members. False if they are taken; then `on_turn` is called when they come."""
        with self._lock:
            if not self._line and not self._taken[turn.members].any():
                self._taken[turn.members] = turn.has_come = True
                return True
            self._line.append(turn)
            self._let_in()
            return turn.has_come

    def are_free(self, members: Some) -> bool:
        """Whether the turns of members could be taken now."""
        with self._lock:
            return not self._line and not self._taken[members].any()

    def end(self, turn: Turn) -> None:
        """Ends a turn, or the wait for it; does nothing if it is over."""
        with self._lock:
            if turn.has_come:
                self._taken[turn.members] = turn.has_come = False
            if turn in self._line:
                self._line.remove(turn)
            self._let_in()

    def _let_in(self) -> None:
        """Takes the turns of those that need not wait any more, and tells them."""
        if not self._line:
            return
        left = []
        blocked = self._taken.copy()
        for turn in self._line:
            if not turn.has_come:  # else this was interrupted before it was told
                if blocked[turn.members].any():
                    left.append(turn)
                    blocked[turn.members] = True
                    continue
                self._taken[turn.members] = turn.has_come = True
            blocked[turn.members] = True
            turn.on_turn()
        self._line = left


class MemberLock:
    """The turns of some members as a lock for threads, to be taken once."""

    __slots__ = ("_came", "_turn", "_turns")

    def __init__(self, turns: Turns, members: Some) -> None:
        self._turns = turns
        self._came = threading.Event()
        self._turn = Turn(members, self._came.set)

    def fresh(self) -> MemberLock:
        """The same turns, to be taken once more."""
        return MemberLock(self._turns, self._turn.members)

    def acquire(self, timeout: float = -1) -> bool:
        """Waits for the turns, at most so many seconds; -1: for ever. Whether they came."""
        wait_s = None if timeout < 0 or math.isinf(timeout) else timeout
        if self._turns.take(self._turn) or self._came.wait(wait_s):
            return True
        self._turns.end(self._turn)
        return False

    def release(self) -> None:
        """Ends the turns, or the wait for them; does nothing if they are over."""
        self._turns.end(self._turn)


class AsyncMemberLock:
    """The turns of some members as a lock for tasks: as `asyncio.Lock` in what handles use of it."""

    __slots__ = ("_members", "_turn", "_turns")

    def __init__(self, turns: Turns, members: Some) -> None:
        self._turns = turns
        self._members = members
        self._turn: Turn | None = None

    def fresh(self) -> AsyncMemberLock:
        """The same turns, to be taken once more."""
        return AsyncMemberLock(self._turns, self._members)

    def locked(self) -> bool:
        """Whether the turns are taken, or waited for by others that came before."""
        return not self._turns.are_free(self._members)

    async def acquire(self) -> bool:
        """Waits for the turns."""
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_turn() -> None:
            if not came.done():  # else its task was cancelled in the same moment
                came.set_result(None)

        self._turn = turn = Turn(self._members, on_turn)
        try:
            if not self._turns.take(turn):
                await came
        except BaseException:  # a cancelled task
            self._turns.end(turn)
            raise
        return True

    def release(self) -> None:
        """Ends the turns."""
        if self._turn is not None:
            self._turns.end(self._turn)
