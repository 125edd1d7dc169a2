"""A session of the async client, and what it has in common with a group. As `session`, awaited."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Coroutine, Generator
from types import CoroutineType, TracebackType
from typing import Any, Literal, Self, TypeVar, cast, overload

from stepwell._base.flow import Flow
from stepwell._base.tracebacks import end_here, ends_here
from stepwell._base.unawaited import Unawaited
from stepwell._core.aio_driver import AsyncDriver
from stepwell._core.handles import ALONE, BaseHandle, SessionFacts
from stepwell._core.locks import Locks, Some, TaskHolder
from stepwell._core.tracker import SessionTracker
from stepwell._state.infos import Inputs, Mask, Outputs, OutputSelection, Rows, StateSelection, TimeSelection
from stepwell._state.state import State, States
from stepwell._state.trace import Trace
from stepwell._transport.retry import Deadline
from stepwell.errors import DeadlineExceededError, InvalidInputError, StepwellError

H = TypeVar("H", bound="AsyncHandle")
T = TypeVar("T")


@end_here
class AsyncHandle(BaseHandle[AsyncDriver], abc.ABC):
    """What a session and a group have in common: one change at a time, and an end."""

    _changer: asyncio.Task[Any] | None = None
    """The task whose change is running."""

    async def _change(self, flow: Flow[T], deadline: Deadline, members: Some | None = None) -> T:
        """Runs a change, one at a time; waiting for the locks counts against the time limit."""
        self._check_open()
        me = asyncio.current_task()
        holder = TaskHolder(self._members if members is None else members)
        try:
            if not self._locks.acquire(holder):
                await self._wait(holder, deadline)
            self._changer = me
            self._check_open()
            return await self._driver.run(flow)
        finally:
            if self._changer is me:
                self._changer = None
            self._locks.release(holder)

    async def _wait(self, holder: TaskHolder, deadline: Deadline) -> None:
        if self._changer is asyncio.current_task():
            raise InvalidInputError(
                "a change must not be made by an event hook of a change of the same session"
            )
        try:
            async with asyncio.timeout(deadline.grpc_timeout_s()):
                await holder.wait()
        except TimeoutError:
            raise DeadlineExceededError(
                "the time limit passed while another change of this session was under way",
                outcome="not_applied",
            ) from None

    @abc.abstractmethod
    async def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes what it stands for."""

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
    """A session or group that is being opened: `await` it, or use it in `async with` directly.

    A coroutine in every other respect, so that a task can be made of it.
    """

    def __init__(self, opening: Coroutine[Any, Any, H], call: str) -> None:
        """`call`: the public call that made it, for messages."""
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
    """One user's conversation with one model: a recurrent state on the server, advanced step by step.

    Made by `AsyncClient.open_session`, by `fork`, and by a group for one of its members. At most one change (step or reset) of a session is
    under way at a time: a second task waits for its turn, within its time limit. Belongs to the event loop
    of its client; not for use from other threads.

    **After an error.** `DeadlineExceededError` and `UnavailableError` say in `.outcome` whether the change
    was "not_applied" or is "unknown". In both cases make the same call with the same arguments again: it
    finishes that change, and it is applied once, however often it was sent. A call with other arguments is
    a new change; if the unfinished one did get through, it raises `RevisionConflictError`, and `refresh`
    takes over the server's revision. The same holds after a cancelled call: its outcome is unknown.

    To give up a change of unknown outcome, call `get_state`, then `refresh`. `refresh` alone does not wait:
    while the change is still under way on the server it returns the old revision, and the change lands
    afterwards, so that the next one raises `RevisionConflictError` after all. `get_state` waits for its turn,
    behind the changes that the server has received. Where the connection broke a request may be received later
    still; the same call again is what settles it for certain.

    **At the end of an `async with` block** a session opened without an id is closed; a named one lives on.

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
        """Advances the session by one time step, or by T: whole or not at all.

        Arguments, result and errors are those of `Session.step`.

        Example:
            >>> (await session.step(np.ones((1, 10, 3), np.float32), outputs="last")).shape
            (1, 1)
        """
        deadline = self._core.deadline(timeout_s)
        change = self._core.step_change(self._tracker, x, outputs, time, reset, rows, states)
        return await self._change(self._core.step(self._tracker, change, deadline), deadline)

    async def trace(
        self,
        x: Inputs,
        reset: Mask | None = None,
        rows: Rows | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Trace:
        """Advances the session, and returns the state after every time step with the outputs.

        Arguments, result and errors are those of `Session.trace`.

        Example:
            >>> trace = await session.trace(np.ones((1, 10, 3), np.float32))
            >>> {array.shape[:2] for array in trace.states.values()}, trace.position == session.position
            ({(1, 10)}, True)
        """
        return await self.step(x, reset=reset, rows=rows, states="all", timeout_s=timeout_s)

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
        await self._change(self._core.reset_states(self._tracker, states, rows, deadline, position), deadline)

    async def get_state(self, *, timeout_s: float | None = None) -> State:
        """A copy of the state, after the changes received before.

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
        """A new session with the state, revision and position of this one; from then on they are apart.

        Arguments, result and errors are those of `Session.fork`.

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
        """Takes over the server's revision and position, and drops a change left unfinished by an error.

        Example:
            >>> await session.refresh()
            >>> session.revision == (await client.session_info(session.id)).revision
            True
        """
        deadline = self._core.deadline(timeout_s)
        await self._change(self._core.refresh(self._tracker, deadline), deadline)

    async def close(self, *, timeout_s: float | None = None) -> None:
        """Deletes the session on the server. Closing again, or a session that is gone, does nothing.

        Example:
            >>> session = await client.open_session("forecast")
            >>> await session.close()
        """
        if not self._closed:
            await self._driver.run(self._core.close(self._tracker, self._core.deadline(timeout_s)))
            self._closed = True
