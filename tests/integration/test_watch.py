"""WatchService on real servers of both fronts: every event against the replies, states and figures of other calls."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Self

import grpc
import numpy as np
import pytest
from google.protobuf import duration_pb2

from stepwell.v1 import models_pb2, tensors_pb2, watch_pb2_grpc
from stepwell.v1 import watch_pb2 as pb
from support.peers import wire
from support.peers.wire import Wire, tensor
from support.servers import both_fronts
from support.servers.both_fronts import FRONTS, needs_native
from support.servers.server_process import FEATURES, serve

PRESENT, STEP, RESET, ENDED = (
    pb.SESSION_EVENT_KIND_PRESENT,
    pb.SESSION_EVENT_KIND_STEP,
    pb.SESSION_EVENT_KIND_RESET,
    pb.SESSION_EVENT_KIND_ENDED,
)
ALL = {"inputs": True, "outputs": True, "states": True}
TIMEOUT_S = 100.0


class Watching:
    """A watch of sessions. Leaving the block cancels it."""

    def __init__(self, channel: grpc.Channel, *session_ids: str, metadata: Any = (), **fields: Any) -> None:
        stub = watch_pb2_grpc.WatchServiceStub(channel)
        request = pb.WatchSessionsRequest(session_ids=session_ids, **fields)
        self.call: Any = stub.WatchSessions(request, timeout=TIMEOUT_S, metadata=metadata)
        self._events = (event for response in self.call for event in response.events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.call.cancel()

    def next(self) -> pb.SessionEvent:
        return next(self._events)

    def take(self, count: int) -> list[pb.SessionEvent]:
        return [self.next() for _ in range(count)]

    def rest(self) -> list[pb.SessionEvent]:
        return list(self._events)


@pytest.fixture(scope="module")
def both() -> Iterator[Mapping[str, Wire]]:
    with both_fronts.serve("seq", "multi") as wires:
        yield wires


@pytest.fixture(params=FRONTS)
def one(both: Mapping[str, Wire], request: pytest.FixtureRequest) -> Wire:
    return both[request.param]


pytestmark = needs_native


def x(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((*shape, 3)).astype(np.float32)


def by_stream(one: Wire, ids: list[str], value: Any) -> None:
    """Step sessions by a frame."""
    (answer,) = one.exchange(wire.step_frame(1, ids, [tensor(value)]))
    assert not answer.errors


def test_each_event_is_what_other_calls_say(one: Wire) -> None:
    """Single steps, frames, steps of several time steps, of some rows, and resets: replayed from the events' inputs."""
    single, rows = one.open("seq"), one.open("seq", batch_size=3)
    with Watching(one.channel, single, rows, **ALL) as watch:
        for event in watch.take(2):
            assert (event.kind, event.model, event.revision) == (PRESENT, "seq", 0)
            assert wire.data(event.states) == wire.data(one.state(event.session_id).state)
        state = list(one.state(single).state)
        for turn in range(20):
            value = x(1, seed=turn)
            reply = one.step(single, [tensor(value)]) if turn % 2 else None
            if reply is None:
                by_stream(one, [single], value)
            event = watch.next()
            assert (event.session_id, event.kind, event.revision) == (single, STEP, turn + 1)
            assert event.inputs[0].data == value.tobytes()
            if reply is not None:
                assert wire.data(event.outputs) == wire.data(reply.outputs)
            predicted = one.predict("seq", event.inputs, state)
            state = list(event.states)
            assert wire.data(predicted.state) == wire.data(state)
            assert wire.data(predicted.outputs) == wire.data(event.outputs)
            assert wire.data(one.state(single).state) == wire.data(state)
        value = x(3, 4)
        reply = one.step(rows, [tensor(value)])
        event = watch.next()
        assert (event.time_steps, event.position, event.revision) == (4, 4, 1)
        assert event.inputs[0].data == value[:, -1].tobytes()
        for name, array in wire.arrays(reply.outputs).items():
            assert wire.arrays(event.outputs)[name].tobytes() == array[:, -1].tobytes()
        assert wire.data(event.states) == wire.data(one.state(rows).state)
        one.step(rows, [tensor(x(1, seed=5))], rows=[2])
        event = watch.next()
        assert list(event.rows) == [2]
        assert wire.data(event.states) == wire.data(one.state(rows).state)
        one.reset(rows, rows=[0])
        event = watch.next()
        assert (event.kind, list(event.rows), len(event.outputs)) == (RESET, [0], 0)
        assert wire.data(event.states) == wire.data(one.state(rows).state)
        one.close(single)
        end = watch.next()
        assert (end.session_id, end.kind, end.error.reason) == (single, ENDED, "SESSION_NOT_FOUND")
        one.close(rows)
        assert [event.kind for event in watch.rest()] == [ENDED], "the stream ends with its last session"


def test_every_nth_change_is_reported(one: Wire) -> None:
    first, second = one.open("seq"), one.open("seq")
    with (
        Watching(one.channel, first, second, revisions=3, **ALL) as watch,
        Watching(one.channel, first, interval=duration_pb2.Duration(seconds=3600), **ALL) as rare,
    ):
        watch.take(2)
        rare.next()
        for turn in range(7):
            value = x(1, seed=turn)
            for session_id in (first, second):
                one.step(session_id, [tensor(value)])
                if turn % 3 == 2:
                    event = watch.next()
                    assert (event.session_id, event.kind, event.revision) == (session_id, STEP, turn + 1)
                    assert event.skipped_revisions == 2
                    assert event.inputs[0].data == value.tobytes()
                    assert wire.data(event.states) == wire.data(one.state(session_id).state)
        for session_id in (first, second):
            one.close(session_id)
        assert [event.kind for event in watch.rest()] == [ENDED] * 2
        assert [event.kind for event in rare.rest()] == [ENDED], "the interval has not passed"


def test_several_inputs_and_outputs_have_their_names(one: Wire) -> None:
    session_id = one.open("multi")
    listed = {
        model.name: model
        for model in one.models.ListModels(models_pb2.ListModelsRequest(), timeout=TIMEOUT_S).models
    }["multi"]
    with Watching(one.channel, session_id, **ALL) as watch:
        watch.next()
        rng = np.random.default_rng(4)
        inputs = []
        for spec in listed.inputs:
            array = (
                rng.integers(0, 9, (1, *spec.shape)).astype(np.int32)
                if spec.dtype == tensors_pb2.DATA_TYPE_INT32
                else rng.standard_normal((1, *spec.shape)).astype(np.float32)
            )
            inputs.append(tensor(array, spec.name))
        reply = one.step(session_id, inputs)
        event = watch.next()
        assert wire.data(event.inputs) == wire.data(inputs)
        assert wire.data(event.outputs) == wire.data(reply.outputs)
        assert [one.name for one in event.states] == [spec.name for spec in listed.state]
    name = listed.state[0].name
    with Watching(one.channel, session_id, states=True, state_names=[name, "unknown"]) as watch:
        event = watch.next()
        assert [one.name for one in event.states] == [name]
        assert not event.inputs


def test_a_retry_makes_no_second_event(one: Wire) -> None:
    session_id = one.open("seq")
    with Watching(one.channel, session_id) as watch:
        watch.next()
        for _ in range(2):
            one.step(session_id, [tensor(x(1))], expected_revision=0, request_id=5)
        one.step(session_id, [tensor(x(1))], expected_revision=1, request_id=6)
        assert [event.revision for event in watch.take(2)] == [1, 2]


def test_a_thousand_sessions_are_watched_together(one: Wire) -> None:
    ids = one.open_many("seq", 1024)
    with Watching(one.channel, *ids, states=True) as watch:
        assert {event.session_id for event in watch.take(1024)} == set(ids)
        by_stream(one, ids, x(1024))
        events = {event.session_id: event for event in watch.take(1024)}
        for session_id in ids[::100]:
            assert wire.data(events[session_id].states) == wire.data(one.state(session_id).state)
    one.close(*ids)


def test_values_instead_of_bytes(one: Wire) -> None:
    session_id = one.open("seq")
    with Watching(
        one.channel, session_id, states=True, tensor_format=tensors_pb2.TENSOR_FORMAT_VALUES
    ) as watch:
        event = watch.next()
        assert not event.states[0].data
        assert len(event.states[0].values)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no ids": ({"session_ids": []}, "session_ids must have 1 to 1024 ids; got 0"),
    "too many": (
        {"session_ids": [f"s{i}" for i in range(1025)]},
        "session_ids must have 1 to 1024 ids; got 1025",
    ),
    "twice": ({"session_ids": ["a", "b", "a"]}, "session_ids must not repeat an id; got 'a' twice"),
    "empty": ({"session_ids": [""]}, "session_ids must not be empty ids; got one"),
    "revisions": ({"session_ids": ["a"], "revisions": 0}, "revisions must be 1 or more; got 0"),
    "short": (
        {"session_ids": ["a"], "interval": duration_pb2.Duration(nanos=9_000_000)},
        "interval must be from 0.01 s to 3600 s; got 0.009 s",
    ),
    "negative": (
        {"session_ids": ["a"], "interval": duration_pb2.Duration(seconds=-1)},
        "interval must be from 0.01 s to 3600 s; got -1 s",
    ),
    "format": (
        {"session_ids": ["a"], "tensor_format": 9},
        "tensor_format must be one of stepwell.v1.TensorFormat; got 9",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused(one: Wire, name: str) -> None:
    fields, words = REFUSED[name]
    fields = dict(fields)
    ids = fields.pop("session_ids")
    refused = wire.refusal(lambda: Watching(one.channel, *ids, **fields).next())
    refused.expect("INVALID_ARGUMENT", "INVALID_INPUT", words)


def test_sessions_that_do_not_exist_end_at_once(one: Wire) -> None:
    with Watching(one.channel, "never", "nor this") as watch:
        events = watch.rest()
    assert [(event.kind, event.error.reason) for event in events] == [(ENDED, "SESSION_NOT_FOUND")] * 2


def test_the_server_reports_its_figures(one: Wire) -> None:
    session_id = one.open("seq")
    stub = watch_pb2_grpc.WatchServiceStub(one.channel)
    call = stub.WatchServer(
        pb.WatchServerRequest(interval=duration_pb2.Duration(nanos=200_000_000)), timeout=TIMEOUT_S
    )
    first = next(call)
    assert first.ready
    assert not first.interval_seconds
    assert {model.name for model in first.models} >= {"seq", "multi"}
    assert (first.server.front, first.server.store) in {("native", "memory"), ("python", "memory")}
    with Watching(one.channel, session_id) as watch:
        watch.next()
        steps = 0.0
        while steps < 5:
            one.step(session_id, [tensor(x(1))])
            steps += sum(response_steps(next(call), "seq"))
        found = next(call)
        assert found.interval_seconds > 0
        assert found.server.watched_sessions == 1
    model = next(model for model in found.models if model.name == "seq")
    assert model.executor == "litert"
    assert model.version == 1
    assert model.sessions >= 1
    assert model.resident_sessions >= 1
    assert model.resident_bytes > 0
    assert found.server.memory_bytes > 0
    call.cancel()
    refused = wire.refusal(
        lambda: next(
            stub.WatchServer(
                pb.WatchServerRequest(interval=duration_pb2.Duration(nanos=100_000_000)), timeout=TIMEOUT_S
            )
        )
    )
    refused.expect("INVALID_ARGUMENT", "INVALID_INPUT", "interval must be from 0.2 s to 3600 s; got 0.1 s")


def response_steps(response: pb.WatchServerResponse, name: str) -> Iterator[float]:
    """The steps that a response counts for a model."""
    for model in response.models:
        if model.name == name:
            if model.row_steps_per_second:
                assert model.rows_per_pass >= 1
                assert {one.stage for one in model.latencies} == {"wait", "commit", "total"}
            yield model.row_steps_per_second * response.interval_seconds


@contextlib.contextmanager
def serving(front: str, *options: str) -> Iterator[Any]:
    with serve("--front", front, *options) as server:
        yield server


@pytest.mark.parametrize("front", FRONTS)
def test_a_slow_reader_delays_nobody_and_learns_what_it_missed(front: str) -> None:
    """The watch is not read while its session makes far more events than the server keeps."""
    with serving(front) as server, Wire(server.address) as client, Wire(server.address) as watcher:
        session_id = client.open("forecast", batch_size=512)
        with Watching(watcher.channel, session_id, **ALL) as watch:
            watch.next()
            value = np.random.default_rng(1).standard_normal((512, 1, FEATURES)).astype(np.float32)
            for _ in range(600):
                client.step(session_id, [tensor(value)])
            shown, missed, revision = 0, 0, 0
            event = watch.next()
            while True:
                missing = event.revision - revision - (event.kind != PRESENT)
                assert event.skipped_revisions + event.dropped_revisions == missing
                assert not event.skipped_revisions
                revision, missed, shown = event.revision, missed + missing, shown + 1
                if revision == 600:
                    break
                event = watch.next()
            assert shown + missed >= 600
            assert wire.data(event.states) == wire.data(client.state(session_id).state)


@pytest.mark.parametrize("front", FRONTS)
def test_a_stopping_server_ends_its_watches(front: str) -> None:
    with serving(front) as server, Wire(server.address) as client:
        session_id = client.open("forecast")
        with Watching(client.channel, session_id) as watch:
            watch.next()
            stub = watch_pb2_grpc.WatchServiceStub(client.channel)
            figures = stub.WatchServer(pb.WatchServerRequest(), timeout=TIMEOUT_S)
            next(figures)
            server.process.terminate()
            for call in (watch.call, figures):
                refused = wire.refusal(functools.partial(list, call))
                refused.expect("UNAVAILABLE", "UNAVAILABLE", "the server is stopping")
            assert server.process.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize("front", FRONTS)
def test_a_cancelled_watch_is_forgotten(front: str) -> None:
    with serving(front) as server, Wire(server.address) as client:
        session_id = client.open("forecast")
        with Watching(client.channel, session_id) as watch:
            watch.next()
        stub = watch_pb2_grpc.WatchServiceStub(client.channel)
        call = stub.WatchServer(
            pb.WatchServerRequest(interval=duration_pb2.Duration(nanos=200_000_000)), timeout=TIMEOUT_S
        )
        while next(call).server.watched_sessions:
            pass
        call.cancel()
        client.step(session_id, [tensor(np.ones((1, 1, FEATURES), np.float32))])


def test_many_watchers_of_a_session_see_the_same(both: Mapping[str, Wire]) -> None:
    one = both["native"]
    session_id = one.open("seq")
    found: list[list[tuple[int, bytes]]] = []
    begun = threading.Barrier(9)

    def watch() -> None:
        with Watching(one.channel, session_id, states=True) as watch:
            watch.next()
            begun.wait(TIMEOUT_S)
            found.append([(event.revision, event.states[0].data) for event in watch.take(50)])

    threads = [threading.Thread(target=watch) for _ in range(8)]
    for thread in threads:
        thread.start()
    begun.wait(TIMEOUT_S)
    for turn in range(50):
        one.step(session_id, [tensor(x(1, seed=turn))])
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(found) == 8
    assert all(each == found[0] for each in found)
    assert [revision for revision, _ in found[0]] == list(range(1, 51))
