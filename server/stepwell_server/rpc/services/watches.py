"""The calls of WatchService: changes of sessions, and the figures of the server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from google.protobuf import duration_pb2

from stepwell.v1 import watch_pb2 as pb
from stepwell_server.core.callers import Role
from stepwell_server.core.recent_values import RecentValues
from stepwell_server.engine.watches.events import Event, Kind, Wanted
from stepwell_server.errors import InvalidInput, MessageTooLarge, Overloaded, Stopping
from stepwell_server.process.replicas import ReplicaState
from stepwell_server.rpc import convert, tenancy, tensors
from stepwell_server.rpc.boundary import parse
from stepwell_server.rpc.status import to_proto

if TYPE_CHECKING:
    from stepwell_server.catalog.catalog import Catalog
    from stepwell_server.engine.engine import Engine
    from stepwell_server.engine.watches.watch import Watch
    from stepwell_server.process.readiness import Report
    from stepwell_server.process.replicas import Replica
    from stepwell_server.rpc.audit import Auditor
    from stepwell_server.rpc.fronts.base import Call
    from stepwell_server.rpc.services.models import ModelServicer

MIN_INTERVAL_S, MAX_INTERVAL_S = 0.01, 3600.0
MIN_SERVER_INTERVAL_S = 0.2
MAX_SERVER_WATCHES = 256
"""Concurrent calls of WatchServer."""
_SERVER_INTERVAL_S = 1.0
_RETRY_AFTER_S = 1.0
#: Events that arrive within this time are one message: each message costs more than an event.
_GATHER_S = 0.02
#: Limits of the events that are kept for other watches of the session: their number, and the bytes of each.
_MAX_SHARED, _MAX_SHARED_BYTES = 256, 16 << 10
#: Bytes of a message besides the tensors of its largest event.
_REST_BYTES = 64 << 10
_KINDS: dict[Kind, pb.SessionEventKind.ValueType] = {
    Kind.PRESENT: pb.SESSION_EVENT_KIND_PRESENT,
    Kind.STEP: pb.SESSION_EVENT_KIND_STEP,
    Kind.RESET: pb.SESSION_EVENT_KIND_RESET,
    Kind.ENDED: pb.SESSION_EVENT_KIND_ENDED,
}
_REPLICA_STATES: dict[ReplicaState, pb.ReplicaState.ValueType] = {
    ReplicaState.READY: pb.REPLICA_STATE_READY,
    ReplicaState.NOT_READY: pb.REPLICA_STATE_NOT_READY,
    ReplicaState.STOPPING: pb.REPLICA_STATE_STOPPING,
    ReplicaState.MISSING: pb.REPLICA_STATE_MISSING,
}


class Figures(Protocol):
    """Computes the figures of the server."""

    @property
    def report(self) -> Report:
        """Whether the server is ready."""

    @property
    def replicas(self) -> Sequence[Replica]:
        """The servers that share the store."""

    async def read(self) -> Any:
        """Read the metrics."""

    async def between(self, before: Any, now: Any, /) -> Mapping[str, Any]:
        """Compute the activity between two readings; `before` None: without rates."""


class WatchServicer:
    """The calls of WatchService, each by its name in snake case. Lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        control: Catalog,
        models: ModelServicer,
        figures: Figures,
        max_reply_bytes: int,
        auditor: Auditor | None = None,
    ) -> None:
        self._engine = engine
        self._control = control
        self._models = models
        self._figures = figures
        self._max_reply_bytes = max_reply_bytes
        self._auditor = auditor
        self._is_stopping = False
        self._server_watches: set[asyncio.Task[None]] = set()
        self._encoded: RecentValues[tuple[Any, ...], bytes] = RecentValues(_MAX_SHARED)
        self._stopped = asyncio.Event()

    def refuse_streams(self) -> None:
        """End every new watch with UNAVAILABLE, before its first event."""
        self._is_stopping = True

    def stop(self) -> None:
        """End all watches with UNAVAILABLE, after the events that wait."""
        self.refuse_streams()
        self._engine.stop_watches(_stopping())
        self._stopped.set()

    def _require_running(self) -> None:
        if self._is_stopping:
            raise _stopping()

    async def watch_sessions(self, call: Call) -> None:
        """Report changes of sessions until the last of them ends."""
        request = parse(pb.WatchSessionsRequest, await call.read() or b"")
        self._require_running()
        as_values = tensors.wants_values(request.tensor_format)
        ids = tenancy.internal_ids(call.who, request.session_ids)
        watch = self._engine.watch_sessions(ids, _wanted(request), (call.who.tenant, call.who.name))
        try:
            if self._auditor is not None:
                self._auditor.began("WatchSessions", call, request)
            await self._report(watch, call, as_values=as_values)
        finally:
            self._engine.end_watch(watch)

    async def _report(self, watch: Watch, call: Call, *, as_values: bool) -> None:
        limit = tensors.reply_limit(self._max_reply_bytes - _REST_BYTES, as_values=as_values)
        while events := await watch.next():
            parts: list[bytes] = []
            for event in events:
                if event.tensor_bytes > limit:
                    watch.end(event.session_id, _too_large(event, limit))
                    continue
                parts.append(self._encode(event, watch.wanted, as_values=as_values))
            if parts:
                await call.write(
                    b"".join(parts)
                )  # responses one after the other are one with all of their events
            await asyncio.sleep(_GATHER_S)

    def _encode(self, event: Event, wanted: Wanted, *, as_values: bool) -> bytes:
        """A response with one event. Watches of a session that want the same share it."""
        counts = event.skipped, event.dropped, event.from_store
        key = (event.sample, event.kind, wanted.what, as_values, counts)
        data = self._encoded.get(key)
        if data is None:
            response = pb.WatchSessionsResponse()
            _add_event(response, event, as_values=as_values)
            data = response.SerializeToString()
            if event.sample and len(data) <= _MAX_SHARED_BYTES:
                self._encoded.put(key, data)
        return data

    async def watch_server(self, call: Call) -> None:
        """Report the activity of the server until the caller cancels."""
        request = parse(pb.WatchServerRequest, await call.read() or b"")
        self._require_running()
        interval_s = _SERVER_INTERVAL_S
        if request.HasField("interval"):
            interval_s = _interval_s(request.interval, MIN_SERVER_INTERVAL_S)
        task = asyncio.current_task()
        assert task is not None
        if len(self._server_watches) >= MAX_SERVER_WATCHES:
            raise Overloaded(
                f"calls of WatchServer must stay within {MAX_SERVER_WATCHES}; as many are running",
                _RETRY_AFTER_S,
            )
        self._server_watches.add(task)
        try:
            before = None
            while True:
                now = await self._figures.read()
                if now is not before:  # else the first response has just left
                    await call.write((await self._response(before, now, call)).SerializeToString())
                before = now
                try:
                    await asyncio.wait_for(self._stopped.wait(), _until_next(interval_s))
                except TimeoutError:
                    continue
                raise _stopping()
        finally:
            self._server_watches.discard(task)

    async def _response(self, before: Any, now: Any, call: Call) -> pb.WatchServerResponse:
        activity = await self._figures.between(before, now)
        # from here on there is no wait: warnings and replicas are of the same moment
        report, is_counted = self._figures.report, call.who.role is Role.ADMIN
        response = pb.WatchServerResponse(
            time=convert.now_timestamp(),
            interval_seconds=0.0 if before is None else now.when - before.when,
            ready=report.is_ready,
            problems={about: reason if is_counted else "" for about, reason in report.problems.items()},
            warnings={about: reason if is_counted else "" for about, reason in report.warnings.items()},
        )
        statuses = self._control.statuses()
        facts = {one["model"]: one for one in activity["models"]}
        for info in self._engine.models():
            model = response.models.add(
                name=info.name,
                version=info.version,
                versions=[
                    convert.from_version(each, counted=is_counted) for each in statuses.get(info.name, ())
                ],
                executor=info.program.executor,
            )
            if is_counted and info.name in facts:
                _fill_model(model, facts[info.name], info.program.state_row_bytes)
        if not is_counted:
            return response
        _fill_server(response.server, activity["server"], ", ".join(one["id"] for one in activity["servers"]))
        response.server.replicas.extend(map(_replica, self._figures.replicas))
        response.methods.extend(
            pb.MethodActivity(
                method=one["method"],
                calls_per_second=one["calls_per_s"],
                messages_per_second=one["messages_per_s"],
                p50_seconds=one["p50_s"],
                p99_seconds=one["p99_s"],
            )
            for one in activity["methods"]
        )
        response.errors.extend(
            pb.ErrorActivity(model=one["model"], reason=one["reason"], per_second=one["per_s"])
            for one in activity["errors"]
        )
        response.tenants.extend(
            pb.TenantActivity(
                tenant=one["tenant"], row_steps_per_second=one["row_steps_per_s"], sessions=one["sessions"]
            )
            for one in activity["tenants"]
        )
        response.slow_sessions.extend(self._models.slow_sessions(call, 10))
        return response


def _stopping() -> Stopping:
    return Stopping("the server is stopping")


def _until_next(interval_s: float) -> float:
    """Return the time until the next multiple of an interval, so that watches with equal intervals share readings."""
    now = asyncio.get_running_loop().time()
    return (math.floor(now / interval_s) + 1) * interval_s - now


def _interval_s(interval: duration_pb2.Duration, least_s: float) -> float:
    seconds = interval.seconds + interval.nanos / 1e9
    if least_s <= seconds <= MAX_INTERVAL_S:
        return convert.to_seconds(interval, "interval")
    text = f"{seconds:g}" if seconds < 0 else convert.seconds_text(interval)
    raise InvalidInput(f"interval must be from {least_s:g} s to {MAX_INTERVAL_S:g} s; got {text} s")


def _wanted(request: pb.WatchSessionsRequest) -> Wanted:
    every = request.WhichOneof("every")
    if every == "revisions" and not request.revisions:
        raise InvalidInput("revisions must be 1 or more; got 0")
    return Wanted(
        inputs=request.inputs,
        outputs=request.outputs,
        states=request.states,
        state_names=frozenset(request.state_names),
        revisions=request.revisions if every == "revisions" else 1,
        interval_s=_interval_s(request.interval, MIN_INTERVAL_S) if every == "interval" else 0.0,
    )


def _too_large(event: Event, limit: int) -> MessageTooLarge:
    return MessageTooLarge(
        f"session_ids must name sessions whose tensors fit into an event of {limit} bytes; those of session"
        f" {event.session_id!r} need {event.tensor_bytes}: name fewer tensors in state_names",
        limit_bytes=str(limit),
    )


def _add_event(response: pb.WatchSessionsResponse, event: Event, *, as_values: bool) -> None:
    message = response.events.add(
        session_id=tenancy.external_id(event.session_id),
        kind=_KINDS[event.kind],
        revision=event.revision,
        position=event.position,
        time=convert.to_timestamp(event.time),
        time_steps=event.time_steps,
        rows=event.rows,
        skipped_revisions=event.skipped,
        dropped_revisions=event.dropped,
        from_store=event.from_store,
        model=event.model,
        model_version=event.version,
        uid=event.uid,
        error=None if event.error is None else to_proto(event.error),
    )
    tensors.add_tensors(message.inputs, event.inputs, as_values=as_values)
    tensors.add_tensors(message.outputs, event.outputs, as_values=as_values)
    tensors.add_tensors(message.states, event.states, as_values=as_values)


def _latencies(stages: Mapping[str, Mapping[str, float | None]]) -> Sequence[pb.StageLatency]:
    return [
        pb.StageLatency(stage=stage, p50_seconds=found["p50_s"], p99_seconds=found["p99_s"])
        for stage, found in stages.items()
    ]


def _fill_server(message: pb.ServerActivity, found: Mapping[str, Any], server_id: str) -> None:
    message.MergeFrom(
        pb.ServerActivity(
            version=found["version"],
            front=found["front"],
            id=server_id,
            uptime_seconds=found["uptime_s"],
            memory_bytes=int(found["memory_bytes"]),
            max_memory_bytes=int(found["max_memory_bytes"]),
            cores=found["cores"],
            connections=int(found["connections"]),
            streams=int(found["streams"]),
            store=found["store"],
            store_id=found["store_id"],
            store_ready=found["store_ready"],
            row_steps_per_second=found["row_steps_per_s"],
            latencies=_latencies(found["stages"]),
            errors_per_second=found["errors_per_s"],
            sessions=found["sessions"],
            resident_sessions=found["resident_sessions"],
            resident_rows=found["resident_rows"],
            queued_rows=found["queued_rows"],
            watched_sessions=found["watched_sessions"],
        )
    )


def _replica(one: Replica) -> pb.ReplicaActivity:
    return pb.ReplicaActivity(
        id=one.id,
        host=one.host,
        address=one.address,
        http_address=one.http_address,
        version=one.version,
        started_time=convert.to_timestamp(one.started),
        state=_REPLICA_STATES[one.state],
        last_seen_time=convert.to_timestamp(one.seen),
        resident_sessions=one.resident_sessions,
    )


def _fill_model(message: pb.ModelActivity, found: Mapping[str, Any], row_bytes: int) -> None:
    message.MergeFrom(
        pb.ModelActivity(
            row_steps_per_second=found["row_steps_per_s"],
            passes_per_second=found["passes_per_s"],
            rows_per_pass=found["rows_per_pass"],
            busy=found["busy"],
            latencies=_latencies(found["stages"]),
            sessions=found["sessions"],
            resident_sessions=found["resident_sessions"],
            resident_rows=found["resident_rows"],
            max_resident_rows=found["max_resident_rows"],
            resident_bytes=found["resident_rows"] * row_bytes,
            paged_in_per_second=found["paged_in_per_s"],
            paged_out_per_second=found["paged_out_per_s"],
            queued_rows=found["queued_rows"],
        )
    )
