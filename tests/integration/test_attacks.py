"""Peers that want to stop a server: bombs, calls that never end, messages that drip. Others are served, and health answers.

Each attack is a real connection that speaks HTTP/2 frame by frame (`support.peers.http2`), to a server in a process of its own;
beside it a client of gRPC steps a session. What is asserted are answers, counters and memory, never how long it took.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import threading
import zlib
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hyperframe.frame import WindowUpdateFrame

from stepwell.v1 import sessions_pb2 as pb
from support import secured
from support.peers import http2
from support.peers.http2 import Gone, Http2, data
from support.servers.attacked_server import TIMEOUT_S, AttackedServer, X, target
from support.servers.both_fronts import needs_native
from support.servers.server_process import FEATURES, tensor

pytestmark = needs_native
SERVICE = "/stepwell.v1.SessionService/"
STEP, GET, STREAM = SERVICE + "Step", SERVICE + "GetSession", SERVICE + "StepStream"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
GZIP = [("grpc-encoding", "gzip")]
HELD_BYTES = 64 << 20
SLACK_BYTES = 100 << 20
ENHANCE_YOUR_CALM = 11
OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAUTHENTICATED = "0", "3", "4", "8", "16"


@pytest.fixture(scope="module")
def open_to_all() -> Iterator[AttackedServer]:
    """A server that asks nobody who calls."""
    with target("native", "--max-held-bytes", str(HELD_BYTES), "--max-message-bytes", str(32 << 20)) as found:
        yield found


@pytest.fixture(scope="module")
def closed() -> Iterator[AttackedServer]:
    """A server that asks for a token."""
    with contextlib.ExitStack() as stack:
        with secured.switched_on():
            found = stack.enter_context(target("native", "--max-held-bytes", str(HELD_BYTES)))
        yield found


def packed(raw: bytes) -> bytes:
    """A compressed message with its prefix."""
    return b"\1" + len(raw).to_bytes(4, "big") + raw


def ends(peer: Http2, path: str, body: bytes, extra: http2.Headers = GZIP) -> dict[str, str]:
    """How a call with this body ends."""
    stream, begun = peer.begin(path, extra)
    peer.send(begun)
    peer.upload(stream, body)
    return peer.outcome(stream)


def status_of(server: AttackedServer) -> int:
    """What a health checker with a connection of its own is answered."""
    with secured.channel(server.address, token=False) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    return int(reply.status)


@contextlib.contextmanager
def attackers(count: int, attack: Callable[[], None]) -> Iterator[Callable[[], int]]:
    """Threads that attack again and again; how often they have."""
    stopped = threading.Event()
    rounds: list[int] = []

    def run() -> None:
        while not stopped.is_set():
            with contextlib.suppress(Gone, OSError):
                attack()
            rounds.append(1)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield lambda: len(rounds)
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


# --- compressed messages ---


def test_what_is_not_one_compressed_stream_is_refused(open_to_all: AttackedServer) -> None:
    raw = pb.GetSessionRequest(session_id=open_to_all.session_id).SerializeToString()
    whole, empty = gzip.compress(raw, mtime=0), gzip.compress(b"", mtime=0)
    deflate = [("grpc-encoding", "deflate")]
    cases = [
        (GZIP, whole, OK, ""),
        (deflate, zlib.compress(raw), OK, ""),
        (GZIP, whole + whole, INVALID_ARGUMENT, "bytes stand behind"),
        (GZIP, empty * 100_000, INVALID_ARGUMENT, "bytes stand behind"),
        (GZIP, whole + b"\0", INVALID_ARGUMENT, "bytes stand behind"),
        (GZIP, whole[:-1], INVALID_ARGUMENT, "cut off"),
        (GZIP, whole[:12], INVALID_ARGUMENT, "cut off"),
        (GZIP, whole[:-8] + b"\0\0\0\0" + whole[-4:], INVALID_ARGUMENT, "checksum"),
        (GZIP, b"no gzip at all", INVALID_ARGUMENT, "one gzip or zlib stream"),
        (deflate, zlib.compress(raw) + b"x", INVALID_ARGUMENT, "bytes stand behind"),
        (deflate, zlib.compress(raw)[:-3], INVALID_ARGUMENT, "cut off"),
        (GZIP, gzip.compress(bytes(5 << 20)), INVALID_ARGUMENT, "inflate to at most"),
    ]
    before = open_to_all.refused("compressed")
    with Http2(open_to_all.address) as peer:
        for extra, body, code, text in cases:
            end = ends(peer, GET, packed(body), extra)
            assert (end["grpc-status"], text in end.get("grpc-message", "")) == (code, True), (body[:30], end)
    assert open_to_all.refused("compressed") == before + sum(code != OK for _, _, code, _ in cases)


def test_bombs_of_many_connections_slow_nobody(open_to_all: AttackedServer) -> None:
    """Each inflates to as much as may be, or to nothing for as long as it takes."""
    bomb = packed(gzip.compress(bytes(31 << 20), compresslevel=1)[: 1 << 20])
    large = gzip.compress(bytes(4 << 20))
    nothing = packed(gzip.compress(b"", mtime=0) * 50_000)
    tables = packed(gzip.compress(b"", mtime=0)[:10] + b"\0\0\0\xff\xff" * 200_000)
    before = open_to_all.memory()

    def attack() -> None:
        with Http2(open_to_all.address) as peer:
            for body in (bomb, packed(large), nothing, tables):
                ends(peer, GET, body)

    with attackers(4, attack) as rounds:
        steps = 0
        while rounds() < 12:
            open_to_all.require_service()
            steps += 1
            assert open_to_all.memory() - before < HELD_BYTES + SLACK_BYTES
        assert status_of(open_to_all) == health_pb2.HealthCheckResponse.SERVING
    assert steps > 2 * rounds(), "others wait for bombs"
    open_to_all.wait_until(lambda: open_to_all.count("held_bytes") == 0)


def test_nothing_is_taken_in_of_callers_that_are_not_known(closed: AttackedServer) -> None:
    """Neither inflated nor kept: the answer comes while the message is still on its way."""
    body = packed(gzip.compress(bytes(4 << 20)))
    held: list[float] = []
    with Http2(closed.address) as peer:
        for extra in ([], [("authorization", "Bearer wrong")], [("stepwell-tenant", "x")]):
            for path in (STEP, GET, "/inference.GRPCInferenceService/ModelInfer", STREAM):
                stream, begun = peer.begin(path, [*GZIP, *extra])
                peer.send(begun, data(stream, body[:100]))  # the rest never comes
                assert peer.outcome(stream)["grpc-status"] == UNAUTHENTICATED, (path, extra)
                held.append(closed.count("held_bytes"))
    assert max(held) < 1 << 20
    assert closed.refused("compressed") == 0


def test_large_messages_of_strangers_are_not_kept(closed: AttackedServer) -> None:
    before = closed.memory()
    message = http2.framed(bytes(60 << 20))

    def attack() -> None:
        with Http2(closed.address) as peer:
            end = ends(peer, STEP, message, [("authorization", "Bearer wrong")])
            assert end["grpc-status"] == UNAUTHENTICATED

    with attackers(2, attack) as rounds:
        while rounds() < 10:
            closed.require_service()
            assert closed.memory() - before < HELD_BYTES


# --- calls that do not end ---


def test_half_calls_of_a_few_connections_leave_places_for_others(open_to_all: AttackedServer) -> None:
    limit = int(open_to_all.count("max_connection_calls"))
    before = open_to_all.memory()
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Http2(open_to_all.address)) for _ in range(7)]
        for path in (STEP, STREAM):
            for peer in peers:
                peer.send(*(peer.begin(path)[1] for _ in range(limit // 2)))
        open_to_all.wait_until(lambda: open_to_all.count("calls") > limit)
        for _ in range(50):
            open_to_all.require_service()
        assert status_of(open_to_all) == health_pb2.HealthCheckResponse.SERVING
        open_to_all.open()
        assert open_to_all.memory() - before < HELD_BYTES + SLACK_BYTES
    open_to_all.wait_until(lambda: open_to_all.count("calls") < 5)


def test_a_message_that_does_not_come_ends_its_call() -> None:
    """Also one that drips. A stream may be silent, but not within a message."""
    limits = {"receive_s": 1.0, "receive_bytes_per_s": 1000}
    waiting: dict[str, tuple[Http2, int]] = {}
    with (
        target("native", limits=limits) as found,
        Http2(found.address) as peer,
        contextlib.ExitStack() as stack,
    ):
        half = http2.framed(bytes(1000))[:100]
        calls = {
            "nothing": (STEP, b""),
            "half": (STEP, half),
            "half of a stream": (STREAM, half),
            "watch": (WATCH, b""),
            "check": (CHECK, b""),
        }
        # each on a connection of its own: they wait at the same time
        for name, (path, body) in calls.items():
            other = stack.enter_context(Http2(found.address))
            stream, begun = other.begin(path)
            other.send(begun, data(stream, body))
            waiting[name] = (other, stream)
        for name, (other, stream) in waiting.items():
            end = other.outcome(stream)
            assert end["grpc-status"] == DEADLINE_EXCEEDED, name
            assert "without a pause" in end["grpc-message"]
        assert found.refused("slow_message") == len(calls)
        silent, begun = peer.begin(STREAM)
        peer.send(begun)
        # a machine that is busy may pause for as long as the limit within a drip: then another one follows
        assert any(sent_until_ended(found, peer, half) > 2 for _ in range(20)), "each was ended for a pause"
        peer.send(data(silent, b"", end=True))
        assert peer.outcome(silent)["grpc-status"] == OK, "a silent stream stays open"


def sent_until_ended(found: AttackedServer, peer: Http2, message: bytes) -> int:
    """Drip a message until the server ends its call; how many bytes were sent."""
    refused = found.refused("slow_message")
    drip, begun = peer.begin(STEP)
    peer.send(begun)
    sent = 0
    with contextlib.suppress(Gone):
        while found.refused("slow_message") == refused:
            peer.send(data(drip, message[sent : sent + 1]))
            sent += 1
    assert peer.outcome(drip)["grpc-status"] == DEADLINE_EXCEEDED
    return sent


def test_watches_are_few_of_a_connection_and_in_all(open_to_all: AttackedServer) -> None:
    before = open_to_all.memory()
    raw = health_pb2.HealthCheckRequest().SerializeToString()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            peer = stack.enter_context(Http2(open_to_all.address))
            streams = [peer.call(WATCH, raw) for _ in range(100)]
            assert peer.outcome(streams[-1])["grpc-status"] == RESOURCE_EXHAUSTED
        assert open_to_all.count("watches") == 20 * 8
        assert open_to_all.refused("watches") >= 20 * 92
        assert status_of(open_to_all) == health_pb2.HealthCheckResponse.SERVING
        open_to_all.require_service()
        assert open_to_all.memory() - before < SLACK_BYTES
    open_to_all.wait_until(lambda: open_to_all.count("watches") == 0)


def test_strangers_take_no_places_of_known_callers() -> None:
    """Where every place of theirs is taken, too."""
    limits = {"calls": 200, "unknown_calls": 40, "receive_s": 100.0}
    with secured.switched_on(), target("native", limits=limits) as found, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Http2(found.address)) for _ in range(20)]
        for peer in peers:
            peer.send(*(peer.begin(CHECK)[1] for _ in range(100)))
        found.wait_until(lambda: found.count("health_calls") > 500)
        for _ in range(20):
            found.require_service()
        assert status_of(found) == health_pb2.HealthCheckResponse.SERVING
        assert found.refused("health_calls") > 0


def test_headers_of_half_calls_count_as_bytes_in_memory(open_to_all: AttackedServer) -> None:
    before = open_to_all.memory()
    large = [("x-large", "v" * 15_000)]
    refused = open_to_all.refused("memory")
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Http2(open_to_all.address)) for _ in range(8)]
        for _ in range(20):
            for peer in peers:
                with contextlib.suppress(Gone):
                    peer.send(*(peer.begin(STREAM, large)[1] for _ in range(50)))
            open_to_all.require_service()
        assert open_to_all.refused("memory") > refused
        assert open_to_all.memory() - before < HELD_BYTES + SLACK_BYTES
        assert status_of(open_to_all) == health_pb2.HealthCheckResponse.SERVING
    open_to_all.wait_until(lambda: open_to_all.count("held_bytes") == 0)


def test_half_messages_of_two_clients_leave_room_for_a_third(open_to_all: AttackedServer) -> None:
    """A connection holds at most what is left for the others, however much that is."""
    half = http2.framed(bytes(24 << 20))[: 20 << 20]
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            peer = stack.enter_context(Http2(open_to_all.address))
            stream, begun = peer.begin(STEP)
            with contextlib.suppress(Gone):
                peer.send(begun)
                peer.upload(stream, half, end=False)
        open_to_all.wait_until(lambda: open_to_all.refused("memory") > 0)
        with Http2(open_to_all.address) as peer:
            end = ends(peer, GET, http2.framed(bytes(6 << 20)), [])
            assert end["grpc-status"] == INVALID_ARGUMENT, "it was taken in, and is no such message"
    with contextlib.suppress(grpc.RpcError):
        open_to_all.stub.Step(pb.StepRequest(session_id="nobody", inputs=[X]), timeout=TIMEOUT_S)


def test_tiny_frames_that_nobody_reads_are_a_flood(open_to_all: AttackedServer) -> None:
    """Each takes hundreds of bytes of memory while it waits, and flow control counts one."""
    ids = [open_to_all.open() for _ in range(100)]
    before = open_to_all.memory()
    x = tensor(np.zeros((100, FEATURES), np.float32))
    step = pb.StepFrame(session_ids=ids, inputs=[x])
    frames = [pb.StepStreamRequest(frame_id=n, step=step).SerializeToString() for n in range(1, 5)]
    closed = 0
    for _ in range(4):
        # no room for replies: the stream is read no further
        with Http2(open_to_all.address, window=100) as peer:
            stream = peer.call(STREAM, *frames, end=False)
            open_to_all.wait_until(lambda: open_to_all.count("unwritten_replies") > 0)
            tiny = data(stream, b"\0") * 1000
            with contextlib.suppress(Gone):
                for _ in range(500):
                    peer.send(tiny)
            closed += peer.goodbye()[0] in {ENHANCE_YOUR_CALM, -1}
        open_to_all.require_service()
        assert open_to_all.memory() - before < SLACK_BYTES
    assert closed == 4
    assert open_to_all.refused("control_frames") > 0


@pytest.mark.parametrize("frame", ["window", "headers", "data"])
def test_mistakes_that_the_server_must_answer_with_resets(open_to_all: AttackedServer, frame: str) -> None:
    """Made you reset: calls that the server itself has to end, as fast as a client can make it."""
    before = open_to_all.memory()
    raw = http2.framed(pb.GetSessionRequest(session_id=open_to_all.session_id).SerializeToString())
    for _ in range(3):
        with Http2(open_to_all.address) as peer, contextlib.suppress(Gone):
            for _ in range(100):
                parts = []
                for _ in range(100):
                    stream, begun = peer.begin(GET)
                    mistake = {
                        "window": WindowUpdateFrame(stream, window_increment=(1 << 31) - 1).serialize() * 2,
                        "headers": begun,
                        "data": data(stream, b"x"),
                    }[frame]
                    parts += [begun, data(stream, raw, end=True), mistake]
                peer.send(*parts)
        open_to_all.require_service()
    open_to_all.wait_until(lambda: open_to_all.count("calls") <= 1)
    assert open_to_all.memory() - before < SLACK_BYTES
    assert status_of(open_to_all) == health_pb2.HealthCheckResponse.SERVING


# --- frames that cost more than their bytes ---


def test_headers_of_a_byte_for_each_field_are_a_flood(open_to_all: AttackedServer) -> None:
    """HPACK's table: one byte stands for a field of 4 KiB, and is decoded whether or not the headers are too large."""
    with Http2(open_to_all.address) as peer:
        own = peer.block(GET, [("x-large", "v" * 3900)])  # the newest entry of the table
        for count in (400, 1900):
            stream = peer.next_stream()
            peer.send(http2.headers(stream, own + b"\xbe" * count, end=True))
            own = peer.block(GET)
            end = peer.outcome(stream)
            assert end.get("grpc-status") == RESOURCE_EXHAUSTED or end[":status"] == "431"
        peer.send(http2.headers(peer.next_stream(), own + b"\xbe" * 10_000, end=True))
        assert peer.goodbye()[0] == ENHANCE_YOUR_CALM
    open_to_all.require_service()
    assert open_to_all.refused("control_frames") > 0


def test_settings_between_calls_are_a_flood(open_to_all: AttackedServer) -> None:
    """Each changes the window of every call of the connection."""
    with Http2(open_to_all.address) as peer:
        peer.send(*(peer.begin(STREAM)[1] for _ in range(500)))
        with contextlib.suppress(Gone):
            for number in range(300):
                peer.send(peer.begin("/no/method", end=True)[1], http2.settings({4: 60_000 + number % 2}))
        assert peer.goodbye()[0] in {ENHANCE_YOUR_CALM, -1}
    open_to_all.wait_until(lambda: open_to_all.count("calls") <= 1)


# --- what HTTP/2 keeps before it is known whose it is; no window counts it ---

KEEPERS = 800
KEPT_BYTES = 4 << 20
FREE_BYTES = 28 << 20
"""What the allocator may keep of memory that was freed: all attacks together, not each."""
"""A quarter of what the server may hold."""
LONG_FIELD = b"\0\x01a\x7f\x81\x7f" + b"v" * 16_384
"""No other field begins in it."""


def _in_frames(block: bytes) -> list[bytes]:
    """Headers without an end."""
    first, *more = [block[start : start + 16_000] for start in range(0, len(block), 16_000)]
    return [http2.raw_frame(1, 0, 1, first), *(http2.raw_frame(9, 0, 1, part) for part in more)]


def _paths() -> list[bytes]:
    """Calls of no method with large headers: of each the table of fields keeps the path, and so all of it."""
    long = b"\0\x01a\x7f\xe1\xd3\x03" + b"v" * 60_000
    block = b"\x83\x86\x01\x01a\x44\x01/" + long
    return [http2.raw_frame(1, 5, 2 * number + 1, block) for number in range(12)]


KEPT = {
    "headers": lambda: [http2.raw_frame(1, 0, 1, (LONG_FIELD * 4)[:60_000], of=65_000)],
    "headers in frames": lambda: _in_frames(LONG_FIELD * 3),
    "fields of one byte": lambda: _in_frames(b"\x95" * 1_800),
    "data": lambda: [http2.raw_frame(0, 0, 1, bytes(60_000), of=65_000)],
    "unknown": lambda: [http2.raw_frame(200, 0, 1, bytes(60_000), of=65_000)],
    "paths in the table": _paths,
}


@contextlib.contextmanager
def _keepers(server: AttackedServer) -> Iterator[list[Http2]]:
    """Connections, of which the server has sent its settings: larger frames may come now."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Http2(server.address)) for _ in range(KEEPERS)]
        for peer in peers:
            peer.frame()
        yield peers
    server.wait_until(lambda: server.count("connections") <= 2)


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[AttackedServer, int]]:
    """A server that may hold little, and what it has of the machine's memory with many idle connections."""
    with target("native", "--max-held-bytes", str(4 * KEPT_BYTES), "--max-message-bytes", "65536") as found:
        with _keepers(found):
            idle = found.memory()
        yield found, idle


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_of_all_connections_is_bounded(small: tuple[AttackedServer, int], kind: str) -> None:
    """Whatever came before: memory that one attack has left takes up the next one."""
    server, idle = small
    evicted = server.refused("evicted")
    with _keepers(server) as peers:
        for peer in peers:
            with contextlib.suppress(Gone):
                for frame in KEPT[kind]():
                    peer.send(frame)
        for _ in range(5):  # each comes behind all that they have sent
            assert status_of(server) == health_pb2.HealthCheckResponse.SERVING
        server.require_service()
        assert server.memory() - idle < KEPT_BYTES + FREE_BYTES
        assert server.refused("evicted") > evicted


@pytest.mark.parametrize("path", [CHECK, WATCH, "/inference.GRPCInferenceService/ServerReady"])
def test_of_strangers_only_small_messages_are_taken_in(closed: AttackedServer, path: str) -> None:
    """Everybody may ask for health: whole or compressed, a large question is refused when its size is known."""
    small = health_pb2.HealthCheckRequest(service="x" * 500).SerializeToString()
    with Http2(closed.address) as peer:
        for extra, body in (
            ([], http2.framed(bytes(60 << 20))[:100]),
            (GZIP, packed(gzip.compress(bytes(1 << 20)))),
            (GZIP, packed(os.urandom(5000))),
        ):
            end = ends(peer, path, body, extra)
            assert (end["grpc-status"], "4096 bytes" in end["grpc-message"]) == (RESOURCE_EXHAUSTED, True)
        if path == CHECK:
            assert ends(peer, path, packed(gzip.compress(small)))["grpc-status"] == "5"  # NOT_FOUND
