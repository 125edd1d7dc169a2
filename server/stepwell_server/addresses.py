"""Where a server listens."""

from __future__ import annotations

import errno
import socket
from typing import Any, NamedTuple


class Address(NamedTuple):
    """A host and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(NamedTuple):
    """A Unix socket."""

    path: str
    """Absolute."""

    def __str__(self) -> str:
        return f"unix:{self.path}"


def bind_problem(address: Address) -> str | None:
    """Why nothing can listen on an address, in better words than gRPC's; None: something can."""
    try:
        candidates = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except OSError as error:
        return error.strerror
    problems = [problem for family, _, _, _, where in candidates if (problem := _bound(family, where))]
    # A name may also stand for an address that this machine lacks, say IPv6's: the others will do.
    for problem in problems:
        if problem.errno == errno.EADDRINUSE or len(problems) == len(candidates):
            return problem.strerror
    return None


def _bound(family: int, where: tuple[Any, ...]) -> OSError | None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the servers will do it: connections of a predecessor that are closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
        except OSError as error:
            return error
    return None
