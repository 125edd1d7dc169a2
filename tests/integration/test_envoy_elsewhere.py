"""What a replica that starts or stops refuses, Envoy sends to another one: its callers see nothing of a rolling restart.

Health checks do not keep such a replica out. Of one that has stopped, and starts, between two of them Envoy knows nothing,
and when all replicas miss theirs it tries every one. So it is here, always.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from stepwell.v1 import models_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.rpc import status
from support import secured
from support.peers import wire
from support.peers.wire import Wire, tensor
from support.processes import until
from support.secured import Server
from support.servers.both_fronts import needs_native
from support.servers.envoy import Envoy, config
from support.servers.held_start import MODEL as LOADING
from support.servers.held_start import held_start
from support.servers.held_step import held_store
from support.servers.served import local_server
from support.servers.server_process import connect, forecast, serve

pytestmark = pytest.mark.skipif(secured.is_on(), reason="with TLS Envoy is tried in test_envoy")
X = np.array([[0.5, -1.0, 2.0]], np.float32)
#: Sessions, whose first replica either may be, as it depends on the ports: of so many not all have the same.
IDS = [f"session-{number}" for number in range(40)]
FRONTS = [pytest.param("native", marks=needs_native), "python"]


@contextlib.contextmanager
def starting(folder: Path, front: str) -> Iterator[str]:
    """The address of a server that is being started."""
    with held_start(folder, "--front", front) as (_, address, _):
        yield address


@contextlib.contextmanager
def stopping(folder: Path, front: str) -> Iterator[str]:
    """The address of a server that was told to stop and has a step to finish, whose commit does not come back."""
    with held_store() as store, serve("--front", front, *store.options, "--drain-timeout-s", "10m") as server:
        channel, stub = connect(server)
        with channel:
            stub.OpenSession(pb.OpenSessionRequest(model="forecast", session_id="a"), timeout=wire.TIMEOUT_S)
            step = pb.StepRequest(session_id="a", inputs=[tensor(X)])
            last = store.begin_step(stub, "a")
            server.signal()
            server.wait_for_log("stopping")
            with Wire(server.address) as one:
                # one that comes just before it refuses them waits behind the first, until its time is over
                until(
                    lambda: "stopping" in wire.refusal(lambda: one.sessions.Step(step, timeout=1.0)).message
                )
            yield server.address
            assert not last.done()
            store.release()
            assert last.result().revision == 1
        assert server.finish()[0] == 0


REFUSING: dict[str, Callable[[Path, str], contextlib.AbstractContextManager[str]]] = {
    "starting": starting,
    "stopping": stopping,
}
REASONS = {"starting": "STARTING", "stopping": "UNAVAILABLE"}


@pytest.fixture(scope="module")
def well() -> Iterator[Server]:
    with local_server("seq") as server:
        yield server


def frame_of(session_id: str, steps: int = 1) -> pb.StepStreamRequest:
    inputs = [tensor(np.repeat(X[:, None], steps, 1))]
    return pb.StepStreamRequest(frame_id=1, step=pb.StepFrame(session_ids=[session_id], inputs=inputs))


#: Calls of `change_in_every_way`.
WAYS = 6


def change_in_every_way(envoy: Envoy, one: Wire, session_id: str) -> None:
    """Open a session and make four changes of it, in JSON, gRPC, gRPC-Web and on a stream."""
    path, header = f"/v1/sessions/{session_id}", ("stepwell-session", session_id)
    common: dict[str, Any] = {"timeout": wire.TIMEOUT_S, "metadata": (header,)}
    code, answer = envoy.json("POST", path, {"model": "seq"})
    assert code == 200, answer
    code, answer = envoy.json("POST", f"{path}:step", {"inputs": [{"values": X[0].tolist()}]})
    assert (code, answer["revision"]) == (200, "1"), answer
    stepped = one.sessions.Step(pb.StepRequest(session_id=session_id, inputs=[tensor(X)]), **common)
    assert stepped.revision == 2
    message = pb.ResetStatesRequest(session_id=session_id).SerializeToString()
    web = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1", header[0]: header[1]}
    framed = struct.pack(">BI", 0, len(message)) + message
    code, body, _ = envoy.http("POST", f"/{wire.SERVICE}/ResetStates", framed, web)
    assert (code, b"grpc-status:0" in body) == (200, True), body
    (part,) = one.sessions.StepStream(iter([frame_of(session_id)]), **common)
    assert (list(part.revisions), list(part.errors)) == ([4], []), part
    assert one.models.Predict(models_pb2.PredictRequest(model="seq", inputs=[tensor(X)]), **common).outputs


def be_refused_in_every_way(envoy: Envoy, one: Wire, reason: str) -> None:
    """Where no replica takes a call, its caller has the last one's answer."""
    refusal = one.refused("Step", pb.StepRequest(session_id="a", inputs=[tensor(X)]))
    assert (refusal.code, refusal.reason) == ("UNAVAILABLE", reason)
    assert envoy.count("upstream_rq_retry") == 5
    code, answer = envoy.json("POST", "/v1/sessions/a:step", {"inputs": [{"values": X[0].tolist()}]})
    assert (code, answer["code"], answer["details"][0]["reason"]) == (503, 14, reason)
    refusal = wire.refusal(lambda: one.exchange(frame_of("a")))
    assert (refusal.code, refusal.reason) == ("UNAVAILABLE", reason)
    # More than Envoy keeps: it goes nowhere else.
    for _ in range(3):
        assert wire.refusal(lambda: one.exchange(*[frame_of("a", 90_000)] * 3)).code == "UNAVAILABLE"


@pytest.mark.slow
@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("how", REFUSING)
def test_no_caller_sees_a_replica_that_starts_or_stops(
    how: str, front: str, well: Server, tmp_path: Path
) -> None:
    with REFUSING[how](tmp_path, front) as address, Wire(well.address) as direct:
        with (
            Envoy(tmp_path / "both", [address, well.address], checks="port") as envoy,
            Wire(envoy.address) as one,
        ):
            assert envoy.healthy() == {address, well.address}
            for session_id in [f"{how}-{front}-{name}" for name in IDS]:
                change_in_every_way(envoy, one, session_id)
                assert direct.session(session_id).revision == 4  # once each
                if envoy.count("upstream_rq_retry"):  # its first replica is the one that refuses
                    break
            assert envoy.count("upstream_rq_retry") == WAYS
        with Envoy(tmp_path / "alone", [address], checks="port") as envoy, Wire(envoy.address) as one:
            be_refused_in_every_way(envoy, one, REASONS[how])


@pytest.mark.parametrize("front", FRONTS)
def test_a_stream_that_was_answered_goes_nowhere_else(front: str) -> None:
    key, _ = status.GO_ELSEWHERE
    with serve("--front", front) as server:
        channel, stub = connect(server)
        with channel:
            stub.OpenSession(pb.OpenSessionRequest(model="forecast", session_id="a"), timeout=wire.TIMEOUT_S)
            with Wire(server.address) as one, wire.Conversation(one) as talk:
                frame = pb.StepFrame(session_ids=["a"], inputs=[tensor(X)])
                talk.send(pb.StepStreamRequest(frame_id=1, step=frame))
                assert list(talk.receive().revisions) == [1]
                server.signal()
                with pytest.raises(grpc.RpcError, match="the server is stopping") as caught:
                    talk.receive()
        trailers: Any = caught.value.trailing_metadata()
        assert key not in dict(trailers)
        assert server.finish()[0] == 0


def test_when_all_replicas_miss_their_checks_all_are_tried(well: Server, tmp_path: Path) -> None:
    """One that is too busy to say that it is well still serves; one that starts is one of them."""
    with (
        starting(tmp_path, "python") as address,
        Envoy(tmp_path / "envoy", [address, well.address], checks="nothing") as envoy,
        Wire(envoy.address) as one,
    ):
        assert envoy.healthy() == set()
        for session_id in IDS:
            header = (("stepwell-session", session_id),)
            step = pb.StepRequest(session_id=session_id, inputs=[tensor(X)])
            refusal = wire.refusal(
                lambda step=step, header=header: one.sessions.Step(  # type: ignore[misc]
                    step, timeout=wire.TIMEOUT_S, metadata=header
                )
            )
            assert refusal.reason == "SESSION_NOT_FOUND"
        assert envoy.count("lb_healthy_panic") > 0


def test_all_know_the_same_header() -> None:
    name, value = status.GO_ELSEWHERE
    assert config("--replica", "a:1").count(f"{{name: {name}, string_match: {{exact: {value}}}}}") == 1


@pytest.mark.slow
@pytest.mark.parametrize("front", FRONTS)
def test_no_caller_sees_a_model_that_only_another_replica_has(front: str, tmp_path: Path) -> None:
    kept = forecast()
    with (
        held_start(tmp_path, "--front", front, "--no-wait-for-models") as (server, address, _),
        Server({LOADING: kept.path}, cache_dir=kept.cache_dir) as other,
        Envoy(tmp_path / "envoy", [address, other.address], checks="port") as envoy,
        Wire(envoy.address) as one,
    ):
        server.wait_for_log(" serving front=")
        for session_id in IDS:
            code, answer = envoy.json("POST", f"/v1/sessions/{session_id}", {"model": LOADING})
            assert code == 200, answer
            assert one.predict(LOADING, [tensor(X)]).outputs
        assert envoy.count("upstream_rq_retry") > 0
