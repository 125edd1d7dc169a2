"""Peers that flood, stall or say nothing cost a bounded amount of memory, and nobody else's time.

Each is a real connection that speaks HTTP/2 frame by frame (`support.peers.http2`), to a server in a process of its own;
beside it a client of gRPC steps a session, and must go on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import socket
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hyperframe.frame import GoAwayFrame, PingFrame

from stepwell.v1 import sessions_pb2 as pb
from support.peers import http2
from support.peers.http2 import Gone, Http2, data, framed
from support.peers.malformed_http2 import HELLO, conversation
from support.peers.malformed_messages import Call
from support.peers.wire import Wire, refusal
from support.servers.attacked_server import TIMEOUT_S, AttackedServer, X, target
from support.servers.both_fronts import needs_native
from support.servers.server_process import FEATURES, begin_long_step, connect, tensor

FRONTS = [pytest.param("native", marks=needs_native), "python"]
SERVICE = "/stepwell.v1.SessionService/"
STREAM, GET = SERVICE + "StepStream", SERVICE + "GetSession"
ENHANCE_YOUR_CALM, REFUSED_STREAM = 11, 7


@pytest.fixture(scope="module", params=FRONTS)
def both(request: pytest.FixtureRequest) -> Iterator[AttackedServer]:
    """A server of each front."""
    with target(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def native() -> Iterator[AttackedServer]:
    """A server of the native front whose limits are small."""
    small = (
        "--max-connections",
        "8",
        "--max-calls-per-connection",
        "40",
        "--max-message-bytes",
        str(2 << 20),
    )
    with target("native", *small) as found:
        yield found


def step_frame(number: int, *session_ids: str) -> bytes:
    x = tensor(np.zeros((len(session_ids), FEATURES), np.float32))
    step = pb.StepFrame(session_ids=session_ids, inputs=[x])
    raw: bytes = pb.StepStreamRequest(frame_id=number, step=step).SerializeToString()
    return raw


# --- floods ---


@needs_native
def test_calls_begun_and_cancelled_at_once(native: AttackedServer) -> None:
    """Rapid reset. On grpc.aio it may end calls of others."""
    with Http2(native.address) as peer, contextlib.suppress(Gone):
        for _ in range(100):
            begun = [peer.begin(STREAM) for _ in range(100)]
            peer.send(*(part for stream, frame in begun for part in (frame, http2.reset(stream))))
    raw = framed(pb.GetSessionRequest(session_id=native.session_id).SerializeToString())
    with Http2(native.address) as peer, contextlib.suppress(Gone):
        for _ in range(100):
            begun = [peer.begin(GET) for _ in range(30)]
            peer.send(*(frame + data(stream, raw, end=True) for stream, frame in begun))
            peer.send(*(http2.reset(stream) for stream, _ in begun))
    native.require_service()
    native.wait_until(lambda: native.count("calls") <= 1)
    native.wait_until(lambda: native.count("unwritten_replies") == 0)  # else a stop waits for them


@pytest.mark.parametrize("frame", ["ping", "settings", "empty data"])
def test_frames_without_a_call(both: AttackedServer, frame: str) -> None:
    with Http2(both.address) as peer:
        flood = {"ping": http2.ping(), "settings": http2.settings()}.get(frame)
        if flood is None:
            stream, begun = peer.begin(STREAM)
            peer.send(begun)
            flood = data(stream, b"")
        with contextlib.suppress(Gone):
            for _ in range(50):
                peer.send(flood * 100)
        if both.is_native:
            assert peer.goodbye()[0] == ENHANCE_YOUR_CALM
            assert both.refused("control_frames") > 0
    both.require_service()


@needs_native
def test_headers_that_do_not_end(native: AttackedServer) -> None:
    """CONTINUATION flood: they are not collected. grpc.aio collects them, and answers nobody meanwhile."""
    with Http2(native.address) as peer:
        head = peer.begin(STREAM)[1]
        # without END_HEADERS, and with a literal header that goes on and on
        unfinished = head[:4] + b"\x00" + head[5:]
        more = b"\x00\x40\x00\x09\x00" + head[5:9] + b"\x00\x01a\x7f\xff\xff\x7f" + b"a" * (0x4000 - 7)
        with contextlib.suppress(Gone):
            peer.send(unfinished)
            for _ in range(1000):
                peer.send(more)
            pytest.fail("16 MiB of headers were taken")
    native.require_service()


@needs_native
def test_more_calls_than_a_connection_may_have(native: AttackedServer) -> None:
    """A client that does not keep to the number is refused the rest; one that does waits."""
    with Http2(native.address) as peer:
        streams = [peer.call(STREAM, end=False) for _ in range(60)]
        assert peer.outcome(streams[-1])["rst"] == str(REFUSED_STREAM)
        native.wait_until(lambda: native.count("calls") >= 40)
        assert native.count("calls") <= 41
    channel, stub = connect(native.server)
    with channel:
        request = pb.GetSessionRequest(session_id=native.session_id)
        calls = [stub.GetSession.future(request, timeout=TIMEOUT_S) for _ in range(200)]
        assert all(call.result().session.session_id == native.session_id for call in calls)


# --- headers ---


def test_a_call_with_large_headers_is_refused_with_a_reason(both: AttackedServer) -> None:
    with Http2(both.address) as peer:
        for size in (8 << 10, 20 << 10, 40 << 10):
            extra = [("x-large", "v" * size)]
            end = peer.outcome(peer.call(GET, b"", extra=extra))
            code = "3" if size < 16 << 10 else "8"  # without a session id; RESOURCE_EXHAUSTED
            assert (
                end["grpc-status"],
                "headers" in end["grpc-message"] or "metadata" in end["grpc-message"],
            ) == (
                code,
                code == "8",
            )
        if both.is_native:
            assert both.refused("headers") == 2


@pytest.mark.parametrize("text", ["5", "S", "-1S", "1x", "soon"])
def test_a_time_limit_that_is_none_is_no_call_without_one(both: AttackedServer, text: str) -> None:
    with Http2(both.address) as peer:
        raw = pb.GetSessionRequest(session_id=both.session_id).SerializeToString()
        end = peer.outcome(peer.call(GET, raw, extra=[("grpc-timeout", text)]))
        assert (end["grpc-status"], end["grpc-message"]) == ("13", "Error parsing 'grpc-timeout' metadata")


def test_bytes_that_are_no_frame_end_a_stream_at_once(both: AttackedServer) -> None:
    """What is under way of it is dropped, as if the client had gone."""
    session_id = both.open()
    long = begin_long_step(both.stub, session_id, 1_000_000)
    call: Any = both.channel.stream_stream(STREAM)
    with pytest.raises(grpc.RpcError) as ended:
        list(call(iter([step_frame(1, session_id), b"\x0a"]), timeout=TIMEOUT_S))
    assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not long.done(), "it waited for the answer to the frame before"
    long.cancel()
    state = both.stub.GetState(pb.GetStateRequest(session_id=session_id), timeout=TIMEOUT_S)
    assert state.session.revision == 0


def test_what_a_peer_says_at_its_end_is_not_in_the_log(both: AttackedServer) -> None:
    with Http2(both.address) as peer:
        text = b'forged\n{"level": "error", "event": "forged"}'
        said = GoAwayFrame(0, error_code=ENHANCE_YOUR_CALM, additional_data=text).serialize()
        peer.send(said, http2.ping())
        # it has been read when the ping is answered, or the connection closed
        any(isinstance(frame, PingFrame) and "ACK" in frame.flags for frame in peer.frames())
    both.stub.OpenSession(
        pb.OpenSessionRequest(model="forecast", session_id=f"after {both.front}"), timeout=TIMEOUT_S
    )
    both.server.wait_for_log(f"after {both.front}")
    assert not any("forged" in line for line in both.server.log)


# --- peers that say nothing, or slowly ---


@pytest.fixture
def patient(request: pytest.FixtureRequest) -> Iterator[AttackedServer]:
    """One that closes no silent connection while a busy machine opens the others."""
    with target(request.param, limits={"handshake_s": 250.0, "keepalive_s": 250.0}) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("patient", FRONTS, indirect=True)
def test_many_silent_connections(patient: AttackedServer) -> None:
    """Ten thousand of them, in each state of silence, are there at the same time, and calls go on."""
    count = 10_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 500:
        pytest.skip(f"only {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 500), hard))
    before = patient.memory()
    host, _, port = patient.address.rpartition(":")
    hello = http2.PREFACE + http2.settings()
    states = (b"", http2.PREFACE[:10], hello, hello + http2.settings({3: 100})[:12])
    with contextlib.ExitStack() as stack:
        for number in range(count):
            one = stack.enter_context(socket.create_connection((host, int(port))))
            one.send(states[number % 4])
        patient.require_service()
        if patient.is_native:
            patient.wait_until(lambda: patient.count("connections") > count)
            assert patient.memory() - before < count * 40_000, "more than the buffers of a connection"
    if patient.is_native:
        patient.wait_until(lambda: patient.count("connections") < 10)


@needs_native
def test_a_frame_over_the_limit_is_refused_as_such_and_not_for_lack_of_room() -> None:
    """A connection has room for a few of the largest messages: one that is larger than all of them gets the same error."""
    limit = 20_000
    with target("native", "--max-message-bytes", str(limit)) as found, Wire(found.address) as client:
        for times in (1, 2, 3, 20):
            x = tensor(np.zeros((1, times * limit // 12 + 1, FEATURES), np.float32))
            step = pb.StepFrame(session_ids=[found.session_id], inputs=[x])
            frame = pb.StepStreamRequest(frame_id=1, step=step)
            refused = refusal(functools.partial(client.exchange, frame))
            refused.expect("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", "larger than max", str(limit))


@needs_native
def test_replies_that_nobody_reads(native: AttackedServer) -> None:
    """Their streams are read no further, and hold little; nobody else waits; nothing of them is left at their end."""
    ids = [native.open() for _ in range(100)]
    refused = native.refused("memory")
    # else the client takes as many as it thinks that the connection bears, with a fast server all of them
    with Wire(native.address, options=[("grpc.http2.bdp_probe", 0)]) as other:
        call: Any = other.channel.stream_stream(STREAM)
        # replies are taken when they are asked for
        streams = [call(step_frame(number, *ids) for number in range(1, 2000)) for _ in range(4)]
        native.wait_until(lambda: native.count("unwritten_replies") >= 4)
        for _ in range(100):
            native.require_service()
        assert native.count("held_bytes") < 1 << 20
        assert native.refused("memory") == refused
        for stream in streams:
            assert stream.is_active()
            stream.cancel()
    native.wait_until(lambda: native.count("held_bytes") + native.count("unwritten_replies") == 0)


@needs_native
def test_new_connections_find_room_while_others_do_nothing(native: AttackedServer) -> None:
    """A health checker's too. One with a call stays; where all have some, new ones are closed."""
    raw = pb.GetSessionRequest(session_id=native.session_id).SerializeToString()
    with contextlib.ExitStack() as stack:
        for _ in range(20):  # more than may be
            peer = stack.enter_context(Http2(native.address))
            assert peer.outcome(peer.call(GET, raw))["grpc-status"] == "0"
        assert native.refused("evicted") >= 12
        assert native.refused("connections") == 0
        line = json.loads(native.server.wait_for_log("idle connections are closed"))
        assert (line["level"], line["connections"] >= 8) == ("warning", True)
        native.require_service()
    with contextlib.ExitStack() as stack:
        busy = []
        for _ in range(8):
            peer = stack.enter_context(Http2(native.address))
            stream, begun = peer.begin(STREAM)
            # it has been read when the ping is answered
            peer.send(begun, http2.ping())
            while not isinstance(peer.frame(), PingFrame):
                pass
            busy.append((peer, stream))
        late = [stack.enter_context(Http2(native.address)) for _ in range(4)]
        for peer in late:
            peer.goodbye()
        assert native.refused("connections") > 0
        native.server.wait_for_log("connections are refused")
        for peer, stream in busy[:2]:
            peer.send(data(stream, b"", end=True))
            assert peer.outcome(stream)["grpc-status"] == "0"
    native.wait_until(lambda: native.count("connections") == 1)


@needs_native
def test_connections_of_an_address_may_be_bounded() -> None:
    with (
        target("native", "--max-connections-per-address", "3") as found,
        contextlib.ExitStack() as stack,
    ):
        peers = [stack.enter_context(Http2(found.address)) for _ in range(5)]
        for peer in peers[2:]:
            peer.goodbye()
        assert found.refused("address_connections") == 3
        found.require_service()
        raw = pb.GetSessionRequest(session_id=found.session_id).SerializeToString()
        assert peers[0].outcome(peers[0].call(GET, raw))["grpc-status"] == "0"


@needs_native
def test_no_file_descriptors_are_left() -> None:
    """One line in the log, callers that are there go on, and when there are some again so do new ones."""
    with target("native") as found, contextlib.ExitStack() as stack:
        line = json.loads(found.server.wait_for_log('"serving"'))
        assert line["open_files"] == int(found.count("max_connections")) + 256 or line["open_files"] > 16_384
        pid = found.server.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 4, limits[1]))
        peers = [stack.enter_context(Http2(found.address)) for _ in range(20)]
        found.server.wait_for_log("connections wait: the limit of open files")
        for _ in range(20):
            found.require_service()
        for peer in peers[:10]:
            peer.socket.close()
        raw = pb.GetSessionRequest(session_id=found.session_id).SerializeToString()
        last = peers[-1]  # it was in the kernel's queue all the time
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert last.outcome(last.call(GET, raw))["grpc-status"] == "0"
        assert found.refused("open_files") > 0


# --- the metrics' own server ---


@pytest.mark.slow
def test_the_metrics_endpoint_serves_metrics_alone_and_closes_who_says_nothing(both: AttackedServer) -> None:
    host, _, port = both.metrics_address.rpartition(":")
    for path, status in (("/metrics", 200), ("/", 404), ("/metrics/x", 404), ("/favicon.ico", 404)):
        assert _status(f"http://{both.metrics_address}{path}") == status
    assert _status(f"http://{both.metrics_address}/metrics", data=b"x") == 405
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((host, int(port)), TIMEOUT_S)) for _ in range(80)
        ]
        silent[0].sendall(b"GET /metrics HTTP/1.1\r\nHost: ")
        assert silent[0].recv(1) == b"", "closed after a few seconds of silence"
        assert _status(f"http://{both.metrics_address}/metrics") == 200


def _status(url: str, data: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(url, data, TIMEOUT_S) as response:  # noqa: S310 - of this test's own server
            status: int = response.status
            return status
    except urllib.error.HTTPError as error:
        return error.code


def test_bytes_that_are_no_text_stop_no_server_and_are_not_in_the_log(both: AttackedServer) -> None:
    """GRPC's own server stops for good at such a path, and logs such headers with all that stands in them."""
    told = conversation(Call(GET, framed(b""), [("authorization", "Bearer s3cr3t\xff")], 1))
    host, port = both.address.rsplit(":", 1)
    for path in ("/\xff\xfe", "/\xff/\xfe"):
        with socket.create_connection((host, int(port)), TIMEOUT_S) as peer:
            peer.sendall(HELLO + told + conversation(Call(path, b"", [], 0), 3))
            peer.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while peer.recv(1 << 16):
                    pass
        _wait_until_served(both)
    assert "s3cr3t" not in "".join(both.server.log)


def _wait_until_served(both: AttackedServer) -> None:
    """A call that comes while the server starts again may be refused; each is told at once."""
    request = pb.StepRequest(session_id=both.session_id, inputs=[X])
    end = time.monotonic() + TIMEOUT_S
    while True:
        try:
            both.stub.Step(request, timeout=TIMEOUT_S, wait_for_ready=True)
        except grpc.RpcError:
            if time.monotonic() > end:
                raise
        else:
            return


@pytest.mark.parametrize("key", ["authorization", "stepwell-tenant"])
@pytest.mark.parametrize("path", [SERVICE + "Step", GET, STREAM, "/grpc.health.v1.Health/Check"])
def test_what_says_who_calls_comes_once(both: AttackedServer, key: str, path: str) -> None:
    """Of two the last one counted, so that a proxy which judges the first was passed by."""
    step = pb.StepRequest(session_id=both.session_id, inputs=[X]).SerializeToString()
    with Http2(both.address) as peer:
        for values in (("Bearer a", "Bearer b"), ("Bearer a", "Bearer a"), ("", "Bearer a")):
            raw = step if path.endswith("Step") else b""
            end = peer.outcome(peer.call(path, raw, extra=[(key, value) for value in values]))
            said = f"{key} must be sent at most once; got 2"
            assert (end["grpc-status"], end["grpc-message"]) == ("3", said)
        if path != "/grpc.health.v1.Health/Check" and key == "authorization":
            end = peer.outcome(
                peer.call(path, step if path.endswith("Step") else b"", extra=[(key, "Bearer a")])
            )
            assert "at most once" not in end.get("grpc-message", "")
