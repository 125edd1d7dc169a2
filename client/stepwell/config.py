"""Defaults of the client, and the environment variable that names the server.

`STEPWELL_SERVER` is the address, HOST:PORT or unix:PATH, used where none is given: by `connect()` and by every
command of the CLI. Nothing else is read from the environment here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from typing import TypeAlias

from stepwell.errors import InvalidInputError

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_LEASE_S",
    "DEFAULT_MAX_MESSAGE_BYTES",
    "DEFAULT_TIMEOUT_S",
    "SERVER_VARIABLE",
    "ClientConfig",
    "TlsConfig",
    "server_address",
]

SERVER_VARIABLE = "STEPWELL_SERVER"
"""Environment variable with the server's address, HOST:PORT or unix:PATH."""
DEFAULT_ADDRESS = "127.0.0.1:50051"
"""Where a server listens unless told otherwise."""
DEFAULT_TIMEOUT_S = 30.0
"""Time limit of a call over all its attempts, in seconds."""
DEFAULT_LEASE_S = 600.0
"""How long a client may be gone before the server closes its sessions that nobody named, in seconds."""
DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message sent or received, in bytes."""


_LONGEST_S = 1e9
_LONGEST_LEASE_S = 3650 * 86400.0

Pem: TypeAlias = str | os.PathLike[str] | bytes


@dataclasses.dataclass(frozen=True, slots=True)
class TlsConfig:
    """How to speak TLS with a server. Each of the first three is the path of a PEM file, or its bytes.

    Raises:
        InvalidInputError: A file cannot be read or is no PEM, or of certificate and key only one is given.

    Example:
        >>> stepwell.TlsConfig(server_name="stepwell.example").server_name
        'stepwell.example'
    """

    ca: Pem | None = None
    """Certificates of the CAs to trust. None: those of the system."""
    cert: Pem | None = None
    """Certificate of this client, followed by those between it and its CA, for servers that demand one."""
    key: Pem | None = dataclasses.field(default=None, repr=False)
    """Its private key, not encrypted."""
    server_name: str | None = None
    """Name that the server's certificate must have. None: the host of the address, `localhost` for a Unix socket."""

    def __post_init__(self) -> None:
        if (self.cert is None) is not (self.key is None):
            given, other = ("cert", "key") if self.key is None else ("key", "cert")
            raise InvalidInputError(f"TlsConfig.{other} must be given with TlsConfig.{given}; got None")
        if self.server_name == "" or not isinstance(self.server_name, str | None):
            raise InvalidInputError(f"TlsConfig.server_name must be a host's name; got {self.server_name!r}")
        self.contents()

    def contents(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The PEM of `ca`, `cert` and `key`.

        Raises:
            InvalidInputError: A file cannot be read or is no PEM.

        Example:
            >>> stepwell.TlsConfig().contents()
            (None, None, None)
        """
        ca, cert = (_pem(name, getattr(self, name), _CERTIFICATE) for name in ("ca", "cert"))
        return ca, cert, _pem("key", self.key, _KEY)


_CERTIFICATE = (b"-----BEGIN CERTIFICATE-----", "hold certificates in PEM")
_KEY = (b"PRIVATE KEY-----", "hold a private key in PEM that is not encrypted")


def _pem(name: str, given: Pem | None, kind: tuple[bytes, str]) -> bytes | None:
    """The bytes of an argument of `TlsConfig`."""
    sign, rule = kind
    if given is None:
        return None
    if isinstance(given, bytes):
        pem, origin = given, f"{len(given)} bytes"
    elif isinstance(given, str | os.PathLike):
        origin = os.fspath(given)
        try:
            pem = pathlib.Path(origin).read_bytes()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise InvalidInputError(
                f"TlsConfig.{name} must be a file that can be read; {origin!r}: {reason}"
            ) from None
    else:
        raise InvalidInputError(f"TlsConfig.{name} must be a path, or PEM as bytes; got {given!r}")
    if sign not in pem or (kind is _KEY and b"ENCRYPTED" in pem):
        raise InvalidInputError(f"TlsConfig.{name} must {rule}; got {origin}")
    return pem


def tls_config(tls: TlsConfig | bool | None) -> TlsConfig | None:
    """What `connect` was told of TLS: True is the default `TlsConfig`, False and None are no TLS.

    Raises:
        InvalidInputError: It is something else.
    """
    if tls is None or isinstance(tls, TlsConfig):
        return tls
    if isinstance(tls, bool):
        return TlsConfig() if tls else None
    raise InvalidInputError(f"tls must be a TlsConfig, True or None; got {tls!r}")


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
    tls: TlsConfig | None = None
    """How to speak TLS. None: not at all. Files are read here, once."""
    lease_s: float | None = DEFAULT_LEASE_S
    """How long this client may be gone before the server closes its sessions that nobody named, in seconds; afterwards 0
    for None: they stay until they are closed."""

    def __post_init__(self) -> None:
        if self.tls is not None:
            ca, cert, key = self.tls.contents()
            object.__setattr__(self, "tls", TlsConfig(ca, cert, key, self.tls.server_name))
        object.__setattr__(self, "lease_s", _lease(self.lease_s))
        check_timeout("timeout_s", self.timeout_s)
        if isinstance(self.max_message_bytes, bool) or not isinstance(self.max_message_bytes, int):
            raise InvalidInputError(f"max_message_bytes must be an int; got {self.max_message_bytes!r}")
        if not 1024 <= self.max_message_bytes < 2**31:
            raise InvalidInputError(
                f"max_message_bytes must be from 1024 to 2147483647; got {self.max_message_bytes}"
            )


def _lease(lease_s: float | None) -> float:
    """A lease in seconds, 0 for none.

    Raises:
        InvalidInputError: It is out of range.
    """
    if lease_s is None or lease_s == 0:
        return 0.0
    if isinstance(lease_s, bool) or not isinstance(lease_s, int | float):
        raise InvalidInputError(f"lease_s must be a number of seconds, or None; got {lease_s!r}")
    if not 1 <= lease_s <= _LONGEST_LEASE_S:
        raise InvalidInputError(
            f"lease_s must be from 1 to {_LONGEST_LEASE_S:g}, or 0 or None for no lease; got {lease_s}"
        )
    return float(lease_s)


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
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not path or (path.startswith("//") and not path.startswith("///")):
            raise InvalidInputError(f"{name} must be unix:PATH or unix:///PATH; got {address!r}")
        return address
    host, colon, port = address.rpartition(":")
    right_port = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if not (host and colon and right_port) or any(c.isspace() for c in address):
        raise InvalidInputError(
            f"{name} must be HOST:PORT with a port from 1 to 65535, or unix:PATH; got {address!r}"
        )
    return address
