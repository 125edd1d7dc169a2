"""The steps of many tasks leave as frames; where their replies are too large together, as smaller ones."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from stepwell import errors
from stepwell._coalesce import Coalescer
from stepwell._flow import Ask, Exchange, Flow, Retrier, drive_async
from stepwell._frames import Change
from stepwell._inputs import pack_inputs
from stepwell._retry import Deadline, RetryPolicy
from stepwell._steps import Step
from stepwell._tensors import pack, to_messages, unpack
from stepwell._tracker import SessionTracker
from stepwell.v1 import sessions_pb2


@dataclasses.dataclass
class Wire:
    """Answers frames of up to so many members, and calls of one step unless they are of the session named."""

    most: int
    too_large: str = ""
    sent: list[list[str]] = dataclasses.field(default_factory=list)
    request_ids: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    refuse: Exception | None = None
    """What becomes of everything after the first frame that was too large."""

    async def drive(self, flow: Flow[Any], /) -> Any:
        return await drive_async(flow, self._answer)

    async def _answer(self, ask: Ask) -> Any:
        if isinstance(ask, Step):
            self._note([ask.session_id], [ask.request_id], "alone")
            if ask.session_id == self.too_large:
                raise errors.ReplyTooLargeError("too large by itself")
            return 1, 1, {"y": 2 * unpack(to_messages(ask.change.tensors)[0])}
        if not isinstance(ask, Exchange):
            return None  # a pause
        frame = ask.request(1).step
        self._note(list(frame.session_ids), list(frame.request_ids))
        if len(frame.session_ids) > self.most or self.too_large in frame.session_ids:
            raise errors.ReplyTooLargeError("too large together")
        ones = [1] * len(frame.session_ids)
        outputs = to_messages([pack("y", "y", 2 * unpack(frame.inputs[0]))])
        response = sessions_pb2.StepStreamResponse(
            all_members=True, revisions=ones, positions=ones, outputs=outputs, last=True
        )
        ask.on_part(ask.frame.accept(response))
        return None

    def _note(self, ids: list[str], request_ids: list[int], how: str = "") -> None:
        if self.refuse is not None and self.sent:
            raise self.refuse
        self.sent.append([how, *ids] if how else ids)
        for one, request_id in zip(ids, request_ids, strict=True):
            self.request_ids.setdefault(one, set()).add(request_id)


async def step_all(coalescer: Coalescer, names: str, limit_s: float = 60.0) -> list[Any]:
    """Step sessions at the same time, each with an input of its own."""

    def one(i: int, name: str) -> Any:
        tracker = SessionTracker(sessions_pb2.Session(session_id=name, model="m", batch_size=1))
        change = Change("step", pack_inputs(np.full((1, 2), i, np.float32)), "all")
        return coalescer.step(tracker, change, Deadline(limit_s))

    return await asyncio.gather(*(one(i, n) for i, n in enumerate(names)), return_exceptions=True)


def coalescer(wire: Wire) -> Coalescer:
    return Coalescer(Retrier(RetryPolicy(), 1 << 20), wire.drive, 1 << 20)


async def test_replies_that_are_too_large_together_make_smaller_frames() -> None:
    wire = Wire(most=2)
    sender = coalescer(wire)
    answers = await step_all(sender, "abcdefg")
    assert [float(y[0, 0]) for y in answers] == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    # the same change in each frame: what was applied is answered again
    assert all(len(request_ids) == 1 for request_ids in wire.request_ids.values())
    wire.sent.clear()
    await step_all(sender, "abc")
    assert wire.sent == [["a"], ["b"], ["c"]], "it is remembered"


async def test_a_reply_that_is_too_large_by_itself_is_told_to_its_caller_alone() -> None:
    wire = Wire(most=9, too_large="c")
    answers = await step_all(coalescer(wire), "abcd")
    assert [i for i, one in enumerate(answers) if isinstance(one, BaseException)] == [2]
    assert isinstance(answers[2], errors.ReplyTooLargeError)
    assert answers[2].message == "too large by itself"


async def test_a_frame_of_one_is_asked_for_by_itself() -> None:
    """The reply that ended the stream may have been another's."""
    wire = Wire(most=0)
    [y] = await step_all(coalescer(wire), "a")
    assert y.tolist() == [[0.0, 0.0]]
    assert wire.sent == [["a"], ["alone", "a"]]


@pytest.mark.parametrize("names", ["ab", "abcd"])
async def test_what_is_refused_later_may_have_been_applied_before(names: str) -> None:
    wire = Wire(most=1, refuse=errors.OverloadedError("full", retry_after_s=100.0))
    for told in await step_all(coalescer(wire), names, limit_s=5.0):
        assert isinstance(told, errors.UnavailableError)
        assert told.outcome == "unknown"
