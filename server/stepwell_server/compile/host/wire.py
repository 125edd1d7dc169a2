"""What the server and its compiling processes say to each other: JSON objects, a line each, over a socket.

Two channels have this form. The fork server (`fork_server`) is asked for workers: ``{"fork": terms}``, with the worker's
ends of its own channel and of its log as open files, gives ``{"pid": ...}``; ``{"reap": pid}`` ends one and gives
``{"status": ...}``. A worker (`worker`) is given jobs, ``{"job": kind, ...}``, and says ``{"protection": ...}`` once, which
the kernel gives (`sandbox`), ``{"stage": ...}`` as each stage begins, then ``{"done": ...}`` or ``{"error": ..., "kind": ...}``.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

#: Of one message, which may be under somebody else's control.
MOST_BYTES = 1 << 20
_FILES = 4


class GarbledError(Exception):
    """What came is no message."""


class Channel:
    """One side of a channel. For one thread at a time, but for `close`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._rest = bytearray()
        self._files: list[int] = []

    def send(self, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
        """Send a message, and open files with it, which stay open here too.

        Raises:
            OSError: the other side has ended.
        """
        data = json.dumps(message).encode() + b"\n"
        if files:
            sent = socket.send_fds(self._socket, [data], list(files))
            data = data[sent:]
        self._socket.sendall(data)

    def receive(self) -> dict[str, Any] | None:
        """Wait for a message. Returns None if the other side has ended, be it in the middle of one.

        Raises:
            GarbledError: it is none, or too long.
        """
        while (end := self._rest.find(b"\n")) < 0:
            if len(self._rest) >= MOST_BYTES:
                raise GarbledError
            try:
                piece, files, _, _ = socket.recv_fds(self._socket, 1 << 16, _FILES)
            except ConnectionError:
                return None
            self._files += files
            if not piece:
                return None
            self._rest += piece
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if len(line) > MOST_BYTES or not isinstance(message, dict):
            raise GarbledError
        return message

    def files(self) -> list[int]:
        """Open files that came with messages since the last time. The caller closes them."""
        came, self._files = self._files, []
        return came

    def close(self) -> None:
        """Close this side, and files that nobody has taken. Idempotent."""
        self._socket.close()
        for file in self.files():
            os.close(file)
