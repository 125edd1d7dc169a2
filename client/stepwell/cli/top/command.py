"""`stepwell top`: the command, and what it does on a terminal."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stepwell.cli import _render
from stepwell.cli._errors import Failure
from stepwell.cli._help import Command
from stepwell.cli._target import Target, json_option, server_options
from stepwell.cli._types import Duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stepwell import Client
    from stepwell.cli.top.scrape import Scrape

_DEFAULT_METRICS = "http://127.0.0.1:9464"
_URL = re.compile(r"https?://[^\s/]+(/\S*)?")
_WIDTH = 80
"""Columns of a picture that goes to no terminal."""


def _metrics_url(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not _URL.fullmatch(value):
        raise click.BadParameter(f"must be http://HOST:PORT or https://HOST:PORT; got {value!r}", ctx, param)
    return value if value.count("/") > 2 and not value.endswith("/") else value.rstrip("/") + "/metrics"


@click.command(
    cls=Command,
    short_help="Show what a server does, live.",
    examples=(
        "stepwell top",
        "stepwell top --server 10.0.0.5:50051 --metrics http://10.0.0.5:9464",
        "stepwell top --once",
        "stepwell top --json | jq '.models[] | {model, row_steps_per_s, p99_s}'",
    ),
    json_keys=(
        ("server", "version, front, uptime_s, memory_bytes, cores, connections, streams, store_ready"),
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
    default=_DEFAULT_METRICS,
    show_default=True,
    callback=_metrics_url,
    help="Where the server serves its metrics.",
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
    metrics: str,
    metrics_token_file: Path | None,
    interval: float,
    rows: int,
    once: bool,
    as_json: bool,
) -> None:
    """Show what a server does: steps, latency, passes, sessions, tenants, errors, and who is slow.

    The numbers are those of its metrics, and of one call that asks for slow sessions. On a terminal the picture is
    made anew every --interval until you press q, also over restarts of the server.
    """
    from stepwell.cli.top.scrape import scrape

    token = metrics_token_file.read_text().strip() if metrics_token_file is not None else None

    def look() -> Scrape:
        return scrape(metrics, token, target.timeout_s)

    with target.connect("Looking", prints=True) as client:
        before = look()
        if as_json or once or not sys.stdout.isatty():
            time.sleep(interval)
            found = _picture(client, before, look(), rows)
            if as_json:
                _render.print_json(found)
            else:
                _print(found, rows)
            return
        _live(client, before, look, interval, rows)


def _picture(client: Client, before: Scrape, now: Scrape, rows: int) -> dict[str, Any]:
    from stepwell.cli.top.picture import picture

    return picture(before, now, client.slow_sessions(limit=rows), time.time())


def _print(found: dict[str, Any], rows: int) -> None:
    from rich.console import Console

    from stepwell.cli.top.screen import screen

    width = None if sys.stdout.isatty() else _WIDTH
    Console(width=width, highlight=False).print(screen(found, rows))


def _live(client: Client, before: Scrape, look: Callable[[], Scrape], interval: float, rows: int) -> None:
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
                now = look()
                last = screen(_picture(client, before, now, rows), rows)
            except (Failure, StepwellError) as error:
                # who watches a restart wants to see the server come back
                text = f"no answer, it is asked again: {error}"
                live.update(Group(Text(text, style="bold red"), "", last), refresh=True)
                continue
            live.update(last, refresh=True)
            before = now


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
