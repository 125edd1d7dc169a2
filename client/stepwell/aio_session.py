"""A session of the async client, and the base class that it shares with a group; the same as `session`, awaited."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Awaitable, Coroutine, Generator, Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import CoroutineType, TracebackType
from typing import Any, Literal, Self, TypeVar, cast, overload

import numpy as np

from stepwell._base.flow import Flow
from stepwell._base.tracebacks import end_here, ends_here, shorten, shortens
from stepwell._base.unawaited import Unawaited
from stepwell._batching.coalesce import WaitingStep
from stepwell._batching.step_arguments import plain_form, selected_of
from stepwell._batching.steps import with_data
from stepwell._core.aio_driver import AsyncDriver
from stepwell._core.handles import ALONE, BaseHandle, SessionFacts
from stepwell._core.locks import Locks, Some, TaskHolder
from stepwell._core.tracker import SessionTracker
from stepwell._state.infos import Inputs, Mask, Outputs, OutputSelection, Rows, StateSelection, TimeSelection
from stepwell._state.state import State, States
from stepwell._state.trace import Trace
from stepwell._tape.tape import RecordedStates, Tape
from stepwell._transport.retry import Deadline
from stepwell._watch.aio_watch import AsyncWatch
from stepwell._watch.core import SessionWatch
from stepwell._watch.events import SessionEvent
from stepwell._watch.record import WatchedReel, is_watch, recorded_async
from stepwell.errors import DeadlineExceededError, InvalidInputError, StepwellError

H = TypeVar("H", bound="AsyncHandle")
T = TypeVar("T")


@end_here
class AsyncHandle(BaseHandle[AsyncDriver], abc.ABC):
    """The common part of a session and a group: one change at a time, and closing."""

    _changer: asyncio.Task[Any] | None = None
    """The task whose change is running."""

    async def _change(self, flow: Flow[T], deadline: Deadline, members: Some | None = None) -> T:
        """Runs a change, one at a time. Waiting for the locks counts against the time limit."""
        self._check_open()
        me = asyncio.current_task()
        holder = TaskHolder(self._members if members is None else members)
        try:
            if not self._locks.acquire(holder):
                await self._wait(holder, deadline)
            self._changer = me
            return await self._driver.run(flow)
        finally:
            if self._changer is me:
                self._changer = None
            self._locks.release(holder)

    async def _wait(self, holder: TaskHolder, deadline: Deadline) -> None:
        if self._changer is asyncio.current_task():
            raise InvalidInputError("an event hook must not change the session whose change called it")
        try:
            async with asyncio.timeout(deadline.grpc_timeout_s()):
                await holder.wait()
        except TimeoutError:
            raise DeadlineExceededError(
                "the time limit passed while another change of this session was active",
                outcome="not_applied",
            ) from None
        self._check_open()

    @abc.abstractmethod
    async def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes the session or sessions of this handle."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._owned:
            return
        try:
            await self.close()
        except StepwellError as closing:
            if error is None:
                raise
            error.add_note(f"and then closing the session failed: {closing}")


class Opening(Unawaited, Coroutine[Any, Any, H]):
    """A call that opens a session or group: `await` it, or use it directly in `async with`.

    Otherwise it is a coroutine, so you can create a task from it.
    """

    def __init__(self, opening: Coroutine[Any, Any, H], call: str) -> None:
        """`call` is the name of the public method, for messages."""
        cast(
            "CoroutineType[Any, Any, H]", opening
        ).__qualname__ = call  # Python's warning of an await that is missing
        self._opening = opening
        self._call = call
        self._handle: H | None = None

    def send(self, value: Any) -> Any:
        """Resumes the call; part of `Coroutine`."""
        return self._opening.send(value)

    def throw(self, *error: Any) -> Any:
        """Raises in the call; part of `Coroutine`."""
        return self._opening.throw(*error)

    def close(self) -> None:
        """Ends the call; part of `Coroutine`."""
        self._opening.close()

    def __await__(self) -> Generator[Any, None, H]:
        return self._opening.__await__()

    async def __aenter__(self) -> H:
        self._handle = await self._opening
        return await self._handle.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            await self._handle.__aexit__(kind, error, trace)


@end_here
class AsyncSession(SessionFacts, AsyncHandle):
    """One user's conversation with one model: a recurrent state on the server that you advance step by step.

    `AsyncClient.open_session` and `fork` return sessions, and so does indexing a group. A session runs one change
    (step or reset) at a time; a second task waits, within its time limit. A session belongs to the event loop of its
    client. Do not use it from other threads.

    **After an error.** The `outcome` of `DeadlineExceededError` and `UnavailableError` is "not_applied" or "unknown".
    In both cases repeat the same call with the same arguments. That completes the change, and the server applies it
    once, however often you send it. A call with other arguments is a new change. If the unfinished change was applied
    after all, the new one raises `RevisionConflictError`; call `refresh` to adopt the server's revision. The same
    holds after a cancelled call, whose outcome is unknown.

    To abandon a change of unknown outcome, call `get_state`, then `refresh`. `get_state` waits for the changes that
    the server has already received. `refresh` alone does not wait: if the change is still active on the server, it
    lands afterwards, and your next change raises `RevisionConflictError`. After a broken connection, a request may
    arrive even later. Only repeating the same call settles its outcome for certain.

    **At the end of an async with block** a session opened without an id is closed. A named session stays open.

    Example:
        >>> import asyncio
        >>> async def main():
        ...     async with stepwell.aio.connect(address) as client:
        ...         async with client.open_session("forecast") as session:
        ...             y = await session.step(np.ones((1, 3), np.float32))
        ...             return y.shape, session.revision, session.position
        >>> asyncio.run(main())
        ((1, 1), 1, 1)
    """

    def __init__(
        self,
        driver: AsyncDriver,
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
    async def step(
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
    async def step(
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

    @shortens
    async def step(
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

        Arguments, result and errors are those of `Session.step`.

        Example:
            >>> (await session.step(np.ones((1, 10, 3), np.float32), outputs="last")).shape
            (1, 1)
        """
        try:
            step = self._begun(x, outputs, time, reset, rows, states, timeout_s)
            # While it waits it holds little: the garbage collector visits whatever it holds.
            del x
            if type(step) is not WaitingStep:
                return await step
            # Most steps are as here: free, and over after one attempt. They need none of a flow's work.
            try:
                try:
                    revision, position, version, names, arrays, _ = await self._driver.direct(step)
                except StepwellError as error:
                    tried, core = (step, error), self._core
                    flow = core.step(self._tracker, step.change, step.deadline, tried=tried)
                    return await self._driver.run(flow)
                if previous := self._tracker.applied(revision, position, version):
                    await self._driver.run(self._core.moved(self._tracker, previous))
                if outputs == "all" and len(arrays) == 1:  # as `selected_of`, without a call
                    return arrays[0]
                return selected_of(names, arrays, step.form)
            finally:
                self._locks.give(self._members)
        except StepwellError as error:
            shorten(error)
            raise

    def _begun(
        self,
        x: Inputs,
        outputs: OutputSelection,
        time: TimeSelection,
        reset: Mask | None,
        rows: Rows | None,
        states: StateSelection,
        timeout_s: float | None,
    ) -> WaitingStep | Awaitable[Outputs | Trace]:
        """A step's first attempt, which holds its lock; or its flow, if it needs one."""
        core, tracker = self._core, self._tracker
        deadline = core.deadline(timeout_s)
        form = data = None
        if rows is None and reset is None and type(x) is np.ndarray:
            try:
                form = plain_form(x.dtype, x.shape, tracker.batch_size, outputs, time, states)
            except TypeError:
                form = None
            data = None if form is None else x.tobytes()
        if form is None:
            form = core.step_change(tracker, x, outputs, time, reset, rows, states)
        if self._closed or self._parent is not None:
            self._check_open()
        if (
            states != "none"
            or self._reels
            or tracker.pending is not None  # it may have asked for more, such as states
            or not core.is_direct
            or not self._locks.take(self._members)
        ):
            flow = core.step(tracker, with_data(form, data), deadline, self._reels)
            return self._change(flow, deadline)
        try:
            return tracker.step(WaitingStep, form, deadline, "none", data)
        except BaseException:  # such as an interrupt
            self._locks.give(self._members)
            raise

    async def trace(
        self,
        x: Inputs,
        reset: Mask | None = None,
        rows: Rows | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Trace:
        """Advances the session and returns the outputs and the state after every time step.

        Arguments, result and errors are those of `Session.trace`.

        Example:
            >>> trace = await session.trace(np.ones((1, 10, 3), np.float32))
            >>> {array.shape[:2] for array in trace.states.values()}, trace.position == session.position
            ({(1, 10)}, True)
        """
        return await self.step(x, reset=reset, rows=rows, states="all", timeout_s=timeout_s)

    def watch(
        self,
        *,
        inputs: bool = False,
        outputs: bool = False,
        states: bool = False,
        state_names: Iterable[str] | None = None,
        every: int = 1,
        interval_s: float | None = None,
    ) -> AsyncWatch[SessionEvent]:
        """Watches this session: reports its changes, whoever makes them.

        Arguments and result are those of `AsyncClient.watch_sessions`.

        Example:
            >>> async with session.watch() as watch:
            ...     (await anext(watch)).kind
            'present'
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
        return AsyncWatch(self._driver, core)

    @overload
    def record(
        self,
        states: RecordedStates = True,
        *,
        max_steps: int | None = None,
        source: Literal["replies"] = "replies",
    ) -> AbstractContextManager[Tape]: ...

    @overload
    def record(
        self, states: RecordedStates = True, *, max_steps: int | None = None, source: Literal["watch"]
    ) -> AbstractAsyncContextManager[Tape]: ...

    def record(
        self,
        states: RecordedStates = True,
        *,
        max_steps: int | None = None,
        source: Literal["replies", "watch"] = "replies",
    ) -> AbstractContextManager[Tape] | AbstractAsyncContextManager[Tape]:
        """Records the steps and resets of this handle while a `with` block runs.

        It makes no call: use `with`, not `async with`. Only with `source="watch"` use `async with`. Arguments, result and errors are those of `Session.record`.

        Example:
            >>> with session.record() as tape:
            ...     y = await session.step(np.ones((1, 10, 3), np.float32))
            >>> len(tape)
            10
        """
        if is_watch(source):
            self._check_open()
            return recorded_async(self._driver, WatchedReel(self._tracker, states, max_steps))
        return self._recording(states, max_steps, self._subject)

    async def reset_states(
        self,
        states: States | None = None,
        rows: Rows | None = None,
        *,
        position: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        """Sets the state, or some rows of it.

        Arguments, result and errors are those of `Session.reset_states`.

        Example:
            >>> await session.reset_states()
            >>> session.position
            0
        """
        deadline = self._core.deadline(timeout_s)
        await self._change(
            self._core.reset_states(self._tracker, states, rows, deadline, position, self._reels), deadline
        )

    async def get_state(self, *, timeout_s: float | None = None) -> State:
        """Returns a copy of the state, after all changes that the server received before this call.

        Arguments, result and errors are those of `Session.get_state`.

        Example:
            >>> (await session.get_state()).revision == session.revision
            True
        """
        self._check_open()
        return await self._driver.run(self._core.get_state(self.id, self._core.deadline(timeout_s)))

    def fork(
        self,
        session_id: str | None = None,
        *,
        max_idle_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Opening[AsyncSession]:
        """Opens a new session with the state, revision and position of this one. The two then change independently.

        Arguments, result and errors are those of `Session.fork`. Await the result, or use it in `async with`.

        Example:
            >>> async with session.fork() as twin:
            ...     twin.id != session.id, twin.position == session.position
            (True, True)
        """
        return Opening(self._fork(session_id, max_idle_s, timeout_s), "AsyncSession.fork")

    @ends_here
    async def _fork(
        self, session_id: str | None, max_idle_s: float | None, timeout_s: float | None
    ) -> AsyncSession:
        self._check_open()
        deadline = self._core.deadline(timeout_s)
        tracker = await self._driver.run(self._core.fork(self._tracker, session_id, max_idle_s, deadline))
        return AsyncSession(self._driver, tracker, owned=session_id is None)

    async def refresh(self, *, timeout_s: float | None = None) -> None:
        """Adopts the server's revision and position, and drops a change that an error left unfinished.

        Example:
            >>> await session.refresh()
            >>> session.revision == (await client.session_info(session.id)).revision
            True
        """
        deadline = self._core.deadline(timeout_s)
        await self._change(self._core.refresh(self._tracker, deadline), deadline)

    async def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes the session on the server. Closing it again, or after it expired, does nothing.

        Example:
            >>> session = await client.open_session("forecast")
            >>> await session.close()
        """
        if not self._closed:
            await self._driver.run(self._core.close(self._tracker, self._core.deadline(timeout_s)))
            self._closed = True
