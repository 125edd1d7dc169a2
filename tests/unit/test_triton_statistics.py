"""Statistics of Triton's protocol."""

from __future__ import annotations

import subprocess
import sys

from stepwell_server.metrics.observer import PrometheusObserver
from stepwell_server.rpc.triton.statistics import RequestStatistics, Timing


def test_the_parts_add_up() -> None:
    observer = PrometheusObserver()
    statistics = RequestStatistics("m", 1, observer)
    observer.pass_done("m", 3, 2, 4e-6)  # 2,000 ns a time step
    statistics.succeeded(Timing(100, read=150, run=10_150), 10_200, now_s=1.5, rows=3, steps=2)
    observer.stepped("m", "s", 1, 5e-6, 0.0)
    observer.stepped("m", "s", 1, 7e-6, 0.0)
    statistics.succeeded(Timing(0, read=10, run=1_010), 1_020, now_s=2.5, rows=1, steps=1)
    statistics.failed(Timing(0), 30)
    # two that came together
    statistics.succeeded(Timing(0, read=1, run=101), 111, now_s=2.5, rows=4, steps=1, count=2)
    statistics.failed(Timing(0), 5, 2)
    said = statistics.message()
    assert (said.name, said.version, said.last_inference) == ("m", "1", 2500)
    assert (said.inference_count, said.execution_count) == (8, 3)
    durations = {name.name: (value.count, value.ns) for name, value in said.inference_stats.ListFields()}
    assert durations == {
        "success": (4, 10_100 + 1_020 + 2 * 111),
        "fail": (3, 30 + 2 * 5),
        "queue": (4, 6_000 + 0),  # a request cannot have been in a pass for longer than it took
        "compute_input": (4, 50 + 10 + 2 * 1),
        "compute_infer": (4, 4_000 + 1_000 + 2 * 100),
        "compute_output": (4, 50 + 10 + 2 * 10),
        "cache_hit": (0, 0),
        "cache_miss": (0, 0),
    }
    batches = {one.batch_size: (one.compute_infer.count, one.compute_infer.ns) for one in said.batch_stats}
    assert batches == {1: (2, 12_000), 3: (1, 4_000)}


def test_reading_statistics_counts_nothing_twice() -> None:
    observer = PrometheusObserver()
    for _ in range(2):
        observer.stepped("m", "s", 1, 1.0, 0.0)
        list(observer.families())
        observer.passes_by_rows("m")
    assert observer.passes_by_rows("m") == {1: (2, 2.0)}


def test_the_protocols_message_names_can_be_registered_by_others() -> None:
    """A process that has imported the server can still register Triton's own messages, and the other way round."""
    code = """
from google.protobuf import descriptor_pb2, descriptor_pool

theirs = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package="inference")
theirs.message_type.add(name="ModelInferRequest")
{before}
descriptor_pool.Default().Add(theirs)
{after}
from stepwell_server.rpc.triton.inference import service_pb2
assert service_pb2.ModelInferRequest(id="1").SerializeToString()
assert not descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest").fields
"""
    ours = "import stepwell_server.rpc.server"
    for before, after in ((ours, ""), ("", ours)):
        subprocess.run(
            [sys.executable, "-c", code.format(before=before, after=after)], check=True, timeout=250
        )
