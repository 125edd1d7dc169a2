"""A bare sink for an attacker: takes in what it sends, keeps nothing, and answers each call that ends, in one process.

    sink.py        (prints its address; ends when its standard input does)

Its windows are those of the server, so that the attacker works as hard beside the one as beside the other.
"""

from __future__ import annotations

import selectors
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.attacks import peer

_WINDOW, _STREAM_WINDOW = 4 << 20, 1 << 20
_MAX_STREAMS = 1000
"""Of a connection, as the server has it: an attacker that ignores the limit floods both alike."""
_REFUSED_STREAM = (7).to_bytes(4, "big")
_ANSWER = b"\x88" + peer.header_block([("content-type", "application/grpc"), ("grpc-status", "8")])
"""HTTP's 200, from the static table, and RESOURCE_EXHAUSTED."""


class Peer:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._frames = peer.Frames()
        self._is_greeted = False
        self._preface = len(peer.PREFACE)
        self._taken = 0
        self._open: set[int] = set()

    def read(self) -> bool:
        """Take in what has come; False where the connection ends."""
        received = self.socket.recv(1 << 18)
        if not received:
            return False
        if self._preface:
            skipped = min(self._preface, len(received))
            received, self._preface = received[skipped:], self._preface - skipped
        out = bytearray()
        if not self._is_greeted:
            self._is_greeted = True
            out += peer.settings(_STREAM_WINDOW)
            out += peer.window_update(0, _WINDOW - peer.DEFAULT_WINDOW)
        for kind, flags, stream, payload in self._frames.push(received):
            if kind == peer.DATA:
                self._taken += len(payload)
                if not flags & peer.END_STREAM and payload:
                    out += peer.window_update(stream, len(payload))
            if kind == peer.HEADERS and len(self._open) >= _MAX_STREAMS:
                out += peer.frame(peer.RST_STREAM, 0, stream, _REFUSED_STREAM)
                continue
            if kind == peer.HEADERS:
                self._open.add(stream)
            if kind in {peer.DATA, peer.HEADERS} and flags & peer.END_STREAM:
                self._open.discard(stream)
                out += peer.frame(peer.HEADERS, peer.END_HEADERS | peer.END_STREAM, stream, _ANSWER)
        if self._taken >= _WINDOW // 4:
            out += peer.window_update(0, self._taken)
            self._taken = 0
        if out:
            self.socket.sendall(out)
        return True


def main() -> None:
    """Serve until standard input ends."""
    selector = selectors.DefaultSelector()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        selector.register(listening, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print(f"127.0.0.1:{listening.getsockname()[1]}", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is listening:
                    connection, _ = listening.accept()
                    selector.register(connection, selectors.EVENT_READ, Peer(connection))
                    continue
                try:
                    goes_on = key.data.read()
                except OSError:
                    goes_on = False
                if not goes_on:
                    selector.unregister(key.fileobj)
                    key.data.socket.close()


if __name__ == "__main__":
    main()
