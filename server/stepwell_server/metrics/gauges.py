"""How things are at the moment of a scrape, beside the limits that they have."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepwell_server.catalog.control import VersionStatus, counts_of
from stepwell_server.engine.commit.group_commit import MAX_WAITING
from stepwell_server.engine.intake.queues import MAX_WAITING_BYTES
from stepwell_server.metrics.families import counter, gauge, histogram, info
from stepwell_server.metrics.series import StoreWrites

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from stepwell_server.engine.engine import ModelStats
    from stepwell_server.engine.quotas import TenantCounts
    from stepwell_server.process.readiness import Report
    from stepwell_server.rpc.fronts.base import FrontCounts
    from stepwell_server.rpc.fronts.certificates import CertificateFiles
    from stepwell_server.store.base import StoreHealth

#: What there can be warnings of (`Report.warnings`): each has a series from the start.
WARNINGS = ("default versions", "disk", "models", "store")
#: What a front has to do (`FrontCounts.now`).
_FRONT = {
    "connections": "Connections open.",
    "calls": "Calls under way.",
    "unknown_calls": "Those of them whose caller is not known, or not yet.",
    "health_calls": "Those of them that ask how the server is.",
    "watches": "Those of them that ask so for as long as they like.",
    "held_bytes": "Bytes of requests and replies in memory.",
    "queued_bytes": "Bytes of plain steps that the event loop has not taken.",
    "window_bytes": "Bytes that clients may send before they are read.",
    "unwritten_replies": "Replies that are not on their way.",
}
#: What clients may take of it (`FrontLimits`): the metric, and what it says.
_FRONT_LIMITS = {
    "connections": ("max_connections", "Connections at most."),
    "address_connections": ("max_address_connections", "Connections from one address at most; 0: no limit."),
    "calls": ("max_calls", "Calls under way at most."),
    "unknown_calls": ("max_unknown_calls", "Calls under way at most whose caller is not known."),
    "health_calls": ("max_health_calls", "Calls under way at most that ask how the server is."),
    "watches": ("max_watches", "The same that ask for as long as they like."),
    "receive_s": ("receive_timeout_seconds", "So long a message may pause while it comes."),
    "receive_bytes_per_s": (
        "min_receive_bytes_per_second",
        "The rate at which a message must come after that time.",
    ),
    "streams": ("max_connection_calls", "Calls under way of one connection at most."),
    "budget_bytes": ("max_held_bytes", "Bytes of requests and replies in memory before calls are refused."),
    "connection_bytes": ("max_connection_held_bytes", "The same, of one connection."),
    "connection_steps": ("max_connection_steps", "Steps of one connection without an answer at most."),
    "frames": ("max_stream_frames", "Frames of one stream without an answer at most."),
    "queued_bytes": ("max_queued_bytes", "Bytes of plain steps that may wait for the event loop."),
    "message_bytes": ("max_message_bytes", "Bytes of a request or reply at most."),
    "open_message_bytes": ("max_open_message_bytes", "Bytes of a health check at most."),
    "header_bytes": ("max_header_bytes", "Bytes of the headers of a call at most."),
    "keepalive_s": ("keepalive_seconds", "A client that is silent for so long is pinged."),
    "keepalive_timeout_s": ("keepalive_timeout_seconds", "So long it may take to answer."),
    "handshake_s": ("handshake_timeout_seconds", "So long a connection may take to begin."),
    "unread_s": ("unread_timeout_seconds", "So long replies may wait for their client before the call ends."),
    "age_s": ("max_connection_age_seconds", "So long a connection takes calls; 0: for ever."),
    "age_grace_s": ("max_connection_age_grace_seconds", "So long its calls may go on after that."),
}


def of_build(facts: Mapping[str, str]) -> Iterator[Metric]:
    """The release, the interpreter, the front, the store."""
    yield info("stepwell_build", "What this server is.", {(): facts})


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
    yield info("stepwell_model", "The models that are served.", served, ("model",))
    counts = counts_of(statuses)
    yield gauge(
        "stepwell_model_versions",
        "Versions of the model that are loading, ready, draining (until their sessions end) and failed.",
        {(name, state.value): n for name, each in counts.items() for state, n in each.by_state.items()},
        ("model", "state"),
    )
    yield gauge(
        "stepwell_model_default_version",
        "The version that the model's name stands for; 0: none is served.",
        {name: each.default for name, each in counts.items()},
        ("model",),
    )


def of_readiness(report: Report) -> Iterator[Metric]:
    """What /readyz says, and what it warns of."""
    text = "1 if calls can be answered, 0 while models are loaded, the store cannot be used, or the server stops."
    yield gauge("stepwell_ready", text, report.is_ready)
    text = "1 while /readyz?verbose warns of it: the server is ready, and somebody should look at this."
    warnings = {
        about.replace(" ", "_"): about in report.warnings for about in sorted({*WARNINGS, *report.warnings})
    }
    yield gauge("stepwell_warning", text, warnings, ("about",))


def of_front(counts: FrontCounts, limits: Mapping[str, float]) -> Iterator[Metric]:
    """What the front has to do, and what it lets clients take."""
    for name, value in counts.now.items():
        yield gauge(f"stepwell_front_{name}", _FRONT[name], value)
    text = "Connections and calls that the front refused or ended, by reason."
    yield counter("stepwell_front_refused", text, counts.refused, ("reason",))
    if counts.taken:
        text = (
            "How often the event loop took what had come, by who read and wrote the sockets: a thread of the front, or the"
            " event loop, as while one client alone steps back to back."
        )
        yield counter("stepwell_front_taken", text, counts.taken, ("driver",))
    for name, most in limits.items():
        metric, text = _FRONT_LIMITS[name]
        yield gauge(f"stepwell_front_{metric}", text, most)


def of_audit(written: int, dropped: int) -> Iterator[Metric]:
    """Events of the audit log."""
    text = "Events of the audit log; dropped: it was written too slowly, or could not be."
    outcomes = {"written": written, "dropped": dropped}
    yield counter("stepwell_audit_events", text, outcomes, labels=("outcome",))


def of_spans(counts: Mapping[str, int]) -> Iterator[Metric]:
    """Spans of traces, by outcome; those that are not counted are 0."""
    text = "Spans of traces by what became of them: sent to the collector, refused by it, or dropped by a full queue."
    outcomes = {"exported": 0, "failed": 0, "dropped": 0, **counts}
    yield counter("stepwell_trace_spans", text, outcomes, ("outcome",))


def of_certificates(files: CertificateFiles) -> Iterator[Metric]:
    """How long the certificates that new connections get are valid, and whether changes of them could be used."""
    text = (
        "When the first certificate of a file that is in use is no longer valid, in seconds since the epoch."
    )
    yield gauge("stepwell_certificate_expiry_timestamp_seconds", text, files.used.ends(), ("file",))
    text = "How often changed certificates could not be used, so that the old ones stayed."
    yield counter("stepwell_certificate_failures", text, files.failures)


def of_store(
    labels: Mapping[str, str], health: StoreHealth, writes: StoreWrites | None, *, is_damaged: bool
) -> Iterator[Metric]:
    """The store, and the durations of its writes if it is on disk (`writes`).

    Servers that share a store have the same `labels`, so that what all of them report is counted once.
    """
    text = "Which store the server has: store_id is the same for those that share it; shared: true or false."
    yield info("stepwell_store", text, {(): labels})
    yield gauge("stepwell_store_ready", "1 if the store can be used, 0 if not.", not health.problem)
    text = "1 if sessions are missing from the store although nobody ended them, 0 if none are known to be."
    yield gauge("stepwell_store_damaged", text, is_damaged)
    text = "How many sessions were found to be lost whose keys a shared store does not have any more."
    yield counter("stepwell_store_lost_sessions", text, health.lost_sessions)
    text = "How often the store was opened anew because its disk had failed."
    yield counter("stepwell_store_reopened", text, health.reopened)
    if writes is None:
        return
    text = "Duration of a write, with --durability sync until the disk has it: one to the log, a transaction of data.mdb."
    series = {"log": writes.log, "data": writes.data}
    yield histogram("stepwell_store_write_seconds", text, series, ("file",))
    text = "Records of sessions written to the log; those that come together are one write."
    yield counter("stepwell_store_log_records", text, writes.log_records)


def of_tenants(counts: TenantCounts) -> Iterator[Metric]:
    """What tenants have, do and are refused, as far as they have labels of their own."""
    label = ("tenant",)
    yield gauge("stepwell_tenant_sessions", "Sessions of the tenant.", counts.sessions, label)
    yield gauge("stepwell_tenant_rows", "Rows of the tenant's sessions.", counts.rows, label)
    yield gauge("stepwell_tenant_bytes", "Bytes that are kept of the tenant's sessions.", counts.bytes, label)
    text = "Steps that the tenant was charged for: rows times time steps."
    yield counter("stepwell_tenant_steps", text, counts.steps, label)
    text = "What a quota refused to the tenant."
    yield counter("stepwell_tenant_refused", text, counts.refused, ("tenant", "quota"))


def of_engine(stats: Sequence[ModelStats]) -> Iterator[Metric]:
    """What the models have and do, and how much that may be."""
    of_models: list[tuple[str, str, Callable[[ModelStats], int]]] = [
        ("sessions", "Sessions live.", lambda model: model.sessions),
        ("resident_rows", "Rows of state ready to step.", lambda model: model.resident_rows),
        ("max_resident_rows", "Rows of state ready to step at most.", lambda model: model.max_resident_rows),
        ("queued_rows", "Rows that wait for a pass, or for their session.", lambda model: model.queued_rows),
        ("max_queued_rows", "Beyond so many, steps are refused.", lambda model: model.max_queued_rows),
        ("max_pass_rows", "Rows of a pass at most.", lambda model: model.max_pass_rows),
    ]
    for name, text, value in of_models:
        yield gauge(f"stepwell_{name}", text, {model.name: value(model) for model in stats}, ("model",))
    waiting = max((model.queued_bytes for model in stats), default=0)  # each says the sum over all models
    commits = max((model.uncommitted for model in stats), default=0)
    for name, text, number in (
        ("queued_bytes", "Bytes of the inputs that wait for a pass, over all models.", waiting),
        ("max_queued_bytes", "Beyond so many, steps are refused.", MAX_WAITING_BYTES),
        ("uncommitted_sessions", "Sessions whose changes wait for the store.", commits),
        ("max_uncommitted_sessions", "From so many on, no pass begins.", MAX_WAITING),
    ):
        yield gauge(f"stepwell_{name}", text, number)


def of_memory(most: int) -> Iterator[Metric]:
    """The memory that the process may take, beside what it has (`process_resident_memory_bytes`)."""
    yield gauge("stepwell_max_memory_bytes", "Memory of the machine or the container.", most)


def of_disk(folder: Path) -> Iterator[Metric]:
    """The file system that has a folder, if it can be asked. Not on the event loop: a disk that fails may take its time."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:  # the folder is gone: the log says so, and no value is better than an old one
        return
    text = "Bytes of the file system that has --data-dir which the server may still use."
    yield gauge("stepwell_store_disk_free_bytes", text, usage.free)
    text = "Bytes of the file system that has --data-dir."
    yield gauge("stepwell_store_disk_size_bytes", text, usage.total)
