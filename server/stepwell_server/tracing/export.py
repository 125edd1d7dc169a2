"""Exports spans to a collector with OpenTelemetry's batch processor, and counts sent, failed and dropped spans."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from typing_extensions import override

from stepwell_server.logs import Log

_log = Log("tracing")
#: The defaults of OpenTelemetry's processor, for the same variables.
_MAX_QUEUE, _MAX_BATCH, _DELAY_MS = 2048, 512, 5000
_MAX_CLOSE_S = 5.0
"""Maximum seconds to wait for the last spans to be sent."""
_HTTP_PORT, _HTTP_PATH = 4318, "/v1/traces"


class CountedExporter(SpanExporter):
    """Sends batches through another exporter, counts their spans, and logs when sending starts to fail or works again."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.counts = {"exported": 0, "failed": 0, "dropped": 0}
        self.taken = 0
        """Spans that have left the queue."""
        self.is_closing = False
        """Whether to drop the remaining spans after the first failure."""
        self._is_failing = self._gave_up = self._is_shut_down = False

    @override
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        is_sent = not self._gave_up and self._send(spans)
        outcome = "exported" if is_sent else "dropped" if self._gave_up else "failed"
        self.counts[outcome] += len(spans)
        self._gave_up = self.is_closing and not is_sent
        if is_sent is self._is_failing:
            self._is_failing = not is_sent
            if is_sent:
                _log.info("spans are sent again")
            else:
                _log.warning("spans cannot be sent and are lost")
        return SpanExportResult.SUCCESS if is_sent else SpanExportResult.FAILURE

    def _send(self, spans: Sequence[ReadableSpan]) -> bool:
        try:
            return self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception as error:
            _log.defect("spans could not be sent", error)
            return False

    @override
    def shutdown(self) -> None:
        if not self._is_shut_down:
            self._is_shut_down = True
            self._exporter.shutdown()


class SpanQueue(BatchSpanProcessor):
    """Keeps spans until a thread sends them. A full queue drops new spans and counts them."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._max_queue = _number("OTEL_BSP_MAX_QUEUE_SIZE", _MAX_QUEUE)
        batch = min(self._max_queue, _number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", _MAX_BATCH))
        self._exporter, self._accepted = CountedExporter(exporter), 0
        super().__init__(
            self._exporter, self._max_queue, _number("OTEL_BSP_SCHEDULE_DELAY", _DELAY_MS), batch
        )

    @override
    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span that ended. Call it on the event loop."""
        # The processor itself would drop the oldest span without counting it.
        if self._accepted - self._exporter.taken >= self._max_queue:
            self._exporter.counts["dropped"] += 1
            return
        self._accepted += 1
        super().on_end(span)

    def counts(self) -> Mapping[str, int]:
        """The number of spans by outcome: exported, failed, dropped."""
        return self._exporter.counts

    def close(self, timeout_s: float) -> None:
        """Send the remaining spans, within the given time and at most five seconds. Blocks. Drops the rest after a failure."""
        timeout_s = min(timeout_s, _MAX_CLOSE_S)
        self._exporter.is_closing = True
        closing = threading.Thread(target=self.shutdown, name="stepwell-traces-end", daemon=True)
        closing.start()
        closing.join(timeout_s)
        if closing.is_alive():
            left = self._accepted - self._exporter.taken
            _log.warning("some spans were not sent in time", spans=left, timeout_s=timeout_s)
            self._exporter.shutdown()  # ends the running request


def exporter_to(endpoint: str | None) -> SpanExporter:
    """Return an exporter to a collector; None: the collector in OpenTelemetry's own variables.

    It uses HTTP for port 4318, for a path /v1/traces, or if `OTEL_EXPORTER_OTLP_PROTOCOL` says so, else gRPC.
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
