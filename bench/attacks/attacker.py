"""One attacker: a few connections that make the same hostile call again and again, in a process of its own.

    attacker.py HOST:PORT ATTACK RUN_S        (ATTACK: JSON, the fields of `Attack`; TOKEN in the environment)

It keeps HTTP/2's flow control, or the server would only have to close its connections. It ignores the limit of
concurrent streams where the attack says so. Prints `ready`, then one JSON document. Loopback only, bounded in time.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import selectors
import socket
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.attacks import peer

_BUFFERED_BYTES = 1 << 20
_RECONNECT_S = 0.05
"""A connection that the server closes is made again after this."""


@dataclasses.dataclass(frozen=True)
class Attack:
    """What one attacker does."""

    path: str
    """Of the method."""
    connections: int
    calls: int
    """In flight on each connection."""
    message: str = ""
    """Base64 of the zlib-compressed message of each call."""
    is_compressed: bool = False
    """The message is gzip; `grpc-encoding` says so."""
    ends: bool = True
    """False: the message never ends."""
    more_headers: Sequence[tuple[str, str]] = ()
    """Of each call, after the others."""

    @staticmethod
    def packed(message: bytes) -> str:
        """A message as `message` holds it."""
        return base64.b64encode(zlib.compress(message, 1)).decode()

    @property
    def body(self) -> bytes:
        """The data of a call; half calls have none."""
        if not self.ends:
            return b""
        message = zlib.decompress(base64.b64decode(self.message))
        return bytes((self.is_compressed,)) + len(message).to_bytes(4, "big") + message

    def headers(self, authority: str, token: str) -> bytes:
        """The header block of each call."""
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", self.path),
            (":authority", authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        if self.is_compressed:
            fields.append(("grpc-encoding", "gzip"))
        if token:
            fields.append(("authorization", f"Bearer {token}"))
        return peer.header_block([*fields, *self.more_headers])


class Connection:
    """One connection of the attacker."""

    def __init__(self, address: tuple[str, int], attack: Attack, block: bytes, body: bytes) -> None:
        self.socket = socket.create_connection(address, timeout=10)
        self.socket.setblocking(False)
        self._attack, self._block, self._body = attack, block, body
        self._frames = peer.Frames()
        self._out = bytearray(
            peer.PREFACE
            + peer.settings(peer.LARGEST_WINDOW)
            + peer.window_update(0, peer.LARGEST_WINDOW - peer.DEFAULT_WINDOW)
        )
        self._next_stream = 1
        self._window = self._initial_window = peer.DEFAULT_WINDOW
        self._streams: dict[int, list[int]] = {}
        """By stream: bytes of its body that were sent, and its window."""
        self.begun = self.ended = self.sent_bytes = 0

    def pump(self) -> bool:
        """Send what may be sent; whether there is more to send."""
        self._fill()
        if self._out:
            try:
                done = self.socket.send(self._out)
            except BlockingIOError:
                done = 0
            self.sent_bytes += done
            del self._out[:done]
        return bool(self._out)

    def read(self) -> None:
        """Take in what the server sent.

        Raises:
            ConnectionError: it has closed the connection, or is about to.
        """
        try:
            received = self.socket.recv(1 << 18)
        except BlockingIOError:
            return
        if not received:
            raise ConnectionError
        for kind, flags, stream, payload in self._frames.push(received):
            if kind == peer.WINDOW_UPDATE:
                self._widen(stream, int.from_bytes(payload, "big"))
            elif kind == peer.SETTINGS and not flags & peer.ACK:
                window = peer.setting(payload, peer.INITIAL_WINDOW_SIZE)
                if window is not None:
                    for state in self._streams.values():
                        state[1] += window - self._initial_window
                    self._initial_window = window
                self._out += peer.frame(peer.SETTINGS, peer.ACK, 0)
            elif kind == peer.PING and not flags & peer.ACK:
                self._out += peer.frame(peer.PING, peer.ACK, 0, payload)
            elif kind == peer.RST_STREAM or (kind == peer.HEADERS and flags & peer.END_STREAM):
                self.ended += self._streams.pop(stream, None) is not None
            elif kind == peer.GOAWAY:
                raise ConnectionError

    def _widen(self, stream: int, size: int) -> None:
        if stream == 0:
            self._window += size
        elif stream in self._streams:
            self._streams[stream][1] += size

    def _fill(self) -> None:
        while len(self._streams) < self._attack.calls and len(self._out) < _BUFFERED_BYTES:
            stream, self._next_stream = self._next_stream, self._next_stream + 2
            self._out += peer.frame(peer.HEADERS, peer.END_HEADERS, stream, self._block)
            self._streams[stream] = [0, self._initial_window]
            self.begun += 1
        if not self._attack.ends:
            return
        for stream, state in self._streams.items():
            while state[0] < len(self._body) and len(self._out) < _BUFFERED_BYTES:
                size = min(peer.FRAME_BYTES, len(self._body) - state[0], state[1], self._window)
                if size <= 0:
                    break
                start = state[0]
                state[0] += size
                state[1] -= size
                self._window -= size
                flags = peer.END_STREAM if state[0] == len(self._body) else 0
                self._out += peer.frame(peer.DATA, flags, stream, self._body[start : state[0]])


def run(address: str, attack: Attack, token: str, run_s: float) -> dict[str, Any]:
    """Attack for so many seconds; what was done."""
    host, _, port = address.rpartition(":")
    block, body = attack.headers(address, token), attack.body
    selector = selectors.DefaultSelector()
    connections: list[Connection] = []
    missing, retry_at = attack.connections, 0.0
    found = {"connections": 0, "calls": 0, "ended": 0, "sent_mib": 0.0}
    print("ready", flush=True)
    end = time.monotonic() + run_s
    while (now := time.monotonic()) < end:
        if missing and now >= retry_at:
            retry_at = now + _RECONNECT_S
            try:
                connections.append(Connection((host, int(port)), attack, block, body))
            except OSError:
                continue
            selector.register(connections[-1].socket, selectors.EVENT_READ, connections[-1])
            found["connections"] += 1
            missing -= 1
        for connection in tuple(connections):
            try:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.pump() else 0)
                selector.modify(connection.socket, events, connection)
            except OSError:
                missing += _closed(connection, connections, selector, found)
        for key, events in selector.select(min(_RECONNECT_S, max(0.0, end - now))):
            if events & selectors.EVENT_READ and key.data in connections:
                try:
                    key.data.read()
                except OSError:
                    missing += _closed(key.data, connections, selector, found)
    for connection in tuple(connections):
        _closed(connection, connections, selector, found)
    return found


def _closed(
    connection: Connection,
    connections: list[Connection],
    selector: selectors.BaseSelector,
    found: dict[str, float],
) -> int:
    connections.remove(connection)
    selector.unregister(connection.socket)
    connection.socket.close()
    found["calls"] += connection.begun
    found["ended"] += connection.ended
    found["sent_mib"] += connection.sent_bytes / (1 << 20)
    return 1


if __name__ == "__main__":
    said = run(
        sys.argv[1],
        Attack(**json.loads(Path(sys.argv[2]).read_text())),
        os.environ.get("TOKEN", ""),
        float(sys.argv[3]),
    )
    print(json.dumps(said), flush=True)
