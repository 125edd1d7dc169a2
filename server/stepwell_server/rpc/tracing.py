"""What of traces the services know: who makes them, and the one of the call that runs now."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Protocol

from stepwell_server.engine.api import Trace


class CallTrace(Trace, Protocol):
    """A call, or a message of a stream, that is traced."""

    def end(self, code: str, reason: str, facts: Mapping[str, str | int]) -> None:
        """It has its answer: a status code, the reason of its error (empty: none), and what is said of it."""


class Tracer(Protocol):
    """Decides what is traced: what the caller traces, a share of what it says nothing of, nothing else. On the event loop."""

    def of_call(self, method: str, metadata: Mapping[str, str | bytes]) -> CallTrace | None:
        """The trace of a call that begins; None: it has none."""

    def of_frame(self, method: str, traceparent: str) -> CallTrace | None:
        """The trace of a message of the stream that is served by this task, whose sender says so of its own trace."""

    def of_messages(self, method: str, count: int) -> Mapping[int, CallTrace]:
        """Traces of some of so many messages whose callers trace none of them, by their number."""


#: Of the call that the running task serves: what its changes are given (`Change.traces`).
TRACES: ContextVar[Mapping[int, Trace] | None] = ContextVar("stepwell_traces", default=None)
