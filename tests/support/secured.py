"""A switch for the harness: with `STEPWELL_TEST_SECURED=1` its servers speak TLS, and know who calls by tokens.

The caller is a plain user of a tenant. What a client needs is in the address and in the environment, so that tests, and
the processes that they start, connect as ever: a secured server's address begins with ``grpcs://``, the system's
authorities are those of the machine and that of the test run, and the SDK finds its token in ``STEPWELL_TOKEN``. Channels
that tests make without the SDK come from `channel`, which does the same for them.

What is about plain connections, or starts servers without the harness, has the mark ``plain(reason)``, and is skipped.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import os
import socket
import ssl
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio

from stepwell_server.auth import token_file
from stepwell_server.auth.tokens import Token, digest_of, new_token
from stepwell_server.core.callers import Caller, Role
from stepwell_server.rpc.fronts.certificates import Certificates
from support.certificates import Authority, Pair
from support.run_folder import run_folder
from support.servers.fork_server import ForkedServer

VARIABLE = "STEPWELL_TEST_SECURED"
SCHEME = "grpcs://"
TENANT = "acme"
_PATIENCE_S = 100.0
_TOKEN = "STEPWELL_TOKEN"
_ROOTS = ("SSL_CERT_FILE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")
"""Where the SDK looks for authorities, and where gRPC does."""
_OWN = {"--auth-tokens", "--auth-certificates", "--auth-jwks", "--tls-cert"}
"""Options of tests that secure a server by themselves."""


class Material(NamedTuple):
    """Files of the test run, and the token."""

    authority: Path
    roots: Path
    """It, and the authorities of this machine."""
    pair: Pair
    tokens: Path
    token: str


def is_on() -> bool:
    """Servers that are started now are secured."""
    return os.environ.get(VARIABLE, "") not in {"", "0"}


def switch_on() -> None:
    """From now on: servers that are started are secured, and clients that are made trust them and have the token."""
    made = _material()
    os.environ.update({VARIABLE: "1", _TOKEN: made.token} | dict.fromkeys(_ROOTS, str(made.roots)))


@contextlib.contextmanager
def switched_on() -> Iterator[None]:
    """The same for a block."""
    before = {name: os.environ.get(name) for name in (VARIABLE, _TOKEN, *_ROOTS)}
    switch_on()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def options(arguments: Sequence[str] = ()) -> list[str]:
    """The options that secure a server with these arguments; none if it is not to be."""
    if not is_on() or _OWN & set(arguments):
        return []
    made = _material()
    (cert, key), tokens = made.pair, made.tokens
    return ["--tls-cert", str(cert), "--tls-key", str(key), "--auth-tokens", str(tokens)]


class Server(ForkedServer):
    """A `LocalServer` that the switch secures."""

    def __init__(
        self,
        models: Mapping[str, str | os.PathLike[str]] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        extra_args: Sequence[str] = (),
        **others: Any,
    ) -> None:
        added = options(extra_args)
        self._scheme = SCHEME if added else ""
        super().__init__(models, data_dir, [*extra_args, *added], **others)

    @property
    def address(self) -> str:
        """See `LocalServer`; it says whether it is secured."""
        return f"{self._scheme}{super().address}"

    def stop(self, timeout_s: float = _PATIENCE_S) -> int:
        """See `LocalServer`; only a hang is killed."""
        return super().stop(timeout_s)


def host_and_port(address: str) -> str:
    """An address without what it says of TLS."""
    return address.removeprefix(SCHEME)


def channel(address: str, options: Sequence[tuple[str, Any]] = (), *, token: bool = True) -> grpc.Channel:
    """A channel to a server, with the token if that is secured; without it where the test has its own."""
    if not address.startswith(SCHEME):
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(host_and_port(address), _credentials(token), options=options)


def channel_aio(
    address: str, options: Sequence[tuple[str, Any]] = (), *, token: bool = True
) -> grpc.aio.Channel:
    """The same for asyncio."""
    if not address.startswith(SCHEME):
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(host_and_port(address), _credentials(token), options=options)


def certificates() -> Certificates | None:
    """For a front of the test's own process."""
    if not is_on():
        return None
    cert, key = _material().pair
    return Certificates(cert.read_bytes(), key.read_bytes(), None)


def named(address: object) -> str:
    """The address of a front that has the `certificates`."""
    return f"{SCHEME if is_on() else ''}{address}"


def connected(address: str, receive_buffer: int = 0) -> socket.socket:
    """A TCP connection to a server, over TLS if it is secured; see `Http2` for the buffer."""
    host, _, port = host_and_port(address).rpartition(":")
    found = socket.socket()
    if receive_buffer:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    found.settimeout(_PATIENCE_S)
    found.connect((host, int(port)))
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return contexts()[1].wrap_socket(found, server_hostname=host) if address.startswith(SCHEME) else found


def add_port(server: grpc.Server, port: int = 0) -> str:
    """Let a server of the test's own process listen; its address. It speaks TLS with the switch, and asks nobody."""
    if not is_on():
        return f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    cert, key = _material().pair
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    return f"{SCHEME}127.0.0.1:{server.add_secure_port(f'127.0.0.1:{port}', credentials)}"


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS as a server of the run speaks it, and as a client that trusts it; both speak HTTP/2 over it."""
    made = _material()
    authority, (cert, key) = made.authority, made.pair
    as_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    as_server.load_cert_chain(cert, key)
    as_client = ssl.create_default_context(cafile=authority)
    as_client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default since Python 3.13
    for context in (as_server, as_client):
        context.set_alpn_protocols(["h2"])
    return as_server, as_client


def _credentials(token: bool = True) -> grpc.ChannelCredentials:
    tls = grpc.ssl_channel_credentials(_material().authority.read_bytes())
    if not token:
        return tls
    return grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(_material().token))


@functools.cache
def _material() -> Material:
    """Made by the first process of the run that asks."""
    folder = run_folder() / "secured"
    if not folder.exists():
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        _make(unfinished)
        with contextlib.suppress(OSError):  # another process was first
            unfinished.rename(folder)
    pair = Pair(folder / "cert.pem", folder / "key.pem")
    files = Material(folder / "ca.pem", folder / "roots.pem", pair, folder / "callers.tokens", "")
    return files._replace(token=(folder / "token").read_text())


def _make(folder: Path) -> None:
    authority = Authority(folder)
    pair = authority.issue()
    for made, name in ((authority.cert, "ca.pem"), (pair.cert, "cert.pem"), (pair.key, "key.pem")):
        made.rename(folder / name)
    (folder / "key.pem").chmod(0o600)
    system = ssl.get_default_verify_paths().cafile
    others = Path(system).read_bytes() if system and Path(system).is_file() else b""
    (folder / "roots.pem").write_bytes((folder / "ca.pem").read_bytes() + others)
    secret = new_token()
    caller = Caller("tester", TENANT, Role.USER)
    token_file.add(folder / "callers.tokens", Token(caller, digest_of(secret), dt.datetime.now(dt.UTC), None))
    (folder / "token").write_text(secret)
