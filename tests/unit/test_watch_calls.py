"""The calls of WatchService without a network: their messages, what watches share, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from google.protobuf import duration_pb2

from stepwell.v1 import sessions_pb2, tensors_pb2
from stepwell.v1 import watch_pb2 as pb
from stepwell_server.core.callers import Caller, Role
from stepwell_server.rpc.fronts.base import CallEnded
from stepwell_server.rpc.services import watches
from support.peers.wire import tensors
from support.rpc.calls import MAX_MESSAGE_BYTES, Calls, calls
from support.rpc.fake_call import FakeCall

PATIENCE_S = 60.0
ALL: dict[str, Any] = {"inputs": True, "outputs": True, "states": True}
USER = Caller("ann", "", Role.USER)


@pytest.fixture
async def at() -> AsyncIterator[Calls]:
    async with calls() as found:
        yield found


@asynccontextmanager
async def serving(at: Calls, request: Any) -> AsyncIterator[FakeCall]:
    """A call that is being served."""
    call = at.new_call()
    call.send(request)
    call.half_close()
    name = type(request).__name__.removesuffix("Request")
    task = asyncio.ensure_future(at.methods[name].serve(call))
    try:
        yield call
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def events(call: FakeCall, count: int) -> list[pb.SessionEvent]:
    found: list[pb.SessionEvent] = []
    while len(found) < count:
        raw = await asyncio.wait_for(call.replies.get(), PATIENCE_S)
        found += pb.WatchSessionsResponse.FromString(raw).events
    assert len(found) == count
    return found


async def step(at: Calls, session_id: str, seed: int) -> Any:
    value = np.random.default_rng(seed).standard_normal((2, 2)).astype(np.float32)
    return await at.call(
        sessions_pb2.StepRequest(session_id=session_id, inputs=tensors({"x": value}), request_id=seed + 1)
    )


async def test_watches_that_want_the_same_share_encoded_events(
    at: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    add = watches._add_event

    def counted(response: pb.WatchSessionsResponse, event: Any, *, as_values: bool) -> None:
        made.append(event.revision)
        add(response, event, as_values=as_values)

    session_id = await at.opened()
    request = pb.WatchSessionsRequest(session_ids=[session_id], **ALL)
    few = pb.WatchSessionsRequest(session_ids=[session_id], outputs=True)
    third = pb.WatchSessionsRequest(session_ids=[session_id], revisions=3, **ALL)
    async with (
        serving(at, request) as one,
        serving(at, request) as other,
        serving(at, few) as outputs,
        serving(at, third) as rare,
    ):
        for call in (one, other, outputs, rare):
            (first,) = await events(call, 1)
            assert (first.kind, first.model) == (pb.SESSION_EVENT_KIND_PRESENT, "plain")
        monkeypatch.setattr(watches, "_add_event", counted)
        states: list[tensors_pb2.Tensor] = []
        for seed in range(3):
            reply = await step(at, session_id, seed)
            (event,) = await events(one, 1)
            assert await events(other, 1) == [event]
            assert list(event.outputs) == list(reply.outputs)
            states = list(event.states)
            (own,) = await events(outputs, 1)
            assert (list(own.outputs), len(own.states)) == (list(reply.outputs), 0)
        (last,) = await events(rare, 1)
        assert (last.skipped_revisions, last.revision, list(last.states)) == (2, 4, states)
        # once for both that want the same, once for outputs alone; another number of skipped changes is another event
        assert sorted(made) == [2, 2, 3, 3, 4, 4, 4]


async def test_values_are_encoded_apart(at: Calls) -> None:
    session_id = await at.opened()
    data = pb.WatchSessionsRequest(session_ids=[session_id], **ALL)
    values = pb.WatchSessionsRequest(tensor_format=tensors_pb2.TENSOR_FORMAT_VALUES)
    values.MergeFrom(data)
    async with serving(at, data) as one, serving(at, values) as other:
        await events(one, 1)
        await events(other, 1)
        await step(at, session_id, 1)
        (plain,), (numbers,) = await events(one, 1), await events(other, 1)
        assert plain.states[0].data
        assert not plain.states[0].values
        assert np.array(numbers.states[0].values, np.float32).tobytes() == plain.states[0].data


async def test_an_event_that_is_too_large_ends_its_session_only(
    at: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = await at.opened(batch_size=64), await at.opened(batch_size=1)
    monkeypatch.setattr(watches, "_REST_BYTES", MAX_MESSAGE_BYTES - 100)
    request = pb.WatchSessionsRequest(session_ids=[large, small], states=True)
    async with serving(at, request) as call:
        found = {event.session_id: event for event in await events(call, 2)}
        assert found[small].kind == pb.SESSION_EVENT_KIND_PRESENT
        assert found[large].kind == pb.SESSION_EVENT_KIND_ENDED
        assert "name fewer tensors in state_names" in found[large].error.message
        await step_small(at, small)
        assert [event.revision for event in await events(call, 1)] == [2]


async def step_small(at: Calls, session_id: str) -> None:
    value = np.ones((1, 2), np.float32)
    await at.call(sessions_pb2.StepRequest(session_id=session_id, inputs=tensors({"x": value})))


@pytest.mark.parametrize(
    ("request_", "rule"),
    [
        (pb.WatchSessionsRequest(session_ids=["a"], revisions=0), "revisions must be 1 or more; got 0"),
        *(
            (
                pb.WatchSessionsRequest(session_ids=["a"], interval=duration_pb2.Duration(**interval)),
                f"interval must be from 0.01 s to 3600 s; got {text} s",
            )
            for interval, text in (
                ({"nanos": 9_999_999}, "0.009999999"),
                ({"seconds": -1}, "-1"),
                ({"seconds": -1, "nanos": -500_000_000}, "-1.5"),
                ({"nanos": -500_000_000}, "-0.5"),
                ({"seconds": 3600, "nanos": 1}, "3600.000000001"),
            )
        ),
        (
            pb.WatchServerRequest(interval=duration_pb2.Duration(seconds=-7)),
            "interval must be from 0.2 s to 3600 s; got -7 s",
        ),
    ],
)
async def test_times_and_numbers_out_of_range(at: Calls, request_: Any, rule: str) -> None:
    name = type(request_).__name__.removesuffix("Request")
    with pytest.raises(CallEnded) as ended:
        await at.streamed(name, request_)
    assert (ended.value.status.code.name, ended.value.status.message) == ("INVALID_ARGUMENT", rule)


async def test_the_server_reports_itself_until_too_many_ask(
    at: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    await at.opened()
    monkeypatch.setattr(watches, "MAX_SERVER_WATCHES", 1)
    request = pb.WatchServerRequest()
    async with serving(at, request) as call:
        raw = await asyncio.wait_for(call.replies.get(), PATIENCE_S)
        reply = pb.WatchServerResponse.FromString(raw)
        assert [(model.name, model.version, model.executor) for model in reply.models]
        assert reply.HasField("server")
        with pytest.raises(CallEnded) as ended:
            await at.streamed("WatchServer", request)
        assert ended.value.status.code.name == "RESOURCE_EXHAUSTED"
    async with serving(at.of(USER), request) as call:
        raw = await asyncio.wait_for(call.replies.get(), PATIENCE_S)
        assert not pb.WatchServerResponse.FromString(raw).HasField("server"), "for admins"
