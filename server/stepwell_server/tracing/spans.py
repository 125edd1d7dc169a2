"""Spans of calls, and of what the engine does for them.

A call that is traced has one span of kind server, whose parent is its client's. Below it are `queue` (until its pass
begins), `run` (in passes) and `commit` (until the store has it). A pass is a span of its own, the root of its own
trace: it runs for many, and is linked with the spans of the calls it runs for, as their `run` is with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

import numpy as np
from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from typing_extensions import override

from stepwell_server.engine.api import Trace
from stepwell_server.rpc.status import Code
from stepwell_server.rpc.tracing import TRACES
from stepwell_server.tracing.export import SpanQueue

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from stepwell_server.clock import Clock

_CONTEXT, _BAGGAGE = TraceContextTextMapPropagator(), W3CBaggagePropagator()
_PARENT, _NANOSECONDS = "traceparent", 1_000_000_000
#: Statuses for which the server is to blame: only they make the span of a server one of an error.
_SERVERS_FAULT = frozenset(
    ["UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"]
)
_NUMBERS = {"OK": 0, "CANCELLED": 1} | {code.name: int(code) for code in Code}
_EMPTY = Context()


class Tracing:
    """Makes spans and sends them. `rpc.tracing.Tracer`, on the event loop."""

    def __init__(
        self, exporter: SpanExporter, share: float, services: Mapping[str, str], clock: Clock
    ) -> None:
        """Trace `share` of the calls whose callers say nothing of a trace; `services` are those of the methods."""
        self._queue = SpanQueue(exporter)
        resource = Resource.create(
            {SERVICE_NAME: "stepwell", SERVICE_VERSION: metadata.version("stepwell")}
        ).merge(Resource.create())
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self._queue)
        self.tracer = self._provider.get_tracer("stepwell", metadata.version("stepwell"))
        self._share = share
        self._services = services
        self._clock = clock
        self._random = np.random.default_rng()
        self.counts = self._queue.counts

    def of_call(self, method: str, metadata: Mapping[str, str | bytes]) -> CallSpans | None:
        """See `rpc.tracing.Tracer`."""
        context = _context_of(metadata) if _PARENT in metadata else None
        return self._begin(method, context, SpanKind.SERVER)

    def of_frame(self, method: str, traceparent: str) -> CallSpans | None:
        """See `rpc.tracing.Tracer`."""
        context = _context_of({_PARENT: traceparent}) if traceparent else None
        stream = (TRACES.get() or {}).get(0)
        links = [Link(stream.context)] if isinstance(stream, CallSpans) else []
        return self._begin(method, context, SpanKind.SERVER, links)

    def of_messages(self, method: str, count: int) -> Mapping[int, CallSpans]:
        """See `rpc.tracing.Tracer`."""
        drawn = np.flatnonzero(self._random.random(count) < self._share)
        found = {number: self._begin(method, _EMPTY, SpanKind.SERVER) for number in drawn.tolist()}
        return {number: spans for number, spans in found.items() if spans is not None}

    def _begin(
        self, method: str, context: Context | None, kind: SpanKind, links: Sequence[Link] = ()
    ) -> CallSpans | None:
        if context is None:
            if self._random.random() >= self._share:
                return None
            context = _EMPTY
        elif (
            context is not _EMPTY
            and not trace.get_current_span(context).get_span_context().trace_flags.sampled
        ):
            return None
        service = self._services.get(method, "")
        span = self.tracer.start_span(
            f"{service}/{method}",
            context,
            kind,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
            links,
        )
        return CallSpans(self, span)

    def nanoseconds(self, monotonic: float) -> int:
        """The time since the epoch of a moment on the clock's monotonic time."""
        return time.time_ns() - round((self._clock.monotonic() - monotonic) * _NANOSECONDS)

    def close(self, timeout_s: float) -> None:
        """Send what is left, within the time given. Blocks."""
        self._queue.close(timeout_s)


class CallSpans(Trace):
    """The span of a call, and those below it. `rpc.tracing.CallTrace`."""

    def __init__(self, tracing: Tracing, span: trace.Span) -> None:
        self._tracing = tracing
        self._span = span
        self.context = span.get_span_context()
        self._below = trace.set_span_in_context(span, _EMPTY)

    @override
    def stage(self, name: str, began: float, ended: float, links: Sequence[Link] = ()) -> None:
        at = self._tracing.nanoseconds
        span = self._tracing.tracer.start_span(name, self._below, links=links, start_time=at(began))
        span.end(at(ended))

    @override
    def ran(
        self,
        others: Sequence[Trace],
        model: str,
        rows: int,
        time_steps: int,
        began: float,
        ended: float,
    ) -> None:
        tracing = self._tracing
        calls = [each for each in others if isinstance(each, CallSpans)]
        span = tracing.tracer.start_span(
            "pass",
            _EMPTY,
            attributes={"stepwell.model": model, "stepwell.rows": rows, "stepwell.time_steps": time_steps},
            links=[Link(each.context) for each in calls],
            start_time=tracing.nanoseconds(began),
        )
        span.end(tracing.nanoseconds(ended))
        for each in calls:
            each.stage("run", began, ended, [Link(span.get_span_context())])

    def end(self, code: str, reason: str, facts: Mapping[str, str | int]) -> None:
        """See `rpc.tracing.CallTrace`."""
        span = self._span
        span.set_attribute("rpc.grpc.status_code", _NUMBERS[code])
        for name, value in facts.items():
            if value:
                span.set_attribute(f"stepwell.{name}", value)
        if reason:
            span.set_attribute("error.type", reason)
        if code in _SERVERS_FAULT:
            span.set_status(Status(StatusCode.ERROR, reason))
        span.end()


def _context_of(metadata: Mapping[str, str | bytes]) -> Context | None:
    """What a client says of its trace; None: nothing that can be read."""
    carrier = {key: value for key, value in metadata.items() if isinstance(value, str)}
    context = _CONTEXT.extract(carrier, _EMPTY)
    if not trace.get_current_span(context).get_span_context().is_valid:
        return None
    return _BAGGAGE.extract(carrier, context)
