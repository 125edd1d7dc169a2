"""OpenTelemetry spans of a client's operations, without I/O: a flow around another one, like event hooks.

An operation has one span of kind client, whose parent is the caller's current span; its attempts are events of the
span. The span's context travels in a call's metadata, or in a frame of steps.
"""

from __future__ import annotations

import dataclasses
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from stepwell import _install
from stepwell._base.flow import Flow, Notify, Pause
from stepwell._base.metadata import sampled
from stepwell._batching.steps import Step
from stepwell._core.lanes import Ask, Exchange
from stepwell._routing.lookup import Lookup
from stepwell._transport.call import Call
from stepwell._transport.channel import service_of
from stepwell.errors import InvalidInputError, StepwellError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from stepwell._base.metadata import Pairs

T = TypeVar("T")


class Tracing:
    """Creates the spans of a client.

    Raises:
        InvalidInputError: opentelemetry-api is not installed.
    """

    def __init__(self, address: str) -> None:
        try:
            from opentelemetry import trace
        except ImportError as error:
            raise InvalidInputError(
                f"tracing must be False unless opentelemetry-api is installed: {_install.advice(_install.OTEL)}; got True"
            ) from error
        self._tracer = trace.get_tracer("stepwell", metadata.version("stepwell"))
        self._address = address

    def traced(self, flow: Flow[T]) -> Flow[T]:
        """The same flow, whose asks carry the context of its span."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        span: Span | None = None
        context: Pairs = ()
        attempts = 0
        try:
            ask: Ask = next(flow)
            while True:
                if not isinstance(ask, Pause | Notify | Lookup):
                    attempts += 1
                    if span is None:
                        span = self._tracer.start_span(
                            _name(ask), kind=SpanKind.CLIENT, attributes=self._facts(ask)
                        )
                        context = _context_of(span)
                    elif span.is_recording():
                        span.add_event("attempt", {"number": attempts})
                    ask = _with(ask, context)
                try:
                    answer = yield ask
                except StepwellError as error:
                    _note(span, error)
                    ask = flow.throw(error)
                else:
                    for lane in ask.lanes if isinstance(ask, Exchange) else ():
                        _note(span, lane.error)
                    ask = flow.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except Exception as error:
            if span is not None:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            if span is not None:
                span.end()
            flow.close()

    def _facts(self, ask: Ask) -> dict[str, str | int]:
        service, _, method = _name(ask).partition("/")
        facts: dict[str, str | int] = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": method,
            "server.address": self._address,
        }
        if isinstance(ask, Exchange):
            facts["stepwell.sessions"] = sum(len(lane.members) for lane in ask.lanes)
            return facts
        asked: Any = ask.request if isinstance(ask, Call) else ask
        for name, fact in (("session_id", "stepwell.session.id"), ("model", "stepwell.model")):
            if value := getattr(asked, name, ""):
                facts[fact] = value
        return facts


def _name(ask: Ask) -> str:
    """The method of an ask, as if steps never shared a message."""
    if isinstance(ask, Call):
        return f"stepwell.v1.{service_of(ask.rpc)}/{ask.rpc}"
    return "stepwell.v1.SessionService/" + ("StepStream" if isinstance(ask, Exchange) else "Step")


def _note(span: Span | None, error: StepwellError | None) -> None:
    """Adds the event of an attempt that failed."""
    if error is not None and span is not None and span.is_recording():
        span.add_event("failed", {"error.type": type(error).__name__, "message": str(error)})


def _context_of(span: Span) -> Pairs:
    """The context of a span: `traceparent`, and the other headers of this process's propagators."""
    from opentelemetry import propagate, trace

    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(span))
    return tuple(carrier.items())


def _with(ask: Ask, context: Pairs) -> Ask:
    if isinstance(ask, Call):
        return ask._replace(metadata=context)
    if isinstance(ask, Step):
        return dataclasses.replace(ask, trace=context)
    if isinstance(ask, Exchange):
        for lane in ask.lanes:
            lane.frame.traceparent = sampled(context)
    return ask
