"""Connections to Valkey servers: the one module that imports the client, valkey-py with libvalkey as its parser.

Of the client its connections are used, not its pools and commands: what is asked for goes through scripts, in few and
large pieces, and a wait for the disk (WAITAOF) belongs to one connection.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

import libvalkey
from typing_extensions import override
from valkey import crc
from valkey import exceptions as theirs
from valkey.asyncio import connection as base

from stepwell_server.store.base import StoreError
from stepwell_server.store.valkey.url import Address, Login, Tls, shown

Command = Sequence[bytes | str | int]
"""Words; the largest one last, where there is a choice."""
Reply = Any
"""Bytes, an int, None, a list of such, or `Refused`."""

#: Bytes of a word that is worth sending by itself.
_LARGE = 32_768
#: The client makes errors of these classes out of the first word of an answer, and leaves the word out.
_CODES: Sequence[tuple[type[Exception], str]] = (
    (theirs.MovedError, "MOVED"),
    (theirs.AskError, "ASK"),
    (theirs.TryAgainError, "TRYAGAIN"),
    (theirs.MasterDownError, "MASTERDOWN"),
    (theirs.ClusterDownError, "CLUSTERDOWN"),
    (theirs.ClusterCrossSlotError, "CROSSSLOT"),
    (theirs.NoScriptError, "NOSCRIPT"),
    (theirs.OutOfMemoryError, "OOM"),
    (theirs.ReadOnlyError, "READONLY"),
    (theirs.NoPermissionError, "NOPERM"),
    (theirs.ExecAbortError, "EXECABORT"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """An answer that is an error: nothing was done."""

    code: str
    """The first word of the answer, such as OOM."""
    text: str
    address: Address | None = None
    """Of the node to ask, with MOVED and ASK; an empty host: the one that was asked."""

    def __str__(self) -> str:
        """As the server says it."""
        return f"{self.code} {self.text}".strip()


class Lost(Exception):
    """A connection could not be made, or did not answer. The message is for people."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent
        """What was asked may have been done."""


class Denied(Lost):
    """The server does not let us in: user, password, certificate or database are not right."""

    def __init__(self, message: str) -> None:
        super().__init__(message, sent=False)


@dataclasses.dataclass(slots=True)
class Access:
    """What a connection needs beside an address."""

    login: Login = dataclasses.field(default_factory=Login)
    database: int = 0
    context: ssl.SSLContext | None = None
    server_name: str = ""
    name: str = "stepwell"
    """Of the connections, as `CLIENT LIST` shows it."""


def context_of(tls: Tls) -> ssl.SSLContext:
    """How connections are secured: certificates are checked, and the names in them.

    Raises:
        StoreError: a file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=None if tls.ca is None else str(tls.ca))
    except (OSError, ssl.SSLError) as error:
        raise StoreError(f"ca: {tls.ca} must have certificates of authorities: {_reason(error)}") from None
    if tls.cert is not None and tls.key is not None:
        try:
            context.load_cert_chain(tls.cert, tls.key, password=_no_password)
        except (OSError, ssl.SSLError) as error:
            raise StoreError(
                f"cert and key: {tls.cert} and {tls.key} must be a certificate and its key: {_reason(error)}"
            ) from None
    return context


def _no_password() -> str:
    raise ssl.SSLError("the key must not need a password")


def slot_of(tag: bytes) -> int:
    """The slot of a Cluster in which the keys with a tag are."""
    return crc.key_slot(tag)


class _Connection(base.Connection):
    """A connection of the client whose certificate is checked for the name that we say."""

    def __init__(self, access: Access, address: Address) -> None:
        self._access = access
        host, port = address
        super().__init__(
            host=host,
            port=port,
            db=access.database,
            username=access.login.user or None,
            password=access.login.password or None,
            client_name=access.name,
            socket_timeout=None,  # every exchange has a limit of its own
            socket_connect_timeout=None,
            socket_keepalive=True,
        )

    def close(self) -> None:
        """End it at once; `disconnect` waits for the other side."""
        self._close()  # type: ignore[no-untyped-call]

    @property
    def has_ended(self) -> bool:
        """The other side has closed it."""
        return self._reader is None or self._reader.at_eof()

    @override
    def _connection_arguments(self) -> Mapping[str, Any]:
        arguments = dict(super()._connection_arguments())
        if self._access.context is not None:
            arguments["ssl"] = self._access.context
            if self._access.server_name:
                arguments["server_hostname"] = self._access.server_name
        return arguments


class Link:
    """One connection, for one exchange at a time. Lives on the event loop."""

    def __init__(self, address: Address, connection: _Connection) -> None:
        self._address = address
        self._connection = connection

    @classmethod
    async def open(cls, address: Address, access: Access) -> Link:
        """Connect and log in. Its time is limited by the caller.

        Raises:
            Denied: we may not, for a reason that stays.
            Lost: nobody is there, or it is not ready.
        """
        connection = _Connection(access, address)
        link = cls(address, connection)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except (theirs.AuthenticationError, theirs.AuthorizationError, theirs.NoPermissionError) as error:
            link.close()
            raise Denied(f"{shown(address)} does not let us in: {error}") from None
        except theirs.BusyLoadingError:
            link.close()
            raise Lost(f"{shown(address)} is loading its data", sent=False) from None
        except theirs.ResponseError as error:
            link.close()
            raise Denied(f"{shown(address)} refuses the connection: {error}") from None
        except (theirs.ValkeyError, OSError) as error:
            link.close()
            if _is_about_tls(error):
                raise Denied(f"TLS with {shown(address)} must succeed: {_deepest(error)}") from None
            raise Lost(
                f"{shown(address)} cannot be connected to: {_reason(_deepest(error))}", sent=False
            ) from None
        except BaseException:
            link.close()
            raise
        return link

    async def ask(self, commands: Sequence[Command]) -> list[Reply]:
        """Send commands together and read their answers. After an exception, a cancellation too, it must be closed.

        Raises:
            Lost: it did not answer.
        """
        packed = [piece for command in commands for piece in _packed(command)]
        try:
            await self._connection.send_packed_command(packed, check_health=False)
            return [await self._reply() for _ in commands]
        except theirs.BusyLoadingError:
            raise Lost(f"{shown(self._address)} is loading its data", sent=False) from None
        except theirs.AuthenticationError as error:
            raise Denied(f"{shown(self._address)} does not let us in any more: {error}") from None
        except (theirs.ValkeyError, OSError) as error:
            raise Lost(f"{shown(self._address)} did not answer: {_reason(error)}", sent=True) from None

    async def _reply(self) -> Reply:
        try:
            return await self._connection.read_response()
        except theirs.ResponseError as error:
            return _refused(error)

    @property
    def has_ended(self) -> bool:
        """The server has closed it, as far as is known."""
        return self._connection.has_ended

    def close(self) -> None:
        """End it, whatever is under way."""
        self._connection.close()


def _packed(command: Command) -> Sequence[bytes]:
    """A command as it is sent. A large last word is not copied."""
    *words, last = command
    if not isinstance(last, bytes) or len(last) < _LARGE:
        return [libvalkey.pack_command(tuple(command))]
    _, _, rest = libvalkey.pack_command(tuple(words)).partition(b"\r\n")
    return [b"*%d\r\n%s$%d\r\n" % (len(command), rest, len(last)), last, b"\r\n"]


def _refused(error: Exception) -> Refused:
    for kind, code in _CODES:
        if isinstance(error, kind):
            address = (error.host, error.port) if isinstance(error, theirs.AskError) else None
            return Refused(code, str(error), address)
    code, _, text = str(error).partition(" ")
    return Refused(code, text)


def _deepest(error: BaseException) -> BaseException:
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__ or error
    return error


def _is_about_tls(error: BaseException) -> bool:
    deepest = _deepest(error)
    return isinstance(deepest, ssl.SSLError) and not isinstance(
        deepest, ssl.SSLEOFError | ssl.SSLZeroReturnError
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.IncompleteReadError | EOFError):
        return "the connection was closed"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
