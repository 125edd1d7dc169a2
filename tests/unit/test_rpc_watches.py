"""WatchService without a network: events of sessions as messages, the figures of the server, refusals, and stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from google.protobuf import duration_pb2, timestamp_pb2

from stepwell.v1 import sessions_pb2, watch_pb2
from stepwell_server.core.callers import Caller, Role
from stepwell_server.process.replicas import Replica, ReplicaState
from stepwell_server.rpc.fronts.base import CallEnded
from support.peers.wire import arrays, tensors
from support.rpc.calls import BAD_ARGUMENT, Calls, calls

USER = Caller("reader", "", Role.USER)
X = np.random.default_rng(8).standard_normal((1, 1, 2)).astype(np.float32)


@asynccontextmanager
async def watching(at: Calls, request: Any) -> AsyncIterator[Any]:
    """A watch, which ends with the block; yields what reads its next message."""
    name = type(request).__name__.removesuffix("Request")
    call = at.new_call(request.SerializeToString())
    call.send(request)
    task = asyncio.ensure_future(at.methods[name].serve(call))
    response = getattr(watch_pb2, f"{name}Response")

    async def next_message() -> Any:
        reply = asyncio.create_task(call.replies.get())
        await asyncio.wait({reply, task}, timeout=100, return_when=asyncio.FIRST_COMPLETED)
        if reply.done():
            return response.FromString(reply.result())
        reply.cancel()
        await task
        raise AssertionError("it ended")

    try:
        yield next_message
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_each_change_is_an_event() -> None:
    async with calls() as at:
        session_id = await at.opened(batch_size=1)
        request = watch_pb2.WatchSessionsRequest(
            session_ids=[session_id], inputs=True, outputs=True, states=True
        )
        async with watching(at, request) as next_message:
            (present,) = (await next_message()).events
            assert (present.kind, present.revision, present.model) == (
                watch_pb2.SESSION_EVENT_KIND_PRESENT,
                1,
                "plain",
            )
            await at.call(sessions_pb2.StepRequest(session_id=session_id, inputs=tensors({"x": X})))
            (step,) = (await next_message()).events
            assert (step.kind, step.revision) == (watch_pb2.SESSION_EVENT_KIND_STEP, 2)
            np.testing.assert_array_equal(arrays(step.inputs)["x"], X[:, 0])
            assert step.outputs
            assert step.states
            await at.call(sessions_pb2.CloseSessionRequest(session_id=session_id))
            (ended,) = (await next_message()).events
            assert (ended.kind, bool(ended.error.message)) == (watch_pb2.SESSION_EVENT_KIND_ENDED, True)


async def test_the_figures_of_a_server_are_for_its_admins() -> None:
    async with calls() as at:
        async with watching(at, watch_pb2.WatchServerRequest()) as next_message:
            first = await next_message()
            assert (first.interval_seconds, first.HasField("server")) == (0, True)
            assert "plain" in {model.name for model in first.models}
        async with watching(at.of(USER), watch_pb2.WatchServerRequest()) as next_message:
            first = await next_message()
            assert not first.HasField("server")
            assert {model.name for model in first.models} >= {"plain"}


async def test_the_servers_of_the_store_are_among_the_figures() -> None:
    own = Replica("a", "here", "127.0.0.1:1", "http://127.0.0.1:2", "1.0", 10.5, ReplicaState.READY, 3, 99.5)
    replicas = [own, *(replace(own, id=state.value, state=state) for state in ReplicaState)]
    async with calls(replicas=replicas) as at, watching(at, watch_pb2.WatchServerRequest()) as next_message:
        first, *others = (await next_message()).server.replicas
        assert first == watch_pb2.ReplicaActivity(
            id="a",
            host="here",
            address="127.0.0.1:1",
            http_address="http://127.0.0.1:2",
            version="1.0",
            started_time=timestamp_pb2.Timestamp(seconds=10, nanos=500_000_000),
            state=watch_pb2.REPLICA_STATE_READY,
            last_seen_time=timestamp_pb2.Timestamp(seconds=99, nanos=500_000_000),
            resident_sessions=3,
        )
        assert {one.id: one.state for one in others} == {
            "ready": watch_pb2.REPLICA_STATE_READY,
            "not ready": watch_pb2.REPLICA_STATE_NOT_READY,
            "stopping": watch_pb2.REPLICA_STATE_STOPPING,
            "missing": watch_pb2.REPLICA_STATE_MISSING,
        }


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            watch_pb2.WatchServerRequest(interval=duration_pb2.Duration(nanos=1)),
            "interval must be from 0.2 s to 3600 s; got 0.000000001 s",
        ),
        (
            watch_pb2.WatchSessionsRequest(session_ids=["a"], revisions=0),
            "revisions must be 1 or more; got 0",
        ),
    ],
    ids=["interval", "revisions"],
)
async def test_what_breaks_a_rule_is_refused(request_: Any, message: str) -> None:
    async with calls() as at, watching(at, request_) as next_message:
        with pytest.raises(CallEnded) as refused:
            await next_message()
        assert (refused.value.status.code.name, refused.value.status.message) == (BAD_ARGUMENT[0], message)
