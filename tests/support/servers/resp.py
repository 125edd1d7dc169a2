"""Asks a Valkey in the tests' own words: a connection, a command, its reply. Not the client that the server uses."""

from __future__ import annotations

import select
import socket
import ssl
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class ReplyError(Exception):
    """Valkey answered with an error."""


class Connection:
    """One connection, of one thread. Leaving the block closes it.

    Args:
        host, port: where Valkey listens.
        password: of the user `default`; empty: none is sent.
        ca: the authority that Valkey's certificate must be from; None: no TLS.
        timeout_s: limit of each wait.
    """

    def __init__(
        self, host: str, port: int, *, password: str = "", ca: Path | None = None, timeout_s: float = 100.0
    ) -> None:
        self._socket = socket.create_connection((host, port), timeout_s)
        if ca is not None:
            context = ssl.create_default_context(cafile=str(ca))
            self._socket = context.wrap_socket(self._socket, server_hostname=host)
        self._file = self._socket.makefile("rb")
        if password:
            self.ask("AUTH", password)

    def ask(self, *words: object) -> Any:
        """Send a command; its reply: bytes, int, list or None.

        Raises:
            ReplyError: Valkey refuses.
            OSError: the connection breaks.
        """
        self.send(*words)
        return self.receive()

    def send(self, *words: object) -> None:
        """Send a command without waiting for its reply."""
        parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        body = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self._socket.sendall(b"*%d\r\n%s" % (len(parts), body))

    def receive(self) -> Any:
        """The next reply."""
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("Valkey has closed the connection")
        kind, rest = line[:1], line[1:-2]
        match kind:
            case b"+":
                return rest
            case b"-":
                raise ReplyError(rest.decode())
            case b":":
                return int(rest)
            case b"$":
                return None if int(rest) < 0 else self._file.read(int(rest) + 2)[:-2]
            case b"*":
                return None if int(rest) < 0 else [self.receive() for _ in range(int(rest))]
        raise AssertionError(f"not a reply: {line!r}")

    def has_ended(self) -> bool:
        """Whether Valkey has closed it, as it does with all when its role changes. No reply may be under way."""
        readable, _, _ = select.select([self._socket], [], [], 0)
        return bool(readable)

    def close(self) -> None:
        """End it."""
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fields(info: bytes) -> dict[str, str]:
    """The fields of INFO or CLUSTER INFO by name."""
    pairs = (line.partition(":") for line in info.decode().splitlines() if ":" in line)
    return {name: value for name, _, value in pairs}


def by_name(flat: list[bytes]) -> dict[str, str]:
    """A list of names and values, as SENTINEL answers, by name."""
    return {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}
