"""What a server reports of itself, as the document of `stepwell top --json`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from google.protobuf import timestamp_pb2
from google.protobuf.message import Message

if TYPE_CHECKING:
    from stepwell.v1 import watch_pb2

#: Names in the document where they are not those of the message.
_NAMES = {
    "uptime_seconds": "uptime_s",
    "row_steps_per_second": "row_steps_per_s",
    "errors_per_second": "errors_per_s",
    "passes_per_second": "passes_per_s",
    "paged_in_per_second": "paged_in_per_s",
    "paged_out_per_second": "paged_out_per_s",
    "calls_per_second": "calls_per_s",
    "messages_per_second": "messages_per_s",
    "per_second": "per_s",
    "age_seconds": "age_s",
    "p50_seconds": "p50_s",
    "p99_seconds": "p99_s",
}
_SERVER = [
    "version",
    "front",
    "store",
    "store_id",
    "uptime_seconds",
    "memory_bytes",
    "max_memory_bytes",
    "cores",
    "connections",
    "streams",
    "store_ready",
    "row_steps_per_second",
    "sessions",
    "resident_sessions",
    "resident_rows",
    "queued_rows",
    "watched_sessions",
    "errors_per_second",
]
_MODEL = [
    "row_steps_per_second",
    "passes_per_second",
    "rows_per_pass",
    "busy",
    "sessions",
    "resident_sessions",
    "resident_rows",
    "max_resident_rows",
    "paged_in_per_second",
    "paged_out_per_second",
    "queued_rows",
]
_SLOW = ["session_id", "model", "seconds", "age_seconds"]
_REPLICA = ["id", "host", "address", "http_address", "version", "resident_sessions"]
_METHOD = ["method", "calls_per_second", "messages_per_second", "p50_seconds", "p99_seconds"]


def picture(reply: watch_pb2.WatchServerResponse, rows: int) -> dict[str, Any]:
    """The document of `stepwell top --json`, with at most `rows` slow sessions."""
    server = reply.server
    return {
        "server": {**_of(server, _SERVER), "ready": reply.ready, **_stages(server.latencies)},
        "servers": [{"metrics": "", "error": "", "id": server.id}],
        "models": [{"model": one.name, **_of(one, _MODEL), **_stages(one.latencies)} for one in reply.models],
        "methods": [_of(one, _METHOD) for one in reply.methods],
        "errors": [_of(one, ["model", "reason", "per_second"]) for one in reply.errors],
        "tenants": [_of(one, ["tenant", "row_steps_per_second", "sessions"]) for one in reply.tenants],
        "slow_sessions": [_of(one, _SLOW) for one in reply.slow_sessions[:rows]],
        "replicas": [_replica(one, reply.time) for one in server.replicas],
    }


def _replica(replica: watch_pb2.ReplicaActivity, now: timestamp_pb2.Timestamp) -> dict[str, Any]:
    """A server that shares the store."""
    from stepwell._watch.events import ReplicaActivity

    found = ReplicaActivity._from_message(replica)
    now_s = now.seconds + now.nanos / 1e9
    return {
        **_of(replica, _REPLICA),
        "state": found.state,
        "uptime_s": max(0.0, now_s - found.started_s),
        "age_s": max(0.0, now_s - found.last_seen_s),
    }


def _of(message: Message, fields: Iterable[str]) -> dict[str, Any]:
    """Fields of a message; None for those that may be absent, and are."""
    found = {}
    for name in fields:
        field = message.DESCRIPTOR.fields_by_name[name]
        is_absent = field.has_presence and not message.HasField(name)
        found[_NAMES.get(name, name)] = None if is_absent else getattr(message, name)
    return found


def _stages(latencies: Iterable[watch_pb2.StageLatency]) -> dict[str, Any]:
    """Percentiles of all stages, and those of the whole."""
    stages = {one.stage: _of(one, ["p50_seconds", "p99_seconds"]) for one in latencies}
    return {**stages.get("total", {"p50_s": None, "p99_s": None}), "stages": stages}
