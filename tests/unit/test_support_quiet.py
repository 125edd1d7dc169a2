"""Runs of tests show their dots: gRPC writes nothing among them."""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

import grpc
import pytest

SETTINGS = b"\0\0\0\4\0\0\0\0\0"
GOAWAY = struct.pack(">I", 8)[1:] + b"\7\0\0\0\0\0" + struct.pack(">II", 0, 2)

PING, PONG = (bytes([0, 0, 8, 6, flags, 0, 0, 0, 0]) for flags in (0, 1))


def test_a_server_that_goes_away_with_an_error_leaves_no_line(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.sendall(SETTINGS)
                accepted.recv(1 << 16)
                accepted.sendall(GOAWAY + PING + bytes(8))
                received = b""
                while PONG not in received:  # by then the client has read what came before the ping
                    received += accepted.recv(1 << 16)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with grpc.insecure_channel(f"127.0.0.1:{listener.getsockname()[1]}") as channel:
            # a call connects, too; what watches a channel may raise on a thread of gRPC when it is closed
            call: Any = channel.unary_unary("/nothing/nothing")
            connecting = call.future(b"", wait_for_ready=True)
            thread.join(60)
            connecting.cancel()
        assert not thread.is_alive()
    assert capfd.readouterr().err == ""
