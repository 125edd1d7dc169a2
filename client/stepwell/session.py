"""A session of the sync client, and the base class that it shares with a group of sessions."""

from __future__ import annotations

import abc
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
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
from stepwell._tape.recording import Recording
from stepwell._tape.tape import RecordedStates, Tape
from stepwell._transport.retry import Deadline
from stepwell._watch.core import SessionWatch
from stepwell._watch.events import SessionEvent
from stepwell._watch.record import WatchedReel, is_watch, recorded
from stepwell._watch.watch import Watch
from stepwell.errors import DeadlineExceededError, InvalidInputError, StepwellError

T = TypeVar("T")


@end_here
class Handle(BaseHandle[Driver], abc.ABC):
    """The common part of a session and a group: one change at a time, and closing."""

    _changer: int | None = None
    """The thread whose change is running."""

    def _change(self, flow: Flow[T], deadline: Deadline, members: Some | None = None) -> T:
        """Runs a change, one at a time. Waiting for the locks counts against the time limit.

        Ctrl-C may interrupt any call, also that of `release`: then it is called again.
        """
        me = threading.get_ident()
        if self._changer == me:
            raise InvalidInputError("an event hook must not change the session whose change called it")
        self._check_open()
        holder = ThreadHolder(self._members if members is None else members)
        try:
            if not self._locks.acquire(holder):
                self._wait(holder, deadline)
            self._changer = me
            return self._driver.run(flow)
        finally:
            if self._changer == me:
                self._changer = None
            try:
                self._locks.release(holder)
            except BaseException:
                self._locks.release(holder)
                raise

    def _wait(self, holder: ThreadHolder, deadline: Deadline) -> None:
        if not holder.wait(deadline.remaining_s()):
            raise DeadlineExceededError(
                "the time limit passed while another change of this session was active",
                outcome="not_applied",
            )
        self._check_open()

    @abc.abstractmethod
    def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes the session or sessions of this handle."""

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
    """One user's conversation with one model: a recurrent state on the server that you advance step by step.

    `Client.open_session` and `fork` return sessions, and so does indexing a group. A session runs one change (step or
    reset) at a time; a second thread waits, within its time limit. Safe to use from many threads; not fork-safe.

    **After an error.** The `outcome` of `DeadlineExceededError` and `UnavailableError` is "not_applied" or "unknown".
    In both cases repeat the same call with the same arguments. That completes the change, and the server applies it
    once, however often you send it. A call with other arguments is a new change. If the unfinished change was applied
    after all, the new one raises `RevisionConflictError`; call `refresh` to adopt the server's revision. The same
    holds after Ctrl-C.

    To abandon a change of unknown outcome, call `get_state`, then `refresh`. `get_state` waits for the changes that
    the server has already received. `refresh` alone does not wait: if the change is still active on the server, it
    lands afterwards, and your next change raises `RevisionConflictError`. After a broken connection, a request may
    arrive even later. Only repeating the same call settles its outcome for certain.

    **At the end of a with block** a session opened without an id is closed. A named session stays open.

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
        """Advances the session by one time step, or by T. The server applies the whole call or nothing of it.

        Args:
            x: Array of shape (batch_size, features...) for one time step, or (batch_size, T, features...) for T; a
                mapping of name to array for several inputs. Other float types are cast to the model's. With `rows`,
                the first axis has len(rows) entries.
            outputs: Time steps to return: "all", "last" or "none"; or the names of the outputs to return.
            time: If `outputs` has names, the time steps of these outputs to return: "all" or "last".
            reset: Rows that restart: booleans of shape (batch_size,), or (batch_size, T) for every time step. Where
                it is true, the row is set to the model's initial state before that time step. Resets and steps are
                one change.
            rows: Rows to advance, as indexes or as booleans of shape (batch_size,); the others keep their state. x,
                reset, outputs and states have these rows, in this order. None: all rows.
            states: "last" also returns the states after the last time step, "all" those after every time step.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Returns:
            An array of shape (batch_size, T, ...) if the model returns sequences and x has a time axis, otherwise
            (batch_size, ...). A dict by name if the model has several outputs or `outputs` has names. None if
            `outputs` is "none". A `Trace` of the outputs and the states if `states` is given.

        Raises:
            InvalidInputError: An input breaks a rule; nothing changed.
            RevisionConflictError: Someone else changed the session; nothing changed. See `refresh`.
            SessionGoneError: The session no longer exists; the subclass tells why.
            DeadlineExceededError: The time limit passed. See `outcome`, and the class above.
            UnavailableError: The server cannot be reached. See `outcome`, and the class above.

        Example:
            >>> session.step(np.ones((1, 10, 3), np.float32), outputs="last").shape
            (1, 1)
            >>> session.step(np.ones((1, 10, 3), np.float32), reset=[True], outputs="none")
            >>> session.position
            10
        """
        deadline = self._core.deadline(timeout_s)
        change = self._core.step_change(self._tracker, x, outputs, time, reset, rows, states)
        return self._change(self._core.step(self._tracker, change, deadline, self._reels), deadline)

    def trace(
        self,
        x: Inputs,
        reset: Mask | None = None,
        rows: Rows | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Trace:
        """Advances the session and returns the outputs and the state after every time step.

        This is one change, like any other step, and a retry returns the same states. The reply must fit into one
        message (`max_message_bytes`); otherwise the call is rejected and nothing changes. Trace a long sequence in
        pieces.

        Args:
            x: As in `step`.
            reset: As in `step`.
            rows: As in `step`.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Raises:
            StepwellError: As in `step`.

        Example:
            >>> trace = session.trace(np.ones((1, 10, 3), np.float32))
            >>> {array.shape[:2] for array in trace.states.values()}, trace.position == session.position
            ({(1, 10)}, True)
        """
        return self.step(x, reset=reset, rows=rows, states="all", timeout_s=timeout_s)

    def watch(
        self,
        *,
        inputs: bool = False,
        outputs: bool = False,
        states: bool = False,
        state_names: Iterable[str] | None = None,
        every: int = 1,
        interval_s: float | None = None,
    ) -> Watch[SessionEvent]:
        """Watches this session: reports its changes, whoever makes them.

        Arguments and result are those of `Client.watch_sessions`.

        Example:
            >>> with session.watch(outputs=True, every=2) as watch:
            ...     first = next(watch)
            ...     for _ in range(4):
            ...         y = session.step(np.ones((1, 3), np.float32))
            ...     next(watch).skipped_revisions
            1
        """
        self._check_open()
        core = SessionWatch(
            self._core,
            [self.id],
            inputs=inputs,
            outputs=outputs,
            states=states,
            state_names=state_names,
            every=every,
            interval_s=interval_s,
        )
        return Watch(self._driver, core)

    def record(
        self,
        states: RecordedStates = True,
        *,
        max_steps: int | None = None,
        source: Literal["replies", "watch"] = "replies",
    ) -> AbstractContextManager[Tape]:
        """Records the steps and resets of this handle while a `with` block runs.

        The tape has the inputs, outputs and states of each time step. Changes that others make, also by another
        handle of this session, are not on it: it marks a gap. A change of unknown outcome is recorded when its
        repetition succeeds. Several tapes may record at once.

        Your calls return what they return without a tape. With `states=True`, each step asks the server for the states
        after all its time steps, as `trace` does, and costs as much. If the reply would exceed the size of a message,
        the server rejects the step and nothing changes: step in pieces, or use `states="last"`.

        With `source="watch"` the tape records the changes that anyone makes, as `watch` reports them. A step of several
        time steps then has values only at its last one. Changes that the watch does not report leave a gap. The end of
        the block waits for the changes that this handle knows of, and raises the error of a watch that failed. If the
        session ends, recording stops.

        Args:
            states: True keeps the states after every time step, "last" those after the last time step of each call,
                False none.
            max_steps: Time steps that the tape keeps, at least 1; it drops the oldest ones beyond. None: all, until
                memory ends.
            source: "replies" records the changes of this handle, "watch" those of anyone.

        Raises:
            InvalidInputError: An argument breaks a rule.
            StepwellError: The watch failed.

        Example:
            >>> with session.record(max_steps=1000) as tape:
            ...     y = session.step(np.ones((1, 10, 3), np.float32))
            ...     session.reset_states()
            ...     y = session.step(np.ones((1, 3), np.float32))
            >>> len(tape), tape.positions[-1].item(), [mark.kind for mark in tape.marks]
            (11, 1, ['reset'])
        """
        if is_watch(source):
            self._check_open()
            return Recording(recorded(self._driver, WatchedReel(self._tracker, states, max_steps)))
        return self._recording(states, max_steps, self._subject)

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
            states: A mapping of name to array, a list of arrays in the model's order, or a `State`. Arrays have the
                shape (batch_size, ...), or (len(rows), ...) with `rows`. None: the model's initial state.
            rows: Rows to set, as indexes without repetition or as booleans of shape (batch_size,). None: all rows,
                which also sets the position. An empty list changes nothing.
            position: Position of the session afterwards, at most 2**61. Use it when you set all rows to states that
                were read at that position.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

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
        self._change(
            self._core.reset_states(self._tracker, states, rows, deadline, position, self._reels), deadline
        )

    def get_state(self, *, timeout_s: float | None = None) -> State:
        """Returns a copy of the state, after all changes that the server received before this call.

        Args:
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Returns:
            A `State` with tensors of shape (batch_size, ...), its revision and its position.

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
        """Opens a new session with the state, revision and position of this one. The two then change independently.

        Args:
            session_id: Id of the new session; it must not be in use. None: the server creates one.
            max_idle_s: Idle limit of the new session, in seconds, as in `Client.open_session`. It does not inherit
                the limit of this one.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

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
        """Adopts the server's revision and position, and drops a change that an error left unfinished.

        Example:
            >>> session.refresh()
            >>> session.revision == client.session_info(session.id).revision
            True
        """
        deadline = self._core.deadline(timeout_s)
        self._change(self._core.refresh(self._tracker, deadline), deadline)

    def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes the session on the server. Closing it again, or after it expired, does nothing.

        Example:
            >>> session = client.open_session("forecast")
            >>> session.close()
        """
        if not self._closed:
            self._driver.run(self._core.close(self._tracker, self._core.deadline(timeout_s)))
            self._closed = True
