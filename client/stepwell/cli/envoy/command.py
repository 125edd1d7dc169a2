"""The command: its options, and what is refused."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stepwell._base import addresses
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.types import Duration, Size

if TYPE_CHECKING:
    from stepwell.cli.envoy.bootstrap import Address, CallerTls, ReplicaTls

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType


_Function = TypeVar("_Function", bound=Callable[..., Any])
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#]+")
#: Words before the document, as comments.
_HEAD = """\
# Made by `stepwell envoy-config` of Stepwell {version}; docs/replicas.md says what it does.
"""


class HostAndPort(ParamType):
    """HOST:PORT, with an IPv6 address in brackets. Becomes a `bootstrap.Address`.

    Args:
        any_port: Whether port 0 may be given, for one that is free.
    """

    name = "address"

    def __init__(self, *, any_port: bool = False) -> None:
        self.any_port = any_port

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        """Read and check it."""
        from stepwell.cli.envoy.bootstrap import Address

        text = str(value)
        host, _, port = text.rpartition(":")
        checked = f"{host}:1" if self.any_port and port == "0" else text
        problem = addresses.host_and_port_problem(checked)
        if problem:
            self.fail(f"must be HOST:PORT or [IPv6]:PORT; got {text!r}: {problem}", param, ctx)
        return Address(host.strip("[]"), int(port))


def _file(name: str, text: str) -> Callable[[_Function], _Function]:
    return click.option(name, metavar="FILE", default="", help=text)


@click.command(
    "envoy-config",
    cls=Command,
    short_help="Write the configuration of an Envoy in front of replicas.",
    examples=(
        "stepwell envoy-config --replica 127.0.0.1:50051 --replica 127.0.0.1:50052 > envoy.yaml",
        "stepwell envoy-config --dns stepwell-replicas:50051 --listen 0.0.0.0:8443 --tls-cert tls.crt --tls-key tls.key",
    ),
    exit_codes=(("0", "done"), ("2", "the command line is wrong")),
)
@click.option(
    "--replica",
    "replicas",
    metavar="HOST:PORT",
    type=HostAndPort(),
    multiple=True,
    help="A replica; give it once for each.",
)
@click.option(
    "--dns",
    metavar="NAME:PORT",
    type=HostAndPort(),
    help="A name that stands for the addresses of all replicas, and is looked up again and again: a headless Service of "
    "Kubernetes, say.",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    type=HostAndPort(any_port=True),
    default="127.0.0.1:8080",
    help="Where callers reach Envoy, with gRPC, gRPC-Web and JSON. Default: 127.0.0.1:8080.",
)
@click.option(
    "--admin",
    metavar="HOST:PORT|off",
    default="127.0.0.1:9901",
    help="Where Envoy shows what it does, and takes orders from whoever reaches it. Default: 127.0.0.1:9901.",
)
@_file("--tls-cert", "Certificate that Envoy shows callers (PEM). Files are named as where Envoy runs.")
@_file("--tls-key", "Its key (PEM).")
@_file("--tls-client-ca", "Callers must show a certificate of these authorities (PEM).")
@_file(
    "--replica-tls-ca",
    "Replicas are reached with TLS; these authorities have signed their certificates (PEM).",
)
@click.option(
    "--replica-tls-name",
    metavar="NAME",
    default="",
    help="What the replicas' certificates are for. Default: the name of --dns, or of all --replica if it is the same.",
)
@_file("--replica-tls-cert", "Certificate that Envoy shows replicas (PEM).")
@_file("--replica-tls-key", "Its key (PEM).")
@click.option(
    "--host",
    "hosts",
    metavar="NAME",
    multiple=True,
    help="Name or address by which callers call Envoy, as https://NAME; others are refused. Default: the names of this "
    "machine for itself where --listen is one of them, else any.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    metavar="ORIGIN",
    multiple=True,
    help="Origin whose pages may call from a browser, such as https://app.example.org, or * for all. Others are refused. "
    "Default: none.",
)
@click.option(
    "--json-timeout-s",
    metavar="TIME",
    type=Duration(0.001, 86_400.0),
    default=60.0,
    help="How long a call in JSON may take: it has no deadline of its own. Default: 60.",
)
@click.option(
    "--max-heap",
    metavar="SIZE",
    type=Size(1 << 26, 1 << 50),
    help="Memory of Envoy at most: at 85 % of it Envoy ends the calls that hold most, at 95 % it takes no new ones. "
    "Default: no limit.",
)
@click.option(
    "--access-log",
    metavar="FILE|-|off",
    default="-",
    help="Where Envoy writes a line of JSON for each call; - is its standard output. Default: -.",
)
@click.option(
    "--insecure-listen",
    is_flag=True,
    help="Listen beyond loopback without TLS: say so where something else sees to who gets that far.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    default="-",
    help="File to write. Default: standard output.",
)
@click.option("--force", is_flag=True, help="Replace the file of -o if it is there.")
def envoy_config(
    replicas: Sequence[Address],
    dns: Address | None,
    listen: Address,
    admin: str,
    tls_cert: str,
    tls_key: str,
    tls_client_ca: str,
    replica_tls_ca: str,
    replica_tls_name: str,
    replica_tls_cert: str,
    replica_tls_key: str,
    hosts: Sequence[str],
    cors_origins: Sequence[str],
    json_timeout_s: float,
    max_heap: int | None,
    access_log: str,
    insecure_listen: bool,
    output: str,
    force: bool,
) -> None:
    """Write the configuration of an Envoy in front of replicas of 'stepwell serve', as YAML.

    Replicas share a store (--store valkey://...), so that any of them serves any session. Envoy sends the calls of one
    session to one replica: by the header stepwell-session, which has the session's id, percent-encoded; else, of a
    call in JSON, by the id in its path. It leaves out replicas that do not answer or say that they stop. It tries
    again only what no replica has seen.

    GET /healthz says whether Envoy takes calls and has a replica for them, to probes and load balancers.

    The file has the protocol in it as Envoy needs it for JSON: write it anew for a new release of Stepwell.
    """
    from stepwell.cli.envoy import _yaml
    from stepwell.cli.envoy.bootstrap import Plan, bootstrap

    if bool(replicas) == (dns is not None):
        raise click.UsageError(
            "replicas must be given by --replica, once for each, or by --dns; got both or neither"
        )
    given = list(replicas) if dns is None else [dns]
    if len(set(given)) != len(given):
        raise click.UsageError("--replica must name each replica once")
    for origin in cors_origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise click.UsageError(
                f"--cors-origin must be *, or SCHEME://HOST[:PORT] as browsers send it; got {origin!r}"
            )
    caller_tls = _caller_tls(tls_cert, tls_key, tls_client_ca)
    if not listen.is_loopback and caller_tls is None and not insecure_listen:
        raise click.UsageError(
            "--listen: beyond loopback it must be given with --tls-cert and --tls-key, or with --insecure-listen, "
            f"which allows it to be without; got {listen.host}"
        )
    plan = Plan(
        replicas=given,
        is_one_name=dns is not None,
        listen=listen,
        admin=_admin(admin, listen),
        caller_tls=caller_tls,
        replica_tls=_replica_tls(replica_tls_ca, replica_tls_name, replica_tls_cert, replica_tls_key, given),
        hosts=_hosts(hosts, listen),
        cors_origins=cors_origins,
        access_log={"-": "/dev/stdout", "off": ""}.get(access_log, access_log),
        json_timeout_s=json_timeout_s,
        max_heap_bytes=max_heap or 0,
    )
    text = _HEAD.format(version=_version()) + _yaml.dump(bootstrap(plan))
    if output == "-":
        click.echo(text, nl=False)
    else:
        _write(Path(output), text, replaces=force)
        click.echo(f"written: {output}; start it: envoy -c {shlex.quote(output)}")


def _write(path: Path, text: str, *, replaces: bool) -> None:
    """Write the file.

    Raises:
        Failure: It is there, and must not be replaced.
    """
    try:
        with path.open("w" if replaces else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise Failure(
            f"-o must name a file that is not there, unless --force replaces it; got {path}"
        ) from None


def _version() -> str:
    try:
        return metadata.version("stepwell")
    except metadata.PackageNotFoundError:
        return "(version not known)"


def _hosts(given: Sequence[str], listen: Address) -> Sequence[str]:
    for name in given:
        problem = addresses.host_and_port_problem(f"{name}:1")
        if problem:
            raise click.UsageError(
                f"--host must be a name or an address, without a port; got {name!r}: {problem}"
            )
    if given or not listen.is_loopback:
        return list(dict.fromkeys(given))
    own = f"[{listen.host}]" if ":" in listen.host else listen.host
    return list(dict.fromkeys(("localhost", "127.0.0.1", "[::1]", own)))


def _admin(text: str, listen: Address) -> Address | None:
    if text == "off":
        return None
    try:
        address: Address = HostAndPort(any_port=True)(text)
    except click.BadParameter:
        raise click.UsageError(f"--admin must be HOST:PORT or off; got {text!r}") from None
    if not address.is_loopback:
        # who reaches it can stop Envoy, and see whatever passes
        raise click.UsageError(
            f"--admin must be an address of this machine alone, or off; got {address.host}"
        )
    if address == listen and address.port:
        raise click.UsageError(f"--admin must be another address than --listen; got {text} for both")
    return address


def _caller_tls(cert: str, key: str, client_ca: str) -> CallerTls | None:
    from stepwell.cli.envoy.bootstrap import CallerTls

    if bool(cert) != bool(key):
        raise click.UsageError("--tls-cert and --tls-key must be given together")
    if client_ca and not cert:
        raise click.UsageError("--tls-client-ca must be given with --tls-cert")
    return CallerTls(cert, key, client_ca) if cert else None


def _replica_tls(ca: str, name: str, cert: str, key: str, replicas: Sequence[Address]) -> ReplicaTls | None:
    from stepwell.cli.envoy.bootstrap import ReplicaTls

    if bool(cert) != bool(key):
        raise click.UsageError("--replica-tls-cert and --replica-tls-key must be given together")
    if not ca:
        if cert or name:
            raise click.UsageError(
                "--replica-tls-cert and --replica-tls-name must be given with --replica-tls-ca"
            )
        return None
    hosts = {replica.host for replica in replicas}
    if not name and len(hosts) > 1:
        raise click.UsageError(
            f"--replica-tls-name must be given for replicas of several hosts; got {sorted(hosts)[:3]}"
        )
    return ReplicaTls(ca, name or hosts.pop(), cert, key)
