"""A group of sessions of the sync client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, overload

import numpy as np

from stepwell._base.tracebacks import end_here
from stepwell._core.driver import Driver
from stepwell._core.group_core import GroupCore
from stepwell._core.handles import BaseHandle, GroupFacts
from stepwell._state.infos import Inputs, Mask, Outputs, OutputSelection, Rows, StateSelection, TimeSelection
from stepwell._state.state import State, States
from stepwell._state.trace import Trace
from stepwell._tape.tape import RecordedStates, Tape
from stepwell.session import Handle, Session


@end_here
class SessionGroup(GroupFacts, Handle):
    """Many sessions of one model and batch size that you step together, with one message for all of them.

    `Client.open_sessions` and `fork` return groups. The members are ordinary sessions on the server, each with its
    own revision. A member runs one change at a time: a change waits, within its time limit, until no other change of
    its members is active. Changes of different members run concurrently. Safe to use from many threads; not
    fork-safe.

    **Members.** `members` are indexes without repetition, or booleans, one for each member. `group[i]` is an ordinary
    `Session`. `group[2:5]`, `group[mask]` and `group[[0, 3]]` are groups of these members, in this order. You can
    also iterate over a group. All of them are views: they share revisions, positions and locks with their group, and
    end when it is closed.

    **After an error.** A change may fail for some members only. Once the outcome of every member is known, the error
    of the first failed member is raised. Its `failures` maps the index of each failed member to its error. Its
    `outputs` has the outputs of the others, and zeros for the failed members. The revisions of the others are up to
    date.

    Repeat the same call for the same members with the same arguments to complete the change. Members that applied it
    return their first answer, and the others apply it. Any other change of one of these members is a new change, and
    abandons the unfinished one. To abandon a change of unknown outcome, call `refresh`, which waits for the changes
    of each member that the server has already received.

    **At the end of a with block** a group opened without ids is closed. A group with ids, or a view, stays open.

    Example:
        >>> with client.open_sessions("forecast", 8) as group:
        ...     y = group.step(np.ones((8, 3), np.float32))
        ...     y.shape, len(group), group.revisions.tolist()
        ((8, 1), 8, [1, 1, 1, 1, 1, 1, 1, 1])
    """

    def __init__(
        self, driver: Driver, core: GroupCore, *, owned: bool, parent: BaseHandle[Any] | None = None
    ) -> None:
        super().__init__(driver, owned, core.tracker.locks, core.members.where, parent)
        self._group = core

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Session: ...

    @overload
    def __getitem__(self, index: slice | Rows) -> SessionGroup: ...

    def __getitem__(self, index: int | np.integer[Any] | slice | Rows) -> Session | SessionGroup:
        """Returns one member as a `Session`, or a view of some members, in their order.

        Example:
            >>> with client.open_sessions("forecast", 4) as group:
            ...     y = group[2].step(np.ones((1, 3), np.float32))
            ...     y = group[1:3].step(np.ones((2, 3), np.float32))
            ...     (
            ...         group.revisions.tolist(),
            ...         group[np.array([True, False, False, True])].ids
            ...         == (
            ...             group.ids[0],
            ...             group.ids[3],
            ...         ),
            ...     )
            ([0, 1, 2, 0], True)
        """
        if not isinstance(index, int | np.integer):
            return SessionGroup(self._driver, self._group.view(index), owned=False, parent=self._root)
        place = self._group.place(index)
        tracker, locks = self._group.member(place), self._group.tracker.locks
        return Session(self._driver, tracker, owned=False, locks=locks, members=place, parent=self._root)

    def __iter__(self) -> Iterator[Session]:
        """Iterates over the members, in their order."""
        return (self[i] for i in range(len(self)))

    @property
    def _root(self) -> BaseHandle[Any]:
        return self._parent or self

    @overload
    def step(
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
    def step(
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

    def step(
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

        Args:
            x: Array of shape (n * batch_size, features...) or (n * batch_size, T, features...), with the rows of one
                member after those of the other; a mapping of name to array for several inputs. With `members`, it has
                the rows of these members only, in that order.
            outputs: Time steps to return: "all", "last" or "none"; or the names of the outputs to return.
            time: If `outputs` has names, the time steps of these outputs to return: "all" or "last".
            reset: Members or rows that restart: booleans, one for each member or for each row of x, or of shape (...,
                T) for every time step. Where it is true, the initial state is set before that time step. Resets and
                steps are one change.
            members: Members to advance, as indexes or as booleans of shape (n,); the others keep their state. None:
                all members. An empty selection changes nothing and returns outputs without rows.
            states: "last" also returns the states after the last time step, "all" those after every time step.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Returns:
            The outputs of one member after those of the other, (n * batch_size, ...). A dict by name if the model has
            several outputs or `outputs` has names. None if `outputs` is "none". A `Trace` of the outputs and the
            states if `states` is given.

        Raises:
            StepwellError: The error of the first failed member; see the class above.

        Example:
            >>> group = client.open_sessions("forecast", 4)
            >>> group.step(np.ones((4, 10, 3), np.float32), outputs="last").shape
            (4, 1)
            >>> done, ready = np.array([True, False]), [3, 0]
            >>> group.step(np.ones((2, 3), np.float32), reset=done, members=ready).shape
            (2, 1)
            >>> group.positions.tolist()
            [11, 10, 10, 1]
            >>> group.close()
        """
        deadline = self._core.deadline(timeout_s)
        some = self._group.some(members)
        change = self._group.step_change(some, x, outputs, time, reset, states)
        return self._change(self._group.step(some, change, deadline, self._reels), deadline, some.where)

    def trace(
        self,
        x: Inputs,
        reset: Mask | None = None,
        members: Rows | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Trace:
        """Advances members and returns the outputs and their states after every time step; see `Session.trace`.

        Example:
            >>> with client.open_sessions("forecast", 4) as group:
            ...     trace = group.trace(np.ones((4, 10, 3), np.float32))
            ...     {array.shape[:2] for array in trace.states.values()}
            {(4, 10)}
        """
        return self.step(x, reset=reset, members=members, states="all", timeout_s=timeout_s)

    def record(
        self, states: RecordedStates = True, *, max_steps: int | None = None
    ) -> AbstractContextManager[Tape]:
        """Records the steps and resets of this group while a `with` block runs, as `Session.record` does.

        Rows of the tape are those of the members, one after the other. Each step of the group is one or more time
        steps of the tape; members that it did not step have NaN there. Changes through `group[i]` or another view are
        not on the tape: it marks a gap. A step that failed for some members is recorded when its repetition succeeds.

        Args:
            states: As in `Session.record`.
            max_steps: As in `Session.record`.

        Raises:
            InvalidInputError: An argument breaks a rule.

        Example:
            >>> with client.open_sessions("forecast", 4) as group, group.record() as tape:
            ...     y = group.step(np.ones((4, 10, 3), np.float32))
            >>> {array.shape for array in tape.inputs.values()}, tape.revisions.shape
            ({(10, 4, 3)}, (10, 4))
        """
        return self._recording(states, max_steps, self._subject)

    def reset_states(
        self,
        states: States | None = None,
        rows: Rows | None = None,
        *,
        members: Rows | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Sets the whole state of every member, or of some members.

        Args:
            states: As in `Session.reset_states`, with arrays of shape (n * batch_size, ...), or (len(members) *
                batch_size, ...). None: the model's initial state.
            rows: Another name for `members`.
            members: Members to reset, as indexes without repetition or as booleans of shape (n,). None: all members.
                An empty list resets none.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Raises:
            StepwellError: The error of the first failed member; see the class above.

        Example:
            >>> group = client.open_sessions("forecast", 4)
            >>> group.reset_states(members=[0, 3])
            >>> group.revisions.tolist()
            [1, 0, 0, 1]
            >>> group.reset_states(group.get_states(members=[0]), members=[2])
            >>> group.close()
        """
        deadline = self._core.deadline(timeout_s)
        some = self._group.some_or_rows(members, rows)
        self._change(self._group.reset_states(some, states, deadline, self._reels), deadline, some.where)

    def get_states(self, members: Rows | None = None, *, timeout_s: float | None = None) -> State:
        """Returns a copy of the members' states, one after the other, with tensors of shape (n * batch_size, ...).

        Each state is read after the changes of that member that the server has received. This takes one call, or a
        few if the states do not fit into one message. If some members cannot be read, `outputs` of the error has the
        states of the others by name, with zeros for the failed members.

        Args:
            members: Members to read, as indexes without repetition or as booleans of shape (n,). None: all members.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Raises:
            StepwellError: The error of the first failed member; see the class above.

        Example:
            >>> with client.open_sessions("forecast", 4) as group:
            ...     group.get_states().batch_size, group.get_states(members=[2, 0]).batch_size
            (4, 2)
        """
        self._check_open()
        some = self._group.some(members)
        return self._driver.run(self._group.get_states(some, self._core.deadline(timeout_s)))

    def get_state(self, *, timeout_s: float | None = None) -> State:
        """Returns the states of all members, as `get_states` does.

        Example:
            >>> with client.open_sessions("forecast", 4) as group:
            ...     group.get_state() == group.get_states()
            True
        """
        return self.get_states(timeout_s=timeout_s)

    def fork(
        self,
        session_ids: Sequence[str] | None = None,
        *,
        max_idle_s: float | None = None,
        timeout_s: float | None = None,
    ) -> SessionGroup:
        """Opens a new group with the members' states, revisions and positions. The call copies all of them or none.

        Each member is copied after the changes of it that the server has received.

        Args:
            session_ids: Ids of the new sessions, one for each member, none of them in use. None: the server creates
                them, and the end of the new group's `with` block closes the sessions.
            max_idle_s: Idle limit of each new session, in seconds, as in `Client.open_session`. They do not inherit
                the limits of the members.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Raises:
            SessionExistsError: One of the ids is in use.
            StepwellError: A member cannot be copied; none was.

        Example:
            >>> with client.open_sessions("forecast", 4) as group, group.fork() as twins:
            ...     y = twins.step(np.ones((4, 3), np.float32))
            ...     twins.revisions.tolist(), group.revisions.tolist()
            ([1, 1, 1, 1], [0, 0, 0, 0])
        """
        self._check_open()
        flow = self._group.fork(session_ids, max_idle_s, self._core.deadline(timeout_s))
        core = GroupCore(self._core, self._driver.run(flow))
        return SessionGroup(self._driver, core, owned=session_ids is None)

    def refresh(self, *, timeout_s: float | None = None) -> None:
        """Adopts the server's revisions and positions, and drops changes that an error left unfinished.

        Each revision is read after the changes of that member that the server has received. If some members no longer
        exist, those of the others are adopted all the same.

        Raises:
            StepwellError: The error of the first failed member; see the class above.

        Example:
            >>> group = client.open_sessions("forecast", 4)
            >>> group.refresh()
            >>> group.close()
        """
        deadline = self._core.deadline(timeout_s)
        self._change(self._group.refresh(deadline), deadline)

    def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes all members on the server; for a view, the members of the view. Closing again does nothing.

        Example:
            >>> client.open_sessions("forecast", 4).close()
        """
        if not self._closed:
            self._driver.run(self._group.close(self._core.deadline(timeout_s)))
            self._closed = True
