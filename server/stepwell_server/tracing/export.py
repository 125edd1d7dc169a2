"""Spans on their way to a collector: a bounded queue, and a thread that sends what is in it."""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Mapping
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from stepwell_server.logs import Log

_log = Log("tracing")
#: As OpenTelemetry's own processor of batches has them, by the same variables.
_MAX_QUEUE, _MAX_BATCH, _DELAY_MS = 2048, 512, 5000
_LAST_S = 5.0
"""Spans are worth so long a wait at the end, and no longer."""
_HTTP_PORT, _HTTP_PATH = 4318, "/v1/traces"


class Queue(SpanProcessor):
    """Keeps spans until they are sent. What comes while it is full is dropped, and counted."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._most = _number("OTEL_BSP_MAX_QUEUE_SIZE", _MAX_QUEUE)
        self._batch = min(self._most, _number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", _MAX_BATCH))
        self._delay_s = _number("OTEL_BSP_SCHEDULE_DELAY", _DELAY_MS) / 1000
        self._spans: collections.deque[ReadableSpan] = collections.deque()
        self._wake = threading.Event()
        self._closing = False
        self._counts = {"exported": 0, "failed": 0, "dropped": 0}
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="stepwell-traces", daemon=True)
        self._thread.start()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """A span began."""

    def on_end(self, span: ReadableSpan) -> None:
        """A span ended. On the event loop."""
        if len(self._spans) >= self._most:
            self._counts["dropped"] += 1
            return
        self._spans.append(span)
        if len(self._spans) >= self._batch:
            self._wake.set()

    def counts(self) -> Mapping[str, int]:
        """How many spans had which end."""
        return self._counts

    def close(self, timeout_s: float) -> None:
        """Send what is left, within the time given and five seconds. Blocks. Where sending fails the rest is dropped."""
        timeout_s = min(timeout_s, _LAST_S)
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _log.warning("some spans were not sent in time", spans=len(self._spans), timeout_s=timeout_s)
        self._exporter.shutdown()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._delay_s)
            self._wake.clear()
            self._send()
        self._send()

    def _send(self) -> None:
        while self._spans:
            batch = [self._spans.popleft() for _ in range(min(len(self._spans), self._batch))]
            try:
                sent = self._exporter.export(batch) is SpanExportResult.SUCCESS
            except Exception as error:
                sent = False
                _log.defect("spans could not be sent", error)
            self._counts["exported" if sent else "failed"] += len(batch)
            if sent is self._is_failing:
                self._is_failing = not sent
                if sent:
                    _log.info("spans are sent again")
                else:
                    _log.warning("spans cannot be sent, they are lost")
            if self._closing and not sent:
                self._counts["dropped"] += len(self._spans)
                self._spans.clear()


def exporter_to(endpoint: str | None) -> SpanExporter:
    """What sends spans to a collector; None: to where OpenTelemetry's own variables say.

    By HTTP to port 4318, to a path /v1/traces, or where `OTEL_EXPORTER_OTLP_PROTOCOL` says so; else by gRPC.
    """
    parts = urlsplit(endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""))
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    is_http = parts.port == _HTTP_PORT or parts.path.rstrip("/").endswith(_HTTP_PATH)
    if protocol == "http/protobuf" or (protocol is None and is_http):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as ByHttp

        if endpoint is not None and not parts.path.strip("/"):
            endpoint = endpoint.rstrip("/") + _HTTP_PATH
        return ByHttp(endpoint=endpoint)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as ByGrpc

    return ByGrpc(endpoint=endpoint)


def _number(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() and int(text) else otherwise
