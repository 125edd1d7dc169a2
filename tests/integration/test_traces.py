"""Traces as a collector gets them, of a real server."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

import stepwell
from stepwell.v1 import sessions_pb2 as pb
from support.servers.both_fronts import FRONTS, needs_native
from support.servers.server_process import FEATURES, connect, random_tensor, serve
from support.telemetry.trace_collector import Collector, Span, collecting

_EACH_FRONT = [pytest.param(front, marks=needs_native if front == "native" else ()) for front in FRONTS]
_SERVER, _SERVICE = 2, "stepwell.v1.SessionService"


def _parent(number: int, *, sampled: bool = True) -> tuple[str, bytes, bytes]:
    """The header of a client's span, its trace and its id."""
    whole, span = f"{number:032x}", f"{number:016x}"
    return f"00-{whole}-{span}-{'01' if sampled else '00'}", bytes.fromhex(whole), bytes.fromhex(span)


@contextmanager
def _tracing(front: str, share: float) -> Iterator[tuple[Any, Collector, Callable[[], list[Span]]]]:
    """A server's stub, the collector that gets its spans, and what ends the server, so that all have been sent."""
    with collecting() as collector:
        options = ("--front", front, "--trace-endpoint", collector.address, "--trace-sample", str(share))
        with serve(*options) as server:
            channel, stub = connect(server)
            with channel:

                def end() -> list[Span]:
                    channel.close()
                    server.signal()
                    code, _, err = server.finish()
                    assert code == 0, err
                    return collector.spans

                yield stub, collector, end


def _named(spans: Sequence[Span], method: str) -> list[Span]:
    return [span for span in spans if span.name == f"{_SERVICE}/{method}"]


@pytest.mark.parametrize("front", _EACH_FRONT)
def test_a_call_that_its_caller_traces_is_traced_from_queue_to_reply(front: str) -> None:
    header, whole, client = _parent(7)
    unsampled, _, _ = _parent(8, sampled=False)
    with _tracing(front, 0.0) as (stub, _, end):
        stub.OpenSession(pb.OpenSessionRequest(model="forecast", session_id="a"))
        x = random_tensor(1, 1, FEATURES)
        stub.Step(pb.StepRequest(session_id="a", inputs=[x]), metadata=[("traceparent", header)])
        long = random_tensor(2, 1, 5, FEATURES)
        stub.Step(pb.StepRequest(session_id="a", inputs=[long]), metadata=[("traceparent", header)])
        stub.Step(pb.StepRequest(session_id="a", inputs=[x]), metadata=[("traceparent", unsampled)])
        stub.Step(pb.StepRequest(session_id="a", inputs=[x]))
        with pytest.raises(grpc.RpcError):
            stub.GetState(pb.GetStateRequest(session_id="b"), metadata=[("traceparent", header)])
        frames: queue.SimpleQueue[pb.StepStreamRequest | None] = queue.SimpleQueue()
        replies = stub.StepStream(iter(frames.get, None))
        for number, said in enumerate((header, "", unsampled), 1):
            body = pb.StepFrame(session_ids=["a"], inputs=[x], traceparent=said)
            frames.put(pb.StepStreamRequest(frame_id=number, step=body))
            assert not next(replies).errors
        frames.put(None)
        assert not list(replies)
        spans = end()
    steps = _named(spans, "Step")
    (refused,) = _named(spans, "GetState")
    (frame,) = _named(spans, "StepStream")
    servers = [span for span in spans if span.kind == _SERVER]
    assert len(servers) == 4, servers  # one of each call that its caller traces, and of no other
    assert {(span.trace, span.parent) for span in servers} == {(whole, client)}
    assert len(steps) == 2
    for step in [*steps, frame]:
        below = {span.name: span for span in spans if span.parent == step.id}
        assert set(below) >= {"run", "commit"}, below
        assert all(span.trace == whole for span in below.values())
        assert step.began <= below["run"].began <= below["run"].ended <= below["commit"].ended <= step.ended
        (work,) = [span for span in spans if span.name == "pass" and step.id in span.links]
        assert below["run"].links == [work.id]
        assert work.trace != whole
        assert work.facts["stepwell.rows"] == 1
        assert work.facts["stepwell.model"] == "forecast"
        assert step.facts["rpc.system"] == "grpc"
        assert step.facts["rpc.service"] == _SERVICE
        assert step.facts["rpc.grpc.status_code"] == 0
    assert {step.facts["stepwell.session.id"] for step in steps} == {"a"}
    assert refused.facts["error.type"] == "SESSION_NOT_FOUND"
    assert refused.facts["rpc.grpc.status_code"] == 5
    assert refused.status == 0, "the caller's mistake is no error of the server"


@pytest.mark.parametrize("front", _EACH_FRONT)
def test_of_calls_whose_callers_say_nothing_a_share_is_traced(front: str) -> None:
    unsampled, _, _ = _parent(8, sampled=False)
    with _tracing(front, 1.0) as (stub, _, end):
        stub.OpenSession(pb.OpenSessionRequest(model="forecast", session_id="a"))
        x = random_tensor(1, 1, FEATURES)
        for _ in range(3):
            stub.Step(pb.StepRequest(session_id="a", inputs=[x]))
            stub.Step(pb.StepRequest(session_id="a", inputs=[x]), metadata=[("traceparent", unsampled)])
        spans = end()
    steps = _named(spans, "Step")
    assert len(steps) == 3
    assert len(_named(spans, "OpenSession")) == 1
    assert len({step.trace for step in steps}) == 3
    assert {step.parent for step in steps} == {b""}
    assert {step.facts["stepwell.session.id"] for step in steps} == {"a"}
    assert len([span for span in spans if span.name == "pass"]) == 3


@pytest.fixture(scope="module")
def clients_spans() -> list[ReadableSpan]:
    """Spans that clients in this process have ended, as they end."""
    ended: list[ReadableSpan] = []

    class Keep(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            ended.append(span)

    provider = TracerProvider()
    provider.add_span_processor(Keep())
    trace.set_tracer_provider(provider)
    return ended


@pytest.mark.parametrize("front", _EACH_FRONT)
def test_a_trace_goes_on_from_the_caller_over_the_client_to_the_server(
    front: str, clients_spans: list[ReadableSpan]
) -> None:
    clients_spans.clear()
    x = np.zeros((1, FEATURES), np.float32)
    with collecting() as collector:
        options = ("--front", front, "--trace-endpoint", collector.address, "--trace-sample", "0")
        with serve(*options) as server, stepwell.connect(server.address, tracing=True) as client:
            with trace.get_tracer("test").start_as_current_span("caller") as caller:
                session = client.open_session("forecast", session_id="a")
                session.step(x)
                with client.open_sessions("forecast", 2) as group:
                    group.step(np.zeros((2, FEATURES), np.float32))
                with pytest.raises(stepwell.SessionNotFoundError):
                    client.session_info("nobody")
            server.signal()
            assert server.finish()[0] == 0
    own = {span.name.rpartition("/")[2]: span for span in clients_spans}
    assert {"OpenSession", "Step", "OpenSessions", "StepStream", "GetSession", "caller"} <= set(own)
    whole = caller.get_span_context().trace_id
    for name in ("OpenSession", "Step", "StepStream", "GetSession"):
        span = own[name].get_span_context()
        assert span is not None
        assert span.trace_id == whole
        (served,) = _named(collector.spans, name)
        assert served.parent == span.span_id.to_bytes(8, "big"), name
        assert served.trace == whole.to_bytes(16, "big")
    assert own["Step"].attributes is not None
    assert own["Step"].attributes["stepwell.session.id"] == "a"
    assert own["GetSession"].status.status_code is trace.StatusCode.ERROR


@pytest.mark.slow
def test_attempts_are_events_of_one_span(clients_spans: list[ReadableSpan]) -> None:
    clients_spans.clear()
    client = stepwell.connect("127.0.0.1:1", tracing=True, connect_timeout_s=2.0)
    with client, pytest.raises(stepwell.UnavailableError):
        client.models()
    (span,) = clients_spans
    names = [event.name for event in span.events]
    assert names[0] == names[-1] == "failed"
    assert names.count("failed") == names.count("attempt") + 1 >= 2
