"""A group of sessions of the sync client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepwell._frames import Counts
from stepwell._group_core import GroupCore
from stepwell._state import State, States
from stepwell._types import Inputs, Outputs, OutputSelection, Rows
from stepwell.session import Handle

if TYPE_CHECKING:
    from stepwell.client import Client


class SessionGroup(Handle):
    """Many sessions of one model and batch size, stepped together: one message for all of them.

    Made by `Client.open_sessions`. The members are ordinary sessions on the server, each with its own
    revision. At most one change of a group is under way at a time. Safe to use from many threads; not
    fork-safe.

    **After an error.** A change of a group may fail for some members only. When all members are settled, the
    error of the first failed member is raised: its `.failures` maps the index of each failed member to its
    error, its `.outputs` holds the outputs of the others (zeros for the failed), and the revisions of the
    others are taken over. The same call with the same arguments again finishes that change: members that
    have it answer with their first answer, the others apply it. A call with other arguments is a new
    change of every member. To give up a change of unknown outcome, call `get_state`, which waits for each
    member's turn, then `refresh`, which does not: alone it may return revisions from before a change that is
    still under way and lands afterwards.

    **At the end of a `with` block** a group opened without ids is closed; a named one lives on.

    Example:
        >>> with client.open_sessions("forecast", 8) as group:
        ...     y = group.step(np.ones((8, 3), np.float32))
        ...     y.shape, len(group), group.revisions.tolist()
        ((8, 1), 8, [1, 1, 1, 1, 1, 1, 1, 1])
    """

    def __init__(self, client: Client, core: GroupCore, *, owned: bool) -> None:
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

    def step(self, x: Inputs, outputs: OutputSelection = "all", *, timeout_s: float | None = None) -> Outputs:
        """Advances every member by one time step, or by T.

        Args:
            x: (n * batch_size, features...) or (n * batch_size, T, features...), the members' rows one after
                the other; a mapping of name to array for several inputs.
            outputs: "all" time steps, the "last", or "none".
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Returns:
            The members' outputs one after the other, (n * batch_size, ...). A dict by name if the model has
            several outputs; None with "none".

        Raises:
            StepwellError: The first failed member's error; see the class.

        Example:
            >>> group = client.open_sessions("forecast", 4)
            >>> group.step(np.ones((4, 10, 3), np.float32), outputs="last").shape
            (4, 1)
            >>> group.close()
        """
        deadline = self._client._core.deadline(timeout_s)
        with self._changing(deadline):
            return self._client._run(self._group.step(x, outputs, deadline))

    def reset_states(
        self,
        states: States | None = None,
        rows: Rows | None = None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        """Sets the whole state of every member, or of some.

        Args:
            states: As in `Session.reset_states`, (n * batch_size, ...) each, or (len(rows) * batch_size, ...).
                None: the model's initial state.
            rows: Indexes of the members to reset, each at most once. None: all. An empty list resets none.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Raises:
            StepwellError: The first failed member's error; see the class.

        Example:
            >>> group = client.open_sessions("forecast", 4)
            >>> group.reset_states(rows=[0, 3])
            >>> group.revisions.tolist()
            [1, 0, 0, 1]
            >>> group.close()
        """
        deadline = self._client._core.deadline(timeout_s)
        with self._changing(deadline):
            self._client._run(self._group.reset_states(states, rows, deadline))

    def get_state(self, *, timeout_s: float | None = None) -> State:
        """A copy of the members' states, one after the other: (n * batch_size, ...) each.

        Reads one member after the other, one call each.

        Example:
            >>> group = client.open_sessions("forecast", 4)
            >>> group.get_state().batch_size
            4
            >>> group.close()
        """
        self._check_open()
        return self._client._run(self._group.get_state(self._client._core.deadline(timeout_s)))

    def refresh(self, *, timeout_s: float | None = None) -> None:
        """Takes over the server's revisions and positions, and drops a change left unfinished.

        Example:
            >>> group = client.open_sessions("forecast", 4)
            >>> group.refresh()
            >>> group.close()
        """
        deadline = self._client._core.deadline(timeout_s)
        with self._changing(deadline):
            self._client._run(self._group.refresh(deadline))

    def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes all members on the server. Closing again does nothing.

        Example:
            >>> client.open_sessions("forecast", 4).close()
        """
        if not self._closed:
            self._client._run(self._group.close(self._client._core.deadline(timeout_s)))
            self._closed = True

    def __repr__(self) -> str:
        return f"SessionGroup({len(self)} sessions, model={self.model!r}, batch_size={self.batch_size})"
