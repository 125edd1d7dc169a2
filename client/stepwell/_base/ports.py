"""Ports of this machine that are kept for a server while it does not run."""

from __future__ import annotations

import socket
import sys


def reserved(host: str, port: int = 0) -> socket.socket | None:
    """A socket that keeps a port, or a free one, until it is closed. None: this system has no such thing.

    It does not listen. Linux lets a server listen on that port all the same, if it sets SO_REUSEADDR as servers do, and
    gives the port to nobody who asks for any free one, or for none, as those do who connect.

    Raises:
        OSError: The port is taken.
    """
    if sys.platform != "linux":
        return None
    held = socket.socket()
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
    except OSError:
        held.close()
        raise
    return held
