"""A group of sessions of the sync client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np

from stepwell._base.tracebacks import end_here
from stepwell._core.driver import Driver
from stepwell._core.group_core import GroupCore
from stepwell._core.handles import BaseHandle, GroupFacts
from stepwell._state.infos import Inputs, Mask, Outputs, OutputSelection, Rows, StateSelection, TimeSelection
from stepwell._state.state import State, States
from stepwell._state.trace import Trace
from stepwell.session import Handle, Session


@end_here
class SessionGroup(GroupFacts, Handle):
    """Many sessions of one model and batch size, stepped together: one message for all of them.

    Made by `Client.open_sessions`, and by `fork`. The members are ordinary sessions on the server, each with its
    own revision. At most one change of a member is under way at a time: a change waits until no other one of any
    of its members is, within its time limit; changes of different members go at the same time. Safe to use from
    many threads; not fork-safe.

    **Members.** `members` are indexes, each at most once, or booleans, one for each member. `group[i]` is an
    ordinary `Session`, `group[2:5]`, `group[mask]` and `group[[0, 3]]` are groups of these members in this order,
    and a group may be iterated over. They are views: they share revisions, positions and locks with the group they
    were taken from, whichever of them makes a change, and end when it is closed.

    **After an error.** A change of a group may fail for some members only. When all members are settled, the
    error of the first failed member is raised: its `.failures` maps the index of each failed member to its
    error, its `.outputs` holds the outputs of the others (zeros for the failed), and the revisions of the
    others are taken over. The same call for the same members with the same arguments again finishes that change:
    members that have it answer with their first answer, the others apply it. Any other change of one of them
    is a new one, and ends what was unfinished: the same call is then a new change of all its members. To give up a
    change of unknown outcome, call `refresh`, which waits for each member's turn, behind the changes that the
    server has received.

    **At the end of a `with` block** a group opened without ids is closed; a named one, or a view, lives on.

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
        """One member, or a view of some, in their order.

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
        """The members, in their order."""
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
        """Advances every member, or some, by one time step, or by T.

        Args:
            x: (n * batch_size, features...) or (n * batch_size, T, features...), the members' rows one after
                the other; a mapping of name to array for several inputs. With members, only theirs, in that order.
            outputs: "all" time steps, the "last", or "none"; or a list of names: only these outputs.
            time: With names, "all" their time steps or the "last".
            reset: Those that begin anew: booleans, one for each member or for each row that x has, or of shape
                (..., T) for every time step. Where it is true, the initial state is set before that time step.
                Reset and step are one change.
            members: Those that advance, as indexes or as booleans of shape (n,); the others keep their state.
                None: all. With none chosen nothing happens, and the outputs have no rows.
            states: "last": the states after the last time step come back too, "all": after every one.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Returns:
            The members' outputs one after the other, (n * batch_size, ...). A dict by name if the model has
            several outputs, or they were asked for by name; None with "none". A `Trace` of it and the states
            where these are asked for.

        Raises:
            StepwellError: The first failed member's error; see the class.

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
        return self._change(self._group.step(some, change, deadline), deadline, some.where)

    def trace(
        self,
        x: Inputs,
        reset: Mask | None = None,
        members: Rows | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Trace:
        """Advances members, and returns their states after every time step with the outputs; see `Session.trace`.

        Example:
            >>> with client.open_sessions("forecast", 4) as group:
            ...     trace = group.trace(np.ones((4, 10, 3), np.float32))
            ...     {array.shape[:2] for array in trace.states.values()}
            {(4, 10)}
        """
        return self.step(x, reset=reset, members=members, states="all", timeout_s=timeout_s)

    def reset_states(
        self,
        states: States | None = None,
        rows: Rows | None = None,
        *,
        members: Rows | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Sets the whole state of every member, or of some.

        Args:
            states: As in `Session.reset_states`, (n * batch_size, ...) each, or (len(members) * batch_size, ...).
                None: the model's initial state.
            rows: Another name of members.
            members: Those to reset, as indexes, each at most once, or as booleans of shape (n,). None: all. An
                empty list resets none.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Raises:
            StepwellError: The first failed member's error; see the class.

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
        self._change(self._group.reset_states(some, states, deadline), deadline, some.where)

    def get_states(self, members: Rows | None = None, *, timeout_s: float | None = None) -> State:
        """A copy of the members' states, one after the other: (n * batch_size, ...) each.

        Each is read after the changes that the server has received for it. It is one call, or a few if the states
        are more than a message holds. If some members cannot be read, the error's `.outputs` has the others'
        states by name (zeros for the failed).

        Args:
            members: Those to read, as indexes, each at most once, or as booleans of shape (n,). None: all.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Raises:
            StepwellError: The first failed member's error; see the class.

        Example:
            >>> with client.open_sessions("forecast", 4) as group:
            ...     group.get_states().batch_size, group.get_states(members=[2, 0]).batch_size
            (4, 2)
        """
        self._check_open()
        some = self._group.some(members)
        return self._driver.run(self._group.get_states(some, self._core.deadline(timeout_s)))

    def get_state(self, *, timeout_s: float | None = None) -> State:
        """As `get_states`, of all members.

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
        """A new group of sessions with the members' states, revisions and positions: all of them or none.

        Each member is copied after the changes that the server has received for it.

        Args:
            session_ids: Ids of the new sessions, one each, none of them in use. None: the server makes them, and
                the sessions are closed when the new group's `with` block ends.
            max_idle_s: Of each new session, as in `Client.open_session`; the limits of the members are not taken over.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

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
        """Takes over the server's revisions and positions, and drops changes left unfinished.

        Each member's are read after the changes that the server has received for it. Those of members that are there
        are taken over even if others are gone.

        Raises:
            StepwellError: The first failed member's error; see the class.

        Example:
            >>> group = client.open_sessions("forecast", 4)
            >>> group.refresh()
            >>> group.close()
        """
        deadline = self._core.deadline(timeout_s)
        self._change(self._group.refresh(deadline), deadline)

    def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes all members on the server: of a view, those of the view. Closing again does nothing.

        Example:
            >>> client.open_sessions("forecast", 4).close()
        """
        if not self._closed:
            self._driver.run(self._group.close(self._core.deadline(timeout_s)))
            self._closed = True
