"""What becomes of spans whose collector is gone."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra otel")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from stepwell_server.tracing.export import Queue


class Gone(SpanExporter):
    """A collector that does not answer: each try takes until it is let go."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self.batches: list[int] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.batches.append(len(spans))
        self.began.set()
        self.go_on.wait(100)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.go_on.set()


def test_a_collector_that_is_gone_blocks_nobody_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    gone = Gone()
    queue = Queue(gone)
    queue.on_end(ReadableSpan("first"))
    queue.on_end(ReadableSpan("first"))
    assert gone.began.wait(100)
    for _ in range(15):  # at once, although nothing is taken away
        queue.on_end(ReadableSpan("later"))
    assert queue.counts()["dropped"] == 5
    gone.go_on.set()
    queue.close(100)
    # the batch that was under way when it was told to end, or the next one, is the last
    assert len(gone.batches) <= 6
    assert sum(queue.counts().values()) == 17

    gone = Gone()
    queue = Queue(gone)
    for _ in range(10):
        queue.on_end(ReadableSpan("some"))
    assert gone.began.wait(100)
    queue.close(0)  # does not wait for it; lets it go
    queue._thread.join(100)
    assert gone.batches == [2]
    assert queue.counts() == {"exported": 0, "failed": 2, "dropped": 8}
