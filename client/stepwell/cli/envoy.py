"""`stepwell envoy-config`: fills the template `envoy.yaml`, the configuration of an Envoy in front of replicas."""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
import string
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from stepwell._base import addresses
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.types import Duration, ParamType, Size

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#]+")
_SENDING_S = 300
"""How long a JSON caller may pause while it sends its call, in addition to the time limit of the answer."""


class Address(NamedTuple):
    """A host, without brackets, and a port."""

    host: str
    port: int

    @property
    def is_number(self) -> bool:
        """Whether it is an IP address, which needs no name lookup."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host == "localhost" or (self.is_number and ipaddress.ip_address(self.host).is_loopback)

    def socket(self) -> dict[str, object]:
        """The address as Envoy's configuration has it."""
        return {"address": self.host, "port_value": self.port}


class HostAndPort(ParamType):
    """HOST:PORT, with an IPv6 address in brackets. Becomes an `Address`.

    Args:
        any_port: Whether port 0 is allowed, for any free port.
    """

    name = "address"

    def __init__(self, *, any_port: bool = False) -> None:
        self.any_port = any_port

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        """Read and check it."""
        text = str(value)
        host, _, port = text.rpartition(":")
        problem = addresses.host_and_port_problem(f"{host}:1" if self.any_port and port == "0" else text)
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
    exit_codes=(("0", "done"), ("2", "the command line is invalid")),
)
@click.option(
    "--replica",
    "replicas",
    metavar="HOST:PORT",
    type=HostAndPort(),
    multiple=True,
    help="Address of a replica. Repeat the option for each replica.",
)
@click.option(
    "--dns",
    metavar="NAME:PORT",
    type=HostAndPort(),
    help="A DNS name that resolves to the addresses of all replicas and is looked up repeatedly, such as a headless Service of "
    "Kubernetes.",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    type=HostAndPort(any_port=True),
    default="127.0.0.1:8080",
    help="Address where callers reach Envoy, with gRPC, gRPC-Web and JSON. Default: 127.0.0.1:8080.",
)
@click.option(
    "--admin",
    metavar="HOST:PORT|off",
    default="127.0.0.1:9901",
    help="Address of Envoy's admin interface. Anybody who reaches it can control Envoy. Default: 127.0.0.1:9901.",
)
@_file(
    "--tls-cert",
    "Certificate that Envoy presents to callers (PEM). Paths are those of the machine where Envoy runs.",
)
@_file("--tls-key", "Key of that certificate (PEM).")
@_file("--tls-client-ca", "Require callers to present a certificate of these authorities (PEM).")
@_file(
    "--replica-tls-ca",
    "Connect to replicas with TLS, and trust these authorities (PEM).",
)
@click.option(
    "--replica-tls-name",
    metavar="NAME",
    default="",
    help="Name in the replicas' certificates. Default: the host of --dns, or of --replica if all have the same.",
)
@_file("--replica-tls-cert", "Certificate that Envoy presents to replicas (PEM).")
@_file("--replica-tls-key", "Key of that certificate (PEM).")
@click.option(
    "--host",
    "hosts",
    metavar="NAME",
    multiple=True,
    help="Host name or address that callers may use, as in https://NAME; others are refused. * allows any. Default: the loopback "
    "names if --listen is one of them, otherwise any.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    metavar="ORIGIN",
    multiple=True,
    help="Origin whose web pages may call, such as https://app.example.org, or * for all. Others are refused. "
    "Default: none.",
)
@click.option(
    "--json-timeout-s",
    metavar="TIME",
    type=Duration(0.001, 86_400.0),
    default=60.0,
    help="Time limit of a JSON call, which has no deadline of its own. Default: 60.",
)
@click.option(
    "--max-heap",
    metavar="SIZE",
    type=Size(1 << 26, 1 << 50),
    help="Memory limit of Envoy. At 85 % of it Envoy ends the calls that hold the most, at 95 % it accepts no new ones. "
    "Default: no limit.",
)
@click.option(
    "--access-log",
    metavar="FILE|-|off",
    default="-",
    help="File for a line of JSON per call; - is Envoy's standard output. Default: -.",
)
@click.option(
    "--insecure-listen",
    is_flag=True,
    help="Allow listening beyond loopback without TLS, if something else protects that address.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    default="-",
    help="File to write. Default: standard output.",
)
@click.option("--force", is_flag=True, help="Replace the file of -o if it exists.")
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

    Replicas share a store (--store valkey://...), so that any of them can serve any session. Envoy sends all calls of
    a session to one replica. It takes the session's id, percent-encoded, from the header stepwell-session, or from
    the path of a JSON call. It skips replicas that do not answer or are stopping, and retries only calls that no
    replica has seen.

    GET /healthz tells probes and load balancers whether Envoy accepts calls and has a replica for them.

    The file contains the protocol for JSON calls: write it again for a new release of Stepwell.
    """
    given = list(replicas) if dns is None else [dns]
    _require(
        bool(replicas) != (dns is not None),
        "replicas must be given either by --replica, once for each, or by --dns; got both or neither",
    )
    _require(len(set(given)) == len(given), "--replica must name each replica once")
    for origin in cors_origins:
        _require(
            origin == "*" or bool(_ORIGIN.fullmatch(origin)),
            f"--cors-origin must be *, or SCHEME://HOST[:PORT] as browsers send it; got {origin!r}",
        )
    _require(bool(tls_cert) == bool(tls_key), "--tls-cert and --tls-key must be given together")
    _require(bool(tls_cert) or not tls_client_ca, "--tls-client-ca must be given with --tls-cert")
    _require(
        listen.is_loopback or bool(tls_cert) or insecure_listen,
        "--listen: beyond loopback it must be given with --tls-cert and --tls-key, or with --insecure-listen, "
        f"which allows listening without TLS; got {listen.host}",
    )
    domains = _hosts(hosts, listen)
    values = {
        "admin": _admin(admin, listen),
        "listen": listen.socket(),
        "domains": domains or ["*"],
        "any_host": not domains,
        "cors": [{"safe_regex": {"regex": ".*"}} if one == "*" else {"exact": one} for one in cors_origins],
        "any_origin": "*" in cors_origins,
        "other_origin": [
            {"name": "origin", "present_match": True},
            *(
                {"name": "origin", "string_match": {"exact": one}, "invert_match": True}
                for one in cors_origins
            ),
        ],
        "json_timeout": f"{json_timeout_s:g}s",
        "json_silence": f"{json_timeout_s + _SENDING_S:g}s",
        "access_log": {"-": "/dev/stdout", "off": ""}.get(access_log, access_log),
        "tls": tls_cert,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "max_heap": max_heap,
        **_cluster(given, is_one_name=dns is not None),
        **_replica_tls(replica_tls_ca, replica_tls_name, replica_tls_cert, replica_tls_key, given),
        **_protocol(),
    }
    try:
        version = metadata.version("stepwell")
    except metadata.PackageNotFoundError:
        version = "(version not known)"
    text = f"# Made by `stepwell envoy-config` of Stepwell {version}; docs/operate/scale-out.md says what it does.\n"
    text += filled(resources.files("stepwell.cli").joinpath("envoy.yaml").read_text("utf-8"), values)
    if output == "-":
        click.echo(text, nl=False)
    else:
        _write(Path(output), text, replaces=force)
        click.echo(f"written: {output}; start it: envoy -c {shlex.quote(output)}")


def filled(template: str, values: Mapping[str, object]) -> str:
    """Fills in a YAML template: each `${NAME}` becomes the value as JSON, which is valid YAML.

    Lines between `#: if NAME`, or `#: if not NAME`, and `#: end` are included if the value is not empty, or if it is.
    """
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    lines: list[str] = []
    conditions = [True]
    for line in template.splitlines(keepends=True):
        if line.startswith("#: if "):
            *negation, name = line.split()[2:]
            conditions.append(bool(values[name]) is not bool(negation))
        elif line.startswith("#: end"):
            conditions.pop()
        elif all(conditions):
            lines.append(string.Template(line).substitute(texts))
    return "".join(lines)


def _require(is_right: bool, message: str) -> None:
    if not is_right:
        raise click.UsageError(message)


def _write(path: Path, text: str, *, replaces: bool) -> None:
    """Writes the file.

    Raises:
        Failure: It exists, and must not be replaced.
    """
    try:
        with path.open("w" if replaces else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise Failure(f"-o must name a new file, or be given with --force; got {path}") from None


def _hosts(given: Sequence[str], listen: Address) -> list[str]:
    """The host names that callers may use, in lower case as Envoy compares them; empty: any."""
    if "*" in given:
        return []
    for name in given:
        problem = addresses.host_and_port_problem(f"{name}:1")
        _require(not problem, f"--host must be a name or an address without a port; got {name!r}: {problem}")
    own = f"[{listen.host}]" if ":" in listen.host else listen.host
    names = [*given] if given or not listen.is_loopback else ["localhost", "127.0.0.1", "[::1]", own]
    return list(dict.fromkeys(map(str.lower, names)))


def _admin(text: str, listen: Address) -> dict[str, object] | None:
    if text == "off":
        return None
    try:
        address: Address = HostAndPort(any_port=True)(text)
    except click.BadParameter:
        raise click.UsageError(f"--admin must be HOST:PORT or off; got {text!r}") from None
    # anybody who reaches it can stop Envoy and read its traffic
    _require(
        address.is_loopback, f"--admin must be an address of this machine alone, or off; got {address.host}"
    )
    _require(
        address != listen or not address.port,
        f"--admin must be another address than --listen; got {text} for both",
    )
    return address.socket()


def _cluster(replicas: Sequence[Address], *, is_one_name: bool) -> dict[str, object]:
    is_static = all(replica.is_number for replica in replicas)
    return {
        "replicas": [{"endpoint": {"address": {"socket_address": one.socket()}}} for one in replicas],
        "cluster_type": "STATIC" if is_static else "STRICT_DNS",
        "lookup_family": "" if is_static else "ALL" if is_one_name else "AUTO",
    }


def _replica_tls(ca: str, name: str, cert: str, key: str, replicas: Sequence[Address]) -> dict[str, object]:
    _require(bool(cert) == bool(key), "--replica-tls-cert and --replica-tls-key must be given together")
    _require(
        bool(ca) or not (cert or name),
        "--replica-tls-cert and --replica-tls-name must be given with --replica-tls-ca",
    )
    hosts = sorted({replica.host for replica in replicas})
    _require(
        not ca or bool(name) or len(hosts) == 1,
        f"--replica-tls-name must be given for replicas of several hosts; got {hosts[:3]}",
    )
    name = name or hosts[0]
    is_number = Address(name, 0).is_number
    return {
        "replica_tls_ca": ca,
        "replica_tls_name": name,
        "replica_tls_cert": cert,
        "replica_tls_key": key,
        "san_type": "IP_ADDRESS" if is_number else "DNS",
        "sni": "" if is_number else name,
    }


def _protocol() -> dict[str, object]:
    """The services with HTTP rules, and the protocol files by which Envoy converts JSON, in base64."""
    import base64

    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from google.rpc import error_details_pb2, status_pb2

    from stepwell.v1 import models_pb2, sessions_pb2, watch_pb2

    found: dict[str, FileDescriptor] = {}
    own = (sessions_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR, watch_pb2.DESCRIPTOR)
    for file in (*own, status_pb2.DESCRIPTOR, error_details_pb2.DESCRIPTOR):  # also the details of errors
        _collect(file, found)
    files = FileDescriptorSet()
    for file in found.values():
        file.CopyToProto(files.file.add())
    return {
        "services": [service.full_name for file in own for service in file.services_by_name.values()],
        "descriptors": base64.b64encode(files.SerializeToString(deterministic=True)).decode(),
    }


def _collect(file: FileDescriptor, found: dict[str, FileDescriptor]) -> None:
    """Adds a file after those that it imports."""
    if file.name not in found:
        for imported in file.dependencies:
            _collect(imported, found)
        found[file.name] = file
