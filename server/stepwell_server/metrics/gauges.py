"""Gauges: values at the moment of a scrape, and the limits that apply to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepwell_server.catalog.control import VersionStatus, counts_of
from stepwell_server.engine.commit.group_commit import MAX_WAITING
from stepwell_server.engine.intake.queues import MAX_WAITING_BYTES
from stepwell_server.engine.watches.watchers import MAX_HELD_BYTES, MAX_WATCHED
from stepwell_server.metrics.families import counter, gauge, histogram, info
from stepwell_server.metrics.series import StoreWrites

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from stepwell_server.engine.engine import ModelStats
    from stepwell_server.engine.quotas import TenantCounts
    from stepwell_server.engine.watches.watchers import WatchCounts
    from stepwell_server.process.readiness import Report
    from stepwell_server.rpc.fronts.base import FrontCounts
    from stepwell_server.rpc.fronts.certificates import CertificateFiles
    from stepwell_server.store.base import StoreHealth

#: Subjects of warnings (`Report.warnings`). Each has a series from the start.
WARNINGS = ("default versions", "disk", "models", "replicas", "store")
#: Help of the front's current values (`FrontCounts.now`).
_FRONT = {
    "connections": "Open connections.",
    "calls": "Running calls.",
    "unknown_calls": "Running calls whose caller is not authenticated, or not yet.",
    "health_calls": "Running health checks.",
    "watches": "Running health watches, which end only when their clients end them.",
    "held_bytes": "Bytes of requests and replies in memory.",
    "queued_bytes": "Bytes of steps that wait for the event loop.",
    "window_bytes": "Bytes that clients may send before the server reads more.",
    "unwritten_replies": "Replies that are not yet written to the network.",
}
#: Name and help of the metric of each limit of the front (`FrontLimits`).
_FRONT_LIMITS = {
    "connections": ("max_connections", "Limit of open connections."),
    "address_connections": (
        "max_address_connections",
        "Limit of connections from one address; 0: no limit.",
    ),
    "calls": ("max_calls", "Limit of running calls."),
    "unknown_calls": ("max_unknown_calls", "Limit of running calls whose caller is not authenticated."),
    "health_calls": ("max_health_calls", "Limit of running health checks."),
    "watches": ("max_watches", "Limit of running health watches."),
    "receive_s": ("receive_timeout_seconds", "Longest pause while a message arrives, in seconds."),
    "receive_bytes_per_s": (
        "min_receive_bytes_per_second",
        "Lowest rate at which a message may arrive after the receive timeout.",
    ),
    "streams": ("max_connection_calls", "Limit of running calls of one connection."),
    "budget_bytes": (
        "max_held_bytes",
        "Bytes of requests and replies in memory, above which calls are refused.",
    ),
    "connection_bytes": (
        "max_connection_held_bytes",
        "Limit of bytes of requests and replies in memory, for one connection.",
    ),
    "connection_steps": ("max_connection_steps", "Limit of unanswered steps of one connection."),
    "frames": ("max_stream_frames", "Limit of unanswered frames of one stream."),
    "queued_bytes": ("max_queued_bytes", "Limit of bytes of steps that wait for the event loop."),
    "message_bytes": ("max_message_bytes", "Largest request or reply, in bytes."),
    "open_message_bytes": ("max_open_message_bytes", "Largest health check, in bytes."),
    "header_bytes": ("max_header_bytes", "Largest headers of a call, in bytes."),
    "keepalive_s": ("keepalive_seconds", "Silence of a client after which it is pinged, in seconds."),
    "keepalive_timeout_s": ("keepalive_timeout_seconds", "Longest time to answer a ping, in seconds."),
    "handshake_s": ("handshake_timeout_seconds", "Longest handshake of a connection, in seconds."),
    "unread_s": (
        "unread_timeout_seconds",
        "Longest time that a client may leave replies unread before its call ends, in seconds.",
    ),
    "age_s": ("max_connection_age_seconds", "Time during which a connection takes calls; 0: no limit."),
    "age_grace_s": (
        "max_connection_age_grace_seconds",
        "Time that calls have to end after the age limit of their connection, in seconds.",
    ),
}


def of_build(facts: Mapping[str, str]) -> Iterator[Metric]:
    """The release, the interpreter, the front, the store."""
    yield info("stepwell_build", "Versions and identity of this server.", {(): facts})


def of_versions(
    statuses: Mapping[str, Sequence[VersionStatus]], models: Mapping[str, Mapping[str, str]]
) -> Iterator[Metric]:
    """The models by their default versions, and the number of versions in each state.

    Args:
        statuses: the versions of each model.
        models: facts of models that do not depend on the version.
    """
    served = {
        name: {
            **models.get(name, {}),
            "version": str(one.version),
            "fingerprint": one.fingerprint,
        }
        for name, versions in statuses.items()
        for one in versions
        if one.is_default
    }
    yield info("stepwell_model", "The served models.", served, ("model",))
    counts = counts_of(statuses)
    yield gauge(
        "stepwell_model_versions",
        "Versions of the model that are loading, ready, draining (until their sessions end) and failed.",
        {(name, state.value): n for name, each in counts.items() for state, n in each.by_state.items()},
        ("model", "state"),
    )
    yield gauge(
        "stepwell_model_default_version",
        "The default version of the model; 0: none is served.",
        {name: each.default for name, each in counts.items()},
        ("model",),
    )


def of_readiness(report: Report) -> Iterator[Metric]:
    """Readiness and warnings, as /readyz reports them."""
    text = "1 if calls can be answered, 0 while models are loaded, the store cannot be used, or the server stops."
    yield gauge("stepwell_ready", text, report.is_ready)
    text = "1 while /readyz?verbose has this warning: the server is ready, but somebody should look at it."
    warnings = {
        about.replace(" ", "_"): about in report.warnings for about in sorted({*WARNINGS, *report.warnings})
    }
    yield gauge("stepwell_warning", text, warnings, ("about",))


def of_front(counts: FrontCounts, limits: Mapping[str, float]) -> Iterator[Metric]:
    """The load of the front, and its limits."""
    for name, value in counts.now.items():
        yield gauge(f"stepwell_front_{name}", _FRONT[name], value)
    text = "Connections and calls that the front refused or ended, by reason."
    yield counter("stepwell_front_refused", text, counts.refused, ("reason",))
    if counts.taken:
        text = (
            "How often the event loop took received messages, by driver of the sockets: a thread of the front, or the event"
            " loop itself, which drives them while a single client steps back to back."
        )
        yield counter("stepwell_front_taken", text, counts.taken, ("driver",))
    for name, limit in limits.items():
        metric, text = _FRONT_LIMITS[name]
        yield gauge(f"stepwell_front_{metric}", text, limit)


def of_audit(written: int, dropped: int) -> Iterator[Metric]:
    """Events of the audit log."""
    text = "Events of the audit log; dropped: the disk was too slow, or the log could not be written."
    outcomes = {"written": written, "dropped": dropped}
    yield counter("stepwell_audit_events", text, outcomes, labels=("outcome",))


def of_spans(counts: Mapping[str, int]) -> Iterator[Metric]:
    """Spans of traces, by outcome; missing outcomes are 0."""
    text = "Spans of traces by outcome: exported to the collector, failed there, or dropped by a full queue."
    outcomes = {"exported": 0, "failed": 0, "dropped": 0, **counts}
    yield counter("stepwell_trace_spans", text, outcomes, ("outcome",))


def of_certificates(files: CertificateFiles) -> Iterator[Metric]:
    """Expiry of the certificates in use, and failures to reload them."""
    text = "Expiry of the certificates in a file, the earliest of them, in seconds since the epoch."
    yield gauge("stepwell_certificate_expiry_timestamp_seconds", text, files.used.ends(), ("file",))
    text = "How often changed certificates could not be used, and the old ones stayed in use."
    yield counter("stepwell_certificate_failures", text, files.failures)


def of_store(
    labels: Mapping[str, str], health: StoreHealth, writes: StoreWrites | None, *, is_damaged: bool
) -> Iterator[Metric]:
    """The store, and the durations of its writes if it is on disk (`writes`).

    Servers that share a store have the same `labels`, so that their common values can be counted once.
    """
    text = (
        "The store of the server. Servers that share a store have the same store_id; shared is true or false."
    )
    yield info("stepwell_store", text, {(): labels})
    yield gauge("stepwell_store_ready", "1 if the store can be used, 0 if not.", not health.problem)
    text = "1 if sessions are known to be missing from the store although nobody ended them, else 0."
    yield gauge("stepwell_store_damaged", text, is_damaged)
    text = "Sessions found lost because a shared store no longer has their keys."
    yield counter("stepwell_store_lost_sessions", text, health.lost_sessions)
    text = "How often the store was reopened after its disk had failed."
    yield counter("stepwell_store_reopened", text, health.reopened)
    if writes is None:
        return
    text = "Duration of a write to the log, or of a transaction of data.mdb; with --durability sync including the flush."
    series = {"log": writes.log, "data": writes.data}
    yield histogram("stepwell_store_write_seconds", text, series, ("file",))
    text = "Session records written to the log. Records that arrive together are one write."
    yield counter("stepwell_store_log_records", text, writes.log_records)


def of_tenants(counts: TenantCounts) -> Iterator[Metric]:
    """Usage and refusals of the tenants that have labels of their own."""
    label = ("tenant",)
    yield gauge("stepwell_tenant_sessions", "Sessions of the tenant.", counts.sessions, label)
    yield gauge("stepwell_tenant_rows", "Rows of the tenant's sessions.", counts.rows, label)
    yield gauge("stepwell_tenant_bytes", "Stored bytes of the tenant's sessions.", counts.bytes, label)
    text = "Steps charged to the tenant: rows times time steps."
    yield counter("stepwell_tenant_steps", text, counts.steps, label)
    text = "Requests of the tenant that a quota refused."
    yield counter("stepwell_tenant_refused", text, counts.refused, ("tenant", "quota"))


def of_engine(stats: Sequence[ModelStats]) -> Iterator[Metric]:
    """The load of the models, and its limits."""
    of_models: list[tuple[str, str, Callable[[ModelStats], int]]] = [
        ("sessions", "Open sessions.", lambda model: model.sessions),
        ("resident_sessions", "Sessions whose state is in memory.", lambda model: model.resident_sessions),
        ("resident_rows", "Rows of state in memory.", lambda model: model.resident_rows),
        ("max_resident_rows", "Limit of rows of state in memory.", lambda model: model.max_resident_rows),
        ("queued_rows", "Rows that wait for a pass, or for their session.", lambda model: model.queued_rows),
        (
            "max_queued_rows",
            "Limit of queued rows, above which steps are refused.",
            lambda model: model.max_queued_rows,
        ),
        ("max_pass_rows", "Limit of rows in a pass.", lambda model: model.max_pass_rows),
    ]
    for name, text, value in of_models:
        yield gauge(f"stepwell_{name}", text, {model.name: value(model) for model in stats}, ("model",))
    waiting = max((model.queued_bytes for model in stats), default=0)  # each says the sum over all models
    commits = max((model.uncommitted for model in stats), default=0)
    for name, text, number in (
        ("queued_bytes", "Bytes of inputs that wait for a pass, over all models.", waiting),
        ("max_queued_bytes", "Limit of queued bytes, above which steps are refused.", MAX_WAITING_BYTES),
        ("uncommitted_sessions", "Sessions whose changes wait for the store.", commits),
        (
            "max_uncommitted_sessions",
            "Limit of uncommitted sessions, from which no pass begins.",
            MAX_WAITING,
        ),
    ):
        yield gauge(f"stepwell_{name}", text, number)


def of_watches(counts: WatchCounts) -> Iterator[Metric]:
    """What is watched, and what slow readers missed."""
    yield gauge("stepwell_watches", "Open watches of sessions.", counts.watches)
    yield gauge("stepwell_watched_sessions", "Watched sessions, once for each watch.", counts.sessions)
    text = "Limit of watched sessions, above which watches are refused."
    yield gauge("stepwell_max_watched_sessions", text, MAX_WATCHED)
    text = "Bytes of events of watches that wait for their readers."
    yield gauge("stepwell_watch_held_bytes", text, counts.held_bytes)
    text = "Limit of bytes of events of watches, above which events are dropped and watches are refused."
    yield gauge("stepwell_max_watch_held_bytes", text, MAX_HELD_BYTES)
    text = "Events of watched sessions: sent, or dropped because the reader was slow."
    outcomes = {"sent": counts.sent, "dropped": counts.dropped}
    yield counter("stepwell_watch_events", text, outcomes, ("outcome",))


def of_memory(limit: int) -> Iterator[Metric]:
    """The memory that the process may use. `process_resident_memory_bytes` is the memory in use."""
    yield gauge("stepwell_max_memory_bytes", "Memory of the machine or the container.", limit)


def of_disk(folder: Path) -> Iterator[Metric]:
    """The file system of a folder, if it can be read. Call it outside the event loop: a failing disk can be slow."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:  # the folder is gone: the log reports it, and no value is better than an old one
        return
    text = "Free bytes of the file system of --data-dir."
    yield gauge("stepwell_store_disk_free_bytes", text, usage.free)
    text = "Size of the file system of --data-dir, in bytes."
    yield gauge("stepwell_store_disk_size_bytes", text, usage.total)
