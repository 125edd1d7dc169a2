"""What servers did between two scrapes, as programs read it (`--json`) and as people do.

Several servers are replicas that share a store, or just several: rates, queues and what is in memory are added up,
percentiles are those of all calls together, and sessions count once for each store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stepwell.cli.top.scrape import Sample, Scrape

if TYPE_CHECKING:
    from stepwell import SlowSession

_Picture = dict[str, Any]


class Seen(NamedTuple):
    """What came of looking at a server."""

    metrics: str
    """Where its metrics are: HOST:PORT, or what else the URL has there."""
    before: Scrape | None
    """The scrape before. None: there was none yet."""
    now: Scrape | None
    """None: it did not answer."""
    error: str = ""
    """Why not."""


class _Between:
    """Servers between two scrapes each."""

    def __init__(self, seen: Sequence[Seen]) -> None:
        self.pairs = [(one.before, one.now) for one in seen if one.before is not None and one.now is not None]
        self._now = [one.now for one in seen if one.now is not None]

    def samples(self, name: str) -> list[Sample]:
        """Values of a metric now, of all servers."""
        return [sample for now in self._now for sample in now.samples(name)]

    def values(self, name: str, label: str) -> list[str]:
        """The values of a label of a metric, in their order."""
        return sorted({value for now in self._now for value in now.values(name, label)})

    def total(self, name: str, **labels: str) -> float:
        """The sum of what the servers have now."""
        return sum(now.total(name, **labels) for now in self._now)

    def of_stores(self, name: str, **labels: str) -> int:
        """The sum over stores of what the servers say of their store."""
        most: dict[str, float] = {}
        for number, now in enumerate(self._now):
            info = now.samples("stepwell_store_info")
            store = info[0].labels["store_id"] if info else f"of server {number}"
            most[store] = max(most.get(store, 0.0), now.total(name, **labels))
        return int(sum(most.values()))

    def rate(self, name: str, **labels: str) -> float:
        """How much a counter has grown in a second. A server that was started anew counts from 0."""
        return sum(
            max(0.0, now.total(name, **labels) - before.total(name, **labels))
            / max(now.when - before.when, 1e-9)
            for before, now in self.pairs
        )

    def quantile(self, name: str, quantile: float, **labels: str) -> float | None:
        """As Prometheus's histogram_quantile has it: within its bucket as if all there were spread evenly.

        None: nothing came.
        """
        counts: dict[float, float] = {}
        for before, now in self.pairs:
            was = {sample.labels["le"]: sample.value for sample in before.samples(f"{name}_bucket", **labels)}
            for sample in now.samples(f"{name}_bucket", **labels):
                bound = float(sample.labels["le"])
                grown = max(0.0, sample.value - was.get(sample.labels["le"], 0.0))
                counts[bound] = counts.get(bound, 0.0) + grown
        return _quantile(counts, quantile)


def picture(seen: Sequence[Seen], slow: Sequence[SlowSession], wall_s: float) -> _Picture:
    """The document of `--json`. Rates are of the time between the scrapes.

    Args:
        seen: The servers, in the order in which they are shown. One at least has answered.
        slow: What they say of slow sessions.
        wall_s: Now, in seconds since the epoch.
    """
    all_of_them = _Between(seen)
    rate = all_of_them.rate
    models = [_model(name, all_of_them) for name in all_of_them.values("stepwell_sessions", "model")]
    methods = [
        {
            "method": method,
            "calls_per_s": rate("stepwell_requests_total", method=method),
            "messages_per_s": messages,
            "p50_s": all_of_them.quantile("stepwell_request_seconds", 0.5, method=method),
            "p99_s": all_of_them.quantile("stepwell_request_seconds", 0.99, method=method),
        }
        for method in all_of_them.values("stepwell_request_seconds_count", "method")
        if (messages := rate("stepwell_request_seconds_count", method=method))
    ]
    pairs = {
        (sample.labels["model"], sample.labels["reason"]): None
        for sample in all_of_them.samples("stepwell_errors_total")
    }
    errors = [
        {"model": model, "reason": reason, "per_s": per_s}
        for model, reason in pairs
        if (per_s := rate("stepwell_errors_total", model=model, reason=reason))
    ]
    return {
        "server": _server(all_of_them, wall_s),
        "servers": [_row(one, wall_s) for one in seen],
        "models": models,
        "methods": sorted(methods, key=lambda each: -each["messages_per_s"]),
        "errors": sorted(errors, key=lambda each: -each["per_s"]),
        "tenants": _tenants(all_of_them),
        "slow_sessions": [
            {"session_id": one.session_id, "model": one.model, "seconds": one.seconds, "age_s": one.age_s}
            for one in slow
        ],
    }


def _server(between: _Between, wall_s: float) -> _Picture:
    """One server, or several as one."""
    builds = [sample.labels for sample in between.samples("stepwell_build_info")]
    started = [sample.value for sample in between.samples("process_start_time_seconds")]
    return {
        "version": _all_of("version", builds),
        "front": _all_of("front", builds),
        "uptime_s": wall_s - max(started, default=wall_s),
        "memory_bytes": between.total("process_resident_memory_bytes"),
        "cores": between.rate("process_cpu_seconds_total"),
        "connections": between.total("stepwell_front_connections"),
        "streams": between.total("stepwell_open_streams"),
        "store_ready": all(sample.value for sample in between.samples("stepwell_store_ready")),
    }


def _all_of(label: str, builds: Sequence[Mapping[str, str]]) -> str:
    """What servers say of themselves; what differs with a comma between."""
    return ", ".join(dict.fromkeys(build.get(label, "") for build in builds))


def _row(one: Seen, wall_s: float) -> _Picture:
    """What is said of each server, also of one that did not answer."""
    if one.now is None:
        return {"metrics": one.metrics, "error": one.error}
    between = _Between([one])
    return {
        "metrics": one.metrics,
        "error": "",
        "ready": bool(between.total("stepwell_ready")),
        "id": ", ".join(between.values("stepwell_build_info", "server_id")),
        **_server(between, wall_s),
        "row_steps_per_s": between.rate("stepwell_row_steps_total", change="step"),
        "p50_s": between.quantile("stepwell_stage_seconds", 0.5, stage="total"),
        "p99_s": between.quantile("stepwell_stage_seconds", 0.99, stage="total"),
        "resident_rows": int(between.total("stepwell_resident_rows")),
        "queued_rows": int(between.total("stepwell_queued_rows")),
        "errors_per_s": between.rate("stepwell_errors_total"),
    }


def _model(name: str, between: _Between) -> _Picture:
    passes = between.rate("stepwell_pass_rows_count", model=name)
    rows = between.rate("stepwell_pass_rows_sum", model=name)
    busy = [_rate_of(pair, "stepwell_pass_seconds_sum", name) for pair in between.pairs]
    return {
        "model": name,
        "row_steps_per_s": between.rate("stepwell_row_steps_total", model=name, change="step"),
        "passes_per_s": passes,
        "rows_per_pass": rows / passes if passes else None,
        "busy": max(busy, default=0.0),
        "p50_s": between.quantile("stepwell_stage_seconds", 0.5, model=name, stage="total"),
        "p99_s": between.quantile("stepwell_stage_seconds", 0.99, model=name, stage="total"),
        "sessions": between.of_stores("stepwell_sessions", model=name),
        "resident_rows": int(between.total("stepwell_resident_rows", model=name)),
        "paged_in_per_s": between.rate("stepwell_paged_sessions_total", model=name, direction="in"),
        "queued_rows": int(between.total("stepwell_queued_rows", model=name)),
    }


def _rate_of(pair: tuple[Scrape, Scrape], name: str, model: str) -> float:
    before, now = pair
    return _Between([Seen("", before, now)]).rate(name, model=model)


def _tenants(between: _Between) -> list[_Picture]:
    """What each tenant does, where the servers know tenants."""
    found = [
        {
            "tenant": name,
            "row_steps_per_s": between.rate("stepwell_tenant_steps_total", tenant=name),
            "sessions": between.of_stores("stepwell_tenant_sessions", tenant=name),
        }
        for name in between.values("stepwell_tenant_sessions", "tenant")
    ]
    return sorted(found, key=lambda each: -float(str(each["row_steps_per_s"])))


def _quantile(counts: Mapping[float, float], quantile: float) -> float | None:
    bounds = sorted(counts)
    if not bounds or counts[bounds[-1]] <= 0:
        return None
    wanted = quantile * counts[bounds[-1]]
    low, below = 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= wanted:
            if math.isinf(bound):
                return low
            inside = counts[bound] - below
            return low + (bound - low) * ((wanted - below) / inside if inside else 1.0)
        low, below = bound, counts[bound]
    return low
