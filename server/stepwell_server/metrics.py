"""Prometheus metrics.

Counting is plain arithmetic on the event loop, where a scrape takes a copy (`metrics_server`). There is no
global registry, and prometheus_client is imported only if metrics are served.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stepwell_server.engine.api import Observer

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from stepwell_server.engine.engine import ModelStats
    from stepwell_server.rpc.fronts.base import FrontCounts

_SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0
)  # fmt: skip
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
_FRONT_TEXTS = {
    "connections": "Connections open.",
    "calls": "Calls under way.",
    "held_bytes": "Bytes of requests and replies in memory.",
    "queued_bytes": "Bytes of plain steps that the event loop has not taken.",
    "window_bytes": "Bytes that clients may send before they are read.",
    "unwritten_replies": "Replies that are not on their way.",
}

Labels = tuple[str, ...]


class _Counter:
    def __init__(self, name: str, text: str, labels: Labels) -> None:
        self.name, self.text, self.labels = name, text, labels
        self.values: defaultdict[Labels, float] = defaultdict(float)

    def family(self) -> Metric:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(self.name, self.text, labels=self.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class _Histogram:
    def __init__(self, name: str, text: str, labels: Labels, bounds: Sequence[float]) -> None:
        self.name, self.text, self.labels, self.bounds = name, text, labels, bounds
        self._edges = np.array(bounds)
        self.series: dict[Labels, _Series] = {}

    def observe(self, labels: Labels, value: float, count: int = 1) -> None:
        series = self.series.get(labels)
        if series is None:
            series = self.series[labels] = _Series(len(self.bounds) + 1)
        series.counts[bisect_left(self.bounds, value)] += count
        series.total += value * count

    def observe_all(self, labels: Labels, values: npt.NDArray[np.float64]) -> None:
        if len(values) == 1:
            self.observe(labels, float(values[0]))
            return
        more = _Series(len(self.bounds) + 1)
        places = self._edges.searchsorted(values)
        more.counts = np.bincount(places, minlength=len(more.counts)).tolist()
        more.total = float(values.sum())
        self.add(labels, more)

    def add(self, labels: Labels, more: _Series) -> None:
        series = self.series.setdefault(labels, _Series(len(self.bounds) + 1))
        series.counts = [a + b for a, b in zip(series.counts, more.counts, strict=True)]
        series.total += more.total

    def family(self) -> Metric:
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(self.name, self.text, labels=self.labels)
        for labels, series in self.series.items():
            family.add_metric(labels, list(self._cumulative(series)), sum_value=series.total)
        return family

    def _cumulative(self, series: _Series) -> Iterator[tuple[str, float]]:
        running = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], series.counts, strict=True):
            running += count
            yield bound, running


class _Series:
    __slots__ = ("counts", "total")

    def __init__(self, size: int) -> None:
        self.counts = [0] * size
        self.total = 0.0


class PrometheusObserver(Observer):
    """Counts what the engine and the gRPC side do. All methods on the event loop."""

    def __init__(self) -> None:
        model = ("model",)
        self._alone: dict[str, _Series] = {}
        self._batches: defaultdict[str, dict[int, tuple[int, float]]] = defaultdict(dict)
        self._time_step_s: dict[str, float] = {}
        self._events = _Counter(
            "stepwell_session_events",
            "Sessions opened, resumed, forked, closed, expired.",
            ("model", "event"),
        )
        self._changes = _Counter(
            "stepwell_changes", "Changes applied: step, reset, predict.", ("model", "change")
        )
        self._row_steps = _Counter(
            "stepwell_row_steps", "Rows times time steps of the changes applied.", ("model", "change")
        )
        self._errors = _Counter(
            "stepwell_errors", "Calls and changes of frames refused, by reason.", ("reason",)
        )
        self._time_steps = _Counter("stepwell_pass_time_steps", "Time steps run in passes.", model)
        self._pass_rows = _Histogram("stepwell_pass_rows", "Rows of a pass.", model, _ROWS)
        self._pass_seconds = _Histogram("stepwell_pass_seconds", "Duration of a pass.", model, _SECONDS)
        self._stages = _Histogram(
            "stepwell_stage_seconds",
            "Seconds of a change by stage: wait (for its pass), commit (for the store), total (until its answer).",
            ("model", "stage"),
            _SECONDS,
        )
        self._front = ""
        self._limits: Mapping[str, float] = {}
        self._front_counts: Callable[[], FrontCounts] | None = None
        self._store_is_ready = True
        self._store_reopened = 0
        self._requests = _Counter("stepwell_requests", "Calls by method and status code.", ("method", "code"))
        self._request_seconds = _Histogram(
            "stepwell_request_seconds", "Duration of a call.", ("method",), _SECONDS
        )

    def session_event(self, event: str, model: str, session_id: str) -> None:  # noqa: ARG002
        """See `Observer.session_event`."""
        self._events.values[model, event] += 1

    def sessions_opened(self, model: str, count: int, event: str = "opened") -> None:
        """See `Observer.sessions_opened`."""
        self._events.values[model, event] += count

    def session_events(self, event: str, model: str, count: int) -> None:
        """See `Observer.session_events`."""
        self._events.values[model, event] += count

    def stage(self, model: str, stage: str, seconds: float, count: int) -> None:
        """See `Observer.stage`."""
        self._stages.observe((model, stage), seconds, count)

    def stepped_alone(self, model: str, seconds: float) -> None:
        """See `Observer.stepped_alone`."""
        alone = self._alone.get(model)
        if alone is None:
            alone = self._alone[model] = _Series(len(_SECONDS) + 1)
        alone.counts[bisect_left(_SECONDS, seconds)] += 1
        alone.total += seconds
        self._time_step_s[model] = seconds

    def _count_alone(self) -> None:
        """Add the steps that ran alone to everything they belong to."""
        for model, alone in self._alone.items():
            steps = sum(alone.counts)
            self._pass_seconds.add((model,), alone)
            self._stages.add((model, "total"), alone)
            self._stages.observe((model, "wait"), 0.0, steps)
            self._pass_rows.observe((model,), 1, steps)
            self._time_steps.values[model,] += steps
            self._changes.values[model, "step"] += steps
            self._row_steps.values[model, "step"] += steps
            self._count_passes(model, 1, steps, alone.total)
        self._alone.clear()

    def pass_done(self, model: str, rows: int, time_steps: int, seconds: float) -> None:
        """See `Observer.pass_done`."""
        labels = (model,)
        self._pass_rows.observe(labels, rows)
        self._pass_seconds.observe(labels, seconds)
        self._time_steps.values[labels] += time_steps
        self._time_step_s[model] = seconds / max(1, time_steps)
        self._count_passes(model, rows, 1, seconds)

    def _count_passes(self, model: str, rows: int, count: int, seconds: float) -> None:
        batches = self._batches[model]
        passes, before = batches.get(rows, (0, 0.0))
        batches[rows] = (passes + count, before + seconds)

    def passes_by_rows(self, model: str) -> Mapping[int, tuple[int, float]]:
        """How many passes of the model ran, and their seconds in all, by the rows they ran."""
        self._count_alone()
        return self._batches[model]

    def seconds_per_time_step(self, model: str) -> float:
        """Seconds that one time step took in the model's latest pass; 0 before the first."""
        return self._time_step_s.get(model, 0.0)

    def applied(self, model: str, change: str, count: int, row_steps: int) -> None:
        """See `Observer.applied`."""
        labels = (model, change)
        self._changes.values[labels] += count
        self._row_steps.values[labels] += row_steps

    def refused(self, reason: str, count: int) -> None:
        """Calls or changes of a frame ended with an error."""
        self._errors.values[(reason,)] += count

    def serves_by(self, front: str, limits: Mapping[str, float], counts: Callable[[], FrontCounts]) -> None:
        """What speaks to the network, as `--front` has it; its limits; what it has to do when it is asked."""
        self._front, self._limits, self._front_counts = front, limits, counts

    def store_checked(self, *, is_ready: bool, reopened: int) -> None:
        """The store was looked after: whether it can be used, and how often it was opened anew."""
        self._store_is_ready, self._store_reopened = is_ready, reopened

    def request_done(self, method: str, code: str, seconds: float) -> None:
        """A call ended."""
        self._requests.values[method, code] += 1
        self._request_seconds.observe((method,), seconds)

    def requests_done(self, method: str, code: str, seconds: npt.NDArray[np.float64]) -> None:
        """Several calls of a method ended alike."""
        self._requests.values[method, code] += len(seconds)
        self._request_seconds.observe_all((method,), seconds)

    def families(self, stats: Iterable[ModelStats]) -> list[Metric]:
        """Everything counted so far, and the gauges of ``stats``."""
        self._count_alone()
        counted: list[_Counter | _Histogram] = [
            *(self._events, self._changes, self._row_steps, self._errors, self._time_steps),
            *(self._pass_rows, self._pass_seconds, self._stages, self._requests, self._request_seconds),
        ]
        families = [each.family() for each in counted]
        return [*families, *self._front_families(), *self._store_families(), *_gauges(list(stats))]

    def _front_families(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        text = "What speaks to the network: native or python."
        yield InfoMetricFamily("stepwell_front", text, value={"front": self._front})
        if self._front_counts is None:
            return
        counts = self._front_counts()
        for name, value in counts.now.items():
            yield GaugeMetricFamily(f"stepwell_front_{name}", _FRONT_TEXTS[name], value=value)
        text = "Connections and calls that the front refused or ended, by reason."
        refused = CounterMetricFamily("stepwell_front_refused", text, labels=("reason",))
        for reason, count in counts.refused.items():
            refused.add_metric((reason,), count)
        text = "What clients may take of the front."
        limits = GaugeMetricFamily("stepwell_front_limit", text, labels=("limit",))
        for limit, most in self._limits.items():
            limits.add_metric((limit,), most)
        yield from (refused, limits)

    def _store_families(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        text = "1 if the store can be used, 0 if not."
        yield GaugeMetricFamily("stepwell_store_ready", text, value=self._store_is_ready)
        text = "How often the store was opened anew because its disk had failed."
        yield CounterMetricFamily("stepwell_store_reopened", text, value=self._store_reopened)


def _gauges(stats: Sequence[ModelStats]) -> list[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    gauges: list[tuple[str, str, Callable[[ModelStats], int]]] = [
        ("stepwell_sessions", "Sessions live.", lambda model: model.sessions),
        ("stepwell_resident_rows", "Rows of state ready to step.", lambda model: model.resident_rows),
        ("stepwell_queued_changes", "Changes waiting for a pass.", lambda model: model.queued),
    ]
    families: list[Metric] = []
    for name, text, value in gauges:
        family = GaugeMetricFamily(name, text, labels=("model",))
        for model in stats:
            family.add_metric((model.name,), value(model))
        families.append(family)
    waiting = max((model.queued_bytes for model in stats), default=0)  # each says the sum over all models
    text = "Bytes of the inputs that wait for a pass, over all models."
    commits = max((model.uncommitted for model in stats), default=0)
    return [
        *families,
        GaugeMetricFamily("stepwell_queued_bytes", text, value=waiting),
        GaugeMetricFamily(
            "stepwell_uncommitted", "Sessions whose changes wait for the store.", value=commits
        ),
    ]
