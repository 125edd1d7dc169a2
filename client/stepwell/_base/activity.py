"""The activity of servers between two scrapes of their metrics: what WatchServer and `stepwell top` show.

Several servers are shown as their total, whether or not they share a store: rates, queues and memory are added up,
percentiles cover all calls, and sessions count once for each store.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)")
_STAGES = ("wait", "commit", "total")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class SlowSession(Protocol):
    """The slowest step of a session."""

    @property
    def session_id(self) -> str:
        """Its id."""

    @property
    def model(self) -> str:
        """Name of its model."""

    @property
    def seconds(self) -> float:
        """The time that the step took."""

    @property
    def age_s(self) -> float:
        """The time since then, in seconds."""


class Sample(NamedTuple):
    """One value of a metric."""

    labels: Mapping[str, str]
    value: float


class Scrape:
    """The metrics of a server at one time.

    Args:
        samples: Name, labels and value of each.
        when: The time on this machine's monotonic clock, in seconds.
    """

    def __init__(self, samples: Iterable[tuple[str, Mapping[str, str], float]], when: float) -> None:
        self.when = when
        self._samples: dict[str, list[Sample]] = {}
        for name, labels, value in samples:
            self._samples.setdefault(name, []).append(Sample(labels, value))

    @classmethod
    def of_text(cls, text: str, when: float) -> Scrape:
        """The metrics in Prometheus's text format."""
        found = filter(None, map(_SAMPLE.match, text.splitlines()))
        return cls(((one[1], dict(_LABEL.findall(one[2] or "")), float(one[3])) for one in found), when)

    def samples(self, name: str, **labels: str) -> list[Sample]:
        """Values of a metric with these labels."""
        wanted = labels.items()
        return [sample for sample in self._samples.get(name, ()) if wanted <= sample.labels.items()]

    def total(self, name: str, **labels: str) -> float:
        """Sum of the values of a metric; 0 if there is none."""
        return sum(sample.value for sample in self.samples(name, **labels))

    @property
    def server_ids(self) -> list[str]:
        """Random ids of the server processes that the metrics belong to."""
        return [sample.labels.get("server_id", "") for sample in self.samples("stepwell_build_info")]


class Seen(NamedTuple):
    """The result of one look at a server."""

    metrics: str
    """Address of its metrics: HOST:PORT or the rest of the URL."""
    before: Scrape | None
    """The previous scrape; None for the first."""
    now: Scrape | None
    """The current scrape; None if the server did not answer."""
    error: str = ""
    """Why it did not answer."""


class _Activity:
    """The activity of servers between two scrapes each."""

    def __init__(self, seen: Sequence[Seen]) -> None:
        self.pairs = [(one.before, one.now) for one in seen if one.before is not None and one.now is not None]
        self._now = [one.now for one in seen if one.now is not None]

    def samples(self, name: str, **labels: str) -> list[Sample]:
        """Current values of a metric, of all servers."""
        return [sample for now in self._now for sample in now.samples(name, **labels)]

    def values(self, name: str, label: str) -> list[str]:
        """The values of a label of a metric, sorted."""
        return sorted({sample.labels[label] for sample in self.samples(name) if label in sample.labels})

    def total(self, name: str, **labels: str) -> float:
        """Sum of the current values of a metric."""
        return sum(sample.value for sample in self.samples(name, **labels))

    def of_stores(self, name: str, **labels: str) -> int:
        """The sum over stores of what the servers report about their store."""
        found: dict[str, float] = {}
        for number, now in enumerate(self._now):
            info = now.samples("stepwell_store_info")
            store = info[0].labels["store_id"] if info else f"of server {number}"
            found[store] = max(found.get(store, 0.0), now.total(name, **labels))
        return int(sum(found.values()))

    def rates(self, name: str, **labels: str) -> list[float]:
        """Growth of a counter per second, on each server. A restarted server counts from 0."""
        return [
            max(0.0, now.total(name, **labels) - before.total(name, **labels))
            / max(now.when - before.when, 1e-9)
            for before, now in self.pairs
        ]

    def rate(self, name: str, **labels: str) -> float:
        """Growth of a counter per second, on all servers together."""
        return sum(self.rates(name, **labels))

    def quantiles(self, name: str, **labels: str) -> dict[str, float | None]:
        """The median and the 99th percentile, computed like Prometheus's histogram_quantile; None without values."""
        grown: dict[float, float] = {}
        for before, now in self.pairs:
            was = {sample.labels["le"]: sample.value for sample in before.samples(f"{name}_bucket", **labels)}
            for sample in now.samples(f"{name}_bucket", **labels):
                le = sample.labels["le"]
                grown[float(le)] = grown.get(float(le), 0.0) + max(0.0, sample.value - was.get(le, 0.0))
        return {"p50_s": _quantile(grown, 0.5), "p99_s": _quantile(grown, 0.99)}

    def stages(self, **labels: str) -> dict[str, dict[str, float | None]]:
        """The `quantiles` of each stage of changes."""
        return {stage: self.quantiles("stepwell_stage_seconds", stage=stage, **labels) for stage in _STAGES}


def _quantile(counts: Mapping[float, float], quantile: float) -> float | None:
    """Interpolates within a bucket as if its values were spread evenly."""
    wanted = quantile * max(counts.values(), default=0.0)
    low, below = 0.0, 0.0
    for bound in sorted(counts):
        if counts[bound] >= wanted > 0:
            if math.isinf(bound):
                return low
            inside = counts[bound] - below
            return low + (bound - low) * ((wanted - below) / inside if inside else 1.0)
        low, below = bound, counts[bound]
    return None


def picture(seen: Sequence[Seen], slow: Sequence[SlowSession], wall_s: float) -> dict[str, Any]:
    """The document of `--json`. Rates cover the time between the scrapes.

    Args:
        seen: The servers, in their order. At least one has answered.
        slow: Their slow sessions.
        wall_s: The current time, in seconds since the epoch.
    """
    activity = _Activity(seen)
    rate = activity.rate
    methods = [
        {
            "method": method,
            "calls_per_s": rate("stepwell_requests_total", method=method),
            "messages_per_s": rate("stepwell_request_seconds_count", method=method),
            **activity.quantiles("stepwell_request_seconds", method=method),
        }
        for method in activity.values("stepwell_request_seconds_count", "method")
    ]
    kinds = [
        dict(pair)
        for pair in dict.fromkeys(
            (("model", sample.labels["model"]), ("reason", sample.labels["reason"]))
            for sample in activity.samples("stepwell_errors_total")
        )
    ]
    errors = [{**kind, "per_s": rate("stepwell_errors_total", **kind)} for kind in kinds]
    tenants = [
        {
            "tenant": tenant,
            "row_steps_per_s": rate("stepwell_tenant_steps_total", tenant=tenant),
            "sessions": activity.of_stores("stepwell_tenant_sessions", tenant=tenant),
        }
        for tenant in activity.values("stepwell_tenant_sessions", "tenant")
    ]
    return {
        "server": _server(activity, wall_s),
        "servers": [
            {
                "metrics": one.metrics,
                "error": one.error,
                "id": ", ".join(one.now.server_ids if one.now else ()),
            }
            for one in seen
        ],
        "models": [_model(name, activity) for name in activity.values("stepwell_sessions", "model")],
        "methods": _busiest(methods, "messages_per_s", least=0.0),
        "errors": _busiest(errors, "per_s", least=0.0),
        "tenants": _busiest(tenants, "row_steps_per_s"),
        "slow_sessions": [
            {"session_id": one.session_id, "model": one.model, "seconds": one.seconds, "age_s": one.age_s}
            for one in slow
        ],
        "replicas": [],
    }


def _busiest(rows: list[dict[str, Any]], key: str, least: float = -1.0) -> list[dict[str, Any]]:
    """Rows with more than `least` under a key, largest first."""
    return sorted((row for row in rows if row[key] > least), key=lambda row: -float(row[key]))


def _server(activity: _Activity, wall_s: float) -> dict[str, Any]:
    """One server, or the total of several; different names are listed with commas."""
    started = [sample.value for sample in activity.samples("process_start_time_seconds")]
    ready = activity.samples("stepwell_ready")
    return {
        "version": ", ".join(activity.values("stepwell_build_info", "version")),
        "front": ", ".join(activity.values("stepwell_build_info", "front")),
        "store": ", ".join(activity.values("stepwell_build_info", "store")),
        "store_id": ", ".join(activity.values("stepwell_store_info", "store_id")),
        "uptime_s": wall_s - max(started, default=wall_s),
        "memory_bytes": activity.total("process_resident_memory_bytes"),
        "max_memory_bytes": activity.total("stepwell_max_memory_bytes"),
        "cores": activity.rate("process_cpu_seconds_total"),
        "connections": activity.total("stepwell_front_connections"),
        "streams": activity.total("stepwell_open_streams"),
        "store_ready": all(sample.value for sample in activity.samples("stepwell_store_ready")),
        "ready": bool(ready) and all(sample.value for sample in ready),
        "row_steps_per_s": activity.rate("stepwell_row_steps_total", change="step"),
        **activity.quantiles("stepwell_stage_seconds", stage="total"),
        "stages": activity.stages(),
        "sessions": activity.of_stores("stepwell_sessions"),
        "resident_sessions": int(activity.total("stepwell_resident_sessions")),
        "resident_rows": int(activity.total("stepwell_resident_rows")),
        "queued_rows": int(activity.total("stepwell_queued_rows")),
        "watched_sessions": int(activity.total("stepwell_watched_sessions")),
        "errors_per_s": activity.rate("stepwell_errors_total"),
    }


def _model(name: str, activity: _Activity) -> dict[str, Any]:
    passes = activity.rate("stepwell_pass_rows_count", model=name)
    return {
        "model": name,
        "row_steps_per_s": activity.rate("stepwell_row_steps_total", model=name, change="step"),
        "passes_per_s": passes,
        "rows_per_pass": activity.rate("stepwell_pass_rows_sum", model=name) / passes if passes else None,
        "busy": max(activity.rates("stepwell_pass_seconds_sum", model=name), default=0.0),
        **activity.quantiles("stepwell_stage_seconds", model=name, stage="total"),
        "stages": activity.stages(model=name),
        "sessions": activity.of_stores("stepwell_sessions", model=name),
        "resident_sessions": int(activity.total("stepwell_resident_sessions", model=name)),
        "resident_rows": int(activity.total("stepwell_resident_rows", model=name)),
        "max_resident_rows": int(activity.total("stepwell_max_resident_rows", model=name)),
        "paged_in_per_s": activity.rate("stepwell_paged_sessions_total", model=name, direction="in"),
        "paged_out_per_s": activity.rate("stepwell_paged_sessions_total", model=name, direction="out"),
        "queued_rows": int(activity.total("stepwell_queued_rows", model=name)),
    }
