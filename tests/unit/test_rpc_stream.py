"""A stream of frames: answers, failures of members, limits, cancelling and stopping."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from stepwell.v1 import tensors_pb2
from stepwell_server.clock import SystemClock
from stepwell_server.errors import InvalidInput, Overloaded, Unavailable
from stepwell_server.rpc.steps.stream import FrameStream, StreamLimits
from support.rpc.fake_call import FakeCall, Requests
from support.rpc.fake_engine import FakeEngine

_PATIENCE_S = 100.0
_ROOMY = StreamLimits(frames=100, bytes=1 << 20)


def _step(frame_id: int, *session_ids: str, steps: int = 0, timeout_ms: int = 0) -> pb.StepStreamRequest:
    shape = (len(session_ids), steps, 2) if steps else (len(session_ids), 2)
    x = np.random.default_rng(frame_id).random(shape, np.float32)
    tensor = tensors_pb2.Tensor(dtype=tensors_pb2.DATA_TYPE_FLOAT32, shape=x.shape, data=x.tobytes())
    frame = pb.StepFrame(session_ids=session_ids, inputs=[tensor], timeout_ms=timeout_ms)
    return pb.StepStreamRequest(frame_id=frame_id, step=frame)


class Call:
    """A running StepStream call, seen from its client."""

    def __init__(self, engine: FakeEngine, limits: StreamLimits) -> None:
        self.engine = engine
        self.context = FakeCall()
        self.observer = Requests()
        self.stream = FrameStream(
            engine,  # type: ignore[arg-type]
            SystemClock(),
            4096,
            limits,
            self.observer,
            self.context,
        )
        self.task = asyncio.create_task(self.stream.run())

    async def reply(self) -> pb.StepStreamResponse:
        raw = await asyncio.wait_for(self.context.replies.get(), _PATIENCE_S)
        return pb.StepStreamResponse.FromString(raw)

    async def ended(self) -> None:
        await asyncio.wait_for(self.task, _PATIENCE_S)

    async def turns(self) -> None:
        """Let everything run that can."""
        for _ in range(200):
            await asyncio.sleep(0)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let things run until the condition holds."""
        async with asyncio.timeout(_PATIENCE_S):
            while not condition():  # noqa: ASYNC110 (a turn of the loop, no time)
                await asyncio.sleep(0)


@asynccontextmanager
async def _call(limits: StreamLimits = _ROOMY, outputs: int = 2) -> AsyncIterator[Call]:
    engine = FakeEngine(outputs)
    engine.open("a", "b", "c")
    call = Call(engine, limits)
    yield call
    call.task.cancel()
    await asyncio.gather(call.task, return_exceptions=True)


@pytest.fixture
async def call() -> AsyncIterator[Call]:
    async with _call() as found:
        yield found


async def test_frames_are_answered_and_the_stream_ends_with_the_client(call: Call) -> None:
    call.context.send(
        _step(7, "a", "b"), pb.StepStreamRequest(frame_id=8, reset=pb.ResetFrame(session_ids=["a"]))
    )
    call.context.half_close()
    step, reset = await call.reply(), await call.reply()
    await call.ended()
    assert (step.frame_id, step.all_members, step.last) == (7, True, True)
    assert (list(step.revisions), list(step.positions)) == ([1, 1], [1, 1])
    assert list(step.outputs[0].shape) == [2, 2]
    assert (reset.frame_id, list(reset.revisions), list(reset.outputs)) == (8, [2], [])


async def test_members_fail_alone(call: Call) -> None:
    call.context.send(_step(1, "a", "nobody", "b"))
    failed, reply = await call.reply(), await call.reply()
    assert (failed.last, reply.last) == (False, True)
    assert (reply.all_members, list(reply.members)) == (False, [0, 2])
    (error,) = failed.errors
    assert (list(error.members), error.error.reason) == ([1], "SESSION_NOT_FOUND")
    assert call.observer.refusals == {"SESSION_NOT_FOUND": 1}


async def test_a_bad_frame_fails_alone(call: Call) -> None:
    bad = _step(3, "a", "b")
    bad.step.expected_revisions.append(1)
    call.context.send(pb.StepStreamRequest(frame_id=1), _step(2), bad, _step(4, "a"))
    replies = [await call.reply() for _ in range(4)]
    assert [reply.frame_id for reply in replies] == [1, 2, 3, 4]
    assert all(reply.last for reply in replies)
    messages = [reply.errors[0].error.message for reply in replies[:3]]
    assert "change must be step or reset; got neither" in messages[0]
    assert "session_ids" in messages[1]
    assert "expected_revisions must be empty or have one entry per session (2); got 1" in messages[2]
    assert not any(list(error.members) for reply in replies for error in reply.errors)
    assert replies[3].all_members
    assert call.observer.refusals == {"INVALID_INPUT": 3}


async def test_overload_is_a_frame_error_with_a_delay(call: Call) -> None:
    call.engine.next_error = Overloaded("full", 0.5)
    call.context.send(_step(1, "a", "b"))
    error = (await call.reply()).errors[0].error
    assert (error.reason, error.retry_after_ms) == ("OVERLOADED", 500)
    assert call.observer.refusals == {"OVERLOADED": 2}


async def test_a_reply_over_the_limit_is_refused_before_anything_changes() -> None:
    async with _call(outputs=16_000) as call:
        call.context.send(_step(1, "a"), _step(2, "nobody", "a", steps=2))
        for _ in range(2):
            assert (await call.reply()).errors[0].error.reason == "MESSAGE_TOO_LARGE"
        assert (await call.engine.session_info("a")).revision == 0


async def test_the_id_of_an_unanswered_frame_is_refused(call: Call) -> None:
    call.engine.held = True
    call.context.send(_step(1, "a"), _step(1, "b"))
    refused = await call.reply()
    call.engine.release()
    answered = await call.reply()
    call.engine.held = False
    call.context.send(_step(1, "b"))
    again = await call.reply()
    assert "frame_id must differ from those of unanswered frames; got 1" in refused.errors[0].error.message
    assert answered.all_members
    assert again.all_members


async def test_invalid_frame_bytes_end_the_stream(call: Call) -> None:
    call.engine.held = True
    call.context.send(_step(1, "a"), b"\xff\xff\xff")
    with pytest.raises(InvalidInput, match=r"must be a stepwell\.v1\.StepStreamRequest; got 3 bytes"):
        await call.ended()
    assert [frame.session_ids for frame in call.engine.cancelled()] == [["a"]]


async def test_the_end_of_the_call_cancels_waiting_steps(call: Call) -> None:
    call.engine.held = True
    call.context.send(_step(1, "a"), _step(2, "b"))
    await call.until(lambda: len(call.engine.changes) == 2)
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.ended()
    assert [frame.session_ids for frame in call.engine.cancelled()] == [["a"], ["b"]]
    call.engine.release()  # a part that comes later goes nowhere
    assert call.context.replies.empty()


async def test_a_half_closed_stream_ends_only_when_all_is_answered(call: Call) -> None:
    call.engine.held = True
    call.context.send(_step(1, "a"))
    call.context.half_close()
    await call.until(lambda: call.context.reads == 2)
    assert not call.task.done()
    call.engine.release()
    await call.reply()
    await call.ended()


async def test_a_stopping_stream_answers_first(call: Call) -> None:
    call.engine.held = True
    call.context.send(_step(1, "a"))
    await call.until(lambda: len(call.engine.changes) == 1)
    call.stream.stop()
    await asyncio.sleep(0)
    assert not call.task.done()
    call.engine.release()
    assert (await call.reply()).all_members
    with pytest.raises(Unavailable, match="stopping"):
        await call.ended()


async def test_an_idle_stream_stops_at_once(call: Call) -> None:
    call.stream.stop()
    with pytest.raises(Unavailable, match="stopping"):
        await call.ended()


@pytest.mark.parametrize(
    "limits", [StreamLimits(frames=3, bytes=1 << 20), StreamLimits(frames=100, bytes=1500)]
)
async def test_a_client_that_does_not_read_is_not_read(limits: StreamLimits) -> None:
    async with _call(limits) as call:
        call.context.client_reads.clear()
        call.engine.held = True
        call.context.send(_step(0, "a"))
        await call.until(lambda: len(call.engine.changes) == 1)
        call.engine.held = False
        call.engine.release()
        await call.turns()  # the writer is stuck now; the reader is free
        call.context.send(*(_step(number, "a") for number in range(1, 50)))
        await call.turns()
        assert call.context.reads <= 3
        call.context.client_reads.set()
        assert [(await call.reply()).frame_id for _ in range(50)] == list(range(50))


async def test_unanswered_frames_hold_up_reading() -> None:
    async with _call(StreamLimits(frames=3, bytes=1 << 20)) as call:
        call.engine.held = True
        call.context.send(*(_step(number, "a") for number in range(7)))
        for count in (3, 3, 1):
            await call.until(lambda count=count: len(call.engine.changes) == count)  # type: ignore[misc]
            await call.turns()
            assert len(call.engine.changes) == count
            call.engine.release()
        assert [(await call.reply()).frame_id for _ in range(7)] == list(range(7))


async def test_time_limits_of_frames(call: Call) -> None:
    call.engine.held = True
    before = SystemClock().monotonic()
    call.context.send(_step(1, "a"), _step(2, "b", timeout_ms=60_000))
    await call.until(lambda: len(call.engine.changes) == 2)
    unlimited, limited = call.engine.changes
    assert unlimited.deadline == float("inf")
    assert before + 60 <= limited.deadline <= SystemClock().monotonic() + 60
