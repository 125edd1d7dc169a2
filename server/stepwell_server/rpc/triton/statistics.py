"""Counts and durations of the requests of one version of a model, in the sense of Triton's statistics extension.

The requests are those in Triton's protocol to this version. The passes are those of the model, over all versions and
protocols, because rows of all clients are batched together.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from stepwell_server.rpc.triton.inference import service_pb2 as pb


class PassObserver(Protocol):
    """Keeps counts of the passes of the models."""

    def passes_by_rows(self, model: str) -> Mapping[int, tuple[int, float]]:
        """Number of passes and their seconds in all, by the rows they ran."""

    def seconds_per_time_step(self, model: str) -> float:
        """Duration of one time step in the model's latest pass."""


@dataclasses.dataclass(slots=True)
class Timing:
    """The points in time of one request, or of several that came together, in nanoseconds of one clock."""

    arrived: int
    read: int = 0
    """Its inputs were read and checked."""
    run: int = 0
    """The engine had answered."""


class RequestStatistics:
    """Counts the requests of one version of a model. Lives on the event loop."""

    def __init__(self, model: str, version: int, observer: PassObserver) -> None:
        self._model = model
        self._version = version
        self._observer = observer
        self._rows = 0
        self._last_ms = 0
        self._counts: Counter[str] = Counter()
        """Requests, by the fields of `InferStatistics`."""
        self._ns: Counter[str] = Counter()
        """Their durations."""

    def succeeded(
        self, timing: Timing, done: int, *, now_s: float, rows: int, steps: int, count: int = 1
    ) -> None:
        """Requests were answered at `done`, `now_s` seconds after the epoch; `rows` in all, `steps` each."""
        engine_ns = timing.run - timing.read
        infer_ns = min(engine_ns, round(self._observer.seconds_per_time_step(self._model) * steps * 1e9))
        self._rows += rows
        self._last_ms = round(now_s * 1000)
        self._add("success", done - timing.arrived, count)
        self._add("compute_input", timing.read - timing.arrived, count)
        self._add("compute_infer", infer_ns, count)
        self._add("queue", engine_ns - infer_ns, count)
        self._add("compute_output", done - timing.run, count)

    def failed(self, timing: Timing, done: int, count: int = 1) -> None:
        """Requests were refused at `done`."""
        self._add("fail", done - timing.arrived, count)

    def message(self) -> pb.ModelStatistics:
        """Everything counted so far."""
        passes = sorted(self._observer.passes_by_rows(self._model).items())
        durations = {
            field.name: pb.StatisticDuration(count=self._counts[field.name], ns=self._ns[field.name])
            for field in pb.InferStatistics.DESCRIPTOR.fields
        }
        return pb.ModelStatistics(
            name=self._model,
            version=str(self._version),
            last_inference=self._last_ms,
            inference_count=self._rows,
            execution_count=sum(count for _, (count, _) in passes),
            inference_stats=pb.InferStatistics(**durations),
            batch_stats=[_batch(rows, count, seconds) for rows, (count, seconds) in passes],
        )

    def _add(self, field: str, ns: int, count: int) -> None:
        self._counts[field] += count
        self._ns[field] += ns * count


def _batch(rows: int, count: int, seconds: float) -> pb.InferBatchStatistics:
    copying = pb.StatisticDuration(count=count)
    return pb.InferBatchStatistics(
        batch_size=rows,
        compute_input=copying,
        compute_infer=pb.StatisticDuration(count=count, ns=round(seconds * 1e9)),
        compute_output=copying,
    )
