"""Defaults of the client, and the environment variable that names the server.

`STEPWELL_SERVER` is the address, HOST:PORT, used where none is given: by `connect()` and by every
command of the CLI. Nothing else is read from the environment.
"""

from __future__ import annotations

import dataclasses
import math
import os

from stepwell.errors import InvalidInputError

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_MAX_MESSAGE_BYTES",
    "DEFAULT_TIMEOUT_S",
    "SERVER_VARIABLE",
    "ClientConfig",
    "server_address",
]

SERVER_VARIABLE = "STEPWELL_SERVER"
"""Environment variable with the server's address, HOST:PORT."""
DEFAULT_ADDRESS = "127.0.0.1:50051"
"""Where a server listens unless told otherwise."""
DEFAULT_TIMEOUT_S = 30.0
"""Time limit of a call over all its attempts, in seconds."""
DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message sent or received, in bytes."""


_LONGEST_S = 1e9


@dataclasses.dataclass(frozen=True, slots=True)
class ClientConfig:
    """What a client was told when it was made; `connect` makes it from its arguments.

    Example:
        >>> stepwell.config.ClientConfig("localhost:50051").timeout_s
        30.0
    """

    address: str
    """HOST:PORT, or unix:PATH."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Time limit of a call over all its attempts, in seconds; `math.inf` for none."""
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    """Largest message sent or received, in bytes."""

    def __post_init__(self) -> None:
        check_timeout("timeout_s", self.timeout_s)
        if isinstance(self.max_message_bytes, bool) or not isinstance(self.max_message_bytes, int):
            raise InvalidInputError(f"max_message_bytes must be an int; got {self.max_message_bytes!r}")
        if not 1024 <= self.max_message_bytes < 2**31:
            raise InvalidInputError(
                f"max_message_bytes must be from 1024 to 2147483647; got {self.max_message_bytes}"
            )


def check_timeout(name: str, timeout_s: float) -> float:
    """A time limit that is a number above zero, `math.inf` included.

    Raises:
        InvalidInputError: It is not.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise InvalidInputError(f"{name} must be a number of seconds; got {timeout_s!r}")
    # Clocks and locks take no number of seconds beyond some 300 years; a limit of 30 years is none.
    if timeout_s > _LONGEST_S:
        return math.inf
    if math.isnan(timeout_s) or timeout_s <= 0:
        raise InvalidInputError(f"{name} must be above 0 (math.inf for no limit); got {timeout_s}")
    return float(timeout_s)


def server_address(address: str | None = None) -> str:
    """The server to talk to: the address given, else `STEPWELL_SERVER`, else 127.0.0.1:50051.

    Args:
        address: HOST:PORT, [IPv6]:PORT, unix:PATH or None.

    Raises:
        InvalidInputError: The address, or the variable, is no address; the message names which.

    Example:
        >>> stepwell.config.server_address("localhost:50051")
        'localhost:50051'
    """
    if address is not None:
        return _checked("address", address)
    from_environment = os.environ.get(SERVER_VARIABLE)
    if from_environment is not None:
        return _checked(SERVER_VARIABLE, from_environment)
    return DEFAULT_ADDRESS


def _checked(name: str, address: str) -> str:
    if not isinstance(address, str):
        raise InvalidInputError(f"{name} must be a string HOST:PORT; got {address!r}")
    if address.startswith("unix:") and len(address) > len("unix:"):
        return address
    host, colon, port = address.rpartition(":")
    right_port = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if not (host and colon and right_port) or any(c.isspace() for c in address):
        raise InvalidInputError(f"{name} must be HOST:PORT with a port from 1 to 65535; got {address!r}")
    return address
