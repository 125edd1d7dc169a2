"""The services' view of traces: the interface of a tracer, and the trace of the running call."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Protocol

from stepwell_server.engine.api import Trace


class CallTrace(Trace, Protocol):
    """The trace of a call, or of a message of a stream."""

    def end(self, code: str, reason: str, facts: Mapping[str, str | int]) -> None:
        """End the trace with a status code, the reason of the error (empty: no error), and facts."""


class Tracer(Protocol):
    """Traces the calls that their callers trace, and a share of those without a decision. On the event loop."""

    def of_call(self, method: str, metadata: Mapping[str, str | bytes]) -> CallTrace | None:
        """Return the trace of a starting call; None: it is not traced."""

    def of_frame(self, method: str, traceparent: str) -> CallTrace | None:
        """Return the trace of a message on the running task's stream, by the traceparent in the message."""

    def of_messages(self, method: str, count: int) -> Mapping[int, CallTrace]:
        """Return traces for some of `count` messages whose callers do not trace them, by their number."""


#: Traces of the call that the running task serves, for its changes (`Change.traces`).
TRACES: ContextVar[Mapping[int, Trace] | None] = ContextVar("stepwell_traces", default=None)
