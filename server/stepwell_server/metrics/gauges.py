"""How things are at the moment of a scrape, beside the limits that they have."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepwell_server.engine.durability.group_commit import MAX_WAITING
from stepwell_server.engine.intake.queues import MAX_WAITING_BYTES

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from stepwell_server.catalog.control import VersionCounts
    from stepwell_server.engine.engine import ModelStats
    from stepwell_server.engine.quotas import TenantCounts
    from stepwell_server.rpc.fronts.base import FrontCounts
    from stepwell_server.rpc.fronts.certificates import CertificateFiles
    from stepwell_server.store.base import StoreTimes

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


def of_build(
    build: Mapping[str, str], models: Mapping[str, Mapping[str, str]], load_seconds: Mapping[str, float]
) -> Iterator[Metric]:
    """What runs here."""
    from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

    yield InfoMetricFamily("stepwell_build", "What this server is.", value=dict(build))
    info = InfoMetricFamily("stepwell_model", "The models that are served.", labels=("model",))
    for model, about in models.items():
        info.add_metric((model,), dict(about))
    yield info
    loaded = GaugeMetricFamily(
        "stepwell_model_load_seconds",
        "What making the model's last version ready took: compiling it, if it was not in the cache.",
        labels=("model",),
    )
    for model, seconds in load_seconds.items():
        loaded.add_metric((model,), seconds)
    yield loaded


def of_versions(counts: Mapping[str, VersionCounts]) -> Iterator[Metric]:
    """How many versions each model has, by how they are, and which one is the default."""
    from prometheus_client.core import GaugeMetricFamily

    text = "Versions of the model that are loading, ready, draining (until their sessions end) and failed."
    versions = GaugeMetricFamily("stepwell_model_versions", text, labels=("model", "state"))
    text = "The version that the model's name stands for; 0: none is served."
    default = GaugeMetricFamily("stepwell_model_default_version", text, labels=("model",))
    for model, count in counts.items():
        for state, number in count.by_state.items():
            versions.add_metric((model, state.value), number)
        default.add_metric((model,), count.default)
    yield from (versions, default)


def of_readiness(*, is_ready: bool, warnings: Collection[str]) -> Iterator[Metric]:
    """What /readyz says, and what it warns of."""
    from prometheus_client.core import GaugeMetricFamily

    text = "1 if calls can be answered, 0 while models are loaded, the store cannot be used, or the server stops."
    yield GaugeMetricFamily("stepwell_ready", text, value=is_ready)
    text = "1 while /readyz?verbose warns of it: the server is ready, and somebody should look at this."
    family = GaugeMetricFamily("stepwell_warning", text, labels=("about",))
    for about in sorted({*WARNINGS, *warnings}):
        family.add_metric((about.replace(" ", "_"),), about in warnings)
    yield family


def of_streams(streams: Mapping[str, int]) -> Iterator[Metric]:
    """Streams that are open, by method."""
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily("stepwell_open_streams", "Streams open.", labels=("method",))
    for method, count in streams.items():
        family.add_metric((method,), count)
    yield family


def of_front(counts: FrontCounts, limits: Mapping[str, float]) -> Iterator[Metric]:
    """What the front has to do, and what it lets clients take."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for name, value in counts.now.items():
        yield GaugeMetricFamily(f"stepwell_front_{name}", _FRONT[name], value=value)
    refused = CounterMetricFamily(
        "stepwell_front_refused",
        "Connections and calls that the front refused or ended, by reason.",
        labels=("reason",),
    )
    for reason, count in counts.refused.items():
        refused.add_metric((reason,), count)
    yield refused
    if counts.taken:
        taken = CounterMetricFamily(
            "stepwell_front_taken",
            "How often the event loop took what had come, by who read and wrote the sockets: a thread of the front, or the"
            " event loop, as while one client alone steps back to back.",
            labels=("driver",),
        )
        for driver, count in counts.taken.items():
            taken.add_metric((driver,), count)
        yield taken
    for name, most in limits.items():
        metric, text = _FRONT_LIMITS[name]
        yield GaugeMetricFamily(f"stepwell_front_{metric}", text, value=most)


def of_audit(written: int, dropped: int) -> Iterator[Metric]:
    """What became of the events of the audit log."""
    from prometheus_client.core import CounterMetricFamily

    text = "Events of the audit log; dropped: it was written too slowly, or could not be."
    family = CounterMetricFamily("stepwell_audit_events", text, labels=("outcome",))
    family.add_metric(("written",), written)
    family.add_metric(("dropped",), dropped)
    yield family


def of_spans(counts: Mapping[str, int]) -> Metric:
    """What became of the spans of traces."""
    from prometheus_client.core import CounterMetricFamily

    text = "Spans of traces by what became of them: sent to the collector, refused by it, or dropped by a full queue."
    family = CounterMetricFamily("stepwell_trace_spans", text, labels=("outcome",))
    for outcome in ("exported", "failed", "dropped"):
        family.add_metric((outcome,), counts.get(outcome, 0))
    return family


def of_certificates(files: CertificateFiles) -> Iterator[Metric]:
    """How long the certificates that new connections get are valid, and whether changes of them could be used."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    family = GaugeMetricFamily(
        "stepwell_certificate_expiry_timestamp_seconds",
        "When the first certificate of a file that is in use is no longer valid, in seconds since the epoch.",
        labels=("file",),
    )
    for file, end in files.used.ends().items():
        family.add_metric((file,), end)
    text = "How often changed certificates could not be used, so that the old ones stayed."
    yield from (family, CounterMetricFamily("stepwell_certificate_failures", text, value=files.failures))


def of_store_info(labels: Mapping[str, str]) -> Metric:
    """Which store it is. Servers that share one say the same of it, so that what all of them report is counted once."""
    from prometheus_client.core import InfoMetricFamily

    text = "Which store the server has: store_id is the same for those that share it; shared: true or false."
    return InfoMetricFamily("stepwell_store", text, value=dict(labels))


def of_store(
    times: StoreTimes | None, *, is_ready: bool, reopened: int, is_damaged: bool, lost_sessions: int
) -> Iterator[Metric]:
    """How the store is, and, of one on disk, how long it takes."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    yield GaugeMetricFamily("stepwell_store_ready", "1 if the store can be used, 0 if not.", value=is_ready)
    text = "1 if sessions are missing from the store although nobody ended them, 0 if none are known to be."
    yield GaugeMetricFamily("stepwell_store_damaged", text, value=is_damaged)
    text = "How many sessions were found to be lost whose keys a shared store does not have any more."
    yield CounterMetricFamily("stepwell_store_lost_sessions", text, value=lost_sessions)
    text = "How often the store was opened anew because its disk had failed."
    yield CounterMetricFamily("stepwell_store_reopened", text, value=reopened)
    if times is None:
        return
    writes = HistogramMetricFamily(
        "stepwell_store_write_seconds",
        "Duration of a write, with --durability sync until the disk has it: one to the log, a transaction of data.mdb.",
        labels=("file",),
    )
    for file, series in (("log", times.log), ("data", times.data)):
        writes.add_metric((file,), list(series.cumulative()), sum_value=series.total)
    text = "Records of sessions written to the log; those that come together are one write."
    yield from (writes, CounterMetricFamily("stepwell_store_log_records", text, value=times.log_records))


def of_tenants(counts: TenantCounts) -> Iterator[Metric]:
    """What tenants have, do and are refused, as far as they have labels of their own."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for name, text, values in (
        ("sessions", "Sessions of the tenant.", counts.sessions),
        ("rows", "Rows of the tenant's sessions.", counts.rows),
        ("bytes", "Bytes that are kept of the tenant's sessions.", counts.bytes),
    ):
        family = GaugeMetricFamily(f"stepwell_tenant_{name}", text, labels=("tenant",))
        for tenant, value in values.items():
            family.add_metric((tenant,), value)
        yield family
    steps = CounterMetricFamily(
        "stepwell_tenant_steps",
        "Steps that the tenant was charged for: rows times time steps.",
        labels=("tenant",),
    )
    for tenant, value in counts.steps.items():
        steps.add_metric((tenant,), value)
    refused = CounterMetricFamily(
        "stepwell_tenant_refused", "What a quota refused to the tenant.", labels=("tenant", "quota")
    )
    for labels, value in counts.refused.items():
        refused.add_metric(labels, value)
    yield from (steps, refused)


def of_engine(stats: Sequence[ModelStats]) -> Iterator[Metric]:
    """What the models have and do, and how much that may be."""
    from prometheus_client.core import GaugeMetricFamily

    of_models: list[tuple[str, str, Callable[[ModelStats], int]]] = [
        ("sessions", "Sessions live.", lambda model: model.sessions),
        ("resident_rows", "Rows of state ready to step.", lambda model: model.resident_rows),
        ("max_resident_rows", "Rows of state ready to step at most.", lambda model: model.max_resident_rows),
        ("queued_rows", "Rows that wait for a pass, or for their session.", lambda model: model.queued_rows),
        ("max_queued_rows", "Beyond so many, steps are refused.", lambda model: model.max_queued_rows),
        ("max_pass_rows", "Rows of a pass at most.", lambda model: model.max_pass_rows),
    ]
    for name, text, value in of_models:
        family = GaugeMetricFamily(f"stepwell_{name}", text, labels=("model",))
        for model in stats:
            family.add_metric((model.name,), value(model))
        yield family
    waiting = max((model.queued_bytes for model in stats), default=0)  # each says the sum over all models
    commits = max((model.uncommitted for model in stats), default=0)
    for name, text, number in (
        ("queued_bytes", "Bytes of the inputs that wait for a pass, over all models.", waiting),
        ("max_queued_bytes", "Beyond so many, steps are refused.", MAX_WAITING_BYTES),
        ("uncommitted_sessions", "Sessions whose changes wait for the store.", commits),
        ("max_uncommitted_sessions", "From so many on, no pass begins.", MAX_WAITING),
    ):
        yield GaugeMetricFamily(f"stepwell_{name}", text, value=number)


def of_memory(most: int) -> Iterator[Metric]:
    """What the process may take, beside what it has (`process_resident_memory_bytes`)."""
    from prometheus_client.core import GaugeMetricFamily

    yield GaugeMetricFamily(
        "stepwell_max_memory_bytes", "Memory of the machine or the container.", value=most
    )


def of_disk(folder: Path) -> Iterator[Metric]:
    """The file system that has a folder, if it can be asked. Not on the event loop: a disk that fails may take its time."""
    from prometheus_client.core import GaugeMetricFamily

    try:
        usage = shutil.disk_usage(folder)
    except OSError:  # the folder is gone: the log says so, and no value is better than an old one
        return
    text = "Bytes of the file system that has --data-dir which the server may still use."
    yield GaugeMetricFamily("stepwell_store_disk_free_bytes", text, value=usage.free)
    text = "Bytes of the file system that has --data-dir."
    yield GaugeMetricFamily("stepwell_store_disk_size_bytes", text, value=usage.total)
