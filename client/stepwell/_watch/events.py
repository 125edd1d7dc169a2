"""What watches return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias

from stepwell._state.tensors import Array, unpack_all
from stepwell._transport.status import from_message
from stepwell.errors import StepwellError
from stepwell.v1 import watch_pb2

SessionEventKind: TypeAlias = Literal["present", "step", "reset", "ended"]
"""What an event reports. "present": the session as it is, without the change that made it so. "step" and "reset": a
change. "ended": the session has ended, or cannot be read.
"""
_KINDS: Mapping[int, SessionEventKind] = {
    watch_pb2.SESSION_EVENT_KIND_PRESENT: "present",
    watch_pb2.SESSION_EVENT_KIND_STEP: "step",
    watch_pb2.SESSION_EVENT_KIND_RESET: "reset",
    watch_pb2.SESSION_EVENT_KIND_ENDED: "ended",
}


@dataclasses.dataclass(frozen=True, slots=True)
class SessionEvent:
    """A change of a watched session, or the session as it is.

    Example:
        >>> with session.watch(states=True) as watch:
        ...     event = next(watch)
        >>> event.kind, event.revision, event.states["lstm/h"].shape
        ('present', 0, (1, 8))
    """

    session_id: str
    kind: SessionEventKind
    """The first event of each session is "present". It also follows changes that no event reported."""
    revision: int
    """Revision after the change. For "ended": the last one reported."""
    position: int
    """Position after the change."""
    time_s: float
    """Time of the change on the server, in seconds since the epoch. For "present": when the session was read."""
    inputs: Mapping[str, Array]
    """Inputs of the last time step of a step, (rows, ...) each. Empty unless requested."""
    outputs: Mapping[str, Array]
    """Outputs of the last time step of a step, (rows, ...) each. Empty unless requested."""
    states: Mapping[str, Array]
    """State after the change, (batch_size, ...) each. Empty unless requested."""
    time_steps: int
    """Number of time steps of a step; 0 for other kinds."""
    rows: tuple[int, ...]
    """Rows that a step advanced, or a reset set. Empty: all."""
    skipped_revisions: int
    """Changes since the session's previous event that were not due, that another server made, or that happened while
    the client was disconnected.
    """
    dropped_revisions: int
    """Changes since the session's previous event that were due while your program was too slow."""
    from_store: bool
    """Whether another server made the change. The event then has neither inputs nor outputs."""
    model: str
    """Name of the model. Only for "present"."""
    model_version: int
    """The version of the model that made the change, or that the session is on."""
    error: StepwellError | None
    """Why the session ended, for example `SessionExpiredError`. Only for "ended"."""

    @classmethod
    def _from_message(cls, event: watch_pb2.SessionEvent) -> Self:
        return cls(
            session_id=event.session_id,
            kind=_KINDS[event.kind],
            revision=event.revision,
            position=event.position,
            time_s=event.time.seconds + event.time.nanos / 1e9,
            inputs=unpack_all(event.inputs),
            outputs=unpack_all(event.outputs),
            states=unpack_all(event.states),
            time_steps=event.time_steps,
            rows=tuple(event.rows),
            skipped_revisions=event.skipped_revisions,
            dropped_revisions=event.dropped_revisions,
            from_store=event.from_store,
            model=event.model,
            model_version=event.model_version,
            error=from_message(event.error) if event.HasField("error") else None,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class StageLatency:
    """Times of a stage of changes, in seconds; None: nothing went through it.

    Example:
        >>> with client.watch_server() as watch:
        ...     activity = next(watch)
        >>> activity.latencies["total"]
        StageLatency(p50_s=None, p99_s=None)
    """

    p50_s: float | None
    """Median."""
    p99_s: float | None
    """99th percentile."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelActivity:
    """The activity of a model, on all its versions.

    Example:
        >>> with client.watch_server() as watch:
        ...     activity = next(watch)
        >>> activity.models["forecast"].executor
        'litert'
    """

    name: str
    version: int
    """The default version."""
    executor: str
    """What runs it: "litert", "onnx" or "tensorflow"."""
    row_steps_per_s: float
    """Rows times time steps."""
    passes_per_s: float
    rows_per_pass: float | None
    """None: no pass."""
    busy: float
    """Share of the time in which a pass ran."""
    latencies: Mapping[str, StageLatency]
    """By stage: "wait" (for a pass), "commit" (for the store), "total" (until the reply)."""
    sessions: int
    """Open sessions."""
    resident_sessions: int
    """Sessions whose state is in memory. The others are paged out."""
    resident_bytes: int
    """Bytes of state in memory."""
    queued_rows: int
    """Rows that wait for a pass, or for their session."""


ReplicaState: TypeAlias = Literal["ready", "not_ready", "stopping", "missing"]
"""Whether a replica answers calls. "not_ready": it is starting, or cannot answer calls now. "stopping": it finishes the
calls that it has, and ends. "missing": it has not reported for 10 s, and did not stop in an orderly way.
"""
REPLICA_STATES: Mapping[int, ReplicaState] = {
    watch_pb2.REPLICA_STATE_READY: "ready",
    watch_pb2.REPLICA_STATE_STOPPING: "stopping",
    watch_pb2.REPLICA_STATE_MISSING: "missing",
}
"""The states of the protocol; others are those of later releases, and not ready."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaActivity:
    """One of the servers that share a store, as it last reported itself.

    Example:
        >>> with client.watch_server() as watch:
        ...     (replica,) = next(watch).replicas
        >>> replica.state
        'ready'
    """

    id: str
    """Random id of the server process."""
    host: str
    """Name of its machine or container."""
    address: str
    """Address on which it listens for gRPC. It may not be one that you reach."""
    http_address: str
    """URL of its JSON over HTTP; empty: none."""
    version: str
    """Version of Stepwell."""
    started_s: float
    """Time of its start, in seconds since the epoch, by its own clock."""
    state: ReplicaState
    last_seen_s: float
    """Time of its last report, in seconds since the epoch. Each server reports every two seconds."""
    resident_sessions: int
    """Sessions whose state is in its memory."""

    @classmethod
    def _from_message(cls, replica: watch_pb2.ReplicaActivity) -> Self:
        return cls(
            id=replica.id,
            host=replica.host,
            address=replica.address,
            http_address=replica.http_address,
            version=replica.version,
            started_s=replica.started_time.seconds + replica.started_time.nanos / 1e9,
            state=REPLICA_STATES.get(replica.state, "not_ready"),
            last_seen_s=replica.last_seen_time.seconds + replica.last_seen_time.nanos / 1e9,
            resident_sessions=replica.resident_sessions,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class ServerActivity:
    """The activity of a server since the previous one.

    If the server authenticates its callers and the caller is not an admin, it has only the models, by name, version and
    executor.

    Example:
        >>> with client.watch_server() as watch:
        ...     activity = next(watch)
        >>> activity.is_ready, list(activity.models), activity.store
        (True, ['forecast'], 'memory')
    """

    time_s: float
    """Seconds since the epoch."""
    interval_s: float
    """Time that rates and latencies cover; 0 for the first."""
    is_ready: bool
    """Whether the server can answer calls."""
    problems: Mapping[str, str]
    """Why it is not ready, by subject."""
    warnings: Mapping[str, str]
    """Problems that leave it ready, by subject."""
    server_id: str
    """Random id of the server process."""
    store: str
    """Kind of the store: "memory", "disk" or "valkey"."""
    memory_bytes: int
    """Memory of the process."""
    cores: float
    """Processor time per second."""
    connections: int
    row_steps_per_s: float
    """Rows times time steps."""
    errors_per_s: float
    latencies: Mapping[str, StageLatency]
    """By stage, of all models: see `ModelActivity.latencies`."""
    sessions: int
    """Open sessions. Servers that share a store have the same sessions."""
    resident_sessions: int
    """Sessions whose state is in memory."""
    models: Mapping[str, ModelActivity]
    """By name."""
    errors: Sequence[tuple[str, str, float]]
    """Model, reason and number per second, the most frequent first."""
    replicas: Sequence[ReplicaActivity]
    """The servers that share the store, this one (`server_id`) included, the oldest first."""

    @classmethod
    def _from_message(cls, reply: watch_pb2.WatchServerResponse) -> Self:
        server = reply.server
        return cls(
            time_s=reply.time.seconds + reply.time.nanos / 1e9,
            interval_s=reply.interval_seconds,
            is_ready=reply.ready,
            problems=dict(reply.problems),
            warnings=dict(reply.warnings),
            server_id=server.id,
            store=server.store,
            memory_bytes=server.memory_bytes,
            cores=server.cores,
            connections=server.connections,
            row_steps_per_s=server.row_steps_per_second,
            errors_per_s=server.errors_per_second,
            latencies=_latencies(server.latencies),
            sessions=server.sessions,
            resident_sessions=server.resident_sessions,
            models={each.name: _model(each) for each in reply.models},
            errors=[(each.model, each.reason, each.per_second) for each in reply.errors],
            replicas=[ReplicaActivity._from_message(each) for each in server.replicas],
        )


def _model(model: watch_pb2.ModelActivity) -> ModelActivity:
    return ModelActivity(
        name=model.name,
        version=model.version,
        executor=model.executor,
        row_steps_per_s=model.row_steps_per_second,
        passes_per_s=model.passes_per_second,
        rows_per_pass=model.rows_per_pass if model.HasField("rows_per_pass") else None,
        busy=model.busy,
        latencies=_latencies(model.latencies),
        sessions=model.sessions,
        resident_sessions=model.resident_sessions,
        resident_bytes=model.resident_bytes,
        queued_rows=model.queued_rows,
    )


def _latencies(stages: Any) -> dict[str, StageLatency]:
    return {
        each.stage: StageLatency(
            each.p50_seconds if each.HasField("p50_seconds") else None,
            each.p99_seconds if each.HasField("p99_seconds") else None,
        )
        for each in stages
    }
