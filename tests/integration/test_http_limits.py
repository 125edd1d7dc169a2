"""Peers that stall, flood or break HTTP cost the door of JSON a bounded amount, and nobody else's time.

Each is a raw socket; a client of gRPC keeps calling the same server meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hyperframe.frame import WindowUpdateFrame

from support import secured
from support.peers import http2
from support.peers.http2 import Gone, Http2
from support.peers.json_client import JsonClient
from support.servers.attacked_server import TIMEOUT_S, AttackedServer, target
from support.servers.both_fronts import needs_native

pytestmark = needs_native
ENHANCE_YOUR_CALM = 11
LIMITS = {"handshake_s": 0.5, "receive_s": 0.5, "unread_s": 0.5}
HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def attacked() -> Iterator[AttackedServer]:
    if secured.is_on():
        pytest.skip("the peers here speak without TLS")
    options = ("--http-listen", "127.0.0.1:0", "--max-connections", "12", "--max-message-bytes", "100000")
    with target("native", *options, limits=LIMITS) as found:
        yield found


def http_address(attacked: AttackedServer) -> str:
    found = re.search(r"HTTP on http://(\S+),", attacked.server.ready_line)
    assert found is not None, attacked.server.ready_line
    return found[1]


@contextlib.contextmanager
def peer(attacked: AttackedServer) -> Iterator[socket.socket]:
    host, _, port = http_address(attacked).rpartition(":")
    with socket.create_connection((host, int(port)), TIMEOUT_S) as connected:
        yield connected


def rest_of(connected: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connected.recv(1 << 16):
            found += part
    return found


def answer_of(raw: bytes) -> tuple[int, Any]:
    """Status and document of one answer."""
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize("begun", [b"", b"G", b"PRI", b"GET /v1/models HTTP/1.1\r\nHost: lo"])
def test_a_request_that_does_not_begin_is_not_awaited(attacked: AttackedServer, begun: bytes) -> None:
    before = attacked.refused("handshake")
    with peer(attacked) as connected:
        connected.sendall(begun)
        assert b"HTTP/1.1" not in rest_of(connected)
    # A connection that has begun HTTP/2 ends before the server counts it.
    attacked.wait_until(lambda: attacked.refused("handshake") == before + 1)


@pytest.mark.parametrize("size", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come_is_refused(attacked: AttackedServer, size: str) -> None:
    before = attacked.refused("slow_message")
    with peer(attacked) as connected:
        connected.sendall(f"POST /v1/sessions HTTP/1.1\r\n{HEAD}{size}\r\n\r\n".encode())
        status, document = answer_of(rest_of(connected))
    assert (status, document["details"][0]["reason"]) == (408, "DEADLINE_EXCEEDED")
    assert document["message"].startswith("the body must come without a pause of more than 0.5 s")
    assert attacked.refused("slow_message") == before + 1


def test_large_headers_are_refused(attacked: AttackedServer) -> None:
    client = JsonClient(http_address(attacked))
    before = attacked.refused("headers")
    status, document = client.json("GET", "/v1/models", headers={"x-large": "x" * 20_000})
    assert (status, document["message"]) == (
        431,
        "the headers of a request must have at most 16384 bytes; got more",
    )
    assert attacked.refused("headers") == before + 1
    with peer(attacked) as connected:
        with contextlib.suppress(ConnectionError):
            connected.sendall(GET[:-2] + b"x-larger: " + b"x" * 200_000 + b"\r\n\r\n")
        found = rest_of(connected)
    assert not found or b" 431 " in found.splitlines()[0]


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_large_is_refused(attacked: AttackedServer, is_announced: bool) -> None:
    begin = f"POST /v1/sessions HTTP/1.1\r\n{HEAD}".encode()
    with peer(attacked) as connected, contextlib.suppress(ConnectionError):
        if is_announced:
            connected.sendall(begin + b"Content-Length: 100001\r\n\r\n")
        else:
            chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
            connected.sendall(begin + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 11)
        status, document = answer_of(rest_of(connected))
        assert (status, document["message"]) == (413, "the body must have at most 100000 bytes; got more")


def test_requests_sent_at_once_are_answered_in_order(attacked: AttackedServer) -> None:
    paths = [f"/v1/sessions/nobody-{number}" for number in range(50)]
    with peer(attacked) as connected:
        for path in paths:
            end = "Connection: close\r\n" if path is paths[-1] else ""
            connected.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{end}\r\n".encode())
        found = rest_of(connected).decode()
    answered = re.findall(r'"session_id": "nobody-(\d+)"', found)
    assert answered == [str(number) for number in range(50)]


def test_answers_that_nobody_reads_end_the_connection(attacked: AttackedServer) -> None:
    before = attacked.refused("unread_replies")
    with peer(attacked) as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connected.settimeout(0.1)
        with contextlib.suppress(TimeoutError, ConnectionError):
            for _ in range(100_000):
                connected.sendall(GET.replace(b"v1/models", b"console"))  # the longest answer
        attacked.wait_until(lambda: attacked.refused("unread_replies") > before)


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"GET /v1/models HTTP/9.9\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: nothing\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: \xff\r\n\r\n",
        bytes(range(256)),
    ],
)
def test_bytes_that_are_not_http_end_the_connection(attacked: AttackedServer, raw: bytes) -> None:
    with peer(attacked) as connected:
        connected.sendall(raw)
        found = rest_of(connected)
    assert not found or found.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 403 ")), found


def test_two_lengths_are_no_request(attacked: AttackedServer) -> None:
    """A proxy may believe one of them and the server the other: the rest would be another caller's request."""
    both = f"POST /v1/sessions HTTP/1.1\r\n{HEAD}Content-Length: 4\r\nContent-Length: 5\r\n\r\n{{}}   "
    with peer(attacked) as connected:
        connected.sendall(both.encode())
        assert rest_of(connected).startswith(b"HTTP/1.1 400 ")


def test_a_body_that_is_not_in_chunks_is_refused(attacked: AttackedServer) -> None:
    before = attacked.refused("protocol")
    with peer(attacked) as connected:
        begin = f"POST /v1/sessions HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n"
        connected.sendall(begin.encode() + b"size\r\n{}\r\n")
        status, document = answer_of(rest_of(connected))
    assert (status, document["details"][0]["reason"]) == (400, "INVALID_INPUT")
    assert document["message"].startswith("the body must come in chunks")
    assert attacked.refused("protocol") == before + 1


@pytest.mark.parametrize("is_length_first", [True, False])
def test_a_length_beside_chunks_hides_no_request(attacked: AttackedServer, is_length_first: bool) -> None:
    """A proxy that believes the length takes what follows the chunks for a part of the body."""
    lengths = ["Content-Length: 100", "Transfer-Encoding: chunked"]
    shown = "\r\n".join(lengths if is_length_first else reversed(lengths))
    with peer(attacked) as connected:
        begin = f"POST /v1/sessions HTTP/1.1\r\n{HEAD}{shown}\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"
        connected.sendall(begin.encode() + GET)
        found = rest_of(connected)
    assert found.count(b"HTTP/1.1 ") == 1
    assert answer_of(found)[1]["message"].startswith(
        "a request must have one of" if is_length_first else "model "
    )


@pytest.mark.parametrize("count", [101, 400])
def test_many_headers_are_refused_by_their_bytes(attacked: AttackedServer, count: int) -> None:
    with peer(attacked) as connected:
        more = "".join(f"x-{number}: {'y' * 9}\r\n" for number in range(count))
        connected.sendall(GET[:-2] + more.encode() + b"Connection: close\r\n\r\n")
        status, document = answer_of(rest_of(connected))
    assert status == (200 if count == 101 else 431), document


@pytest.mark.parametrize("host", ["", "Host:\r\n"])
def test_a_request_names_its_host(attacked: AttackedServer, host: str) -> None:
    with peer(attacked) as connected:
        connected.sendall(f"GET /v1/models HTTP/1.1\r\n{host}Connection: close\r\n\r\n".encode())
        status, document = answer_of(rest_of(connected))
    assert (status, document["message"]) == (400, "the Host of a request must be given once; got none")


def test_new_connections_find_room_while_others_do_nothing(attacked: AttackedServer) -> None:
    before = attacked.refused("evicted")
    with contextlib.ExitStack() as stack:
        for _ in range(24):
            connected = stack.enter_context(peer(attacked))
            connected.sendall(GET)
            assert connected.recv(12) == b"HTTP/1.1 200"
        attacked.require_service()
    assert attacked.refused("evicted") > before


def test_an_answer_of_http2_that_is_not_read_ends_its_stream_alone(attacked: AttackedServer) -> None:
    before = attacked.refused("unread_replies")
    with Http2(http_address(attacked), window=0) as peer:
        unread = peer.call("/v1/sessions")
        outcome = peer.outcome(unread)
        assert (outcome[":status"], outcome["rst"]) == ("415", str(ENHANCE_YOUR_CALM))
        peer.send(WindowUpdateFrame(0, window_increment=65_535).serialize())
        other, begun = peer.begin("/v1/sessions", end=True)
        peer.send(begun, WindowUpdateFrame(other, window_increment=65_535).serialize())
        assert peer.outcome(other)[":status"] == "415"
    assert attacked.refused("unread_replies") == before + 1


def test_a_body_of_http2_that_does_not_come_is_refused(attacked: AttackedServer) -> None:
    before = attacked.refused("slow_message")
    with Http2(http_address(attacked)) as peer:
        outcome = peer.outcome(peer.call("/v1/sessions", b"{", end=False))
    assert (outcome[":status"], attacked.refused("slow_message")) == ("408", before + 1)


@pytest.mark.parametrize("path", ["/stepwell.v1.SessionService/GetSession", "/v1/models"])
def test_calls_that_are_cancelled_at_once_are_a_flood(attacked: AttackedServer, path: str) -> None:
    """Rapid reset, few at a time: all are served before the next come."""
    before = attacked.refused("protocol")
    address = http_address(attacked) if path.startswith("/v1/") else attacked.address
    with Http2(address) as peer:
        with contextlib.suppress(Gone):
            for _ in range(100):
                begun = [peer.begin(path) for _ in range(100)]
                peer.send(*(part for stream, frame in begun for part in (frame, http2.reset(stream))))
        assert peer.goodbye()[0] in {ENHANCE_YOUR_CALM, -1}
    assert attacked.refused("protocol") == before + 1


def test_a_client_that_leaves_ends_its_call(attacked: AttackedServer) -> None:
    with peer(attacked) as connected:
        connected.sendall(f"POST /v1/sessions HTTP/1.1\r\n{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        attacked.wait_until(lambda: attacked.count("calls") == 1)
    attacked.wait_until(lambda: attacked.count("calls") == 0)
