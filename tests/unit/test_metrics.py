"""What is told to the metrics is counted and shown."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from stepwell_server.catalog.control import VersionState, VersionStatus
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.engine.commit.group_commit import MAX_WAITING
from stepwell_server.engine.engine import ModelStats
from stepwell_server.engine.intake.queues import MAX_WAITING_BYTES
from stepwell_server.errors import reasons
from stepwell_server.metrics import gauges
from stepwell_server.metrics.observer import PrometheusObserver
from stepwell_server.metrics.series import Series, StoreWrites
from stepwell_server.metrics.server import Source
from stepwell_server.process.readiness import Readiness
from stepwell_server.rpc.fronts.base import SECONDS, Durations, FrontCounts
from stepwell_server.rpc.status import ANY_CODE
from stepwell_server.store.base import Store, StoreHealth
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from support.clock import ManualClock
from support.engine.fake_executor import PLAIN
from support.stores.fake_shared_store import RemoteStore
from support.telemetry.scrape import Scrape

_STATS = [ModelStats("m", 3, 2, 8, 1, 64, 4, 70, 5), ModelStats("n", 0, 0, 8, 0, 64, 4, 70, 5)]


def _scrape(*sources: Source) -> Scrape:
    class Sources(Collector):
        def collect(self) -> Iterator[Metric]:
            return (family for source in sources for family in source())

    registry = CollectorRegistry()
    registry.register(Sources())
    return Scrape(generate_latest(registry).decode())


def _expect(scrape: Scrape, *rows: tuple[Any, ...]) -> None:
    """Check values of series; a row is a name, a value and the values of the labels."""
    for name, value, *labels in rows:
        assert scrape.value(f"stepwell_{name}", *labels) == value, (name, labels)


def _serving(*models: str) -> PrometheusObserver:
    """An observer of a server of some models."""
    observer = PrometheusObserver()
    for model in models:
        observer.model_served(model, PLAIN)
    return observer


def test_everything_told_is_counted() -> None:
    observer = _serving("m")
    observer.session_event("opened", "m", "s")
    observer.sessions_opened("m", 4)
    observer.applied("m", "step", 5, 50)
    observer.replayed("m", "step", 3)
    observer.judged_again("m", 2)
    observer.paged("m", "in", 7, 0.002)
    observer.paged("m", "in", 1, 0.002)
    observer.refused("INVALID_INPUT", 2, "m")
    observer.refused("INVALID_INPUT", 1)
    observer.pass_done("m", 5, 10, 0.002)
    observer.model_loaded("m", "compiled", 12.5)
    scrape = _scrape(observer.families, lambda: gauges.of_build({"version": "1"}))
    _expect(
        scrape,
        ("session_events_total", 5, "m", "opened"),
        ("changes_total", 5, "m", "step"),
        ("row_steps_total", 50, "m", "step"),
        ("replays_total", 3, "m", "step"),
        ("store_conflicts_total", 2, "m"),
        ("paged_sessions_total", 8, "m", "in"),
        ("paging_seconds_count", 2, "m", "in"),
        ("paging_seconds_count", 0, "m", "out"),
        ("errors_total", 2, "m", "INVALID_INPUT"),
        ("errors_total", 1, "", "INVALID_INPUT"),
        ("pass_time_steps_total", 10, "m"),
        ("pass_rows_sum", 5, "m"),
        ("model_loads_total", 1, "m", "compiled"),
        ("model_loads_total", 0, "m", "cache"),
        ("model_load_seconds", 12.5, "m"),
    )
    assert {"version": "1"} in scrape.series("stepwell_build_info")


def test_versions_are_counted_by_how_they_are() -> None:
    observer = _serving("m", "gone")
    statuses = {
        "m": [
            VersionStatus(1, VersionState.DRAINING, fingerprint="f1", sessions=2),
            VersionStatus(3, VersionState.READY, fingerprint="f3", is_default=True),
            VersionStatus(4, VersionState.FAILED, "no"),
            VersionStatus(5, VersionState.FAILED, "no"),
        ],
        "new": [VersionStatus(1, VersionState.LOADING, "probe")],
    }
    observer.sessions_moved("m", "carry", 7)
    observer.model_failed("m")
    observer.model_failed("")
    scrape = _scrape(observer.families, lambda: gauges.of_versions(statuses, observer.models))
    _expect(
        scrape,
        ("model_versions", 1, "m", "draining"),
        ("model_versions", 1, "m", "ready"),
        ("model_versions", 2, "m", "failed"),
        ("model_versions", 0, "m", "loading"),
        ("model_versions", 1, "new", "loading"),
        ("model_default_version", 3, "m"),
        ("model_default_version", 0, "new"),
        ("moved_sessions_total", 7, "m", "carry"),
        ("moved_sessions_total", 0, "m", "reset"),
        ("model_loads_total", 1, "m", "failed"),
        ("model_loads_total", 1, "", "failed"),
    )
    (about,) = scrape.series("stepwell_model_info")
    assert about == {"model": "m", "version": "3", "fingerprint": "f3", "executor": PLAIN.executor}


def test_what_may_come_stands_at_0_before_it_does() -> None:
    observer = _serving("m", "n")
    observer.method_served("Step", ANY_CODE, streams=False)
    observer.method_served("StepStream", ANY_CODE, streams=True)
    scrape = _scrape(observer.families)
    errors = {(labels["model"], labels["reason"]) for labels in scrape.series("stepwell_errors_total")}
    assert errors == {(model, reason) for model in ("", "m", "n") for reason in reasons()}
    assert {"OVERLOADED", "SESSION_NOT_FOUND", "REVISION_CONFLICT", "INTERNAL"} < set(reasons())
    requests = [(labels["method"], labels["code"]) for labels in scrape.series("stepwell_requests_total")]
    assert sorted(requests) == sorted((m, code) for m in ("Step", "StepStream") for code in ANY_CODE)
    _expect(
        scrape,
        ("session_events_total", 0, "n", "expired"),
        ("stage_seconds_count", 0, "n", "commit"),
        ("request_seconds_count", 0, "Step"),
        ("open_streams", 0, "StepStream"),
    )


def test_what_callers_say_makes_no_series() -> None:
    observer = _serving("m")
    before = _scrape(observer.families).size
    for number in range(100):
        observer.refused("MODEL_NOT_FOUND", 1, f"model {number}")
        observer.session_event("expired", f"model {number}", f"session {number}")
    scrape = _scrape(observer.families)
    assert scrape.value("stepwell_errors_total", "", "MODEL_NOT_FOUND") == 100
    assert scrape.size == before + 1  # sessions of models that are not served any more, all together


def test_a_stream_is_timed_by_its_messages_and_counted_while_it_is_open() -> None:
    observer = _serving()
    observer.method_served("StepStream", ANY_CODE, streams=True)
    observer.stream_began("StepStream")
    observer.stream_began("StepStream")
    observer.messages_done("StepStream", np.array([0.002, 0.003]))
    observer.stream_done("StepStream", "CANCELLED")
    scrape = _scrape(observer.families)
    _expect(
        scrape,
        ("open_streams", 1, "StepStream"),
        ("request_seconds_count", 2, "StepStream"),
        ("request_seconds_sum", pytest.approx(0.005), "StepStream"),
        ("requests_total", 1, "StepStream", "CANCELLED"),
    )


def test_histograms_count_each_change_of_a_batch() -> None:
    observer = PrometheusObserver()
    observer.stage("m", "wait", 0.0005, 10)
    observer.stage("m", "wait", 0.0006, 5)
    observer.stage("m", "wait", 100.0, 1)
    samples = _scrape(observer.families)
    _expect(
        samples,
        *(
            ("stage_seconds_bucket", count, "m", "wait", bound)
            for bound, count in (("0.00025", 0), ("0.0005", 10), ("0.001", 15), ("+Inf", 16))
        ),
        ("stage_seconds_count", 16, "m", "wait"),
        ("stage_seconds_sum", pytest.approx(100.008), "m", "wait"),
    )


def test_gauges_are_those_of_the_moment() -> None:
    samples = _scrape(lambda: gauges.of_engine(_STATS))
    _expect(
        samples,
        ("sessions", 3, "m"),
        ("resident_rows", 2, "m"),
        ("max_resident_rows", 8, "m"),
        ("queued_rows", 1, "m"),
        ("max_queued_rows", 64, "m"),
        ("max_pass_rows", 4, "m"),
        ("sessions", 0, "n"),
        ("queued_bytes", 70),
        ("max_queued_bytes", MAX_WAITING_BYTES),
        ("uncommitted_sessions", 5),
        ("max_uncommitted_sessions", MAX_WAITING),
    )


def test_how_the_store_is_stands_there() -> None:
    writes = StoreWrites()

    def scrape(health: StoreHealth, *, is_damaged: bool, of: StoreWrites | None = writes) -> Scrape:
        return _scrape(lambda: gauges.of_store({}, health, of, is_damaged=is_damaged))

    in_memory = scrape(StoreHealth(), is_damaged=False, of=None)
    assert not in_memory.series("stepwell_store_write_seconds_count")
    writes.log_written(0.002, 3)
    samples = scrape(StoreHealth(), is_damaged=False)
    _expect(
        samples,
        ("store_write_seconds_count", 1, "log"),
        ("store_write_seconds_count", 0, "data"),
        ("store_log_records_total", 3),
        ("store_ready", 1),
    )
    samples = scrape(StoreHealth("full", reopened=3, lost_sessions=2), is_damaged=True)
    _expect(
        samples,
        ("store_ready", 0),
        ("store_reopened_total", 3),
        ("store_damaged", 1),
        ("store_lost_sessions_total", 2),
    )


def test_whether_it_is_ready_stands_there_from_the_first_scrape_on() -> None:
    readiness = Readiness()

    def is_ready() -> float:
        return _scrape(lambda: gauges.of_readiness(readiness.report)).value("stepwell_ready")

    assert is_ready() == 0
    readiness.problem("models", "")
    assert is_ready() == 1
    readiness.problem("stopping", "the server stops")
    assert is_ready() == 0


def test_calls_that_end_together_are_counted_as_if_each_had_ended_alone() -> None:
    together, alone = PrometheusObserver(), PrometheusObserver()
    seconds = np.random.default_rng(0).uniform(0, 0.02, 50)
    together.requests_done("Step", "OK", seconds)
    together.requests_done("Step", "OK", seconds[:1])
    for each in [*seconds.tolist(), float(seconds[0])]:
        alone.request_done("Step", "OK", each)
    assert _scrape(together.families) == _scrape(alone.families)


def test_answers_that_a_front_counted_are_counted_as_if_each_had_been_reported() -> None:
    counted, reported = PrometheusObserver(), PrometheusObserver()
    nothing = ([0] * (len(SECONDS) + 1), 0.0)
    for calls, messages in (([0.25, 2e-5], []), ([0.5], [0.125, 64.0])):
        counted.answered("Step", "StepStream", _durations(calls), _durations(messages))
        reported.requests_done("Step", "OK", np.array(calls))
        if messages:
            reported.messages_done("StepStream", np.array(messages))
    counted.answered("Step", "StepStream", nothing, nothing)
    assert _scrape(counted.families) == _scrape(reported.families)


def _durations(seconds: list[float]) -> Durations:
    series = Series()
    for each in seconds:
        series.observe(each)
    return series.counts, series.total


def test_steps_that_ran_without_a_wait_are_counted_as_passes() -> None:
    direct, passes = PrometheusObserver(), PrometheusObserver()
    for rows, seconds in ((1, 3e-4), (3, 2e-3), (3, 5e-3)):
        direct.stepped("m", "s", rows, seconds, 1.0)
        passes.pass_done("m", rows, 1, seconds)
        passes.stage("m", "wait", 0.0, rows)
        passes.stage("m", "total", seconds, rows)
        passes.slow("m", "s", seconds, 1.0)
        passes.applied("m", "step", rows, rows)
    assert _scrape(direct.families) == _scrape(passes.families)
    assert direct.passes_by_rows("m") == passes.passes_by_rows("m")


def test_the_front_is_shown() -> None:
    limits = FrontLimits(1 << 20, connections=10).values
    counts = FrontCounts(
        {"calls": 3, "held_bytes": 1000}, {"memory": 2, "silent": 0}, {"event_loop": 7, "thread": 5}
    )
    samples = _scrape(lambda: gauges.of_front(counts, limits))
    _expect(
        samples,
        ("front_calls", 3),
        ("front_held_bytes", 1000),
        ("front_refused_total", 2, "memory"),
        ("front_refused_total", 0, "silent"),
        ("front_taken_total", 7, "event_loop"),
        ("front_taken_total", 5, "thread"),
        ("front_max_connections", 10),
    )


async def test_servers_of_one_store_say_the_same_name_of_it_and_others_another() -> None:
    shared = RemoteStore(MemoryStore())
    own, backup = (InProcessStore(local, ManualClock()) for local in [MemoryStore()] * 2)

    def told(store: Store) -> dict[str, str]:
        source = functools.partial(gauges.of_store, store.labels, StoreHealth(), None, is_damaged=False)
        (labels,) = _scrape(source).series("stepwell_store_info")
        return dict(labels)

    first, second = told(shared), told(shared.replica())
    assert first == second == {"store_id": shared.incarnation, "shared": "true"}
    # two servers may have been set up from one backup
    assert told(own)["shared"] == "false"
    assert told(own)["store_id"] != told(backup)["store_id"] != shared.incarnation


def test_what_the_server_warns_of_is_shown() -> None:
    readiness = Readiness()

    def scrape() -> Scrape:
        return _scrape(lambda: gauges.of_readiness(readiness.report))

    assert {each["about"] for each in scrape().series("stepwell_warning")} == {
        "default_versions",
        "disk",
        "models",
        "replicas",
        "store",
    }
    readiness.warning("store", "it keeps nothing")
    readiness.defaults_elsewhere({"m": 3})
    values = [scrape().value("stepwell_warning", about) for about in ("store", "default_versions", "disk")]
    assert values == [1, 1, 0]
