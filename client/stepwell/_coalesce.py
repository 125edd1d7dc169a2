"""Steps awaited in the same turn of the event loop leave together, as few frames as possible."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from stepwell import _channel
from stepwell._book import SessionBook
from stepwell._core import selected
from stepwell._flow import Attempter, Flow
from stepwell._frames import Change, Part
from stepwell._retry import Deadline
from stepwell._steps import Gathering, Step, Stepped, abandon, answer, framed, latest
from stepwell._types import Outputs
from stepwell.errors import StepwellError

Drive = Callable[[Flow[None]], Awaitable[None]]


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

    def __init__(self, attempter: Attempter, drive: Drive, max_frame_bytes: int) -> None:
        self._attempter = attempter
        self._drive = drive
        self._max_frame_bytes = max_frame_bytes
        self._waiting: Gathering[_Member] = Gathering()
        self._tasks: set[asyncio.Task[None]] = set()

    async def step(self, book: SessionBook, change: Change, deadline: Deadline) -> Outputs:
        """Advances a session in a frame with whoever steps at the same time."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._flush)
        member = _Member(book.step(change, deadline), loop.create_future())
        self._waiting.add(member, round(deadline.remaining_s(), 2))
        try:
            revision, position, outputs = await member.answer
        except StepwellError as error:
            raise book.failed(error) from None
        book.applied(revision, position)
        return selected(outputs, change.outputs)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, Gathering()
        for members in waiting.frames(self._max_frame_bytes):
            task = asyncio.create_task(self._send(members))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send(self, members: Sequence[_Member]) -> None:
        """Sees one frame through. Whatever happens, no caller is left waiting."""

        def on_part(part: Part) -> None:
            answer(members, part)

        error: BaseException | None = None
        try:
            await self._drive(self._attempter.exchange(framed(members), latest(members), on_part))
        except Exception as defect:
            error = defect
        finally:
            abandon(members, error or _channel.closed())

    async def close(self) -> None:
        """Ends the frames under way; their callers get `ClosedError`."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
