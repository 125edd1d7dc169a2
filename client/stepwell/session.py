"""A session of the sync client, and what it has in common with a group of sessions."""

from __future__ import annotations

import abc
import threading
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from stepwell._base.flow import Flow
from stepwell._base.tracebacks import end_here
from stepwell._core.driver import Driver
from stepwell._core.handles import ALONE, BaseHandle, SessionFacts
from stepwell._core.locks import Locks, Some, ThreadHolder
from stepwell._core.tracker import SessionTracker
from stepwell._state.infos import Inputs, Mask, Outputs, OutputSelection, Rows, StateSelection, TimeSelection
from stepwell._state.state import State, States
from stepwell._state.trace import Trace
from stepwell._transport.retry import Deadline
from stepwell.errors import DeadlineExceededError, InvalidInputError, StepwellError

T = TypeVar("T")


@end_here
class Handle(BaseHandle[Driver], abc.ABC):
    """What a session and a group have in common: one change at a time, and an end."""

    _changer: int | None = None
    """The thread whose change is running."""

    def _change(self, flow: Flow[T], deadline: Deadline, members: Some | None = None) -> T:
        """Runs a change, one at a time; waiting for the locks counts against the time limit.

        An interrupt may arrive at any call, that of `release` included: then it is called again.
        """
        me = threading.get_ident()
        if self._changer == me:
            raise InvalidInputError(
                "a change must not be made by an event hook of a change of the same session"
            )
        self._check_open()
        holder = ThreadHolder(self._members if members is None else members)
        try:
            if not self._locks.acquire(holder) and not holder.wait(deadline.remaining_s()):
                raise DeadlineExceededError(
                    "the time limit passed while another change of this session was under way",
                    outcome="not_applied",
                )
            self._changer = me
            self._check_open()
            return self._driver.run(flow)
        finally:
            if self._changer == me:
                self._changer = None
            try:
                self._locks.release(holder)
            except BaseException:
                self._locks.release(holder)
                raise

    @abc.abstractmethod
    def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes what it stands for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._owned:
            return
        try:
            self.close()
        except StepwellError as closing:
            if error is None:
                raise
            error.add_note(f"and then closing the session failed: {closing}")


@end_here
class Session(SessionFacts, Handle):
    """One user's conversation with one model: a recurrent state on the server, advanced step by step.

    Made by `Client.open_session`, by `fork`, and by a group for one of its members. At most one change (step or reset) of a session is under
    way at a time: a second thread waits for its turn, within its time limit. Safe to use from many
    threads; not fork-safe.

    **After an error.** `DeadlineExceededError` and `UnavailableError` say in `.outcome` whether the change
    was "not_applied" or is "unknown". In both cases make the same call with the same arguments again: it
    finishes that change, and it is applied once, however often it was sent. A call with other arguments is
    a new change; if the unfinished one did get through, it raises `RevisionConflictError`, and `refresh`
    takes over the server's revision. The same holds after Ctrl-C.

    To give up a change of unknown outcome, call `get_state`, then `refresh`. `refresh` alone does not wait:
    while the change is still under way on the server it returns the old revision, and the change lands
    afterwards, so that the next one raises `RevisionConflictError` after all. `get_state` waits for its turn,
    behind the changes that the server has received. Where the connection broke a request may be received later
    still; the same call again is what settles it for certain.

    **At the end of a `with` block** a session opened without an id is closed; a named one lives on.

    Example:
        >>> with client.open_session("forecast") as session:
        ...     y = session.step(np.ones((1, 3), np.float32))
        ...     y.shape, session.revision, session.position
        ((1, 1), 1, 1)
    """

    def __init__(
        self,
        driver: Driver,
        tracker: SessionTracker,
        *,
        owned: bool,
        locks: Locks | None = None,
        members: Some = ALONE,
        parent: BaseHandle[Any] | None = None,
    ) -> None:
        super().__init__(driver, owned, locks or Locks(1), members, parent)
        self._tracker = tracker

    @overload
    def step(
        self,
        x: Inputs,
        outputs: OutputSelection = "all",
        *,
        time: TimeSelection = "all",
        reset: Mask | None = None,
        rows: Rows | None = None,
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
        rows: Rows | None = None,
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
        rows: Rows | None = None,
        states: StateSelection = "none",
        timeout_s: float | None = None,
    ) -> Outputs | Trace:
        """Advances the session by one time step, or by T: whole or not at all.

        Args:
            x: (batch_size, features...) for one time step, (batch_size, T, features...) for T; a mapping of
                name to array for several inputs. Other float types are cast to the model's. With rows, only
                theirs: (len(rows), ...).
            outputs: "all" time steps, the "last", or "none"; or a list of names: only these outputs.
            time: With names, "all" their time steps or the "last".
            reset: Rows that begin anew: booleans of shape (batch_size,), or (batch_size, T) for every time
                step. Where it is true, the row is set to the model's initial state before that time step.
                All of it is one change.
            rows: Rows that advance, as indexes or as booleans of shape (batch_size,); the others keep their
                state. x, reset, outputs and states are theirs, in this order. None: all.
            states: "last": the states after the last time step come back too, "all": after every one.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Returns:
            (batch_size, T, ...) where the model returns sequences and x had T, else (batch_size, ...). A
            dict by name if the model has several outputs, or they were asked for by name; None with "none".
            A `Trace` of it and the states where these are asked for.

        Raises:
            InvalidInputError: An input breaks a rule; nothing changed.
            RevisionConflictError: Someone else changed the session; nothing changed. See `refresh`.
            SessionNotFoundError, SessionExpiredError, SessionLostError: It is gone, and why.
            DeadlineExceededError, UnavailableError: See `.outcome` and the class.

        Example:
            >>> session.step(np.ones((1, 10, 3), np.float32), outputs="last").shape
            (1, 1)
            >>> session.step(np.ones((1, 10, 3), np.float32), reset=[True], outputs="none")
            >>> session.position
            10
        """
        deadline = self._core.deadline(timeout_s)
        change = self._core.step_change(self._tracker, x, outputs, time, reset, rows, states)
        return self._change(self._core.step(self._tracker, change, deadline), deadline)

    def trace(
        self,
        x: Inputs,
        reset: Mask | None = None,
        rows: Rows | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Trace:
        """Advances the session, and returns the state after every time step with the outputs.

        It is a step like any other, one change, and a retry gets the same states. The reply must fit into one
        message (max_message_bytes), else it is refused and nothing changes: trace a long sequence in pieces.

        Args:
            x: As in `step`.
            reset: As in `step`.
            rows: As in `step`.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Raises:
            StepwellError: As in `step`.

        Example:
            >>> trace = session.trace(np.ones((1, 10, 3), np.float32))
            >>> {array.shape[:2] for array in trace.states.values()}, trace.position == session.position
            ({(1, 10)}, True)
        """
        return self.step(x, reset=reset, rows=rows, states="all", timeout_s=timeout_s)

    def reset_states(
        self,
        states: States | None = None,
        rows: Rows | None = None,
        *,
        position: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        """Sets the state, or some rows of it.

        Args:
            states: Mapping of name to array, list of arrays in the model's order, or a `State`; each
                (batch_size, ...), or (len(rows), ...) with rows. None: the model's initial state.
            rows: Rows to set, as indexes, each at most once, or as booleans of shape (batch_size,). None: all,
                and the position becomes `position`. An empty list sets nothing and is no change.
            position: The session's position afterwards, where all rows are set to states that a session had at that
                position; at most 2**61.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Raises:
            InvalidInputError: A state or a row breaks a rule; nothing changed.
            ModelMismatchError: The state belongs to another model.
            RevisionConflictError: Someone else changed the session; nothing changed.

        Example:
            >>> session.reset_states()
            >>> session.reset_states({name: np.ones_like(h) for name, h in session.get_state().items()})
            >>> session.position
            0
        """
        deadline = self._core.deadline(timeout_s)
        self._change(self._core.reset_states(self._tracker, states, rows, deadline, position), deadline)

    def get_state(self, *, timeout_s: float | None = None) -> State:
        """A copy of the state, after the changes received before.

        Example:
            >>> state = session.get_state()
            >>> state.revision == session.revision
            True
        """
        self._check_open()
        return self._driver.run(self._core.get_state(self.id, self._core.deadline(timeout_s)))

    def fork(
        self,
        session_id: str | None = None,
        *,
        max_idle_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Session:
        """A new session with the state, revision and position of this one; from then on they are apart.

        Args:
            session_id: Id of the new session, not in use. None: the server makes one.
            max_idle_s: As in `Client.open_session`; the limit of this one is not taken over.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Raises:
            SessionExistsError: The id is in use.

        Example:
            >>> with session.fork() as twin:
            ...     twin.id != session.id, twin.position == session.position
            (True, True)
        """
        self._check_open()
        tracker = self._driver.run(
            self._core.fork(self._tracker, session_id, max_idle_s, self._core.deadline(timeout_s))
        )
        return Session(self._driver, tracker, owned=session_id is None)

    def refresh(self, *, timeout_s: float | None = None) -> None:
        """Takes over the server's revision and position, and drops a change left unfinished by an error.

        Example:
            >>> session.refresh()
            >>> session.revision == client.session_info(session.id).revision
            True
        """
        deadline = self._core.deadline(timeout_s)
        self._change(self._core.refresh(self._tracker, deadline), deadline)

    def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes the session on the server. Closing again, or a session that is gone, does nothing.

        Example:
            >>> session = client.open_session("forecast")
            >>> session.close()
        """
        if not self._closed:
            self._driver.run(self._core.close(self._tracker, self._core.deadline(timeout_s)))
            self._closed = True
