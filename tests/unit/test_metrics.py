"""What is told to the metrics is counted and shown."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from stepwell_server.engine.engine import ModelStats
from stepwell_server.metrics import PrometheusObserver
from stepwell_server.rpc.fronts.base import FrontCounts

_STATS = [ModelStats("m", 3, 2, 1, 70, 5), ModelStats("n", 0, 0, 0, 70, 5)]


class Samples:
    """A scrape's values by name and label values, in any order."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        self._values = {(each.name, frozenset(each.labels.values())): each.value for each in samples}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Samples) and self._values == pytest.approx(other._values)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, key: tuple[str, ...]) -> float:
        name, *labels = key
        return self._values[name, frozenset(labels)]


def _samples(observer: PrometheusObserver) -> Samples:
    class Collector:
        def collect(self) -> object:
            return observer.families(_STATS)

    registry = CollectorRegistry()
    registry.register(Collector())  # type: ignore[arg-type]
    return Samples(generate_latest(registry).decode())


def test_everything_told_is_counted() -> None:
    observer = PrometheusObserver()
    observer.session_event("opened", "m", "s")
    observer.sessions_opened("m", 4)
    observer.applied("m", "step", 5, 50)
    observer.refused("INVALID_INPUT", 2)
    observer.pass_done("m", 5, 10, 0.002)
    observer.request_done("Step", "OK", 0.003)
    samples = _samples(observer)
    assert samples["stepwell_session_events_total", "m", "opened"] == 5
    assert samples["stepwell_changes_total", "m", "step"] == 5
    assert samples["stepwell_row_steps_total", "m", "step"] == 50
    assert samples["stepwell_errors_total", "INVALID_INPUT"] == 2
    assert samples["stepwell_pass_time_steps_total", "m"] == 10
    assert samples["stepwell_pass_rows_sum", "m"] == 5
    assert samples["stepwell_requests_total", "Step", "OK"] == 1
    assert samples["stepwell_request_seconds_count", "Step"] == 1


def test_histograms_count_each_change_of_a_batch() -> None:
    observer = PrometheusObserver()
    observer.stage("m", "wait", 0.0005, 10)
    observer.stage("m", "wait", 0.0006, 5)
    observer.stage("m", "wait", 100.0, 1)
    samples = _samples(observer)
    name = "stepwell_stage_seconds"
    assert samples[f"{name}_bucket", "m", "wait", "0.00025"] == 0
    assert samples[f"{name}_bucket", "m", "wait", "0.0005"] == 10
    assert samples[f"{name}_bucket", "m", "wait", "0.001"] == 15
    assert samples[f"{name}_bucket", "m", "wait", "+Inf"] == samples[f"{name}_count", "m", "wait"] == 16
    assert abs(samples[f"{name}_sum", "m", "wait"] - 100.008) < 1e-9


def test_gauges_are_those_of_the_moment() -> None:
    samples = _samples(PrometheusObserver())
    assert samples["stepwell_sessions", "m"] == 3
    assert samples["stepwell_resident_rows", "m"] == 2
    assert samples["stepwell_queued_changes", "m"] == 1
    assert samples["stepwell_sessions", "n"] == 0
    assert samples[("stepwell_queued_bytes",)] == 70
    assert samples[("stepwell_uncommitted",)] == 5


def test_how_the_store_is_stands_there() -> None:
    observer = PrometheusObserver()
    assert _samples(observer)[("stepwell_store_ready",)] == 1
    observer.store_checked(is_ready=False, reopened=3)
    samples = _samples(observer)
    assert samples[("stepwell_store_ready",)] == 0
    assert samples[("stepwell_store_reopened_total",)] == 3


def test_calls_that_end_together_are_counted_as_if_each_had_ended_alone() -> None:
    together, alone = PrometheusObserver(), PrometheusObserver()
    seconds = np.random.default_rng(0).uniform(0, 0.02, 50)
    together.requests_done("Step", "OK", seconds)
    together.requests_done("Step", "OK", seconds[:1])
    for each in [*seconds.tolist(), float(seconds[0])]:
        alone.request_done("Step", "OK", each)
    assert _samples(together) == _samples(alone)


def test_the_front_is_shown() -> None:
    observer = PrometheusObserver()
    counts = FrontCounts({"calls": 3, "held_bytes": 1000}, {"memory": 2, "silent": 0})
    observer.serves_by("native", {"connections": 10}, lambda: counts)
    samples = _samples(observer)
    assert samples["stepwell_front_info", "native"] == 1
    assert samples[("stepwell_front_calls",)] == 3
    assert samples[("stepwell_front_held_bytes",)] == 1000
    assert samples["stepwell_front_refused_total", "memory"] == 2
    assert samples["stepwell_front_refused_total", "silent"] == 0
    assert samples["stepwell_front_limit", "connections"] == 10
