"""Ports of this machine that are reserved for a server while it is not running."""

from __future__ import annotations

import socket
import sys


def reserved(host: str, port: int = 0) -> socket.socket | None:
    """Returns a socket that reserves a port, or a free one, until it is closed; None if this system cannot do that.

    The socket does not listen. Linux still lets a server listen on that port, if it sets SO_REUSEADDR as servers do.
    It gives the port to no program that asks for any free port, or that connects without choosing one.

    Raises:
        OSError: The port is in use.
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
