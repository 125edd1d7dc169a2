"""A group of sessions of the async client. As `group`, awaited."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepwell._frames import Counts
from stepwell._group_core import GroupCore
from stepwell._state import State, States
from stepwell._types import Inputs, Outputs, OutputSelection, Rows
from stepwell.aio_session import AsyncHandle

if TYPE_CHECKING:
    from stepwell.aio import AsyncClient


class AsyncSessionGroup(AsyncHandle):
    """Many sessions of one model and batch size, stepped together: one message for all of them.

    Made by `AsyncClient.open_sessions`. The members are ordinary sessions on the server, each with its own
    revision. At most one change of a group is under way at a time. Belongs to the event loop of its
    client; not for use from other threads.

    **After an error.** A change of a group may fail for some members only. When all members are settled, the
    error of the first failed member is raised: its `.failures` maps the index of each failed member to its
    error, its `.outputs` holds the outputs of the others (zeros for the failed), and the revisions of the
    others are taken over. The same call with the same arguments again finishes that change: members that
    have it answer with their first answer, the others apply it. A call with other arguments is a new
    change of every member. To give up a change of unknown outcome, call `get_state`, which waits for each
    member's turn, then `refresh`, which does not: alone it may return revisions from before a change that is
    still under way and lands afterwards.

    **At the end of an `async with` block** a group opened without ids is closed; a named one lives on.

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

    def __init__(self, client: AsyncClient, core: GroupCore, *, owned: bool) -> None:
        super().__init__(client, owned)
        self._group = core

    def __len__(self) -> int:
        return len(self._group.tracker.ids)

    @property
    def ids(self) -> tuple[str, ...]:
        """The members' ids, in their order."""
        return self._group.tracker.ids

    @property
    def model(self) -> str:
        """Name of their model."""
        return self._group.tracker.model

    @property
    def batch_size(self) -> int:
        """Rows of each member."""
        return self._group.tracker.batch_size

    @property
    def revisions(self) -> Counts:
        """Changes of each member so far, (n,) uint64; a copy."""
        return self._group.tracker.revisions.copy()

    @property
    def positions(self) -> Counts:
        """Time steps of each member since its last reset, (n,) uint64; a copy."""
        return self._group.tracker.positions.copy()

    async def step(
        self, x: Inputs, outputs: OutputSelection = "all", *, timeout_s: float | None = None
    ) -> Outputs:
        """Advances every member by one time step, or by T.

        Arguments, result and errors are those of `SessionGroup.step`.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     (await group.step(np.ones((4, 10, 3), np.float32), outputs="last")).shape
            (4, 1)
        """
        deadline = self._client._core.deadline(timeout_s)
        async with self._changing(deadline):
            return await self._client._run(self._group.step(x, outputs, deadline))

    async def reset_states(
        self,
        states: States | None = None,
        rows: Rows | None = None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        """Sets the whole state of every member, or of some.

        Arguments, result and errors are those of `SessionGroup.reset_states`.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     await group.reset_states(rows=[0, 3])
            ...     group.revisions.tolist()
            [1, 0, 0, 1]
        """
        deadline = self._client._core.deadline(timeout_s)
        async with self._changing(deadline):
            await self._client._run(self._group.reset_states(states, rows, deadline))

    async def get_state(self, *, timeout_s: float | None = None) -> State:
        """A copy of the members' states, one after the other: (n * batch_size, ...) each.

        Reads one member after the other, one call each.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     (await group.get_state()).batch_size
            4
        """
        self._check_open()
        return await self._client._run(self._group.get_state(self._client._core.deadline(timeout_s)))

    async def refresh(self, *, timeout_s: float | None = None) -> None:
        """Takes over the server's revisions and positions, and drops a change left unfinished.

        Example:
            >>> async with client.open_sessions("forecast", 4) as group:
            ...     await group.refresh()
        """
        deadline = self._client._core.deadline(timeout_s)
        async with self._changing(deadline):
            await self._client._run(self._group.refresh(deadline))

    async def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes all members on the server. Closing again does nothing.

        Example:
            >>> group = await client.open_sessions("forecast", 4)
            >>> await group.close()
        """
        if not self._closed:
            await self._client._run(self._group.close(self._client._core.deadline(timeout_s)))
            self._closed = True

    def __repr__(self) -> str:
        return f"AsyncSessionGroup({len(self)} sessions, model={self.model!r}, batch_size={self.batch_size})"
