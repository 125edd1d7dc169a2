"""The steps of many tasks leave as frames; whoever leaves, fails or is too large does so alone."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from stepwell import errors
from stepwell._base.flow import drive_async
from stepwell._batching import coalesce
from stepwell._batching.coalesce import Coalescer, WaitingStep
from stepwell._batching.frames import Change
from stepwell._batching.steps import FRAME_SHARE, Member, Step, Stepped, abandon, facts, read, stepped_of
from stepwell._core.lanes import Ask
from stepwell._core.retrier import Retrier
from stepwell._state.arguments import pack_inputs
from stepwell._state.tensors import pack, to_messages, unpack
from stepwell._transport.call import Call
from stepwell._transport.retry import Deadline, RetryPolicy
from stepwell._transport.stream import MakeRequest, Sink
from stepwell.v1 import sessions_pb2
from support.clock import ManualClock
from support.sdk.scripted_model import in_full


@dataclasses.dataclass
class Wire:
    """Answers frames of up to so many members, and calls of one step unless they are of the session named."""

    most: int = 1000
    too_large: str = ""
    refuse: errors.StepwellError | None = None
    """What becomes of everything after the first frame that was too large."""
    answers: bool = True
    sent: list[list[str]] = dataclasses.field(default_factory=list)
    forgotten: int = 0
    request_ids: dict[str, set[int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.retrier = Retrier(RetryPolicy(base_s=0.0), 1 << 20)
        self.coalescer = Coalescer(self, self.unary, FRAME_SHARE << 20)

    async def step(self, step: Step) -> Stepped:
        """A step with its retries, as a client makes it."""
        return await drive_async(self.retrier.step(step), self._answer)

    async def _answer(self, ask: Ask) -> Any:
        if isinstance(ask, Step):
            return await self.coalescer.step(ask)
        return None  # a pause

    async def unary(self, step: Step) -> Stepped:
        return read(self._call(step.call(1 << 20)))

    def _call(self, call: Call) -> sessions_pb2.StepResponse:
        assert isinstance(call.request, bytes)
        request = sessions_pb2.StepRequest.FromString(call.request)
        self._note([request.session_id], [request.request_id], "alone")
        if request.session_id == self.too_large:
            raise errors.ReplyTooLargeError("too large by itself")
        y = 2 * unpack(request.inputs[0])
        return sessions_pb2.StepResponse(outputs=to_messages([pack("y", "y", y)]), revision=1, position=1)

    def post(self, make: MakeRequest, sink: Sink) -> Callable[[], None]:
        frame = in_full(make(1)).step
        self._note(list(frame.session_ids), list(frame.request_ids))
        if self.answers:
            asyncio.get_running_loop().call_soon(sink, self._reply(frame))
        return self._forget

    def _forget(self) -> None:
        self.forgotten += 1

    def _reply(self, frame: sessions_pb2.StepFrame) -> sessions_pb2.StepStreamResponse | errors.StepwellError:
        if len(frame.session_ids) > self.most or self.too_large in frame.session_ids:
            return errors.ReplyTooLargeError("too large together")
        ones = [1] * len(frame.session_ids)
        outputs = to_messages([pack("y", "y", 2 * unpack(frame.inputs[0]))])
        return sessions_pb2.StepStreamResponse(
            all_members=True, revisions=ones, positions=ones, outputs=outputs, last=True
        )

    def _note(self, ids: list[str], request_ids: list[int], how: str = "") -> None:
        if self.refuse is not None and self.sent:
            raise self.refuse
        self.sent.append([how, *ids] if how else ids)
        for one, request_id in zip(ids, request_ids, strict=True):
            self.request_ids.setdefault(one, set()).add(request_id)


def one_step(number: int, name: str, deadline: Deadline) -> Step:
    change = Change("step", pack_inputs(np.full((1, 2), number, np.float32)), "all")
    return Step("m", name, change, 1, 0, number + 1, deadline)


async def step_all(wire: Wire, names: str, limit_s: float = 60.0) -> list[Any]:
    """Step sessions at the same time, each with an input of its own."""
    deadline = Deadline(limit_s)
    steps = [wire.step(one_step(i, name, deadline)) for i, name in enumerate(names)]
    return await asyncio.gather(*steps, return_exceptions=True)


def values(answers: list[Any]) -> list[float]:
    return [float(arrays[0][0, 0]) for _, _, _, _, arrays, _ in answers]


async def test_replies_that_are_too_large_together_make_smaller_frames() -> None:
    wire = Wire(most=2)
    assert values(await step_all(wire, "abcdefg")) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    # the same change in each frame: what was applied is answered again
    assert all(len(request_ids) == 1 for request_ids in wire.request_ids.values())
    assert wire.sent == [
        list("abcdefg"),
        *(list(x) for x in ("abc", "def", "g", "a", "b", "c", "d", "e", "f")),
    ]
    wire.sent.clear()
    await step_all(wire, "abc")
    assert wire.sent == [["a"], ["b"], ["c"]], "it is remembered"


async def test_a_reply_that_is_too_large_by_itself_fails_its_caller_alone() -> None:
    answers = await step_all(Wire(too_large="c"), "abcd")
    assert [i for i, one in enumerate(answers) if isinstance(one, BaseException)] == [2]
    assert isinstance(answers[2], errors.ReplyTooLargeError)
    assert answers[2].message == "too large by itself"


async def test_a_frame_of_one_is_asked_for_by_itself() -> None:
    """The reply that ended the stream may have been another's."""
    wire = Wire(most=0)
    assert values(await step_all(wire, "a")) == [0.0]
    assert wire.sent == [["a"], ["alone", "a"]]


@pytest.mark.parametrize("names", ["ab", "abcd"])
async def test_what_is_refused_later_may_have_been_applied_before(names: str) -> None:
    wire = Wire(most=1, refuse=errors.OverloadedError("full", retry_after_s=100.0))
    for told in await step_all(wire, names, limit_s=5.0):
        assert type(told) is errors.UnavailableError
        assert told.outcome == "unknown"


async def test_time_limits_that_differ_a_little_leave_together_and_those_that_differ_a_lot_do_not() -> None:
    """However long the machine took between the first step and the last."""
    clock = ManualClock()
    wire = Wire()
    steps = []
    for i, (name, limit_s) in enumerate([("a", 30.0), ("b", 30.0), ("c", 29.0), ("d", 2.0)]):
        steps.append(wire.step(one_step(i, name, Deadline(limit_s, clock.monotonic))))
        clock.advance(0.5)
    await asyncio.gather(*steps)
    assert wire.sent == [["a", "b", "c"], ["d"]]


async def test_a_large_step_is_a_call_of_its_own() -> None:
    wire = Wire()
    change = Change("step", pack_inputs(np.zeros((1, 20_000), np.float32)), "all")
    await wire.step(Step("m", "a", change, 1, 0, 7, Deadline(60.0)))
    assert wire.sent == [["alone", "a"]]


async def test_each_caller_keeps_its_own_time_limit_in_a_frame_with_a_longer_one() -> None:
    clock = ManualClock()
    wire = Wire(answers=False)
    limits = {"a": 20.0, "b": 25.0, "c": 31.0}
    steps = [
        asyncio.ensure_future(wire.step(one_step(i, name, Deadline(limit_s, clock.monotonic))))
        for i, (name, limit_s) in enumerate(limits.items())
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert wire.sent == [["a", "b", "c"]]
    # its limit is a timer of the event loop, which keeps another clock than the test
    (frame,) = wire.coalescer._in_flight
    ended = []
    for passed_s in (19.0, 1.0, 6.0):
        clock.advance(passed_s)
        wire.coalescer._on_time_limit(frame)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ended.append([step.done() for step in steps])
    assert ended == [[False] * 3, [True, False, False], [True, True, False]]
    assert type(steps[0].exception()) is errors.DeadlineExceededError
    assert wire.forgotten == 0
    steps[2].cancel()
    await asyncio.sleep(0)
    wire.coalescer._on_time_limit(frame)
    assert wire.forgotten == 1, "every caller has left"
    assert not wire.coalescer._in_flight


@pytest.mark.parametrize("moment", ["before the frame leaves", "after others of the frame have ended"])
async def test_a_time_limit_that_passes_between_two_looks_at_the_clock_ends_its_step(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    wire = Wire(answers=False)
    steps = [
        asyncio.ensure_future(wire.step(one_step(i, name, Deadline(limit_s, clock.monotonic))))
        for i, (name, limit_s) in enumerate({"a": 20.0, "b": 20.5, "c": 31.0}.items())
    ]
    await asyncio.sleep(0)
    if moment == "before the frame leaves":
        clock.advance(20.5)
        await asyncio.sleep(0)
    else:
        await asyncio.sleep(0)
        (frame,) = wire.coalescer._in_flight

        def slowly(late: Sequence[Member], error: BaseException) -> None:
            abandon(late, error)
            clock.advance(0.5)

        with monkeypatch.context() as patch:
            patch.setattr(coalesce, "abandon", slowly)
            clock.advance(20.0)
            wire.coalescer._on_time_limit(frame)
    for step in steps[:2]:
        with pytest.raises(errors.DeadlineExceededError):
            await asyncio.wait_for(step, 100)
    assert not steps[2].done()
    steps[2].cancel()


async def test_a_time_limit_passes_by_itself() -> None:
    wire = Wire(answers=False)
    [told] = await step_all(wire, "a", limit_s=0.05)
    assert type(told) is errors.DeadlineExceededError
    assert told.outcome == "unknown"
    assert not wire.coalescer._in_flight


async def sent(wire: Wire, count: int) -> tuple[list[asyncio.Task[Stepped]], list[WaitingStep]]:
    """Tasks whose steps wait for the answer of one frame."""
    steps = [wire.coalescer.step(one_step(i, f"s{i}", Deadline(60.0))) for i in range(count)]
    waiting = [step for step in steps if isinstance(step, WaitingStep)]
    tasks = [asyncio.create_task(awaited(step)) for step in waiting]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks, waiting


async def awaited(step: WaitingStep) -> Stepped:
    return await step


def answered(number: int) -> Stepped:
    return stepped_of(number, number, {})


async def test_a_frame_wakes_its_tasks_by_one_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, waiting = await sent(Wire(answers=False), 50)
    loop, called = asyncio.get_running_loop(), []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon", lambda function, *_, **__: called.append(function))
        for i, step in enumerate(waiting):
            step.settle(answered(i))
    assert len(called) == 1
    loop.call_soon(*called)
    assert await asyncio.gather(*tasks) == [answered(i) for i in range(50)]


@pytest.mark.parametrize("moment", ["before its answer", "after its answer"])
async def test_a_task_that_is_cancelled_does_so_alone(moment: str) -> None:
    tasks, waiting = await sent(Wire(answers=False), 3)
    if moment == "before its answer":
        assert tasks[1].cancel("enough")
    for i, step in enumerate(waiting):
        step.settle(answered(i))
    if moment == "after its answer":
        assert tasks[1].cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await tasks[1]
    assert tasks[1].cancelled()
    assert (await tasks[0], await tasks[2]) == (answered(0), answered(2))


async def test_a_step_that_fails_before_it_is_awaited_raises_then() -> None:
    step = Wire(answers=False).coalescer.step(one_step(0, "a", Deadline(60.0)))
    assert isinstance(step, WaitingStep)
    step.fail(errors.UnavailableError("gone"))
    await asyncio.sleep(0)
    with pytest.raises(errors.UnavailableError, match="gone"):
        await step


@pytest.mark.parametrize("moment", ["while it waits", "before it is awaited"])
async def test_a_step_that_failed_keeps_nothing_of_its_caller(moment: str) -> None:
    """Its session keeps it until the next change."""
    [step] = [Wire(answers=False).coalescer.step(one_step(0, "a", Deadline(60.0)))]
    assert isinstance(step, WaitingStep)
    kept = contextvars.ContextVar[Kept]("kept")

    async def caller() -> weakref.ref[Kept]:
        value = Kept()
        kept.set(value)
        with pytest.raises(errors.UnavailableError):
            await step
        return weakref.ref(value)

    gc.disable()
    try:
        if moment == "before it is awaited":
            step.fail(errors.UnavailableError("gone"))
        task = asyncio.create_task(caller())
        await asyncio.sleep(0)
        step.fail(errors.UnavailableError("gone"))
        value = await task
        del task
        await asyncio.sleep(0)
        assert value() is None
    finally:
        gc.enable()


class Kept:
    """A value of a caller."""


def test_an_exit_in_one_task_lets_the_others_wake_when_the_loop_runs_again() -> None:
    async def leave(step: WaitingStep) -> None:
        await step
        raise SystemExit(3)

    async def begin() -> tuple[list[asyncio.Task[Stepped]], list[WaitingStep], asyncio.Task[None]]:
        tasks, waiting = await sent(Wire(answers=False), 3)
        tasks[1].cancel()
        await asyncio.sleep(0)
        waiting[1] = WaitingStep(*facts(waiting[1]))
        waiting[1].queued(waiting[0]._waker)
        leaving = asyncio.create_task(leave(waiting[1]))
        await asyncio.sleep(0)
        return tasks, waiting, leaving

    loop = asyncio.new_event_loop()
    try:
        tasks, waiting, leaving = loop.run_until_complete(begin())
        for i, step in enumerate(waiting):
            step.settle(answered(i))
        with pytest.raises(SystemExit):
            loop.run_until_complete(leaving)
        assert loop.run_until_complete(tasks[2]) == answered(2)
        assert tasks[0].result() == answered(0)
        assert isinstance(leaving.exception(), SystemExit)
    finally:
        loop.close()


@pytest.mark.parametrize("is_debug", [False, True])
def test_tasks_written_in_python_can_await_steps(*, is_debug: bool) -> None:
    """As with libraries that replace asyncio's tasks."""
    python_task: Any = asyncio.tasks._PyTask  # type: ignore[attr-defined]

    async def run() -> list[Any]:
        asyncio.get_running_loop().set_task_factory(
            lambda loop, coro, **more: python_task(coro, loop=loop, **more)
        )
        tasks, waiting = await sent(Wire(answers=False), 3)
        assert all(type(task) is python_task for task in tasks)
        tasks[0].cancel("enough")
        waiting[1].settle(answered(1))
        waiting[2].fail(errors.UnavailableError("gone"))
        return await asyncio.gather(*tasks, return_exceptions=True)

    ends = asyncio.run(run(), debug=is_debug)
    assert [type(end) for end in ends] == [asyncio.CancelledError, tuple, errors.UnavailableError]


async def test_an_answered_task_is_freed_although_its_frame_waits_for_others() -> None:
    tasks, waiting = await sent(Wire(answers=False), 2)
    waiting[0].settle(answered(0))
    await tasks[0]
    freed = weakref.ref(tasks.pop(0))
    await asyncio.sleep(0)  # the callback that woke this test refers to the task
    gc.collect()
    assert freed() is None
    waiting[1].settle(answered(1))
    await tasks[0]


async def test_closing_ends_waiting_and_running_calls() -> None:
    wire = Wire(answers=False)
    under_way = asyncio.ensure_future(wire.step(one_step(0, "a", Deadline(60.0))))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting = asyncio.ensure_future(wire.step(one_step(1, "b", Deadline(60.0))))
    await asyncio.sleep(0)
    wire.coalescer.close()
    ends = await asyncio.gather(under_way, waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [errors.ClosedError] * 2
    assert wire.sent == [["a"]]
    assert not wire.coalescer._in_flight
