"""The metrics of servers: where they are, and whether what answers there is that server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from stepwell._base import addresses
from stepwell.cli.toolkit.errors import SERVER_ERROR, Failure, as_failure
from stepwell.cli.top.scrape import Scrape, scrape

if TYPE_CHECKING:
    from stepwell import Client, ServerInfo

PORT = 9464
"""Where a server has its metrics by default."""
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - read, not listened on
"""Hosts that stand for all addresses of a server, and the one that reaches it from its own machine."""


class Metrics(Protocol):
    """The metrics of one server."""

    @property
    def name(self) -> str:
        """Where they are, for people: HOST:PORT, or what else the URL has there."""

    def look(self) -> Scrape:
        """What they are now.

        Raises:
            Failure: They cannot be read.
        """


class GivenMetrics:
    """Those of a URL that --metrics names."""

    def __init__(self, url: str, token: str | None, timeout_s: float) -> None:
        self.url = url
        self._token, self._timeout_s = token, timeout_s

    @property
    def name(self) -> str:
        """See `Metrics.name`."""
        return _short(self.url)

    def look(self) -> Scrape:
        """See `Metrics.look`."""
        return scrape(self.url, self._token, self._timeout_s)


class ServerMetrics:
    """Those that a server says are its own. It is asked again when they are not: it may have been restarted."""

    def __init__(self, server: str, client: Client, token: str | None, timeout_s: float) -> None:
        self._server, self._client = server, client
        self._token, self._timeout_s = token, timeout_s
        self._url = self._id = ""

    @property
    def name(self) -> str:
        """See `Metrics.name`; the server's address until it has said where its metrics are."""
        return _short(self._url) or self._server

    def look(self) -> Scrape:
        """See `Metrics.look`."""
        if self._url:
            try:
                found = scrape(self._url, self._token, self._timeout_s)
            except Failure:
                found = None
            if found is not None and self._id in server_ids(found):
                return found
        info = self._ask()
        self._url, self._id = url_of(self._server, info), info.id
        try:
            found = scrape(self._url, self._token, self._timeout_s)
        except Failure as failure:
            raise Failure(failure.message + self._hint(info), failure.exit_code) from None
        others = server_ids(found)
        if self._id not in others:
            raise Failure(
                f"the metrics at {self._url} are of the server process {', '.join(others)}, not of"
                f" the one at {self._server} (--server), which is {self._id}{self._hint(info)}",
                SERVER_ERROR,
            )
        return found

    def _ask(self) -> ServerInfo:
        from stepwell.errors import StepwellError

        try:
            return self._client.server_info(timeout_s=self._timeout_s)
        except StepwellError as error:
            failure = as_failure(error)
            assert failure is not None
            raise failure from None

    def _hint(self, info: ServerInfo) -> str:
        if info.metrics_address is None:
            return "; only admins see the address of a server's metrics: give it with --metrics"
        if _is_loopback(info.metrics_address) and not addresses.is_on_this_machine(self._server):
            return (
                f"; that server has its metrics at {info.metrics_address} of its own machine: run 'stepwell top' there, or"
                " let --metrics name an address that leads to them"
            )
        return "; --metrics says where else they are"


def url_of(server: str, info: ServerInfo) -> str:
    """Where the metrics of a server are.

    Args:
        server: Its address, as --server has it, of one server.
        info: What it says of itself.

    Raises:
        Failure: It serves none, or what it says is no address.
    """
    is_on_this_machine = addresses.is_on_this_machine(server)
    if info.metrics_address is None:
        return f"http://{'127.0.0.1' if is_on_this_machine else _host_of(server)}:{PORT}/metrics"
    if not info.metrics_address:
        raise Failure(
            f"the server at {server} (--server) serves no metrics: --metrics-listen of 'stepwell serve' gives them an"
            " address",
            SERVER_ERROR,
        )
    problem = addresses.host_and_port_problem(info.metrics_address)
    if problem:
        raise Failure(
            f"the server at {server} (--server) must have its metrics at HOST:PORT; it says {info.metrics_address!r}:"
            f" {problem}. --metrics says where they are",
            SERVER_ERROR,
        )
    host, port = addresses.host_and_port(info.metrics_address)
    if host in _WILDCARDS:
        return f"http://{_WILDCARDS[host] if is_on_this_machine else _host_of(server)}:{port}/metrics"
    return f"http://{addresses.of_host(host, port)}/metrics"


def server_ids(found: Scrape) -> list[str]:
    """The random ids of the server process that metrics are of: one."""
    return found.values("stepwell_build_info", "server_id")


def _host_of(server: str) -> str:
    """The host of an address, an IPv6 address in brackets."""
    return server.rpartition("/")[2].rpartition(":")[0]


def _is_loopback(address: str) -> bool:
    return not addresses.host_and_port_problem(address) and addresses.is_on_this_machine(address)


def _short(url: str) -> str:
    return url.partition("://")[2].removesuffix("/metrics")
