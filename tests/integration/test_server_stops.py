"""SIGTERM: what is queued is finished and answered, what comes is refused, and the process ends with 0."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stepwell.v1 import sessions_pb2 as pb
from support import secured
from support.servers.held_step import HeldStore, held_store
from support.servers.server_process import (
    FEATURES,
    ServerProcess,
    begin_long_step,
    connect,
    random_tensor,
    serve,
)

_TIMEOUT_S = 100.0
HUNG_UP = "new connections get the changed certificates" if secured.is_on() else "nothing to reload"
_LONG = 1_000_000
"""Time steps of one that ends with the server."""
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with serve() as server:
        yield server


def _open(stub: Any, *session_ids: str) -> None:
    stub.OpenSessions(pb.OpenSessionsRequest(model="forecast", session_ids=session_ids), timeout=_TIMEOUT_S)


@pytest.fixture
def store() -> Iterator[HeldStore]:
    with held_store() as store:
        yield store


@pytest.fixture
def waiting(store: HeldStore) -> Iterator[ServerProcess]:
    """A server whose steps wait for the store."""
    with serve(*store.options) as server:
        yield server


@contextlib.contextmanager
def _busy(server: ServerProcess) -> Iterator[Any]:
    """A long step, which is under way."""
    channel, stub = connect(server)
    with channel:
        _open(stub, "a")
        yield begin_long_step(stub, "a", _LONG)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops_with_0(server: ServerProcess, number: signal.Signals) -> None:
    server.signal(signal.SIGHUP)
    server.wait_for_log(HUNG_UP)
    server.signal(number)
    code, out, err = server.finish()
    assert (code, out) == (0, "")
    assert f"stopping signal={number.name}" in err


@pytest.mark.slow
def test_queued_work_is_finished_and_new_work_refused(waiting: ServerProcess, store: HeldStore) -> None:
    channel, stub = connect(waiting)
    with channel:
        _open(stub, "a", "b")
        held = store.begin_step(stub, "a")
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        assert next(watch).status == _SERVING
        waiting.signal()
        assert next(watch).status == _NOT_SERVING
        for refused in (
            lambda: stub.OpenSession(pb.OpenSessionRequest(model="forecast"), timeout=_TIMEOUT_S),
            lambda: stub.Step(
                pb.StepRequest(session_id="b", inputs=[random_tensor(1, 1, 1, FEATURES)]), timeout=_TIMEOUT_S
            ),
        ):
            with pytest.raises(grpc.RpcError, match="the server is stopping") as caught:
                refused()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not held.done()
        store.release()
        assert held.result().revision == 1
        assert waiting.finish()[0] == 0


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_it_with_a_drain(store: HeldStore) -> None:
    primary, secondary = os.openpty()
    with serve(*store.options, terminal=secondary) as server:
        os.close(secondary)
        server.signal(signal.SIGHUP)  # somebody's, while the terminal is there
        server.wait_for_log(HUNG_UP)
        channel, stub = connect(server)
        with channel:
            _open(stub, "a")
            held = store.begin_step(stub, "a")
            os.close(primary)
            server.wait_for_log("stopping signal=SIGHUP")
            store.release()
            assert held.result().revision == 1
            assert server.finish()[0] == 0


@pytest.mark.slow
def test_a_stream_is_answered_and_then_ended(waiting: ServerProcess, store: HeldStore) -> None:
    channel, stub = connect(waiting)
    done = threading.Event()

    def frames() -> Iterator[pb.StepStreamRequest]:
        frame = pb.StepFrame(session_ids=["a"], inputs=[random_tensor(1, 1, FEATURES)])
        yield pb.StepStreamRequest(frame_id=1, step=frame)
        yield pb.StepStreamRequest(frame_id=2)
        done.wait(_TIMEOUT_S)

    with channel:
        _open(stub, "a")
        store.hold()
        stream = stub.StepStream(frames(), timeout=_TIMEOUT_S)
        assert next(stream).frame_id == 2  # refused at once: the server has taken in both
        store.wait()
        waiting.signal()
        waiting.wait_for_log("stopping")
        store.release()
        answer = next(stream)
        assert (answer.frame_id, list(answer.revisions)) == (1, [1])
        with pytest.raises(grpc.RpcError, match="the server is stopping") as caught:
            next(stream)
        done.set()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert waiting.finish()[0] == 0


def test_it_stops_under_load_and_every_answer_was_applied_in_order(server: ServerProcess) -> None:
    failures: list[grpc.StatusCode] = []
    revisions: dict[str, int] = {}
    busy = threading.Barrier(5)

    def keep_busy(session_id: str) -> None:
        channel, stub = connect(server)
        request = pb.StepRequest(session_id=session_id, inputs=[random_tensor(1, 1, 1, FEATURES)])
        with channel:
            _open(stub, session_id)
            try:
                for number in range(1, 1_000_000):
                    assert stub.Step(request, timeout=_TIMEOUT_S).revision == number
                    revisions[session_id] = number
                    if number == 20:
                        busy.wait(_TIMEOUT_S)
            except grpc.RpcError as error:
                failures.append(error.code())

    threads = [threading.Thread(target=keep_busy, args=(f"s{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    busy.wait(_TIMEOUT_S)
    server.signal()
    code, _, err = server.finish()
    for thread in threads:
        thread.join(_TIMEOUT_S)
    assert code == 0
    # A call that crosses gRPC's own goodbye on its way is CANCELLED by gRPC; the SDK takes it for UNAVAILABLE.
    assert len(failures) == 4
    assert set(failures) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert min(revisions.values()) >= 20
    assert " error " not in err


def test_a_stop_waits_no_longer_than_it_was_told() -> None:
    with serve("--drain-timeout-s", "0.1") as server, _busy(server) as long:
        server.signal()
        with pytest.raises(grpc.RpcError):
            long.result()
        code, _, err = server.finish()
    assert code == 0
    assert "some work was not finished in time drain_timeout_s=0.1" in err


def test_a_second_signal_ends_it_at_once(server: ServerProcess) -> None:
    with _busy(server) as long:
        server.signal()
        server.wait_for_log("stopping")
        server.signal(signal.SIGINT)
        code, _, err = server.finish()
        assert code == 1
        assert "stopped at once by a second signal" in err
        with pytest.raises(grpc.RpcError):
            long.result()
