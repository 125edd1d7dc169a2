"""What a server did between two scrapes, as programs read it (`--json`) and as people do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stepwell.cli.top.scrape import Scrape

if TYPE_CHECKING:
    from stepwell import SlowSession

_Picture = dict[str, Any]


def picture(before: Scrape, now: Scrape, slow: Sequence[SlowSession], wall_s: float) -> _Picture:
    """The document of `--json`. Rates are of the time between the scrapes.

    Args:
        before: The earlier one.
        now: The later one.
        slow: What the server says of slow sessions.
        wall_s: Now, in seconds since the epoch.
    """
    seconds = max(now.when - before.when, 1e-9)

    def rate(name: str, **labels: str) -> float:
        # a server that was started anew counts from 0
        return max(0.0, now.total(name, **labels) - before.total(name, **labels)) / seconds

    def each(name: str, quantile: float, **labels: str) -> float | None:
        return _quantile(before, now, name, quantile, labels)

    build = now.samples("stepwell_build_info")[0].labels
    models = [_model(name, now, rate, each) for name in now.values("stepwell_sessions", "model")]
    methods = [
        {
            "method": method,
            "calls_per_s": rate("stepwell_requests_total", method=method),
            "messages_per_s": messages,
            "p50_s": each("stepwell_request_seconds", 0.5, method=method),
            "p99_s": each("stepwell_request_seconds", 0.99, method=method),
        }
        for method in now.values("stepwell_request_seconds_count", "method")
        if (messages := rate("stepwell_request_seconds_count", method=method))
    ]
    errors = [
        {"model": sample.labels["model"], "reason": sample.labels["reason"], "per_s": per_s}
        for sample in now.samples("stepwell_errors_total")
        if (per_s := rate("stepwell_errors_total", **sample.labels))
    ]
    return {
        "server": {
            "version": build.get("version", ""),
            "front": build.get("front", ""),
            "uptime_s": wall_s - now.total("process_start_time_seconds"),
            "memory_bytes": now.total("process_resident_memory_bytes"),
            "cores": rate("process_cpu_seconds_total"),
            "connections": now.total("stepwell_front_connections"),
            "streams": now.total("stepwell_open_streams"),
            "store_ready": bool(now.total("stepwell_store_ready")),
        },
        "models": models,
        "methods": sorted(methods, key=lambda each: -each["messages_per_s"]),
        "errors": sorted(errors, key=lambda each: -each["per_s"]),
        "tenants": _tenants(now, rate),
        "slow_sessions": [
            {"session_id": one.session_id, "model": one.model, "seconds": one.seconds, "age_s": one.age_s}
            for one in slow
        ],
    }


def _model(name: str, now: Scrape, rate: Any, each: Any) -> _Picture:
    passes = rate("stepwell_pass_rows_count", model=name)
    rows = rate("stepwell_pass_rows_sum", model=name)
    return {
        "model": name,
        "row_steps_per_s": rate("stepwell_row_steps_total", model=name, change="step"),
        "passes_per_s": passes,
        "rows_per_pass": rows / passes if passes else None,
        "busy": rate("stepwell_pass_seconds_sum", model=name),
        "p50_s": each("stepwell_stage_seconds", 0.5, model=name, stage="total"),
        "p99_s": each("stepwell_stage_seconds", 0.99, model=name, stage="total"),
        "sessions": int(now.total("stepwell_sessions", model=name)),
        "resident_rows": int(now.total("stepwell_resident_rows", model=name)),
        "paged_in_per_s": rate("stepwell_paged_sessions_total", model=name, direction="in"),
        "queued_rows": int(now.total("stepwell_queued_rows", model=name)),
    }


def _tenants(now: Scrape, rate: Any) -> list[_Picture]:
    """What each tenant does, where the server knows tenants."""
    names = now.values("stepwell_tenant_sessions", "tenant")
    found = [
        {
            "tenant": name,
            "row_steps_per_s": rate("stepwell_tenant_steps_total", tenant=name),
            "sessions": int(now.total("stepwell_tenant_sessions", tenant=name)),
        }
        for name in names
    ]
    return sorted(found, key=lambda each: -float(str(each["row_steps_per_s"])))


def _quantile(
    before: Scrape, now: Scrape, name: str, quantile: float, labels: Mapping[str, str]
) -> float | None:
    """As Prometheus's histogram_quantile has it: within its bucket as if all there were spread evenly. None: nothing came."""
    counts: dict[float, float] = {}
    for scrape, sign in ((now, 1), (before, -1)):
        for sample in scrape.samples(f"{name}_bucket", **labels):
            bound = float(sample.labels["le"])
            counts[bound] = counts.get(bound, 0.0) + sign * sample.value
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
