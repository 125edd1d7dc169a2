"""The steps of many threads leave as frames; whoever leaves or fails does so alone."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import pytest

from stepwell import errors
from stepwell._batching.frames import Change
from stepwell._batching.sender import Sender
from stepwell._batching.steps import FRAME_SHARE, Step, Stepped, read, stepped_of
from stepwell._state.arguments import pack_inputs
from stepwell._state.tensors import pack, to_messages, unpack
from stepwell._transport.retry import Deadline, RepliesTooLargeError
from stepwell._transport.stream import Answer, MakeRequest, Sink
from stepwell.v1 import errors_pb2, sessions_pb2
from support.sdk.scripted_model import in_full
from support.sdk.sender_queue import SenderQueue

WAIT_S = 100.0
CORRUPT = errors_pb2.Error(code=15, reason="STATE_CORRUPT", message="damaged")
OVERLOADED = errors_pb2.Error(code=8, reason="OVERLOADED", retry_after_ms=50)


class Posted:
    """A frame that has left, to be answered by the test."""

    def __init__(self, request: sessions_pb2.StepStreamRequest, sink: Sink) -> None:
        self.step = request.step
        self.sink = sink
        self.forgotten = threading.Event()

    @property
    def ids(self) -> list[str]:
        return list(self.step.session_ids)

    def part(self, members: Sequence[int], last: bool = True) -> sessions_pb2.StepStreamResponse:
        """Applied: twice the input, the revision after the expected one."""
        starts = np.cumsum([0, *self.step.batch_sizes])
        x = np.concatenate([unpack(self.step.inputs[0])[starts[i] : starts[i + 1]] for i in members])
        revisions = [self.step.expected_revisions[i] + 1 for i in members]
        return sessions_pb2.StepStreamResponse(
            members=members,
            revisions=revisions,
            positions=revisions,
            outputs=to_messages([pack("y", "y", 2 * x)]),
            last=last,
        )

    def answer(self) -> None:
        self.sink(self.part(range(len(self.ids))))


class FakeLink:
    """A link whose frames the test answers."""

    def __init__(self) -> None:
        self.posts: queue.SimpleQueue[Posted] = queue.SimpleQueue()
        self.error: Exception | None = None
        self.all: list[Posted] = []

    def post(self, make: MakeRequest, sink: Sink) -> Callable[[], None]:
        if self.error is not None:
            raise self.error
        posted = Posted(in_full(make(1)), sink)
        self.all.append(posted)
        self.posts.put(posted)
        return posted.forgotten.set


class Bench:
    """A sender, its link and its clock; threads that step; and one lone call that is under way."""

    def __init__(self, max_frame_bytes: int = 1 << 20) -> None:
        self.now_s = 0.0
        self.link = FakeLink()
        self.unaries: list[str] = []
        self.gate = threading.Event()
        self.lone = threading.Event()
        self.threads = futures.ThreadPoolExecutor(40)
        self.sender = Sender(self.link, self.unary, FRAME_SHARE * max_frame_bytes, self.clock)
        self.line = SenderQueue.of(self.sender)

    def clock(self) -> float:
        return self.now_s

    def unary(self, step: Step) -> Stepped:
        self.unaries.append(step.session_id)
        if step.session_id == "lone":
            self.lone.set()
            assert self.gate.wait(WAIT_S)
        return read(sessions_pb2.StepResponse(revision=1, position=1))

    def go(self, session_id: str, **kwargs: Any) -> futures.Future[Stepped]:
        """A thread makes a step."""
        return self.threads.submit(self.sender.step, step(session_id, **kwargs))

    def stand(self, *session_ids: str, **kwargs: Any) -> list[futures.Future[Stepped]]:
        """Threads make steps, one after the other, that go into the line."""
        steps = []
        for session_id in session_ids:
            steps.append(self.go(session_id, **kwargs))
            assert self.line.arrived.acquire(timeout=WAIT_S)
        return steps

    def occupy(self) -> futures.Future[Stepped]:
        """A step that is under way as a call of its own until the gate opens."""
        lone = self.go("lone")
        assert self.lone.wait(WAIT_S)
        return lone

    def first(self, session_id: str = "first") -> tuple[futures.Future[Stepped], Posted]:
        """A lone call and a frame are under way."""
        self.occupy()
        [waiting] = self.stand(session_id)
        return waiting, self.posted()

    def proceeds(self) -> None:
        """Nothing is left over that would keep the next step from being sent and answered."""
        [waiting] = self.stand("next")
        self.posted().answer()
        assert result(waiting)[0] == 5

    def frame_of(self, *session_ids: str, **kwargs: Any) -> tuple[list[futures.Future[Stepped]], Posted]:
        """Steps that wait while another frame is under way, and the frame that has all of them."""
        _, posted = self.first()
        steps = self.stand(*session_ids, **kwargs)
        posted.answer()
        return steps, self.posted()

    def end(self) -> None:
        self.gate.set()
        self.sender.close()
        for posted in self.link.all:
            posted.sink(errors.ClosedError("the test is over"))
        self.threads.shutdown()

    def posted(self) -> Posted:
        return self.link.posts.get(timeout=WAIT_S)


def step(
    session_id: str,
    value: float = 1.0,
    rows: int = 1,
    outputs: str = "all",
    features: int = 2,
    limit_s: float = 60.0,
) -> Step:
    change = Change("step", pack_inputs(np.full((rows, features), value, np.float32)), outputs)
    return Step("m", session_id, change, rows, 4, 7, Deadline(limit_s))


def result(waiting: futures.Future[Stepped]) -> Stepped:
    return waiting.result(WAIT_S)


def error(waiting: futures.Future[Stepped]) -> Any:
    return waiting.exception(WAIT_S)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.end()


def test_alone_a_step_is_a_call_of_its_own_and_no_thread_is_started(bench: Bench) -> None:
    for _ in range(3):
        assert bench.sender.step(step("a")) == stepped_of(1, 1, {})
    assert bench.unaries == ["a"] * 3
    assert bench.line.thread is None


def test_a_large_step_is_a_call_of_its_own(bench: Bench) -> None:
    bench.first()
    assert result(bench.go("large", features=20_000)) == stepped_of(1, 1, {})


def test_while_a_frame_waits_for_its_reply_the_next_gathers(bench: Bench) -> None:
    first, posted = bench.first()
    waiting = [
        bench.stand(name, value=value, rows=rows)[0]
        for name, value, rows in (("a", 1.0, 1), ("b", 2.0, 3), ("c", 3.0, 2))
    ]
    assert bench.link.posts.empty()
    posted.answer()
    assert result(first)[0] == 5
    second = bench.posted()
    assert (second.ids, list(second.step.batch_sizes)) == (["a", "b", "c"], [1, 3, 2])
    assert list(second.step.request_ids) == [7, 7, 7]
    second.answer()
    outputs = [result(one)[4][0] for one in waiting]
    assert [y.tolist() for y in outputs] == [[[2.0, 2.0]], [[4.0, 4.0]] * 3, [[6.0, 6.0]] * 2]
    assert not any(np.shares_memory(outputs[0], y) for y in outputs[1:])
    assert second.forgotten.wait(WAIT_S)


def test_an_old_frame_does_not_hold_up_the_next(bench: Bench) -> None:
    first, _ = bench.first()
    [waiting] = bench.stand("a")
    assert bench.link.posts.empty()
    bench.now_s += 1.0
    bench.posted().answer()
    assert result(waiting)[0] == 5
    assert not first.done()


def test_what_is_not_alike_leaves_apart(bench: Bench) -> None:
    _, posted = bench.first()
    steps = bench.stand("a", "b")
    steps += bench.stand("c", outputs="none") + bench.stand("d", features=3) + bench.stand("e", limit_s=500.0)
    steps += bench.stand("a", value=9.0)  # another handle's step of the same session
    posted.answer()
    frames = [bench.posted() for _ in range(5)]
    assert sorted(frame.ids for frame in frames) == [["a"], ["a", "b"], ["c"], ["d"], ["e"]]
    for frame in frames:
        frame.answer()
    assert [result(one)[0] for one in steps] == [5] * 6


def test_a_frame_has_its_limit(bench: Bench) -> None:
    bench.line.limit_frames(500)
    _, posted = bench.first()
    steps = bench.stand(*"abcde", features=25)  # 100 bytes each, and what comes with it
    posted.answer()
    frames = [bench.posted() for _ in range(2)]
    assert [len(frame.ids) for frame in frames] in ([3, 2], [4, 1])
    for frame in frames:
        frame.answer()
    assert [result(one)[0] for one in steps] == [5] * 5


def test_the_time_limit_passes_in_the_line(bench: Bench) -> None:
    _, posted = bench.first()
    [late] = bench.stand("late", limit_s=0.05)
    [other] = bench.stand("other")
    ended = error(late)
    assert isinstance(ended, errors.DeadlineExceededError)
    assert ended.outcome == "not_applied"
    posted.answer()
    second = bench.posted()
    assert second.ids == ["other"]
    second.answer()
    assert result(other)[0] == 5


def test_the_time_limit_passes_on_the_way(bench: Bench) -> None:
    bench.occupy()
    [late] = bench.stand("late", limit_s=0.05)
    posted = bench.posted()
    ended = error(late)
    assert isinstance(ended, errors.DeadlineExceededError)
    assert ended.outcome == "unknown"
    posted.answer()  # nobody waits any more: nothing happens
    # A frame whose callers have all left is forgotten at last, answered or not.
    bench.proceeds()


def test_a_frame_that_is_never_answered_is_forgotten_when_its_callers_have_left(bench: Bench) -> None:
    bench.occupy()
    [late] = bench.stand("late", limit_s=0.05)
    posted = bench.posted()
    assert isinstance(error(late), errors.DeadlineExceededError)
    bench.proceeds()  # at once, although the clock stands still
    assert posted.forgotten.is_set()


def test_parts_are_handed_on_as_they_come(bench: Bench) -> None:
    steps, frame = bench.frame_of(*"abc")
    frame.sink(frame.part([1], last=False))
    assert result(steps[1])[0] == 5
    assert not steps[0].done()
    frame.sink(frame.part([0, 2]))
    assert [result(one)[0] for one in steps] == [5, 5, 5]


def test_an_error_of_one_member_is_its_own(bench: Bench) -> None:
    steps, frame = bench.frame_of(*"abcd")
    response = frame.part([0, 2])
    response.errors.add(members=[1], error=CORRUPT)
    response.errors.add(members=[3], error=OVERLOADED)
    frame.sink(response)
    assert [result(steps[i])[0] for i in (0, 2)] == [5, 5]
    assert isinstance(error(steps[1]), errors.StateCorruptError)
    # One that may be tried again is, by the step's own flow, not by the frame.
    assert isinstance(error(steps[3]), errors.OverloadedError)


def test_a_stream_that_breaks_fails_whoever_is_unanswered_with_an_error_of_its_own(bench: Bench) -> None:
    steps, frame = bench.frame_of(*"abc")
    frame.sink(frame.part([1], last=False))
    frame.sink(errors.UnavailableError("broken"))
    assert result(steps[1])[0] == 5
    ends = [error(steps[0]), error(steps[2])]
    assert [(type(end), end.outcome) for end in ends] == [(errors.UnavailableError, "unknown")] * 2
    assert ends[0] is not ends[1]


def test_replies_that_are_too_large_together_make_smaller_frames(bench: Bench) -> None:
    steps, frame = bench.frame_of(*"abcd", features=3)
    frame.sink(errors.ReplyTooLargeError("too large"))
    ends = [error(one) for one in steps]
    assert [(type(end), end.outcome) for end in ends] == [(RepliesTooLargeError, "unknown")] * 4
    assert [end.members for end in ends] == [4] * 4
    _, posted = bench.stand("x")[0], bench.posted()
    again = bench.stand(*"abcd", features=3)
    others = bench.stand(*"efgh")
    posted.answer()
    frames = [bench.posted() for _ in range(3)]
    assert [frame.ids for frame in frames] == [["a", "b"], ["c", "d"], ["e", "f", "g", "h"]]
    for frame in frames:
        frame.answer()
    assert [result(one)[0] for one in again + others] == [5] * 8


def test_a_frame_of_one_that_is_too_large_says_that_it_was_alone(bench: Bench) -> None:
    """Its step is then made as a call of its own; the reply that ended the stream may have been another's."""
    waiting, posted = bench.first()
    posted.sink(errors.ReplyTooLargeError("too large"))
    ended = error(waiting)
    assert isinstance(ended, RepliesTooLargeError)
    assert (ended.members, ended.outcome) == (1, "unknown")


@pytest.mark.parametrize(
    "response",
    [
        sessions_pb2.StepStreamResponse(members=[7], revisions=[1], positions=[1]),
        sessions_pb2.StepStreamResponse(members=[0], revisions=[1]),
        sessions_pb2.StepStreamResponse(last=True),
    ],
)
def test_a_reply_that_contradicts_itself_leaves_nobody_waiting(bench: Bench, response: Answer) -> None:
    waiting, posted = bench.first()
    posted.sink(response)
    assert isinstance(error(waiting), errors.InternalError)
    assert posted.forgotten.wait(WAIT_S)
    bench.proceeds()


@pytest.mark.parametrize("kind", [errors.ClosedError, errors.InvalidInputError, ZeroDivisionError])
def test_what_cannot_be_sent_leaves_nobody_waiting(bench: Bench, kind: type[Exception]) -> None:
    bench.occupy()
    bench.link.error = kind("scripted")
    assert isinstance(error(bench.stand("a")[0]), kind)
    bench.link.error = None
    bench.proceeds()


def test_closing_refuses_the_line_and_ends_the_thread(bench: Bench) -> None:
    bench.first()
    steps = bench.stand(*"abc")
    bench.sender.close()
    thread = bench.line.thread
    assert [type(error(one)) for one in steps] == [errors.ClosedError] * 3
    assert thread is not None
    assert not thread.is_alive()
    assert isinstance(error(bench.go("late")), errors.ClosedError)
    bench.sender.close()


def test_a_sender_that_nobody_closed_ends_with_its_last_reference() -> None:
    bench = Bench()
    waiting, posted = bench.first()
    posted.answer()
    result(waiting)
    bench.gate.set()
    bench.threads.shutdown()
    thread, gone = bench.line.thread, weakref.ref(bench.sender)
    del bench, posted, waiting
    gc.collect()
    assert gone() is None
    assert thread is not None
    thread.join(WAIT_S)
    assert not thread.is_alive()
