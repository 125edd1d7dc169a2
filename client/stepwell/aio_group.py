"""A group of sessions of the async client; the same as `group`, awaited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, overload

import numpy as np

from stepwell._base.tracebacks import end_here
from stepwell._core.aio_driver import AsyncDriver
from stepwell._core.group_core import GroupCore
from stepwell._core.handles import BaseHandle, GroupFacts
from stepwell._state.infos import Inputs, Mask, Outputs, OutputSelection, Rows, StateSelection, TimeSelection
from stepwell._state.state import State, States
from stepwell._state.trace import Trace
from stepwell._tape.tape import RecordedStates, Tape
from stepwell.aio_session import AsyncHandle, AsyncSession, Opening


@end_here
class AsyncSessionGroup(GroupFacts, AsyncHandle):
    """Many sessions of one model and batch size that you step together, with one message for all of them.

    `AsyncClient.open_sessions` and `fork` return groups. The members are ordinary sessions on the server, each with
    its own revision. A member runs one change at a time: a change waits, within its time limit, until no other change
    of its members is active. Changes of different members run concurrently. A group belongs to the event loop of its
    client. Do not use it from other threads.

    **Members.** `members` are indexes without repetition, or booleans, one for each member. `group[i]` is an ordinary
    `AsyncSession`. `group[2:5]`, `group[mask]` and `group[[0, 3]]` are groups of these members, in this order. You
    can also iterate over a group. All of them are views: they share revisions, positions and locks with their group,
    and end when it is closed.

    **After an error.** A change may fail for some members only. Once the outcome of every member is known, the error
    of the first failed member is raised. Its `failures` maps the index of each failed member to its error. Its
    `outputs` has the outputs of the others, and zeros for the failed members. The revisions of the others are up to
    date.

    Repeat the same call for the same members with the same arguments to complete the change. Members that applied it
    return their first answer, and the others apply it. Any other change of one of these members is a new change, and
    abandons the unfinished one. To abandon a change of unknown outcome, call `refresh`, which waits for the changes
    of each member that the server has already received.

    **At the end of an async with block** a group opened without ids is closed. A group with ids, or a view, stays
    open.

    Example:
        >>> import asyncio
        >>> async def main():
        ...     async with stepwell.aio.connect(address) as client:
        ...         async with client.open_sessions("forecast", 4) as group:
        ...             y = await group.step(np.ones((4, 3), np.float32))
        ...             return y.shape, len(group), group.revisions.tolist()
        >>> asyncio.run(main())
        ((4, 1), 4, [1, 1, 1, 1])
    """

    def __init__(
        self, driver: AsyncDriver, core: GroupCore, *, owned: bool, parent: BaseHandle[Any] | None = None
    ) -> None:
        super().__init__(driver, owned, core.tracker.locks, core.members.where, parent)
        self._group = core

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> AsyncSession: ...

    @overload
    def __getitem__(self, index: slice | Rows) -> AsyncSessionGroup: ...

    def __getitem__(self, index: int | np.integer[Any] | slice | Rows) -> AsyncSession | AsyncSessionGroup:
        """Returns one member as an `AsyncSession`, or a view of some members, in their order.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     y = await group[2].step(np.ones((1, 3), np.float32))
            ...     y = await group[1:3].step(np.ones((2, 3), np.float32))
            ...     group.revisions.tolist()
            [0, 1, 2, 0]
        """
        if not isinstance(index, int | np.integer):
            return AsyncSessionGroup(self._driver, self._group.view(index), owned=False, parent=self._root)
        place = self._group.place(index)
        tracker, locks = self._group.member(place), self._group.tracker.locks
        return AsyncSession(self._driver, tracker, owned=False, locks=locks, members=place, parent=self._root)

    def __iter__(self) -> Iterator[AsyncSession]:
        """Iterates over the members, in their order."""
        return (self[i] for i in range(len(self)))

    @property
    def _root(self) -> BaseHandle[Any]:
        return self._parent or self

    @overload
    async def step(
        self,
        x: Inputs,
        outputs: OutputSelection = "all",
        *,
        time: TimeSelection = "all",
        reset: Mask | None = None,
        members: Rows | None = None,
        states: Literal["none"] = "none",
        timeout_s: float | None = None,
    ) -> Outputs: ...

    @overload
    async def step(
        self,
        x: Inputs,
        outputs: OutputSelection = "all",
        *,
        time: TimeSelection = "all",
        reset: Mask | None = None,
        members: Rows | None = None,
        states: Literal["all", "last"],
        timeout_s: float | None = None,
    ) -> Trace: ...

    async def step(
        self,
        x: Inputs,
        outputs: OutputSelection = "all",
        *,
        time: TimeSelection = "all",
        reset: Mask | None = None,
        members: Rows | None = None,
        states: StateSelection = "none",
        timeout_s: float | None = None,
    ) -> Outputs | Trace:
        """Advances every member, or some members, by one time step or by T.

        Arguments, result and errors are those of `SessionGroup.step`.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     y = await group.step(np.ones((4, 10, 3), np.float32), outputs="last")
            ...     done, ready = np.array([True, False]), [3, 0]
            ...     y.shape, (await group.step(np.ones((2, 3), np.float32), reset=done, members=ready)).shape
            ((4, 1), (2, 1))
        """
        deadline = self._core.deadline(timeout_s)
        some = self._group.some(members)
        change = self._group.step_change(some, x, outputs, time, reset, states)
        return await self._change(self._group.step(some, change, deadline, self._reels), deadline, some.where)

    async def trace(
        self,
        x: Inputs,
        reset: Mask | None = None,
        members: Rows | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Trace:
        """Advances members and returns the outputs and their states after every time step.

        Arguments, result and errors are those of `SessionGroup.trace`.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     trace = await group.trace(np.ones((4, 10, 3), np.float32))
            ...     {array.shape[:2] for array in trace.states.values()}
            {(4, 10)}
        """
        return await self.step(x, reset=reset, members=members, states="all", timeout_s=timeout_s)

    def record(
        self, states: RecordedStates = True, *, max_steps: int | None = None
    ) -> AbstractContextManager[Tape]:
        """Records the steps and resets of this handle while a `with` block runs.

        It makes no call: use `with`, not `async with`. Arguments, result and errors are those of `SessionGroup.record`.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     with group.record() as tape:
            ...         y = await group.step(np.ones((4, 3), np.float32))
            ...     tape.revisions.shape
            (1, 4)
        """
        return self._recording(states, max_steps, self._subject)

    async def reset_states(
        self,
        states: States | None = None,
        rows: Rows | None = None,
        *,
        members: Rows | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Sets the whole state of every member, or of some members.

        Arguments, result and errors are those of `SessionGroup.reset_states`.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     await group.reset_states(members=[0, 3])
            ...     group.revisions.tolist()
            [1, 0, 0, 1]
        """
        deadline = self._core.deadline(timeout_s)
        some = self._group.some_or_rows(members, rows)
        await self._change(
            self._group.reset_states(some, states, deadline, self._reels), deadline, some.where
        )

    async def get_states(self, members: Rows | None = None, *, timeout_s: float | None = None) -> State:
        """Returns a copy of the members' states, one after the other, with tensors of shape (n * batch_size, ...).

        Arguments, result and errors are those of `SessionGroup.get_states`.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     (await group.get_states()).batch_size, (await group.get_states(members=[2, 0])).batch_size
            (4, 2)
        """
        self._check_open()
        some = self._group.some(members)
        return await self._driver.run(self._group.get_states(some, self._core.deadline(timeout_s)))

    async def get_state(self, *, timeout_s: float | None = None) -> State:
        """Returns the states of all members, as `get_states` does.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     await group.get_state() == await group.get_states()
            True
        """
        return await self.get_states(timeout_s=timeout_s)

    def fork(
        self,
        session_ids: Sequence[str] | None = None,
        *,
        max_idle_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Opening[AsyncSessionGroup]:
        """Opens a new group with the members' states, revisions and positions. The call copies all of them or none.

        Arguments, result and errors are those of `SessionGroup.fork`. Await the result, or use it in `async with`.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group, group.fork() as twins:
            ...     y = await twins.step(np.ones((4, 3), np.float32))
            ...     twins.revisions.tolist(), group.revisions.tolist()
            ([1, 1, 1, 1], [0, 0, 0, 0])
        """
        return Opening(self._fork(session_ids, max_idle_s, timeout_s), "AsyncSessionGroup.fork")

    async def _fork(
        self, session_ids: Sequence[str] | None, max_idle_s: float | None, timeout_s: float | None
    ) -> AsyncSessionGroup:
        self._check_open()
        flow = self._group.fork(session_ids, max_idle_s, self._core.deadline(timeout_s))
        core = GroupCore(self._core, await self._driver.run(flow))
        return AsyncSessionGroup(self._driver, core, owned=session_ids is None)

    async def refresh(self, *, timeout_s: float | None = None) -> None:
        """Adopts the server's revisions and positions, and drops changes that an error left unfinished.

        Result and errors are those of `SessionGroup.refresh`.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     await group.refresh()
        """
        deadline = self._core.deadline(timeout_s)
        await self._change(self._group.refresh(deadline), deadline)

    async def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes all members on the server; for a view, the members of the view. Closing again does nothing.

        Example:
            >>> group = await client.open_sessions("forecast", 4)
            >>> await group.close()
        """
        if not self._closed:
            await self._driver.run(self._group.close(self._core.deadline(timeout_s)))
            self._closed = True
