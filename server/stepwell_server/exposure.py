"""Who can reach what a server listens on, and whether that is what its user has asked for.

Who listens beyond loopback is reached by whoever the network lets through. There, callers must be known and nobody
else must read along; `--insecure-listen` is how one says that something else sees to that.
"""

from __future__ import annotations

import ipaddress
import socket

from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.errors import StartError
from stepwell_server.logs import Log
from stepwell_server.settings import Settings

_log = Log("reach")


def require_closed(settings: Settings, *, front_problem: str) -> None:
    """Refuse settings that open the server to others without a word. What was allowed by an option is a warning.

    Args:
        settings: of the server.
        front_problem: why the front in Python serves although `--front` does not ask for it, and how to get the native
            one; empty if the native one serves.

    Raises:
        StartError: others could reach it.
    """
    if others := beyond_loopback(settings.listen):
        _require_known(settings, "--listen", settings.listen, others)
        _require_bounds(settings, front_problem)
    if settings.http_listen is not None:
        _require_native(settings, front_problem)
        if others := beyond_loopback(settings.http_listen):
            _require_known(settings, "--http-listen", settings.http_listen, others)
    metrics = settings.metrics_listen
    if not isinstance(metrics, Address) or settings.metrics_token_file is not None:
        return
    if others := beyond_loopback(metrics):
        problem = f"anybody who reaches {_named(metrics, others)} can read the metrics, which name models and tenants"
        if not settings.insecure_listen:
            raise StartError(
                "--metrics-listen: beyond loopback it must be given with --metrics-token-file, or with --insecure-listen"
                f" to accept the risk; {problem}"
            )
        _log.warning(f"--insecure-listen: {problem}")


def beyond_loopback(address: Address | UnixAddress) -> list[str]:
    """Return the addresses of a host that other machines can reach.

    A name may resolve to several; one beyond loopback is enough. Addresses that are not this machine's cannot be
    listened on, but count as well, as that may change.
    """
    if isinstance(address, UnixAddress):
        return []
    found = {str(where[0]) for *_, where in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)}
    return sorted(host for host in found if not _is_loopback(host))


def _named(address: Address | UnixAddress, others: list[str]) -> str:
    """Format an address, with what a name resolves to."""
    hosts = "" if isinstance(address, Address) and others == [address.host] else f" ({', '.join(others)})"
    return f"{address}{hosts}"


def _is_loopback(host: str) -> bool:
    found = ipaddress.ip_address(host)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def _require_native(settings: Settings, front_problem: str) -> None:
    """Refuse HTTP on the front in Python, which speaks gRPC only."""
    if settings.front == "python":
        raise StartError(
            "--http-listen: must be left out with --front python; only the native front serves HTTP"
        )
    if front_problem:
        raise StartError(f"--http-listen: only the native front serves HTTP; {front_problem}")


def _require_known(
    settings: Settings, option: str, address: Address | UnixAddress, others: list[str]
) -> None:
    has_tls = settings.tls_cert is not None
    # Only who has a certificate of these CAs gets in, whether or not there is a file that says who is who.
    knows = settings.asks_callers or settings.tls_client_ca is not None
    problems = []
    if not has_tls:
        problems.append("it does not use TLS (--tls-cert, --tls-key)")
    if not knows:
        problems.append("it does not authenticate callers (--auth-tokens, --auth-jwks or --tls-client-ca)")
    if not problems:
        return
    what = " and ".join(problems)
    if not settings.insecure_listen:
        raise StartError(
            f"{option}: beyond loopback the server must use TLS and authenticate callers, or be given --insecure-listen to"
            f" accept the risk; {what}; got {_named(address, others)}"
        )
    _log.warning(f"--insecure-listen: other machines reach this server, and {what}", listen=str(address))


def _require_bounds(settings: Settings, front_problem: str) -> None:
    """Let the front in Python, which cannot bound what clients take, be reached from elsewhere only if it was asked for."""
    if settings.front == "python":
        _log.warning(
            "the Python front does not limit the resources that clients use", listen=str(settings.listen)
        )
    elif front_problem:
        raise StartError(
            "--listen: without the native front it must be a loopback address, because the Python front does not limit"
            f" the resources that clients use; {front_problem}; or accept that with --front python (docs/operate/run.md);"
            f" got {settings.listen}"
        )
