"""`stepwell top`: the command, and what it does on a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stepwell._base import addresses
from stepwell.cli.toolkit import render
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.target import Target, json_option, server_options
from stepwell.cli.toolkit.types import Duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stepwell import Client, SlowSession
    from stepwell.cli.top.metrics import Metrics
    from stepwell.cli.top.picture import Seen
    from stepwell.cli.top.scrape import Scrape

_URL = re.compile(r"https?://[^\s/]+(/\S*)?")
_SLOW_S = 1.0
"""How long each of several servers may take to say who is slow: the picture goes on without one that is gone."""
_WIDTH = 80
"""Columns of a picture that goes to no terminal."""


def _metrics_urls(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str]:
    """Those that are named; none if none are."""
    found = []
    for url in [each.strip() for each in value.split(",")] if value is not None else []:
        if not _URL.fullmatch(url):
            raise click.BadParameter(
                f"must be http://HOST:PORT or https://HOST:PORT, or several with commas between; got {url!r}",
                ctx,
                param,
            )
        full = url if url.count("/") > 2 and not url.endswith("/") else url.rstrip("/") + "/metrics"
        if full in found:
            raise click.BadParameter(f"must name each server once; got {url!r} twice", ctx, param)
        found.append(full)
    return found


def _require_single(servers: Sequence[str]) -> None:
    """Check that each server can be asked where its metrics are.

    Raises:
        click.UsageError: One is a name whose every address is a server.
    """
    names = [server for server in servers if addresses.is_name(server)]
    if names:
        raise click.UsageError(
            "--metrics must name the metrics of each server, with commas between, where --server has a name that stands"
            f" for several; got --server {names[0]}"
        )


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
            "version, front, uptime_s, memory_bytes, cores, connections, streams, store_ready; of several the sums",
        ),
        (
            "servers",
            "list: metrics, error (if it did not answer), ready, id, row_steps_per_s, p99_s, ..., and what server has",
        ),
        (
            "models",
            "list: model, row_steps_per_s, passes_per_s, rows_per_pass, busy (0 to 1), p50_s, p99_s, sessions, ...",
        ),
        ("methods", "list, the busiest first: method, calls_per_s, messages_per_s, p50_s, p99_s"),
        ("errors", "list: model, reason, per_s"),
        ("tenants", "list: tenant, row_steps_per_s, sessions; empty: the server knows none"),
        ("slow_sessions", "list, the slowest first: session_id, model, seconds, age_s"),
    ),
)
@click.option(
    "--metrics",
    metavar="URL",
    envvar="STEPWELL_METRICS_URL",
    show_envvar=True,
    callback=_metrics_urls,
    help="Where the server serves its metrics; of several servers all, with commas between. Default: where each server"
    " says; to callers that are no admins it does not, and port 9464 of its host is tried.",
)
@click.option(
    "--metrics-token-file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="STEPWELL_METRICS_TOKEN_FILE",
    show_envvar=True,
    help="File that holds the token for the metrics, if they need one.",
)
@click.option(
    "--interval",
    metavar="TIME",
    type=Duration(0.1, 3600),
    default=2.0,
    show_default=True,
    help="Time between two pictures, which rates and percentiles are of.",
)
@click.option(
    "--rows",
    metavar="N",
    type=click.IntRange(1, 100),
    default=10,
    show_default=True,
    help="Rows of a table.",
)
@click.option(
    "--once", is_flag=True, help="Print one picture and end, as it does where stdout is no terminal."
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
    """Show what servers do: steps, latency, passes, sessions, tenants, errors, and who is slow.

    The numbers are those of their metrics, and of one call that asks for slow sessions. Metrics that are of another
    server process than --server are refused. On a terminal the picture is
    made anew every --interval until you press q, also over restarts of a server. Of several servers each has a row,
    and everything else is of all together: rates are sums, percentiles those of all calls, sessions those of the
    store that they share.
    """
    from stepwell.cli.top.metrics import GivenMetrics, ServerMetrics

    servers = addresses.split(target.address)
    token = metrics_token_file.read_text().strip() if metrics_token_file is not None else None
    if not metrics:
        _require_single(servers)
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(dataclasses.replace(target, address=server).connect("Looking", prints=True))
            for server in servers
        ]
        watch = _Watch(
            [GivenMetrics(url, token, target.timeout_s) for url in metrics]
            or [ServerMetrics(*each, token, target.timeout_s) for each in zip(servers, clients, strict=True)]
        )
        watch.look()
        if metrics:
            _note_others(servers, clients, watch.last)
        if as_json or once or not sys.stdout.isatty():
            time.sleep(interval)
            found = _picture(clients, watch.look(), rows)
            if as_json:
                render.print_json(found)
            else:
                _print(found, rows)
            return
        _live(clients, watch.look, interval, rows)


class _Watch:
    """Looks at the metrics of servers, again and again."""

    def __init__(self, metrics: Sequence[Metrics]) -> None:
        self._metrics = metrics
        self._last: dict[int, Scrape] = {}

    @property
    def last(self) -> list[Scrape]:
        """What each answered last, of those that have answered."""
        return list(self._last.values())

    def look(self) -> list[Seen]:
        """What each answers now, and what it answered last.

        Raises:
            Failure: None answers; what is wrong with the first.
        """
        from stepwell.cli.top.picture import Seen

        with ThreadPoolExecutor(len(self._metrics)) as pool:
            answers = list(pool.map(_look, self._metrics))
        failed = [answer for answer in answers if isinstance(answer, Failure)]
        if len(failed) == len(answers):
            raise failed[0]
        seen = []
        for number, (metrics, answer) in enumerate(zip(self._metrics, answers, strict=True)):
            if isinstance(answer, Failure):
                seen.append(Seen(metrics.name, None, None, answer.message))
            else:
                seen.append(Seen(metrics.name, self._last.get(number), answer))
                self._last[number] = answer
        return seen


def _look(metrics: Metrics) -> Scrape | Failure:
    try:
        return metrics.look()
    except Failure as failure:
        return failure


def _note_others(servers: Sequence[str], clients: Sequence[Client], found: Sequence[Scrape]) -> None:
    """Say so on stderr where --metrics names metrics of other servers than --server does.

    That may be right, behind a proxy say; but slow sessions are those of --server.
    """
    from stepwell import StepwellError
    from stepwell.cli.top.metrics import server_ids

    def ask(client: Client) -> str:
        try:
            return client.server_info(timeout_s=_SLOW_S).id
        except StepwellError:
            return ""

    with ThreadPoolExecutor(len(clients)) as pool:
        known = list(pool.map(ask, clients))
    theirs = {server_id for scrape in found for server_id in server_ids(scrape)}
    others = theirs - set(known)
    if others and all(known) and not any(map(addresses.is_name, servers)):
        click.echo(
            f"stepwell: note: --metrics has metrics of the server process {', '.join(sorted(others))}; --server is"
            f" {', '.join(known)}",
            err=True,
        )


def _picture(clients: Sequence[Client], seen: Sequence[Seen], rows: int) -> dict[str, Any]:
    from stepwell.cli.top.picture import picture

    return picture(seen, _slow(clients, rows), time.time())


def _slow(clients: Sequence[Client], rows: int) -> list[SlowSession]:
    """The slowest sessions of all servers that answer.

    Raises:
        StepwellError: None does.
    """
    from stepwell import DeadlineExceededError, UnavailableError

    if len(clients) == 1:
        return clients[0].slow_sessions(limit=rows)

    def ask(client: Client) -> list[SlowSession] | UnavailableError | DeadlineExceededError:
        try:
            return client.slow_sessions(limit=rows, timeout_s=_SLOW_S)
        except (UnavailableError, DeadlineExceededError) as error:
            return error

    with ThreadPoolExecutor(len(clients)) as pool:
        answers = list(pool.map(ask, clients))
    found = [answer for answer in answers if isinstance(answer, list)]
    for answer in answers:
        if not found and not isinstance(answer, list):
            raise answer
    return sorted((one for some in found for one in some), key=lambda one: -one.seconds)[:rows]


def _print(found: dict[str, Any], rows: int) -> None:
    from rich.console import Console

    from stepwell.cli.top.screen import screen

    width = None if sys.stdout.isatty() else _WIDTH
    Console(width=width, highlight=False).print(screen(found, rows))


def _live(clients: Sequence[Client], look: Callable[[], Sequence[Seen]], interval: float, rows: int) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from stepwell import StepwellError
    from stepwell.cli.top.screen import screen

    console = Console(highlight=False)
    last: RenderableType = Text("...")
    with _keys() as pressed, Live(Text("..."), console=console, screen=True, auto_refresh=False) as live:
        while not pressed(interval):
            try:
                last = screen(_picture(clients, look(), rows), rows)
            except (Failure, StepwellError) as error:
                # who watches a restart wants to see the server come back
                text = f"no answer, it is asked again: {error}"
                live.update(Group(Text(text, style="bold red"), "", last), refresh=True)
                continue
            live.update(last, refresh=True)


def _slept(seconds: float) -> bool:
    time.sleep(seconds)
    return False


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Waits for so many seconds, or until q is pressed; whether it was."""
    if os.name != "posix" or not sys.stdin.isatty():
        yield _slept
        return
    import termios
    import tty

    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([stdin], [], [], left)[0] and os.read(stdin, 64).lower().startswith(
                (b"q", b"\x04")
            ):
                return True
        return False

    tty.setcbreak(stdin)
    try:
        yield pressed
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
