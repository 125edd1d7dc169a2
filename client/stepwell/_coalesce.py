"""Steps awaited in the same turn of the event loop leave together, as few frames as possible."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from stepwell import _channel
from stepwell._book import SessionBook
from stepwell._core import selected
from stepwell._flow import Attempter, Flow
from stepwell._frames import Change, Frame, Part
from stepwell._retry import Deadline
from stepwell._tensors import Array
from stepwell._types import Outputs

Drive = Callable[[Flow[None]], Awaitable[None]]
Answer = tuple[int, int, dict[str, Array]]


class _Member(NamedTuple):
    session_id: str
    change: Change
    rows: int
    expected: int
    request_id: int
    deadline: Deadline
    answer: asyncio.Future[Answer]


class Coalescer:
    """Collects steps and sends them as frames. Of one event loop."""

    def __init__(self, attempter: Attempter, drive: Drive, max_frame_bytes: int) -> None:
        self._attempter = attempter
        self._drive = drive
        self._max_frame_bytes = max_frame_bytes
        self._waiting: dict[Hashable, dict[str, _Member]] = {}
        """What leaves in a frame together: members by their session."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def step(self, book: SessionBook, change: Change, deadline: Deadline) -> Outputs:
        """Advances a session in a frame with whoever steps at the same time."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._flush)
        answer: asyncio.Future[Answer] = loop.create_future()
        member = _Member(
            book.session_id,
            change,
            book.batch_size,
            book.revision,
            book.begin(change),
            deadline,
            answer,
        )
        self._gather(_key(book.model, change, deadline), member)
        revision, position, outputs = await answer
        book.applied(revision, position)
        return selected(outputs, change.outputs)

    def _gather(self, key: Hashable, member: _Member) -> None:
        # A frame names a session once: another handle's step of the same session goes in a frame of its own.
        nth = 0
        while member.session_id in self._waiting.setdefault((key, nth), {}):
            nth += 1
        self._waiting[key, nth][member.session_id] = member

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for gathered in waiting.values():
            members = list(gathered.values())
            size = sum(len(tensor.data) for tensor in members[0].change.tensors) + 64
            count = max(1, self._max_frame_bytes // size)
            for start in range(0, len(members), count):
                task = asyncio.create_task(self._send(members[start : start + count]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _send(self, members: Sequence[_Member]) -> None:
        """Sees one frame through. Whatever happens, no caller is left waiting."""
        deadline = max((member.deadline for member in members), key=Deadline.remaining_s)
        frame, replies = _frame(members), _Replies(members)
        error: BaseException | None = None
        try:
            await self._drive(self._attempter.exchange(frame, deadline, replies.add))
        except Exception as defect:
            error = defect
        finally:
            replies.abandon(error or _channel.closed())

    async def close(self) -> None:
        """Ends the frames under way; their callers get `ClosedError`."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def _key(model: str, change: Change, deadline: Deadline) -> Hashable:
    """What steps must have in common to share a frame: all but their rows. Time limits only roughly."""
    signature = tuple([(tensor.name, tensor.dtype, tensor.shape[1:]) for tensor in change.tensors])
    return model, change.outputs, signature, round(deadline.remaining_s(), 2)


def _frame(members: Sequence[_Member]) -> Frame:
    if len(members) == 1:
        change = members[0].change
    else:
        change = dataclasses.replace(members[0].change, tensors=_joined([m.change for m in members]))
    return Frame(
        change,
        [member.session_id for member in members],
        np.array([member.rows for member in members], np.intp),
        np.array([member.expected for member in members], np.uint64),
        np.array([member.request_id for member in members], np.uint64),
    )


def _joined(changes: Sequence[Change]) -> tuple[Any, ...]:
    joined = []
    for i, first in enumerate(changes[0].tensors):
        tensors = [change.tensors[i] for change in changes]
        rows = sum(tensor.shape[0] for tensor in tensors)
        data = b"".join([tensor.data for tensor in tensors])
        joined.append(first._replace(shape=(rows, *first.shape[1:]), data=data))
    return tuple(joined)


class _Replies:
    """Hands the parts of a frame's reply to the callers."""

    def __init__(self, members: Sequence[_Member]) -> None:
        self._members = members

    def add(self, part: Part) -> None:
        """Takes in one part."""
        members, start = self._members, 0
        settled = zip(part.applied.tolist(), part.revisions.tolist(), part.positions.tolist(), strict=True)
        for i, revision, position in settled:
            member = members[i]
            end = start + member.rows
            # A caller that was cancelled has left; its neighbours have not.
            if not member.answer.done():
                outputs = {name: array[start:end] for name, array in part.outputs.items()}
                member.answer.set_result((revision, position, outputs))
            start = end
        for i, error in part.failures.items():
            self._fail(i, error)

    def _fail(self, index: int, error: BaseException) -> None:
        answer = self._members[index].answer
        if not answer.done():
            answer.set_exception(error)

    def abandon(self, error: BaseException) -> None:
        """Fails whoever still waits."""
        for i in range(len(self._members)):
            self._fail(i, error)
