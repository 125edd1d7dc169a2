"""Addresses of servers: what a caller may write, and what gRPC takes."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import NamedTuple, NoReturn

from stepwell.errors import InvalidInputError

_RULE = "HOST:PORT, [IPv6]:PORT, unix:PATH, dns:///HOST:PORT, grpc://HOST:PORT or grpcs://HOST:PORT"
_HOST = re.compile(r"[^\s/:@?#\[\]\0-\x1f\x7f]+")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BRACKETS = re.compile(r"\[([^\]]*)\]")
#: Maximum length of a Unix socket's path in bytes, without the terminating 0.
_MAX_PATH_BYTES = 107
_RESOLVERS = ("dns:///", "dns:", "ipv4:", "ipv6:")
"""Prefixes that gRPC accepts before HOST:PORT."""


class Address(NamedTuple):
    """The address of a server."""

    target: str
    """The address as gRPC takes it, without a scheme of Stepwell's."""
    tls: bool | None
    """Whether its scheme asks for TLS; None if it has no scheme."""


def parse(name: str, given: str) -> Address:
    """Reads an address.

    Args:
        name: The argument or variable it comes from, for messages.
        given: The address.

    Raises:
        InvalidInputError: It is not an address.
    """
    if not isinstance(given, str):
        raise InvalidInputError(f"{name} must be a string, {_RULE}; got {given!r}")
    if given.startswith("unix:"):
        return _unix(name, given)
    for resolver in _RESOLVERS:
        if given.startswith(resolver):
            _check_host_and_port(name, given, given.removeprefix(resolver))
            return Address(given, None)
    scheme = _SCHEME.fullmatch(given)
    if scheme is None:
        _check_host_and_port(name, given, given)
        return Address(given, None)
    kind, rest = scheme[1].lower(), scheme[2].removesuffix("/")
    if kind in {"http", "https"}:
        host = rest.partition("/")[0]
        instead = repr(host) if kind == "http" else f"{'grpcs://' + host!r}, or {host!r} with tls=True"
        _refuse(name, given, f"Stepwell speaks gRPC, which has no {kind}:// addresses: write {instead}")
    if kind not in {"grpc", "grpcs"}:
        _refuse(name, given, f"{kind}:// is not a known scheme")
    _check_host_and_port(name, given, rest)
    return Address(rest, kind == "grpcs")


def split(text: str) -> list[str]:
    """Splits a text with addresses separated by commas. The path of a Unix socket may contain commas itself."""
    start = 0 if text.startswith("unix:") else text.find(",unix:") + 1
    if not start and not text.startswith("unix:"):
        return text.split(",")
    before = text[: start - 1].split(",") if start else []
    return before + re.split(",(?=unix:)", text[start:])


def parse_all(name: str, given: str) -> tuple[tuple[str, ...], bool | None]:
    """Reads the address of a server, or those of its replicas, separated by commas.

    Returns:
        The addresses for gRPC, and whether their schemes ask for TLS; None if they have no schemes.

    Raises:
        InvalidInputError: One is not an address, or is repeated, or their schemes differ in TLS.
    """
    pieces = [given]
    if "," in str(given):
        pieces = [each.strip() for each in split(given)]
    if len(pieces) > 1 and not all(pieces):
        raise InvalidInputError(f"{name} must have an address before and after each comma; got {given!r}")
    found = [parse(name, each) for each in pieces]
    targets = [each.target for each in found]
    # host names are case-insensitive
    names = [target if target.startswith("unix:") else target.lower() for target in targets]
    again = [target for i, target in enumerate(targets) if names[i] in names[:i]]
    if again:
        raise InvalidInputError(f"{name} must name each replica once; got {again[0]!r} twice")
    schemes = {each.tls for each in found} - {None}
    if len(schemes) > 1:
        raise InvalidInputError(f"{name} must be all grpc:// or all grpcs://; got {given!r}")
    return tuple(targets), next(iter(schemes), None)


def join(name: str, given: object) -> str:
    """Joins addresses of replicas to one text, which `parse_all` reads.

    Raises:
        InvalidInputError: They are not addresses.
    """
    if isinstance(given, str):
        text = given
    elif isinstance(given, list | tuple) and given and all(isinstance(each, str) for each in given):
        for each in given:
            parse(name, each)
            if "," in each:
                _refuse(name, each, "a path in a list must not contain a comma")
        text = ",".join(sorted(given, key=lambda each: each.startswith("unix:")))
    else:
        raise InvalidInputError(
            f"{name} must be a string, {_RULE}, or a list of one or more of them; got {given!r}"
        )
    parse_all(name, text)
    return text


def is_name(target: str) -> bool:
    """Whether it is a name of which every address is a replica."""
    return target.startswith("dns:///")


def host_and_port(target: str) -> tuple[str, int]:
    """The host and port of an address that was read."""
    host, _, port = target.removeprefix("dns:///").rpartition(":")
    return host.strip("[]"), int(port)


def of_host(host: str, port: int) -> str:
    """The address of a host that was looked up."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def are_on_this_machine(text: str) -> bool:
    """Whether messages to all of these addresses stay on this machine."""
    return all(is_on_this_machine(each) for each in split(text))


def is_on_this_machine(target: str) -> bool:
    """Whether messages to this address stay on this machine: a Unix socket, `localhost` or a loopback address."""
    if target.startswith("unix:"):
        return True
    for resolver in _RESOLVERS:
        target = target.removeprefix(resolver)
    host = target.rpartition(":")[0].strip("[]").lower()
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _unix(name: str, given: str) -> Address:
    path = given.removeprefix("unix:")
    if not path or (path.startswith("//") and not path.startswith("///")):
        raise InvalidInputError(f"{name} must be unix:PATH or unix:///PATH; got {given!r}")
    length = len(os.fsencode(path.removeprefix("//")))
    if length > _MAX_PATH_BYTES:
        raise InvalidInputError(
            f"{name} must be unix:PATH with a path of at most {_MAX_PATH_BYTES} bytes; got one of {length}"
        )
    return Address(given, None)


def _check_host_and_port(name: str, given: str, text: str) -> None:
    problem = host_and_port_problem(text)
    if problem:
        _refuse(name, given, problem)


def host_and_port_problem(text: str) -> str:
    """Why a text is not HOST:PORT or [IPv6]:PORT; empty if it is."""
    in_brackets = _BRACKETS.match(text)
    if in_brackets is not None:
        if not _is_ipv6(in_brackets[1]):
            return f"{in_brackets[0]} is not an IPv6 address"
        host, rest = in_brackets[0], text[in_brackets.end() :]
    else:
        if text.count(":") > 1:
            return "write an IPv6 address in brackets, such as [::1]:50051"
        host, colon, port = text.partition(":")
        rest = colon + port
        if not _HOST.fullmatch(host):
            return f"{host!r} is not the name of a host" if host else "the host is missing"
    if rest in {"", ":"}:
        return f"the port is missing, as in {host}:50051"
    port = rest[1:]
    if rest[0] != ":" or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        return f"{rest.removeprefix(':')!r} is not a port from 1 to 65535"
    return ""


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _refuse(name: str, given: str, why: str) -> NoReturn:
    raise InvalidInputError(f"{name} must be {_RULE}; got {given!r}: {why}")
