"""The configuration of a client: its defaults, and the environment variables that replace missing arguments.

`STEPWELL_SERVER` is the default address, `STEPWELL_CONNECT_TIMEOUT_S` the default `connect_timeout_s` and
`STEPWELL_TOKEN` the default token of `connect()` and of every command. This module reads no other environment
variables.

An address is HOST:PORT, [IPv6]:PORT, unix:PATH, dns:///HOST:PORT, grpc://HOST:PORT (without TLS) or grpcs://HOST:PORT
(with TLS). Several addresses, separated by commas, are replicas that share a store; so are all addresses of a name
after dns:///.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import TypeAlias

from stepwell._base import addresses, bearer, hooks, metadata
from stepwell._base.bearer import AsyncToken
from stepwell._base.metadata import Metadata
from stepwell.errors import InvalidInputError
from stepwell.events import EventHooks

__all__ = [
    "CONNECT_TIMEOUT_VARIABLE",
    "DEFAULT_ADDRESS",
    "DEFAULT_CONNECT_TIMEOUT_S",
    "DEFAULT_LOAD_TIMEOUT_S",
    "DEFAULT_MAX_MESSAGE_BYTES",
    "DEFAULT_TIMEOUT_S",
    "SERVER_VARIABLE",
    "TOKEN_VARIABLE",
    "ClientConfig",
    "TlsConfig",
    "connect_timeout",
    "server_address",
    "token_or_variable",
]

SERVER_VARIABLE = "STEPWELL_SERVER"
"""Environment variable with the server's address."""
CONNECT_TIMEOUT_VARIABLE = "STEPWELL_CONNECT_TIMEOUT_S"
"""Environment variable with the default of `connect_timeout_s`, in seconds."""
TOKEN_VARIABLE = "STEPWELL_TOKEN"  # noqa: S105 - the name, not the token
"""Environment variable with the token to send if no token is given."""
DEFAULT_ADDRESS = "127.0.0.1:50051"
"""The address where a server listens by default."""
DEFAULT_TIMEOUT_S = 30.0
"""Time limit of a call over all its attempts, in seconds."""
DEFAULT_LOAD_TIMEOUT_S = 600.0
"""Time limit of a call that loads a model, which the server may have to compile, in seconds."""
DEFAULT_CONNECT_TIMEOUT_S = 1.0
"""Time limit of calls until the client has reached the server for the first time, in seconds."""
DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Size of the largest message to send or receive, in bytes."""


_LONGEST_S = 1e9
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}|\*")

Pem: TypeAlias = str | os.PathLike[str] | bytes
"""The path of a PEM file, or its bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class TlsConfig:
    """TLS settings of a client. `ca`, `cert` and `key` are each the path of a PEM file, or its content as bytes.

    Raises:
        InvalidInputError: A file cannot be read or is not PEM, or only one of `cert` and `key` is given.

    Example:
        >>> stepwell.TlsConfig(server_name="stepwell.example").server_name
        'stepwell.example'
    """

    ca: Pem | None = None
    """Certificates of the CAs to trust. None: those of the system."""
    cert: Pem | None = None
    """Certificate of this client, followed by the intermediate certificates, for servers that require one."""
    key: Pem | None = dataclasses.field(default=None, repr=False)
    """Private key of that certificate, not encrypted."""
    server_name: str | None = None
    """Name that the server's certificate must have. None: the host of the address, or `localhost` for a Unix socket."""

    def __post_init__(self) -> None:
        if (self.cert is None) is not (self.key is None):
            given, other = ("cert", "key") if self.key is None else ("key", "cert")
            raise InvalidInputError(f"TlsConfig.{other} must be given with TlsConfig.{given}; got None")
        if self.server_name == "" or not isinstance(self.server_name, str | None):
            raise InvalidInputError(f"TlsConfig.server_name must be a host's name; got {self.server_name!r}")
        self.contents()

    def contents(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Returns the PEM content of `ca`, `cert` and `key`, with None for those that are not given.

        Raises:
            InvalidInputError: A file cannot be read or is not PEM.

        Example:
            >>> stepwell.TlsConfig().contents()
            (None, None, None)
        """
        ca, cert = (_pem(name, getattr(self, name), _CERTIFICATE) for name in ("ca", "cert"))
        return ca, cert, _pem("key", self.key, _KEY)


_CERTIFICATE = (b"-----BEGIN CERTIFICATE-----", "hold certificates in PEM")
_KEY = (b"PRIVATE KEY-----", "hold a private key in PEM that is not encrypted")


def _pem(name: str, given: Pem | None, kind: tuple[bytes, str]) -> bytes | None:
    """Returns the bytes of an argument of `TlsConfig`."""
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
    """Converts the `tls` argument of `connect`: True is the default `TlsConfig`; False and None mean no TLS.

    Raises:
        InvalidInputError: It is another value.
    """
    if tls is None or isinstance(tls, TlsConfig):
        return tls
    if isinstance(tls, bool):
        return TlsConfig() if tls else None
    raise InvalidInputError(f"tls must be a TlsConfig, True or None; got {tls!r}")


def check_switch(name: str, given: object) -> None:
    """Checks that an argument is True or False. Other values would count by their truth, so that "no" would mean True.

    Raises:
        InvalidInputError: It is not a bool.
    """
    if not isinstance(given, bool):
        raise InvalidInputError(f"{name} must be True or False; got {given!r}")


def check_timeout(name: str, timeout_s: float) -> float:
    """Checks that a time limit is a number above zero, which includes `math.inf`.

    Raises:
        InvalidInputError: It is not.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise InvalidInputError(f"{name} must be a number of seconds; got {timeout_s!r}")
    # Clocks and locks accept at most some 300 years; a limit of 30 years or more counts as none.
    if timeout_s > _LONGEST_S:
        return math.inf
    if math.isnan(timeout_s) or timeout_s <= 0:
        raise InvalidInputError(f"{name} must be above 0 (math.inf for no limit); got {timeout_s}")
    return float(timeout_s)


def connect_timeout(timeout_s: float | None = None) -> float:
    """Returns the `connect_timeout_s` of a client: the argument, or `STEPWELL_CONNECT_TIMEOUT_S`, or 1 second.

    Args:
        timeout_s: In seconds, or None.

    Raises:
        InvalidInputError: The argument or the variable is not a time limit; the message names it.

    Example:
        >>> stepwell.config.connect_timeout(2)
        2.0
    """
    if timeout_s is not None:
        return check_timeout("connect_timeout_s", timeout_s)
    from_environment = os.environ.get(CONNECT_TIMEOUT_VARIABLE)
    if from_environment is None:
        return DEFAULT_CONNECT_TIMEOUT_S
    try:
        seconds = float(from_environment)
    except ValueError:
        raise InvalidInputError(
            f"{CONNECT_TIMEOUT_VARIABLE} must be a number of seconds; got {from_environment!r}"
        ) from None
    return check_timeout(CONNECT_TIMEOUT_VARIABLE, seconds)


@dataclasses.dataclass(frozen=True, slots=True)
class ClientConfig:
    """The configuration of a client, which `connect` makes from its arguments.

    Example:
        >>> stepwell.config.ClientConfig("localhost:50051").timeout_s
        30.0
    """

    address: str
    """The address, in one of the forms that the module lists. It is stored without grpc:// or grpcs://, which set `tls`."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Time limit of a call over all its attempts, in seconds; `math.inf` for none."""
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    """Size of the largest message to send or receive, in bytes."""
    tls: TlsConfig | None = None
    """TLS settings. None: no TLS, unless the address starts with grpcs://. Files are read here, once."""
    connect_timeout_s: float = dataclasses.field(default_factory=connect_timeout)
    """Time limit of calls until the client has reached the server for the first time, in seconds; `math.inf`: the same
    as `timeout_s`. A server that accepts connections but does not answer, for example on a busy machine, gets ten
    times as long. After the first contact every call is retried up to its own limit.
    """
    metadata: Metadata = dataclasses.field(default=(), repr=False)
    """Headers to send with every call, as pairs of key and value. They are stored as a tuple with lower-case keys."""
    event_hooks: EventHooks | None = dataclasses.field(default=None, hash=False)
    """Functions to call before and after attempts and before retries; see `stepwell.events`."""
    tracing: bool = False
    """Create OpenTelemetry spans, and let the server continue their traces."""
    token: AsyncToken | None = dataclasses.field(default=None, repr=False)
    """The bearer token to send with every call, or a function that returns it; see `connect`."""
    allow_insecure_token: bool = False
    """Send the token to another machine even without TLS."""
    tenant: str | None = None
    """The tenant to act in, for admins; "*" lists the sessions of all tenants. None: the caller's own."""
    targets: tuple[str, ...] = dataclasses.field(default=(), init=False, repr=False, compare=False)
    """The addresses in `address`; more than one means replicas."""

    def __post_init__(self) -> None:
        targets, says_tls = addresses.parse_all("address", self.address)
        tls = self.tls
        if says_tls is False and tls is not None:
            raise InvalidInputError(
                f"tls must be None if the address starts with grpc://; got {self.address!r}"
            )
        if says_tls and tls is None:
            tls = TlsConfig()
        if tls is not None:
            ca, cert, key = tls.contents()
            tls = TlsConfig(ca, cert, key, tls.server_name)
        object.__setattr__(self, "address", ",".join(targets))
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "tls", tls)
        object.__setattr__(self, "metadata", metadata.checked(self.metadata))
        check_switch("tracing", self.tracing)
        check_switch("allow_insecure_token", self.allow_insecure_token)
        for target in targets:
            self._check_token(target)
        self._check_tenant(self.tenant)
        object.__setattr__(self, "event_hooks", hooks.checked(self.event_hooks))
        object.__setattr__(self, "timeout_s", check_timeout("timeout_s", self.timeout_s))
        check_timeout("connect_timeout_s", self.connect_timeout_s)
        if isinstance(self.max_message_bytes, bool) or not isinstance(self.max_message_bytes, int):
            raise InvalidInputError(f"max_message_bytes must be an int; got {self.max_message_bytes!r}")
        if not 1024 <= self.max_message_bytes < 2**31:
            raise InvalidInputError(
                f"max_message_bytes must be from 1024 to 2147483647; got {self.max_message_bytes}"
            )

    def _check_tenant(self, tenant: object) -> None:
        if tenant is None or (isinstance(tenant, str) and _TENANT.fullmatch(tenant)):
            return
        raise InvalidInputError(
            f"tenant must be 1 to 64 letters, digits or any of '._@-', or '*'; got {tenant!r}"
        )

    def _check_token(self, target: str) -> None:
        if bearer.checked(self.token) is None:
            return
        if any(key == "authorization" for key, _ in metadata.checked(self.metadata)):
            raise InvalidInputError("token must be None if metadata has the key 'authorization'; got both")
        if self.tls is None and not self.allow_insecure_token and not addresses.is_on_this_machine(target):
            raise InvalidInputError(
                f"token must not be sent to another machine without TLS, because anybody on the network path can read it: use tls, "
                f"or pass allow_insecure_token=True; got the address {target!r}"
            )


def token_or_variable(token: AsyncToken | None = None) -> AsyncToken | None:
    """Returns the token to send: the argument, or `STEPWELL_TOKEN`, or None.

    Args:
        token: A token, a function that returns it, or None.

    Raises:
        InvalidInputError: The variable does not hold a valid token. The message does not show it.

    Example:
        >>> stepwell.config.token_or_variable("stw_secret")
        'stw_secret'
    """
    if token is not None:
        return token
    from_environment = os.environ.get(TOKEN_VARIABLE)
    if not from_environment:
        return None
    try:
        bearer.checked(from_environment)
    except InvalidInputError as error:
        raise InvalidInputError(error.message.replace("token", TOKEN_VARIABLE, 1)) from None
    return from_environment


def server_address(address: str | Sequence[str] | None = None) -> str:
    """Returns the address of the server: the argument, or `STEPWELL_SERVER`, or 127.0.0.1:50051.

    Args:
        address: An address in one of the forms that the module lists, several of them, or None.

    Returns:
        The address; those of several replicas are separated by commas.

    Raises:
        InvalidInputError: The argument or the variable is not an address; the message names it.

    Example:
        >>> stepwell.config.server_address("localhost:50051")
        'localhost:50051'
    """
    if address is not None:
        return addresses.join("address", address)
    from_environment = os.environ.get(SERVER_VARIABLE)
    if from_environment is not None:
        addresses.parse_all(SERVER_VARIABLE, from_environment)
        return from_environment
    return DEFAULT_ADDRESS
