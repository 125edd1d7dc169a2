"""`stepwell top`: the activity of one server as it reports it, or of several together, from their metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import re
import select
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from stepwell._base import addresses
from stepwell._base.activity import Scrape, Seen, picture
from stepwell.cli.toolkit import render, reported
from stepwell.cli.toolkit.errors import SERVER_ERROR, Failure, as_failure
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.target import Target, as_options, json_option, server_options
from stepwell.cli.toolkit.types import Duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stepwell import Client, ServerInfo, SlowSession, StepwellError
    from stepwell.v1.watch_pb2 import WatchServerResponse

Item = TypeVar("Item")
Result = TypeVar("Result")

PORT = 9464
"""Default port of a server's metrics."""
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - read, not listened on
"""Hosts that mean all addresses of a server, and the address that reaches it from its own machine."""
_URL = re.compile(r"https?://[^\s/]+(/\S*)?")
_MAX_METRICS_BYTES = 16 << 20
_SLOW_S = 1.0
"""Time limit of each of several servers to answer a call, so that one that is down does not delay the picture."""
_MIN_PATIENCE_S = 0.25
"""A live picture waits for answers for half of its interval, but at least this long."""
_WHOLE = 0.9
"""Share of the interval that a report must cover."""
_PATIENCE = 1.5
"""A live picture waits for a report for this many intervals."""
_WIDTH = 80
"""Columns of a picture that does not go to a terminal."""


def _metrics_urls(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str]:
    """The URLs that are given; empty if none are."""
    found = []
    for url in [each.strip() for each in value.split(",")] if value is not None else []:
        if not _URL.fullmatch(url):
            raise click.BadParameter(
                f"must be http://HOST:PORT or https://HOST:PORT, or several separated by commas; got {url!r}",
                ctx,
                param,
            )
        full = url if url.count("/") > 2 and not url.endswith("/") else url.rstrip("/") + "/metrics"
        if full in found:
            raise click.BadParameter(f"must name each server once; got {url!r} twice", ctx, param)
        found.append(full)
    return found


@click.command(
    cls=Command,
    short_help="Show what a server does, live.",
    examples=(
        "stepwell top",
        "stepwell top --server 10.0.0.5:50051 --metrics http://10.0.0.5:9464",
        "stepwell top --server a:50051,b:50051,c:50051",
        "stepwell top --once",
        "stepwell top --json | jq '.models[] | {model, row_steps_per_s, p99_s}'",
    ),
    json_keys=(
        (
            "server",
            (
                "version, front, uptime_s, memory_bytes, cores, connections, streams, store_ready, ready, errors_per_s and"
                " totals of the models; for several servers the sums"
            ),
        ),
        (
            "servers",
            "list: id, metrics (their address, empty for a server that reports itself), error (if it did not answer)",
        ),
        (
            "models",
            "list: model, row_steps_per_s, passes_per_s, rows_per_pass, busy (0 to 1), p50_s, p99_s, sessions, ...",
        ),
        ("methods", "list, busiest first: method, calls_per_s, messages_per_s, p50_s, p99_s"),
        ("errors", "list: model, reason, per_s"),
        ("tenants", "list: tenant, row_steps_per_s, sessions; empty if the server has no tenants"),
        ("slow_sessions", "list, slowest first: session_id, model, seconds, age_s"),
        (
            "replicas",
            (
                "servers that share the store, oldest first: id, host, address, http_address, version, state (ready, not_ready,"
                " stopping, missing), uptime_s, age_s (of the last report), resident_sessions; empty if read from metrics"
            ),
        ),
    ),
)
@click.option(
    "--metrics",
    metavar="URL",
    envvar="STEPWELL_METRICS_URL",
    show_envvar=True,
    callback=_metrics_urls,
    help="Read these metrics instead of asking the server; for several servers all of them, separated by commas. Needed"
    " by callers who are not admins, and for several servers whose metrics are not where they report them.",
)
@click.option(
    "--metrics-token-file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="STEPWELL_METRICS_TOKEN_FILE",
    show_envvar=True,
    help="File with the token for the metrics, if they need one.",
)
@click.option(
    "--interval",
    metavar="TIME",
    type=Duration(0.2, 3600),
    default=2.0,
    show_default=True,
    help="Time between two updates. Rates and percentiles cover this time.",
)
@click.option(
    "--rows",
    metavar="N",
    type=click.IntRange(1, 100),
    default=10,
    show_default=True,
    help="Maximum rows of each table.",
)
@click.option(
    "--once", is_flag=True, help="Print once and exit, which is the default if stdout is not a terminal."
)
@json_option
@server_options
def top(
    target: Target,
    metrics: list[str],
    metrics_token_file: Path | None,
    interval: float,
    rows: int,
    once: bool,
    as_json: bool,
) -> None:
    """Show the activity of a server, or of several: steps, latency, passes, sessions, tenants, errors and slow sessions.

    One server reports its numbers to admins by itself (WatchServer): it needs no metrics port. On a terminal the picture
    is updated every --interval until you press q, also while a server restarts.

    For several servers it shows totals, from their metrics: rates are added up, percentiles cover all calls, and
    sessions are those of the shared store. A server that does not answer is named and left out. Metrics of another
    server process than --server are refused. For callers who are not admins, one server is shown from its metrics, too,
    by default from port 9464 of its host.

    A server that shares its store lists the replicas, also those that disappeared without stopping.
    """
    servers = addresses.split(target.address)
    token = metrics_token_file.read_text().strip() if metrics_token_file is not None else None
    if not metrics and (names := list(filter(addresses.is_name, servers))):
        raise click.UsageError(
            "--metrics must list the metrics of every server, separated by commas, if --server has a name that stands"
            f" for several; got --server {names[0]}"
        )
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(dataclasses.replace(target, address=server).connect("Looking", prints=True))
            for server in servers
        ]
        is_live = not as_json and not once and sys.stdout.isatty()
        if not metrics and len(servers) == 1 and _info(clients[0], target.timeout_s).role == "admin":
            patience_s = (_PATIENCE if is_live else 2.0) * interval + (0.0 if is_live else target.timeout_s)
            _run(
                _reported(clients[0], servers[0], interval, rows, patience_s),
                interval,
                rows,
                is_live,
                as_json,
            )
            return
        sources = [Source(url, None, token, target.timeout_s) for url in metrics] or [
            Source(server, client, token, target.timeout_s)
            for server, client in zip(servers, clients, strict=True)
        ]
        looks = [Calls(source.look) for source in sources]
        slow = [Calls(partial(_slow, client, rows, alone=len(clients) == 1)) for client in clients]
        calls: list[Calls[Any]] = [*looks, *slow]
        scrapes = [one.now for one in look(sources, looks) if one.now is not None]
        if metrics:
            _note_others(servers, clients, scrapes)

        def show() -> dict[str, Any]:
            patience_s = max(interval / 2, _MIN_PATIENCE_S) if is_live else None
            wait([one.begin() for one in calls], patience_s)
            return picture(look(sources, looks, patience_s), _slowest(slow, rows, patience_s), time.time())

        if not is_live:
            time.sleep(interval)
        _run(show, interval, rows, is_live, as_json)


def _run(
    show: Callable[[], dict[str, Any]], interval: float, rows: int, is_live: bool, as_json: bool
) -> None:
    """Show pictures until q is pressed, or one."""
    if is_live:
        _live(show, interval, rows)
    elif as_json:
        render.print_json(show())
    else:
        from rich.console import Console

        width = None if sys.stdout.isatty() else _WIDTH
        Console(width=width, highlight=False).print(screen(show(), rows))


def _reported(
    client: Client, server: str, interval: float, rows: int, patience_s: float
) -> Callable[[], dict[str, Any]]:
    """A function that waits for the next picture of what a server reports."""
    from stepwell import StepwellError
    from stepwell._watch.core import ServerReports
    from stepwell._watch.watch import Watch

    found: queue.SimpleQueue[WatchServerResponse | StepwellError] = queue.SimpleQueue()

    def put(reply: WatchServerResponse | StepwellError) -> None:
        with contextlib.suppress(queue.Empty):
            found.get_nowait()  # only the latest counts
        found.put(reply)

    def read() -> None:
        while True:
            try:
                for reply in Watch(client._driver, ServerReports(client._core, interval)):
                    if reply.interval_seconds >= interval * _WHOLE:  # the first ones cover less
                        put(reply)
            except StepwellError as error:
                put(error)
                time.sleep(interval)

    def show() -> dict[str, Any]:
        try:
            reply = found.get(timeout=patience_s)
        except queue.Empty:
            raise Failure(f"{server} has not answered within {patience_s:g} s", SERVER_ERROR) from None
        if isinstance(reply, StepwellError):
            raise reply
        return reported.picture(reply, rows)

    threading.Thread(target=read, daemon=True).start()
    return show


class Calls(Generic[Result]):
    """Calls of a function that waits for a server, one at a time.

    Each has a thread that does not delay the program's end.

    Args:
        function: It is called without arguments.
    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._call: Future[Result] | None = None

    def begin(self) -> Future[Result]:
        """The call whose result is not taken yet, or a new one."""
        if self._call is None:
            self._call = Future()
            threading.Thread(target=self._run, args=(self._call,), daemon=True).start()
        return self._call

    def take(self, patience_s: float | None) -> Result | None:
        """Returns the result of the call.

        Without a limit it waits. With one it returns None if the call is still running.
        """
        call = self.begin()
        if patience_s is not None and not call.done():
            return None
        self._call = None
        return call.result()

    def _run(self, call: Future[Result]) -> None:
        try:
            call.set_result(self._function())
        except BaseException as error:
            call.set_exception(error)


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results of a function that waits, for each item."""
    return [call.result() for call in [Calls(partial(function, item)).begin() for item in items]]


class Source:
    """The metrics of one server.

    Args:
        where: Their URL, as --metrics has it; with a client the server's address.
        client: Asks the server for the address of its metrics, and again if they are not there: it may have
            restarted.
        token: For the metrics, if they need one.
        timeout_s: For each request.
    """

    def __init__(self, where: str, client: Client | None, token: str | None, timeout_s: float) -> None:
        self._server, self._client = where, client
        self._token, self._timeout_s = token, timeout_s
        self._url, self._id = "" if client else where, ""
        self.last: Scrape | None = None
        self._error = ""

    @property
    def name(self) -> str:
        """HOST:PORT or the rest of the URL; the server's address until the metrics are known."""
        return self._url.partition("://")[2].removesuffix("/metrics") or self._server

    def look(self) -> Seen:
        """The metrics now and before, or why they cannot be read."""
        before = self.last
        try:
            self.last = self.read()
        except Failure as failure:
            self._error = failure.message
            return Seen(self.name, None, None, failure.message)
        self._error = ""
        return Seen(self.name, before, self.last)

    def pending(self, patience_s: float | None) -> str:
        """The message while a look is running: why the last one failed, if it did."""
        return self._error or f"{self.name} has not answered within {patience_s:g} s"

    def read(self) -> Scrape:
        """Reads the metrics.

        Raises:
            Failure: They cannot be read, or are those of another server.
        """
        if self._client is None:
            return scrape(self._url, self._token, self._timeout_s)
        if self._url:
            with contextlib.suppress(Failure):
                found = scrape(self._url, self._token, self._timeout_s)
                if self._id in found.server_ids:
                    return found
        info = _info(self._client, self._timeout_s)
        self._url, self._id = url_of(self._server, info), info.id
        try:
            found = scrape(self._url, self._token, self._timeout_s)
        except Failure as failure:
            raise Failure(failure.message + self._hint(info), failure.exit_code) from None
        if self._id not in found.server_ids:
            raise Failure(
                f"the metrics at {self._url} are of the server process {', '.join(found.server_ids)}, not of"
                f" the one at {self._server} (--server), which is {self._id}{self._hint(info)}",
                SERVER_ERROR,
            )
        return found

    def _hint(self, info: ServerInfo) -> str:
        address = info.metrics_address
        if address is None:
            return "; only admins see the address of a server's metrics: pass it with --metrics"
        is_loopback = not addresses.host_and_port_problem(address) and addresses.is_on_this_machine(address)
        if is_loopback and not addresses.is_on_this_machine(self._server):
            return (
                f"; that server has its metrics at {address} on its own machine: run 'stepwell top' there, or"
                " pass an address that reaches them with --metrics"
            )
        return "; if they are elsewhere, pass their address with --metrics"


def look(
    sources: Sequence[Source], looks: Sequence[Calls[Seen]], patience_s: float | None = None
) -> list[Seen]:
    """The results of the looks at all servers.

    Args:
        sources: The metrics of the servers.
        looks: Calls that look at them.
        patience_s: How long the caller has already waited for them; None: wait now.

    Raises:
        Failure: No server answers; the reason of the first.
    """
    for one in looks:
        one.begin()
    seen = [
        one.take(patience_s) or Seen(source.name, None, None, source.pending(patience_s))
        for source, one in zip(sources, looks, strict=True)
    ]
    if all(one.now is None for one in seen):
        raise Failure(seen[0].error, SERVER_ERROR)
    return seen


def _info(client: Client, timeout_s: float) -> ServerInfo:
    from stepwell.errors import StepwellError

    try:
        return client.server_info(timeout_s=timeout_s)
    except StepwellError as error:
        failure = as_failure(error)
        assert failure is not None
        raise Failure(as_options(failure.message), failure.exit_code) from None


def url_of(server: str, info: ServerInfo) -> str:
    """The URL of a server's metrics.

    Args:
        server: The address of one server, as --server has it.
        info: The server's description of itself.

    Raises:
        Failure: It serves none, or reports an invalid address.
    """
    is_on_this_machine = addresses.is_on_this_machine(server)
    host_of_server = server.rpartition("/")[2].rpartition(":")[0]
    if info.metrics_address is None:
        return f"http://{'127.0.0.1' if is_on_this_machine else host_of_server}:{PORT}/metrics"
    if not info.metrics_address:
        raise Failure(
            f"the server at {server} (--server) serves no metrics: start 'stepwell serve' with --metrics-listen to give them an"
            " address",
            SERVER_ERROR,
        )
    problem = addresses.host_and_port_problem(info.metrics_address)
    if problem:
        raise Failure(
            f"the server at {server} (--server) must have its metrics at HOST:PORT; it reports {info.metrics_address!r}:"
            f" {problem}. Set --metrics to their address",
            SERVER_ERROR,
        )
    host, port = addresses.host_and_port(info.metrics_address)
    if host in _WILDCARDS:
        return f"http://{_WILDCARDS[host] if is_on_this_machine else host_of_server}:{port}/metrics"
    return f"http://{addresses.of_host(host, port)}/metrics"


def scrape(url: str, token: str | None, timeout_s: float) -> Scrape:
    """Read the metrics at a URL.

    Raises:
        Failure: Nothing answers, or not with metrics.
    """
    request = urllib.request.Request(url)  # noqa: S310 - the option takes http and https only
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            text = answer.read(_MAX_METRICS_BYTES).decode(errors="replace")
    except urllib.error.HTTPError as error:
        hint = "; pass the token with --metrics-token-file" if error.code in {401, 403} else ""
        raise Failure(
            f"the server refused the metrics at {url} (--metrics): {error.code} {error.reason}{hint}",
            SERVER_ERROR,
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise Failure(f"the metrics at {url} (--metrics) cannot be read: {reason}", SERVER_ERROR) from None
    found = Scrape.of_text(text, time.monotonic())
    if not found.server_ids:
        raise Failure(
            f"{url} (--metrics) must serve a Stepwell server's metrics; the answer has no stepwell_build_info",
            SERVER_ERROR,
        )
    return found


def _note_others(servers: Sequence[str], clients: Sequence[Client], found: Sequence[Scrape]) -> None:
    """Print a note on stderr where --metrics names metrics of other servers than --server does.

    That may be right, behind a proxy say; but slow sessions are those of --server.
    """

    def ask(client: Client) -> str:
        try:
            return _info(client, _SLOW_S).id
        except Failure:
            return ""

    known = in_parallel(ask, clients)
    others = {server_id for one in found for server_id in one.server_ids} - set(known)
    if others and all(known) and not any(map(addresses.is_name, servers)):
        click.echo(
            f"stepwell: note: --metrics has metrics of the server process {', '.join(sorted(others))}; --server is"
            f" {', '.join(known)}",
            err=True,
        )


def _slow(client: Client, rows: int, *, alone: bool) -> list[SlowSession] | StepwellError:
    """The slowest sessions of a server, or why it does not answer; of several it must answer soon."""
    from stepwell import DeadlineExceededError, UnavailableError

    try:
        return client.slow_sessions(limit=rows, timeout_s=None if alone else _SLOW_S)
    except (UnavailableError, DeadlineExceededError) as error:
        return error


def _slowest(
    calls: Sequence[Calls[list[SlowSession] | StepwellError]], rows: int, patience_s: float | None
) -> list[SlowSession]:
    """The slowest sessions of all servers that answer.

    Raises:
        StepwellError: None does.
    """
    answers = [one.take(patience_s) for one in calls]
    found = [answer for answer in answers if isinstance(answer, list)]
    for answer in answers:
        if not found and isinstance(answer, Exception):
            raise answer
    return sorted((one for some in found for one in some), key=lambda one: -one.seconds)[:rows]


def _live(show: Callable[[], dict[str, Any]], interval: float, rows: int) -> None:
    """Show a new picture every `interval` seconds until q is pressed, also while no server answers."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from stepwell import StepwellError

    console = Console(highlight=False)
    last: RenderableType = Text("...")
    with _keys() as pressed, Live(last, console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic() + interval
        while not pressed(due - time.monotonic()):
            due = max(due, time.monotonic() - interval) + interval
            try:
                last = screen(show(), rows)
            except (Failure, StepwellError) as error:
                # someone who watches a restart wants to see the server come back
                text = f"no answer, retrying: {error}"
                live.update(Group(Text(text, style="bold red"), "", last), refresh=True)
                continue
            live.update(last, refresh=True)


def _slept(seconds: float) -> bool:
    time.sleep(max(0.0, seconds))
    return False


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits for some seconds, or until q is pressed, and returns whether it was."""
    if os.name != "posix" or not sys.stdin.isatty():
        yield _slept
        return
    import termios
    import tty

    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while select.select([stdin], [], [], max(0.0, until - time.monotonic()))[0]:
            if os.read(stdin, 64).lower().startswith((b"q", b"\x04")):
                return True
        return False

    tty.setcbreak(stdin)
    try:
        yield pressed
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def screen(found: dict[str, Any], rows: int) -> RenderableType:
    """The picture for people: tables that fit into 80 columns, of at most `rows` rows."""
    from rich.console import Group
    from rich.text import Text

    server, servers = found["server"], found["servers"]
    several = f"{len(servers)} servers, " if len(servers) > 1 else ""
    head = Text(
        f"{several}stepwell {server['version']} ({server['front']}), up {_long(server['uptime_s'])}, "
        f"{server['cores']:.1f} cores, {server['memory_bytes'] / (1 << 20):.0f} MiB, "
        f"{server['connections']:.0f} connections, {server['streams']:.0f} streams"
    )
    if not server["store_ready"]:
        head.append("\nTHE STORE CANNOT BE USED", style="bold red")
    for one in servers:
        if one["error"]:
            head.append(f"\nNO ANSWER: {one['metrics']}", style="bold red")
    # what needs attention must not be cut off
    found = {**found, "replicas": sorted(found["replicas"], key=lambda one: one["state"] == "ready")}
    tables = [
        _table(*table, found[name][:rows])
        for name, table in _TABLES.items()
        if len(found[name]) > (name == "replicas") or name == "models"
    ]
    return Group(head, *(part for table in tables for part in ("", table)))


def _table(headings: str, keys: str, rows: Sequence[dict[str, Any]]) -> RenderableType:
    """A table with a column for each key; names stand to the left, and the first column gives way where it is narrow."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for place, (heading, key) in enumerate(zip(headings.split("|"), keys.split(), strict=True)):
        table.add_column(
            heading,
            justify="left" if key in _NAMES else "right",
            no_wrap=True,
            overflow="ellipsis",
            ratio=None if place else 1,
        )
    for row in rows:
        table.add_row(*(Text(_cell(key, row[key])) for key in keys.split()))
    return table


_TABLES = {
    "models": (
        "MODEL|STEPS/S|P50|P99|PASSES/S|ROWS|BUSY|SESSIONS|RESIDENT|QUEUED",
        "model row_steps_per_s p50_s p99_s passes_per_s rows_per_pass busy sessions resident_rows queued_rows",
    ),
    "methods": ("METHOD|PER S|P50|P99", "method messages_per_s p50_s p99_s"),
    "tenants": ("TENANT|STEPS/S|SESSIONS", "tenant row_steps_per_s sessions"),
    "slow_sessions": ("SLOW SESSION|MODEL|TOOK|AGO", "session_id model seconds age_s"),
    "errors": ("ERROR|MODEL|PER S", "reason model per_s"),
    "replicas": (
        "REPLICA|HOST|VERSION|STATE|UP|RESIDENT|SEEN",
        "address host version state uptime_s resident_sessions age_s",
    ),
}
"""Headings and keys of the tables, by what the picture has for them."""
_NAMES = {"model", "method", "tenant", "session_id", "reason", "address", "host", "version", "state"}


def _cell(key: str, value: Any) -> str:
    """A value as it stands in a table."""
    if key in _NAMES:
        return str(value or "(none)")
    if value is None:
        return "-"
    if key == "busy":
        return f"{value:.0%}"
    if key == "age_s":
        return f"{value:.0f} s"
    if key == "uptime_s":
        return _long(value)
    return _time(value) if key in {"p50_s", "p99_s", "seconds"} else _number(value)


def _number(value: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.1f}{unit}"
    if value >= 1e4:
        return f"{value / 1e3:.1f}k"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _long(seconds: float) -> str:
    if seconds >= 86_400:
        return f"{seconds / 86_400:.1f} d"
    return f"{seconds / 3_600:.1f} h" if seconds >= 3_600 else f"{seconds:.0f} s"
