"""A collector of traces: a real receiver of OTLP over gRPC, which keeps the traces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

_TIMEOUT_S = 100.0


class Span:
    """A span as it was exported."""

    def __init__(self, message: Any) -> None:
        self.name: str = message.name
        self.kind: int = message.kind
        self.id: bytes = message.span_id
        self.trace: bytes = message.trace_id
        self.parent: bytes = message.parent_span_id
        self.links: list[bytes] = [link.span_id for link in message.links]
        self.status: int = message.status.code
        self.began, self.ended = message.start_time_unix_nano, message.end_time_unix_nano
        self.events: list[str] = [event.name for event in message.events]
        self.facts: Mapping[str, Any] = {
            each.key: getattr(each.value, each.value.WhichOneof("value")) for each in message.attributes
        }

    def __repr__(self) -> str:
        return f"{self.name} {dict(self.facts)}"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps spans. For any thread."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.address = ""
        self._came = threading.Condition()

    def Export(self, request: Any, _context: object) -> Any:  # noqa: N802 - as the protocol has it
        with self._came:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self.spans += map(Span, scope.spans)
            self._came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, enough: Callable[[list[Span]], bool]) -> list[Span]:
        """The spans, as soon as they are enough."""
        with self._came:
            assert self._came.wait_for(lambda: enough(self.spans), _TIMEOUT_S), self.spans
            return list(self.spans)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens on loopback."""
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
