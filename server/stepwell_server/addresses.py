"""The addresses that a server listens on."""

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
    """Return why an address cannot be listened on, in clearer words than gRPC; None: it can."""
    try:
        candidates = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except OSError as error:
        return error.strerror
    problems = [problem for family, _, _, _, where in candidates if (problem := _bound(family, where))]
    # A name may also resolve to an address that this machine lacks, such as an IPv6 one: the others are enough.
    for problem in problems:
        if problem.errno == errno.EADDRINUSE or len(problems) == len(candidates):
            return problem.strerror
    return None


def _bound(family: int, where: tuple[Any, ...]) -> OSError | None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the servers do: closing connections of a predecessor are no problem.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
        except OSError as error:
            return error
    return None
