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
"""How long the caller of a call in JSON may send nothing of it, beside the time that the answer may take."""


class Address(NamedTuple):
    """A host, without brackets, and a port."""

    host: str
    port: int

    @property
    def is_number(self) -> bool:
        """It is an IP address: nothing has to be looked up."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    @property
    def is_loopback(self) -> bool:
        """Only this machine reaches it, or is reached by it."""
        return self.host == "localhost" or (self.is_number and ipaddress.ip_address(self.host).is_loopback)

    def socket(self) -> dict[str, object]:
        """As Envoy has it."""
        return {"address": self.host, "port_value": self.port}


class HostAndPort(ParamType):
    """HOST:PORT, with an IPv6 address in brackets. Becomes an `Address`.

    Args:
        any_port: Whether port 0 may be given, for one that is free.
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
    help="Name or address by which callers call Envoy, as https://NAME; others are refused. * is any. Default: the names of this "
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
    given = list(replicas) if dns is None else [dns]
    _require(
        bool(replicas) != (dns is not None),
        "replicas must be given by --replica, once for each, or by --dns; got both or neither",
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
        f"which allows it to be without; got {listen.host}",
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
    """A template of YAML, filled in: each `${NAME}` becomes the value as JSON, which YAML takes.

    Lines between `#: if NAME`, or `#: if not NAME`, and `#: end` are there if the value is not empty, or if it is.
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


def _hosts(given: Sequence[str], listen: Address) -> list[str]:
    """The names by which callers may call, in lower case as Envoy compares them; empty: any."""
    if "*" in given:
        return []
    for name in given:
        problem = addresses.host_and_port_problem(f"{name}:1")
        _require(not problem, f"--host must be a name or an address, without a port; got {name!r}: {problem}")
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
    # whoever reaches it can stop Envoy and read what passes
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
    """The services that have HTTP rules, and the files of the protocol that Envoy converts JSON by, in base64."""
    import base64

    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from google.rpc import error_details_pb2, status_pb2

    from stepwell.v1 import models_pb2, sessions_pb2

    found: dict[str, FileDescriptor] = {}
    own = (sessions_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR)
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
    """Add a file after those that it imports."""
    if file.name not in found:
        for imported in file.dependencies:
            _collect(imported, found)
        found[file.name] = file
