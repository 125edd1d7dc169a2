"""What becomes of spans whose collector is gone."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra otel")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags

from stepwell_server.tracing.export import SpanQueue


class Gone(SpanExporter):
    """A collector that does not answer: each try takes until it is let go."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.ends = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.batches.append(len(spans))
        self.began.set()
        self.go_on.wait(100)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.ends += 1
        self.go_on.set()


def span() -> ReadableSpan:
    return ReadableSpan(
        "some", SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    )


def end(queue: SpanQueue, timeout_s: float) -> None:
    """Close it, and wait until what it leaves behind has ended."""
    queue.close(timeout_s)
    for thread in threading.enumerate():
        if thread.name == "stepwell-traces-end":
            thread.join(100)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _small_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")


def test_a_collector_that_is_gone_blocks_nobody_and_no_end() -> None:
    gone = Gone()
    queue = SpanQueue(gone)
    queue.on_end(span())
    queue.on_end(span())
    assert gone.began.wait(100)
    for _ in range(15):  # at once, although nothing is taken away
        queue.on_end(span())
    assert queue.counts()["dropped"] == 5
    gone.go_on.set()
    end(queue, 100)
    # the batch that was under way when it was told to end, or the next one, is the last
    assert len(gone.batches) <= 6
    assert sum(queue.counts().values()) == 17


def test_an_end_that_has_no_time_lets_go_what_is_being_sent() -> None:
    gone = Gone()
    queue = SpanQueue(gone)
    for _ in range(10):
        queue.on_end(span())
    assert gone.began.wait(100)
    end(queue, 0)
    assert gone.batches == [2]
    assert queue.counts() == {"exported": 0, "failed": 2, "dropped": 8}
    assert gone.ends == 1


def test_what_waits_is_sent_at_the_end_and_an_exporter_that_raises_has_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Gone):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            super().export(spans)
            if len(self.batches) == 1:
                raise RuntimeError("no")
            return SpanExportResult.SUCCESS

    broken = Broken()
    queue = SpanQueue(broken)
    caplog.set_level("INFO")
    queue.on_end(span())
    queue.on_end(span())
    assert broken.began.wait(100)
    for _ in range(3):  # fewer than two batches
        queue.on_end(span())
    broken.go_on.set()
    queue.force_flush()
    end(queue, 100)
    assert queue.counts() == {"exported": 3, "failed": 2, "dropped": 0}
    messages = [record.getMessage() for record in caplog.records]
    assert messages.index("spans cannot be sent and are lost") < messages.index("spans are sent again")
