"""Parses the URL of a shared store.

    valkey://[USER[:PASSWORD]@]HOST[:PORT][,HOST[:PORT]...][/DB][?NAME=VALUE&...]

`valkeys` uses TLS; `redis` and `rediss` are aliases of `valkey` and `valkeys`. Several addresses belong to Sentinels
(`sentinel=NAME`), to nodes of a Cluster (`cluster=true`), or to servers of which one is the primary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from stepwell_server.files import private_files

USER_VARIABLE, PASSWORD_VARIABLE = "STEPWELL_VALKEY_USER", "STEPWELL_VALKEY_PASSWORD"
SENTINEL_USER_VARIABLE = "STEPWELL_VALKEY_SENTINEL_USER"
SENTINEL_PASSWORD_VARIABLE = "STEPWELL_VALKEY_SENTINEL_PASSWORD"  # noqa: S105 (a name)
DEFAULT_PREFIX = "stepwell:"
DEFAULT_PARTITIONS = 64
MAX_PARTITIONS = 4096
MAX_PREFIX_BYTES = 64
MAX_REPLICAS = 16
_PORT, _SENTINEL_PORT = 6379, 26379
_PLAIN, _SECURE = frozenset({"valkey", "redis"}), frozenset({"valkeys", "rediss"})
SCHEMES = _PLAIN | _SECURE
_TIMEOUT_MS = 2000
_TIMEOUTS_MS = range(50, 60_001)
_WEEK_S = 7 * 24 * 3600
_TOMBSTONES_S = range(60, 10 * 365 * 24 * 3600 + 1)

Address = tuple[str, int]
"""Host and port."""


class UrlError(ValueError):
    """The URL of a store is invalid. The message explains the problem and never contains a password."""


@dataclasses.dataclass(frozen=True, slots=True)
class Login:
    """Credentials; both empty: no login."""

    user: str = ""
    password: str = dataclasses.field(default="", repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Tls:
    """TLS settings."""

    ca: Path | None = None
    """CA certificates, instead of the system's."""
    cert: Path | None = None
    """Client certificate, for servers that require one; needs `key`."""
    key: Path | None = None
    server_name: str = ""
    """Expected host name in the certificate; empty: the host of the address."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoreUrl:
    """The location of a shared store, and its options."""

    addresses: tuple[Address, ...]
    kind: Literal["server", "sentinel", "cluster"] = "server"
    sentinel: str = ""
    """The name under which Sentinels know the primary."""
    database: int = 0
    login: Login = Login()
    sentinel_login: Login = Login()
    tls: Tls | None = None
    prefix: str = DEFAULT_PREFIX
    """Prefix of all keys."""
    partitions: int | None = None
    """Number of partitions; None: as in the existing store, `DEFAULT_PARTITIONS` for a new one."""
    replicas: int = 0
    """Number of replicas that must have a change on disk before it is acknowledged with durability `sync`."""
    timeout_s: float = _TIMEOUT_MS / 1000
    """Time limit for one answer."""
    password_file: Path | None = None
    """File of the password, which is read again for each connection."""
    tombstone_s: float = _WEEK_S
    """Lifetime of tombstones."""

    def __str__(self) -> str:
        """The URL without passwords and default values."""
        user = f"{quote(self.login.user, safe='')}@" if self.login.user else ""
        hosts = ",".join(shown(address) for address in self.addresses)
        tls = self.tls or Tls()
        options = {
            "sentinel": self.sentinel or None,
            "cluster": "true" if self.kind == "cluster" else None,
            "prefix": self.prefix if self.prefix != DEFAULT_PREFIX else None,
            "partitions": self.partitions,
            "replicas": self.replicas or None,
            "timeout_ms": round(self.timeout_s * 1000) if self.timeout_s != _TIMEOUT_MS / 1000 else None,
            "tombstone_s": round(self.tombstone_s) if self.tombstone_s != _WEEK_S else None,
            "password_file": self.password_file,
            **{name: getattr(tls, name) or None for name in ("ca", "cert", "key", "server_name")},
        }
        query = urlencode({name: value for name, value in options.items() if value is not None}, safe="/:")
        scheme = "valkey" if self.tls is None else "valkeys"
        return f"{scheme}://{user}{hosts}/{self.database}{'?' if query else ''}{query}"


def shown(address: Address) -> str:
    """Format an address."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_store_url(text: str) -> bool:
    """Whether a text is a URL, as for a shared store."""
    return "://" in text


def parse(text: str, environ: Mapping[str, str] | None = None) -> StoreUrl:
    """Parse a URL. User and password may also come from the environment, and the password from a file.

    Raises:
        UrlError: it breaks a rule, or a file that it names cannot be used.
    """
    environ = os.environ if environ is None else environ
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise UrlError(f"it must be a URL: {error}") from None
    if parts.scheme not in SCHEMES:
        raise UrlError(
            f"it must begin with valkey://, valkeys://, redis:// or rediss://; got {parts.scheme or text[:20]!r}"
        )
    if parts.fragment:
        raise UrlError("it must not contain '#': in a name or password write %23")
    options = _Options(parts.query)
    sentinel = options.text("sentinel")
    is_cluster = options.flag("cluster")
    if sentinel and is_cluster:
        raise UrlError("sentinel and cluster must not be given together: a Cluster fails over by itself")
    user_and_password, _, hosts = parts.netloc.rpartition("@")
    _require_whole_password(parts)
    addresses = _addresses(hosts, _SENTINEL_PORT if sentinel else _PORT)
    database = _database(parts)
    if is_cluster and database:
        raise UrlError(f"the database of a Cluster must be 0; got {database}")
    password_file = options.path("password_file")
    tls = _tls(options) if parts.scheme in _SECURE else None
    url = StoreUrl(
        addresses=addresses,
        kind="cluster" if is_cluster else "sentinel" if sentinel else "server",
        sentinel=sentinel,
        database=database,
        login=_login(user_and_password, password_file, environ),
        password_file=password_file,
        sentinel_login=Login(
            environ.get(SENTINEL_USER_VARIABLE, ""), environ.get(SENTINEL_PASSWORD_VARIABLE, "")
        ),
        tls=tls,
        prefix=_prefix(options.text("prefix", DEFAULT_PREFIX)),
        partitions=options.number("partitions", range(1, MAX_PARTITIONS + 1)),
        replicas=options.number("replicas", range(MAX_REPLICAS + 1)) or 0,
        timeout_s=(options.number("timeout_ms", _TIMEOUTS_MS) or _TIMEOUT_MS) / 1000,
        tombstone_s=options.number("tombstone_s", _TOMBSTONES_S) or _WEEK_S,
    )
    options.require_empty(is_secure=tls is not None)
    return url


class _Options:
    """The options after the question mark. Each is taken once; those left at the end are unknown."""

    _OF_TLS = ("ca", "cert", "key", "server_name")
    _KNOWN = (
        *("prefix", "partitions", "replicas", "sentinel", "cluster", "timeout_ms", "tombstone_s"),
        *("password_file", *_OF_TLS),
    )

    def __init__(self, query: str) -> None:
        self._left: dict[str, str] = {}
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
        except (ValueError, UnicodeDecodeError):
            raise UrlError("after '?' there must be NAME=VALUE, separated by '&'") from None
        for name, value in pairs:
            if name in self._left:
                raise UrlError(f"{name} must be given once")
            self._left[name] = value

    def text(self, name: str, default: str = "") -> str:
        value = self._left.pop(name, None)
        if value == "":
            raise UrlError(f"{name} must not be empty")
        return default if value is None else value

    def flag(self, name: str) -> bool:
        value = self.text(name, "false")
        if value not in {"true", "false"}:
            raise UrlError(f"{name} must be true or false; got {value!r}")
        return value == "true"

    def number(self, name: str, allowed: range) -> int | None:
        value = self.text(name)
        if not value:
            return None
        if not (value.isascii() and value.isdecimal()) or len(value) > 12 or int(value) not in allowed:
            raise UrlError(f"{name} must be a number from {allowed[0]} to {allowed[-1]}; got {value!r}")
        return int(value)

    def path(self, name: str) -> Path | None:
        value = self.text(name)
        return Path(value) if value else None

    def require_empty(self, *, is_secure: bool) -> None:
        for name in self._left:
            if name in self._OF_TLS and not is_secure:
                raise UrlError(f"{name} must be given with valkeys:// or rediss://, which use TLS")
            raise UrlError(f"{name} is not a known option; the options are {', '.join(self._KNOWN)}")


def _require_whole_password(parts: SplitResult) -> None:
    """Detect a password that made the URL split in the wrong place, so that no message shows a part of it.

    Raises:
        UrlError: there is such a password.
    """
    host, _, port = parts.netloc.partition(":")
    is_address = "@" in parts.netloc or host.startswith("[") or "," in port or not port or port.isdecimal()
    if "@" in parts.path or ("@" in parts.query and not is_address):
        raise UrlError("in a name or password '/' must be written %2F, '?' %3F and '@' %40")


def _addresses(hosts: str, port: int) -> tuple[Address, ...]:
    return tuple(_address(part, port) for part in hosts.split(","))


def _address(text: str, default_port: int) -> Address:
    problem = (
        "an address must be HOST or HOST:PORT with a port from 1 to 65535, an IPv6 address in brackets; "
        f"got {text!r}"
    )
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise UrlError(problem)
        port = rest[1:] if rest else ""
        is_whole = rest != ":"
    else:
        host, colon, port = text.partition(":")
        is_whole = not colon or bool(port)
    if not host or not is_whole:
        raise UrlError(problem)
    if not port:
        return host, default_port
    if not (port.isascii() and port.isdecimal()) or len(port) > 5 or not 1 <= int(port) <= 65535:
        raise UrlError(problem)
    return host, int(port)


def _database(parts: SplitResult) -> int:
    text = parts.path.removeprefix("/")
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal()) or len(text) > 5:
        raise UrlError(f"after the addresses there must be a database number, as in /0; got {text!r}")
    return int(text)


def _prefix(prefix: str) -> str:
    size = len(prefix.encode())
    if size > MAX_PREFIX_BYTES or not prefix.isprintable() or "{" in prefix or "}" in prefix:
        raise UrlError(
            f"prefix must have at most {MAX_PREFIX_BYTES} bytes, all printable, and no braces; got {prefix!r}"
        )
    return prefix


def _login(text: str, password_file: Path | None, environ: Mapping[str, str]) -> Login:
    user, colon, password = text.partition(":")
    user, password = unquote(user), unquote(password)
    if password_file is not None:
        if colon:
            raise UrlError("password_file must not be given with a password in the URL")
        password = password_in(password_file)
    return Login(user or environ.get(USER_VARIABLE, ""), password or environ.get(PASSWORD_VARIABLE, ""))


def password_in(path: Path) -> str:
    """Read a password file.

    Raises:
        UrlError: it cannot be read, is not private, or does not have exactly one line.
    """
    try:
        private_files.require_secret(
            path, group_may_read=True
        )  # container secrets are readable by their group
        lines = path.read_text().splitlines()
    except private_files.NotPrivateError as error:
        raise UrlError(f"password_file: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UrlError(f"password_file: {path} must be readable: {reason}") from None
    if len(lines) != 1 or not lines[0]:
        raise UrlError(f"password_file: {path} must have one line, the password; it has {len(lines)}")
    return lines[0]


def _tls(options: _Options) -> Tls:
    tls = Tls(options.path("ca"), options.path("cert"), options.path("key"), options.text("server_name"))
    if (tls.cert is None) != (tls.key is None):
        raise UrlError("cert and key must be given together")
    return tls
