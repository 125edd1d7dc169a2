"""Counts and durations of the requests of one version of a model, in the sense of Triton's statistics extension.

Requests are those of this protocol, and of the version. Passes are those of the model, whichever version they ran and
whoever's rows they took along: that is what batching across clients means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from stepwell_server.rpc.triton.inference import service_pb2 as pb


class PassObserver(Protocol):
    """Who has watched the passes of the models."""

    def passes_by_rows(self, model: str) -> Mapping[int, tuple[int, float]]:
        """Number of passes and their seconds in all, by the rows they ran."""

    def seconds_per_time_step(self, model: str) -> float:
        """What one time step took in the model's latest pass."""


@dataclasses.dataclass(slots=True)
class Timing:
    """The points in time of one request, or of several that came together, in nanoseconds of one clock."""

    arrived: int
    read: int = 0
    """Its inputs were read and checked."""
    run: int = 0
    """The engine had answered."""


class RequestStatistics:
    """What became of the requests of one version of a model. Lives on the event loop."""

    def __init__(self, model: str, version: int, observer: PassObserver) -> None:
        self._model = model
        self._version = version
        self._observer = observer
        self._rows = 0
        self._last_ms = 0
        self._succeeded = _Sum()
        self._failed = _Sum()
        self._queue = _Sum()
        self._input = _Sum()
        self._infer = _Sum()
        self._output = _Sum()

    def succeeded(
        self, timing: Timing, done: int, *, now_s: float, rows: int, steps: int, count: int = 1
    ) -> None:
        """Requests were answered at `done`, `now_s` seconds after the epoch; `rows` in all, `steps` each."""
        engine_ns = timing.run - timing.read
        infer_ns = min(engine_ns, round(self._observer.seconds_per_time_step(self._model) * steps * 1e9))
        self._rows += rows
        self._last_ms = round(now_s * 1000)
        self._succeeded.add(done - timing.arrived, count)
        self._input.add(timing.read - timing.arrived, count)
        self._infer.add(infer_ns, count)
        self._queue.add(engine_ns - infer_ns, count)
        self._output.add(done - timing.run, count)

    def failed(self, timing: Timing, done: int, count: int = 1) -> None:
        """Requests were refused at `done`."""
        self._failed.add(done - timing.arrived, count)

    def message(self) -> pb.ModelStatistics:
        """Everything counted so far."""
        passes = sorted(self._observer.passes_by_rows(self._model).items())
        return pb.ModelStatistics(
            name=self._model,
            version=str(self._version),
            last_inference=self._last_ms,
            inference_count=self._rows,
            execution_count=sum(count for _, (count, _) in passes),
            inference_stats=pb.InferStatistics(
                success=self._succeeded.message(),
                fail=self._failed.message(),
                queue=self._queue.message(),
                compute_input=self._input.message(),
                compute_infer=self._infer.message(),
                compute_output=self._output.message(),
                cache_hit=pb.StatisticDuration(),
                cache_miss=pb.StatisticDuration(),
            ),
            batch_stats=[_batch(rows, count, seconds) for rows, (count, seconds) in passes],
        )


def _batch(rows: int, count: int, seconds: float) -> pb.InferBatchStatistics:
    copying = pb.StatisticDuration(count=count)
    return pb.InferBatchStatistics(
        batch_size=rows,
        compute_input=copying,
        compute_infer=pb.StatisticDuration(count=count, ns=round(seconds * 1e9)),
        compute_output=copying,
    )


@dataclasses.dataclass(slots=True)
class _Sum:
    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int) -> None:
        self.count += count
        self.ns += ns * count

    def message(self) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=self.count, ns=self.ns)
