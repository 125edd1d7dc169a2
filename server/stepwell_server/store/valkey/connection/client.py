"""Connections to Valkey servers: the only module that imports the client, valkey-py with libvalkey as its parser.

It uses the client's connections, but not its pools and commands: requests are scripts with few, large arguments, and a
wait for the disk (WAITAOF) belongs to one connection.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import libvalkey
from typing_extensions import override
from valkey import crc
from valkey import exceptions as theirs
from valkey.asyncio import connection as base

from stepwell_server.logs import Log
from stepwell_server.store.base import StoreError
from stepwell_server.store.valkey.connection.url import Address, Login, Tls, UrlError, password_in, shown

_log = Log("store.valkey")
Command = Sequence[bytes | str | int]
"""The words of a command, with the largest one last if possible."""
Reply = Any
"""Bytes, an int, None, a list of such, or `ErrorReply`."""
_LARGE = 32_768
"""Minimum size of a word that is sent without copying."""


@dataclasses.dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error reply: nothing was done."""

    code: str
    """Its first word, such as OOM."""
    text: str
    address: Address | None = None
    """For MOVED and ASK, the node to ask; an empty host means the same node."""

    @classmethod
    def of(cls, line: str) -> ErrorReply:
        """Parse a line of the protocol."""
        code, _, text = line.partition(" ")
        if code not in {"MOVED", "ASK"}:
            return cls(code, text)
        host, _, port = text.rpartition(" ")[2].rpartition(":")
        return cls(code, text, (host, int(port)))

    def __str__(self) -> str:
        """The text as sent by the server."""
        return f"{self.code} {self.text}".strip()


class ConnectionLost(Exception):
    """A connection failed or did not answer. The message is for people."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent
        """The request may have been executed."""


class AccessDenied(ConnectionLost):
    """The server denied access: user, password, certificate or database are wrong."""

    def __init__(self, message: str) -> None:
        super().__init__(message, sent=False)


@dataclasses.dataclass(slots=True)
class Access:
    """The settings of a connection, without its address."""

    login: Login = dataclasses.field(default_factory=Login)
    database: int = 0
    context: ssl.SSLContext | None = None
    server_name: str = ""
    name: str = "stepwell"
    """The name of connections in `CLIENT LIST`."""
    password_file: Path | None = None
    """The file of the password, which may change."""
    _is_unreadable: bool = False

    async def read_password(self) -> None:
        """Read the password file again. If that fails, keep the last password."""
        if self.password_file is None:
            return
        try:
            password = await asyncio.to_thread(password_in, self.password_file)
        except UrlError as error:
            if not self._is_unreadable:
                _log.warning(
                    "the password file of the store cannot be read; the last password is used",
                    reason=str(error),
                )
            self._is_unreadable = True
            return
        self._is_unreadable = False
        if password != self.login.password:
            _log.info("the password of the store has changed", file=str(self.password_file))
            self.login = Login(self.login.user, password)


def context_of(tls: Tls) -> ssl.SSLContext:
    """Create the TLS context. It checks certificates and their host names.

    Raises:
        StoreError: a file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=None if tls.ca is None else str(tls.ca))
    except (OSError, ssl.SSLError) as error:
        raise StoreError(f"ca: {tls.ca} must contain CA certificates: {_reason(error)}") from None
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
    """Return the Cluster slot of the keys with this tag."""
    return crc.key_slot(tag)


class _Connection(base.Connection):
    """A client connection with a configurable host name for the certificate check."""

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
            socket_timeout=None,  # every exchange has its own limit
            socket_connect_timeout=None,
            socket_keepalive=True,
        )

    def close(self) -> None:
        """Close immediately; `disconnect` would wait for the server."""
        self._close()  # type: ignore[no-untyped-call]

    @property
    def transport(self) -> asyncio.WriteTransport:
        """The transport of the open connection."""
        assert self._writer is not None, "it is connected"
        return self._writer.transport

    @override
    def _connection_arguments(self) -> Mapping[str, Any]:
        arguments = dict(super()._connection_arguments())
        if self._access.context is not None:
            arguments["ssl"] = self._access.context
            if self._access.server_name:
                arguments["server_hostname"] = self._access.server_name
        return arguments


class _Answers(asyncio.Protocol):
    """Parses received data as the answers to the last request."""

    def __init__(self) -> None:
        self._reader = libvalkey.Reader(
            protocolError=_Nonsense, replyError=cast("Any", ErrorReply.of), notEnoughData=_NOT_ALL
        )
        self._found: list[Reply] = []
        self._wanted = 0
        self._done: Callable[[list[Reply] | str], None] | None = None
        self.why_ended = ""

    @property
    def is_awaited(self) -> bool:
        """Expected answers are outstanding."""
        return self._done is not None

    def expect(self, count: int, done: Callable[[list[Reply] | str], None]) -> None:
        """Call `done` with this many answers, or with the reason for their absence."""
        self._found, self._wanted, self._done = [], count, done
        if self.why_ended:
            self.fail(self.why_ended)

    @override
    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _NOT_ALL:
                self._found.append(reply)
        except _Nonsense as error:
            self.fail(f"it does not speak the protocol: {error}")
            return
        if len(self._found) == self._wanted:
            self._finish(self._found)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.fail("the connection was closed" if exc is None else _reason(exc))

    def fail(self, why: str) -> None:
        """Stop expecting answers."""
        self.why_ended = self.why_ended or why
        self._finish(self.why_ended)

    def _finish(self, result: list[Reply] | str) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(result)


class Link:
    """One connection, for one exchange at a time. Lives on the event loop."""

    def __init__(self, address: Address, connection: _Connection) -> None:
        self._address = address
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._transport = connection.transport
        is_plain = self._transport.get_extra_info("ssl_object") is None
        self._socket: socket.socket | None = self._transport.get_extra_info("socket") if is_plain else None
        self._answers = _Answers()
        # The client has connected and logged in. From here on, bypass its streams, which make a round trip twice as
        # long.
        self._transport.set_protocol(self._answers)
        self._due = 0.0
        """Deadline of the current answers."""
        self._limit_s = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        """Checks for late answers: occasionally, not for each exchange."""
        self._rings_at = 0.0

    @classmethod
    async def open(cls, address: Address, access: Access) -> Link:
        """Connect and log in. The caller limits the time.

        Raises:
            AccessDenied: the server refuses, for a reason that stays.
            ConnectionLost: the server cannot be reached, or is not ready.
        """
        await access.read_password()
        connection = _Connection(access, address)
        try:
            # While connecting, uvloop resolves the name in its own future. If the time limit cancels that, the future's
            # exception is never retrieved and logged as an error. So resolve the name here first.
            await asyncio.get_running_loop().getaddrinfo(*address, type=socket.SOCK_STREAM)
            await connection.connect()  # type: ignore[no-untyped-call]
            return cls(address, connection)
        except BaseException as error:
            connection.close()
            raise _why_not_open(address, error) from None

    async def ask(self, commands: Sequence[Command], limit_s: float) -> list[Reply]:
        """Send commands together and read their answers. After an exception or cancellation, close the connection.

        Raises:
            ConnectionLost: it did not answer within `limit_s`.
        """
        answers: asyncio.Future[list[Reply] | ConnectionLost] = self._loop.create_future()

        def done(result: list[Reply] | ConnectionLost) -> None:
            if not answers.done():
                answers.set_result(result)

        self.begin(commands, limit_s, done)
        result = await answers
        if isinstance(result, ConnectionLost):
            raise result
        return result

    def begin(
        self,
        commands: Sequence[Command],
        limit_s: float,
        done: Callable[[list[Reply] | ConnectionLost], None],
    ) -> None:
        """Send commands together; `done` is called with their answers, at the latest after `limit_s`.

        If it receives `ConnectionLost` instead, close the connection.
        """

        def came(result: list[Reply] | str) -> None:
            done(self._checked(result))

        self._answers.expect(len(commands), came)
        self._send([piece for command in commands for piece in _packed(command)])
        self._limit_s, self._due = limit_s, self._loop.time() + limit_s
        if self._alarm is None or self._due < self._rings_at:
            self._ring_at(self._due)

    def _send(self, pieces: list[bytes]) -> None:
        """Send immediately: a uvloop transport would wait for the end of this event loop iteration."""
        if self._socket is not None and not (
            self._transport.get_write_buffer_size() or self._transport.is_closing()
        ):
            try:
                sent = os.writev(self._socket.fileno(), pieces)
            except OSError:  # the buffer is full or the socket broken: the transport handles it
                sent = 0
            while pieces and sent >= len(pieces[0]):
                sent -= len(pieces.pop(0))
            if sent:
                pieces[0] = pieces[0][sent:]
        if pieces:
            self._transport.writelines(pieces)

    def _checked(self, result: list[Reply] | str) -> list[Reply] | ConnectionLost:
        if isinstance(result, str):
            return ConnectionLost(f"{shown(self._address)} did not answer: {result}", sent=True)
        first = result[0]
        if isinstance(first, ErrorReply) and first.code in _NOT_READY:
            return ConnectionLost(f"{shown(self._address)} is not ready: {first}", sent=False)
        if isinstance(first, ErrorReply) and first.code == "NOAUTH":
            return AccessDenied(f"{shown(self._address)} denies access now: {first}")
        return result

    def _ring_at(self, moment: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._rings_at = moment
        self._alarm = self._loop.call_at(moment, self._rang)

    def _rang(self) -> None:
        self._alarm = None
        if not self._answers.is_awaited:
            return
        if self._loop.time() < self._due:
            self._ring_at(self._due)
        else:
            self._answers.fail(f"the limit is {self._limit_s:.2g} s")

    @property
    def has_ended(self) -> bool:
        """The connection is known to be closed."""
        return bool(self._answers.why_ended) or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection, even during an exchange."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._connection.close()


_NOT_ALL = object()
_NOT_READY = frozenset({"LOADING"})


class _Nonsense(Exception):
    """Received data violate the protocol."""


def _why_not_open(address: Address, error: BaseException) -> BaseException:
    where = shown(address)
    if isinstance(error, theirs.AuthenticationError | theirs.AuthorizationError | theirs.NoPermissionError):
        return AccessDenied(f"{where} denies access: {error}")
    if isinstance(error, theirs.BusyLoadingError):
        return ConnectionLost(f"{where} is loading its data", sent=False)
    if isinstance(error, theirs.ResponseError):
        return AccessDenied(f"{where} refuses the connection: {error}")
    if isinstance(error, theirs.ValkeyError | OSError):
        deepest = _deepest(error)
        if _is_about_tls(deepest):
            return AccessDenied(f"TLS with {where} must succeed: {deepest}")
        return ConnectionLost(f"{where} cannot be connected to: {_reason(deepest)}", sent=False)
    return error


def _packed(command: Command) -> Sequence[bytes]:
    """Encode a command without copying a large last word."""
    *words, last = command
    if not isinstance(last, bytes) or len(last) < _LARGE:
        return [libvalkey.pack_command(tuple(command))]
    _, _, rest = libvalkey.pack_command(tuple(words)).partition(b"\r\n")
    return [b"*%d\r\n%s$%d\r\n" % (len(command), rest, len(last)), last, b"\r\n"]


def _deepest(error: BaseException) -> BaseException:
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__ or error
    return error


def _is_about_tls(error: BaseException) -> bool:
    return isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.IncompleteReadError | EOFError):
        return "the connection was closed"
    # Their error numbers are not those of the system.
    has_own_numbers = isinstance(error, socket.gaierror | ssl.SSLError)
    if isinstance(error, OSError) and error.errno is not None and not has_own_numbers:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
