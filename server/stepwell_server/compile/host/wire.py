"""Messages between the server and a worker: one JSON object per line, over a socket pair.

The fork server is trusted and uses a connection of `multiprocessing`. A worker may be controlled by a model: its
messages are bounded and never unpickled, and limits are checked while waiting for the rest of a message.

The server sends jobs, ``{"job": kind, ...}``. A worker sends ``{"protection": ...}`` once (see `sandbox`), ``{"stage": ...}``
as each stage begins, then ``{"done": ...}`` or ``{"error": ..., "kind": ...}``.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

MAX_BYTES = 1 << 20
CHECK_INTERVAL_S = 0.02


class GarbledError(Exception):
    """The received data is not a message."""


class Channel:
    """One end of a channel. For one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._rest = bytearray()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message.

        Raises:
            OSError: the other end is closed.
        """
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, check: Callable[[], None] | None = None) -> dict[str, Any] | None:
        """Wait for a message. Returns None if the other end is closed, even in the middle of a message.

        Args:
            check: called many times per second while this waits; if it raises, the wait ends.

        Raises:
            GarbledError: the received data is not a message, or too long.
        """
        self._socket.settimeout(None if check is None else CHECK_INTERVAL_S)
        while (end := self._rest.find(b"\n")) < 0:
            if len(self._rest) >= MAX_BYTES:
                raise GarbledError
            try:
                piece = self._socket.recv(1 << 16)
            except TimeoutError:
                piece = None
            except ConnectionError:
                return None
            if piece == b"":
                return None
            self._rest += piece or b""
            if check is not None:
                check()
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if len(line) > MAX_BYTES or not isinstance(message, dict):
            raise GarbledError
        return message

    def close(self) -> None:
        """Close this end. Idempotent."""
        self._socket.close()
