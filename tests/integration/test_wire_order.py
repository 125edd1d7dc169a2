"""What is under way at once: order within a session, cancelled and late requests, clients that go away."""

from __future__ import annotations

import contextlib
import itertools

import grpc
import numpy as np

import stepwell
from stepwell.v1 import sessions_pb2
from support.peers import wire
from support.peers.wire import Conversation, Wire, tensor
from support.servers.served import Served

pb = sessions_pb2
LONG = 60_000
"""Time steps of a request that is under way while others come."""
LONGER = (LONG, 3 * LONG, 10 * LONG)
"""Tried one after the other where a busy machine may hold this process up until a long step is over."""


def long_step(served: Served, session_id: str, steps: int = LONG) -> pb.StepRequest:
    x = np.random.default_rng(0).standard_normal((1, steps, 3)).astype(np.float16)
    return pb.StepRequest(session_id=session_id, inputs=[tensor(x)], outputs=pb.OUTPUT_SELECTION_LAST)


def long_frame(served: Served, frame_id: int, session_id: str, steps: int) -> pb.StepStreamRequest:
    step = long_step(served, session_id, steps)
    return wire.step_frame(frame_id, [session_id], step.inputs, outputs=step.outputs)


def begun(served: Served, session_id: str, steps: int = LONG) -> Conversation:
    """A stream on which a long step of the session is under way: the answer to what came after says so."""
    stream = Conversation(served.wire)
    stream.send(long_frame(served, 1, session_id, steps), pb.StepStreamRequest(frame_id=2))
    assert stream.receive().frame_id == 2
    return stream


def test_a_call_that_is_cancelled_while_it_waits(served: Served) -> None:
    """It is not applied, and those before and behind it in line are."""
    x = [tensor(np.ones((1, 3), np.float32))]
    is_in_line, revisions, last = False, list[list[int]](), 0
    for steps in LONGER:
        with served.session("seq", steps=0) as session_id, begun(served, session_id, steps) as stream:
            stream.send(*[wire.step_frame(10 + i, [session_id], x) for i in range(2)])
            with Conversation(served.wire) as leaving:
                leaving.send(wire.step_frame(1, [session_id], x), pb.StepStreamRequest(frame_id=2))
                is_in_line = leaving.receive().frame_id == 2
                stream.send(*[wire.step_frame(20 + i, [session_id], x) for i in range(2)])
                leaving.call.cancel()
            is_in_line = is_in_line and served.wire.session(session_id).revision == 0
            revisions = [list(answer.revisions) for answer in stream.end()]
            last = served.wire.session(session_id).revision
        if is_in_line:
            break
    assert is_in_line
    assert revisions == [[i] for i in range(1, 6)]
    assert last == 5


def test_a_long_step_that_is_cancelled_is_not_applied(served: Served) -> None:
    with served.session("seq") as session_id, served.nothing_changes(session_id):
        stream = begun(served, session_id, LONGER[-1])
        stream.call.cancel()
        assert served.wire.state(session_id).session.revision == 1


def test_a_client_that_disconnects_in_the_middle_and_comes_back(served: Served) -> None:
    """It sends the same change again by another connection: applied once, whether it was or not."""
    x = tensor(np.ones((1, 3_000, 3), np.float32))
    known = served.wire.predict("seq", [x]).outputs[0].data
    for _ in range(5):
        with served.session("seq", steps=0) as session_id:
            request = pb.StepRequest(session_id=session_id, inputs=[x], expected_revision=0, request_id=8)
            with Wire(served.address) as first:
                call = first.sessions.Step.future(request, timeout=200)
                first.session(session_id)  # by now the step has left this side
                call.cancel()
            answer = served.wire.sessions.Step(request, timeout=200)
            assert (answer.revision, answer.position) == (1, 3_000)
            assert answer.outputs[0].data == known


def test_a_deadline_that_passes_in_line(served: Served) -> None:
    is_in_line = False
    x = [tensor(np.ones((1, 3), np.float32))]
    refused: list[dict[int, wire.Refusal]] = [{}]
    answers: dict[int, pb.StepStreamResponse] = {}
    for steps in LONGER:
        with served.session("seq", steps=0) as session_id, begun(served, session_id, steps) as stream:
            late = pb.StepRequest(session_id=session_id, inputs=x)
            with contextlib.suppress(grpc.RpcError):
                served.wire.sessions.Step(late, timeout=0.01)
            is_in_line = served.wire.session(session_id).revision == 0
            stream.send(
                wire.step_frame(5, [session_id], x, timeout_ms=1),
                wire.reset_frame(6, [session_id], timeout_ms=1),
            )
            stream.send(wire.step_frame(7, [session_id], x))
            answers = {answer.frame_id: answer for answer in stream.end()}
        refused = [wire.of_members([answers[frame_id]], 1) for frame_id in (5, 6)]
        if is_in_line and all(refused):
            break
    assert is_in_line
    for one in refused:
        one[0].expect("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "not applied")
    assert list(answers[7].revisions) == [2]


def test_a_time_limit_of_the_sdk(served: Served) -> None:
    is_in_line = False
    late: stepwell.DeadlineExceededError | None = None
    for steps in LONGER:
        with served.session("seq", steps=0) as session_id:
            session = served.client.open_session("seq", session_id=session_id)
            with begun(served, session_id, steps) as stream:
                try:
                    session.step(np.ones((1, 3)), timeout_s=0.02)
                except stepwell.DeadlineExceededError as error:
                    late = error
                except stepwell.RevisionConflictError:  # the long step was done before it came
                    assert served.wire.session(session_id).revision == 1
                is_in_line = served.wire.session(session_id).revision == 0
                stream.end()
            session.refresh()
            if is_in_line:
                assert (session.revision, session.position) == (1, steps)
                break
    assert is_in_line
    assert late is not None
    assert late.outcome in ("not_applied", "unknown")


def test_many_streams_at_once(served: Served) -> None:
    streams = [Conversation(served.wire) for _ in range(8)]
    ids = served.wire.open_many("seq", 8)
    x = served.draw("seq", 8, 5)["x"]
    known = [served.wire.predict("seq", [tensor(x[i : i + 1])]).outputs[0].data for i in range(8)]
    for time, (i, stream) in itertools.product(range(5), enumerate(streams)):
        stream.send(wire.step_frame(time, [ids[i]], [tensor(x[i : i + 1, time])]))
    for i, stream in enumerate(streams):
        assert b"".join(answer.outputs[0].data for answer in stream.end()) == known[i]
    served.wire.close(*ids)
