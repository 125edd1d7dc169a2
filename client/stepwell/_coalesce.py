"""Steps awaited in the same turn of the event loop leave together, as few frames as possible.

Where the replies to a frame, together, are over the limit of a message, its steps are sent again in smaller frames, and
fewer of their kind leave together from then on. A frame of one may have been hit by another's reply, for a reply that is
too large ends the stream they share: as a call of its own it gets an answer that is about itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Hashable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from stepwell import _channel
from stepwell._core import selected
from stepwell._flow import Flow, Retrier
from stepwell._frames import Change, Part
from stepwell._retry import Deadline
from stepwell._steps import Gathering, Step, Stepped, abandon, answer, framed, latest
from stepwell._tracker import SessionTracker
from stepwell._types import Outputs
from stepwell.errors import ReplyTooLargeError, StepwellError

T = TypeVar("T")


class Drive(Protocol):
    """Drives a flow to its result."""

    def __call__(self, flow: Flow[T], /) -> Awaitable[T]: ...


class _Member(NamedTuple):
    step: Step
    answer: asyncio.Future[Stepped]

    def settle(self, stepped: Stepped) -> None:
        # A caller that was cancelled has left; its neighbours have not.
        if not self.answer.done():
            self.answer.set_result(stepped)

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Coalescer:
    """Collects steps and sends them as frames. Of one event loop."""

    def __init__(self, retrier: Retrier, drive: Drive, max_frame_bytes: int) -> None:
        self._retrier = retrier
        self._drive = drive
        self._max_frame_bytes = max_frame_bytes
        self._waiting: Gathering[_Member] = Gathering()
        self._most: dict[Hashable, int] = {}
        """How many steps may leave together, by kind, where more had replies too large for one message."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def step(self, tracker: SessionTracker, change: Change, deadline: Deadline) -> Outputs:
        """Advances a session in a frame with whoever steps at the same time."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._flush)
        member = _Member(tracker.step(change, deadline), loop.create_future())
        self._waiting.add(member, round(deadline.remaining_s(), 2))
        try:
            revision, position, outputs = await member.answer
        except StepwellError as error:
            raise tracker.failed(error) from None
        tracker.applied(revision, position)
        return selected(outputs, change.outputs)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, Gathering()
        for members in waiting.frames(self._max_frame_bytes, self._most):
            task = asyncio.create_task(self._send(members))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send(self, members: Sequence[_Member]) -> None:
        """Sees one frame through. Whatever happens, no caller is left waiting."""
        error: BaseException | None = None
        try:
            await self._frame(members)
        except Exception as defect:
            error = defect
        finally:
            abandon(members, error or _channel.closed())

    async def _frame(self, members: Sequence[_Member], *, in_doubt: bool = False) -> None:
        """Sends a frame with its retries, and again in smaller ones what was too large together."""
        apart: list[_Member] = []

        def on_part(part: Part) -> None:
            apart.extend([members[i] for i, error in part.failures.items() if _is_too_large(error)])
            others = {i: error for i, error in part.failures.items() if not _is_too_large(error)}
            answer(members, dataclasses.replace(part, failures=others))

        await self._drive(
            self._retrier.exchange(framed(members), latest(members), on_part, in_doubt=in_doubt)
        )
        most = max(1, len(members) // 2)
        if apart and len(members) > 1:
            self._most[members[0].step.kind()] = most
        for begin in range(0, len(apart), most):
            fewer = apart[begin : begin + most]
            if len(fewer) > 1:
                await self._frame(fewer, in_doubt=True)
            else:
                await self._alone(fewer[0])

    async def _alone(self, member: _Member) -> None:
        try:
            member.settle(await self._drive(self._retrier.step(member.step, in_doubt=True)))
        except StepwellError as error:
            member.fail(error)

    async def close(self) -> None:
        """Ends the frames under way; their callers get `ClosedError`."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def _is_too_large(error: StepwellError) -> bool:
    return isinstance(error, ReplyTooLargeError)
