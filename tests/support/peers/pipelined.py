"""Many calls at once on one connection that speaks HTTP/2 by hand, as fast as Python can, and how each of them ended."""

from __future__ import annotations

import functools
import socket
from collections import Counter

import hpack

from support.peers.http2 import LARGEST_WINDOW, PREFACE, TIMEOUT_S, Gone
from support.peers.malformed_http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    RST,
    SETTINGS,
    WINDOW,
    frame,
    headers,
)
from support.peers.malformed_messages import Call

ACK = 1
_HEAD, _LARGEST_FRAME, _FIRST_WINDOW = 9, 16_384, 65_535
_TABLE_SIZE, _INITIAL_WINDOW = 1, 4
_DEPTH = 48
"""Calls under way."""
MAX_CALLS = 20_000
"""Of a connection."""
_block = functools.lru_cache(2000)(headers)


class Pipeline:
    """A connection. What ends calls is in `ended`: a status by its number, or how the stream was reset."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ended: Counter[str] = Counter()
        self.calls = 0
        self._open: set[int] = set()
        """Streams without an end."""
        self._block, self._flags = b"", 0
        """The headers that are coming, and the flags of their frames."""
        self._buffer = bytearray()
        self._room = self._stream_room = _FIRST_WINDOW
        self._goodbye = ""
        tables = _TABLE_SIZE.to_bytes(2, "big") + bytes(
            4
        )  # so that a block can be read without those before it
        window = _INITIAL_WINDOW.to_bytes(2, "big") + LARGEST_WINDOW.to_bytes(4, "big")
        more = frame(WINDOW, 0, 0, (LARGEST_WINDOW - _FIRST_WINDOW).to_bytes(4, "big"))
        self._send(PREFACE + frame(SETTINGS, 0, 0, tables + window) + more)

    @property
    def is_full(self) -> bool:
        """It takes no more calls: the server says so, or it has had many."""
        return bool(self._goodbye) or self.calls >= MAX_CALLS

    def put(self, call: Call) -> None:
        """Send a call, whose data must fit into a stream's window. Waits for others to end if there are many.

        Raises:
            Gone: the server has closed the connection.
            TimeoutError: it says nothing although calls wait.
        """
        body = call.body[: self._stream_room]
        while len(self._open) >= _DEPTH or self._room < len(body):
            self._read()
        stream = 2 * self.calls + 1
        self.calls += 1
        self._room -= len(body)
        self._open.add(stream)
        pieces = range(0, len(body), _LARGEST_FRAME)
        parts = [frame(HEADERS, END_HEADERS, stream, _block(call.path, tuple(call.headers)))]
        parts += [frame(DATA, 0, stream, body[at : at + _LARGEST_FRAME]) for at in pieces]
        self._send(b"".join([*parts, frame(DATA, END_STREAM, stream)]))

    def finish(self) -> None:
        """Wait until all calls have ended. Raises as `put`."""
        while self._open:
            self._read()

    def close(self) -> None:
        self._socket.close()

    def _send(self, raw: bytes) -> None:
        try:
            self._socket.sendall(raw)
        except TimeoutError:
            raise
        except OSError as error:
            raise Gone(self._goodbye) from error

    def _read(self) -> None:
        try:
            more = self._socket.recv(1 << 18)
        except TimeoutError:
            raise
        except OSError as error:
            raise Gone(self._goodbye) from error
        if not more:
            raise Gone(self._goodbye)
        buffer = self._buffer
        buffer += more
        at = 0
        while len(buffer) - at >= _HEAD:
            end = at + _HEAD + int.from_bytes(buffer[at : at + 3], "big")
            if end > len(buffer):
                break
            stream = int.from_bytes(buffer[at + 5 : at + 9], "big")
            self._take(buffer[at + 3], buffer[at + 4], stream, bytes(buffer[at + _HEAD : end]))
            at = end
        del buffer[:at]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind in {HEADERS, CONTINUATION}:
            self._block = payload if kind == HEADERS else self._block + payload
            self._flags = flags if kind == HEADERS else self._flags | flags
            if self._flags & END_HEADERS and self._flags & END_STREAM:
                self._end(stream, status_of(self._block))
        elif kind == DATA and flags & END_STREAM:
            self._end(stream, "no status")
        elif kind == RST:
            self._end(stream, f"reset {int.from_bytes(payload, 'big')}")
        elif kind == WINDOW and not stream:
            self._room += int.from_bytes(payload, "big")
        elif kind == GOAWAY:
            self._goodbye = (
                f"code {int.from_bytes(payload[4:8], 'big')} {payload[8:].decode(errors='replace')}"
            )
        elif kind == PING and not flags & ACK:
            self._send(frame(PING, ACK, 0, payload))
        elif kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                if int.from_bytes(payload[at : at + 2], "big") == _INITIAL_WINDOW:
                    self._stream_room = int.from_bytes(payload[at + 2 : at + 6], "big")
            self._send(frame(SETTINGS, ACK, 0))

    def _end(self, stream: int, how: str) -> None:
        if stream in self._open:
            self._open.remove(stream)
            self.ended[how] += 1


@functools.lru_cache(5000)
def status_of(block: bytes) -> str:
    """The status in the headers of a reply that has ended; with its message if that tells of a defect."""
    found = {}
    for name, value in hpack.Decoder().decode(block):
        found[str(name)] = str(value)
    if "grpc-status" not in found:
        return f"http {found.get(':status')}"
    message = found.get("grpc-message", "")
    return f"{found['grpc-status']} {message}" if "internal error" in message else found["grpc-status"]
