"""`stepwell console`: the console of a server, in a browser."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from stepwell import _install
from stepwell._base import addresses
from stepwell.cli.toolkit import render
from stepwell.cli.toolkit.errors import SERVER_ERROR, Failure
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.target import Target, json_option, server_options

if TYPE_CHECKING:
    from stepwell.testing import LocalServer

_PATH = "/console"
_WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - read, not listened on


@click.command(
    cls=Command,
    short_help="Watch sessions and their states in a browser.",
    examples=(
        "stepwell console --demo",
        "stepwell console",
        "stepwell console --server 10.0.0.5:50051 --no-browser",
    ),
    json_keys=(("url", "address of the console"),),
    exit_codes=(
        ("0", "the address was printed, or the demo was ended by Ctrl-C"),
        ("1", "the server has no console, could not be reached, or the demo cannot start"),
        ("2", "the command line is invalid, or the server's package is missing"),
    ),
)
@click.option(
    "--demo",
    is_flag=True,
    help="Start a server with a small trained model and three users, and show that one. Ctrl-C ends it.",
)
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@json_option
@server_options
def console(target: Target, demo: bool, no_browser: bool, as_json: bool) -> None:
    """Print the address of a server's console, and open it in a browser if there is one.

    The server must listen for HTTP (stepwell serve --http-listen). The page asks for a token if the server
    authenticates its callers.
    """
    if demo:
        _run_demo(opens=not no_browser, as_json=as_json)
    else:
        with target.connect("Looking for the console") as client:
            found = client.server_info().http_address
        if not found:
            raise Failure(
                f"the server at {target.address} (--server) has no console: start it with --http-listen",
                SERVER_ERROR,
            )
        _show(url_of(found, addresses.split(target.address)[0]), opens=not no_browser, as_json=as_json)


def url_of(http_address: str, server: str) -> str:
    """The address of the console.

    Args:
        http_address: URL at which the server serves JSON, as the server reports it.
        server: The address that reached the server. It replaces a host that means all of the server's addresses.
    """
    parts = urlsplit(http_address)
    host = parts.hostname or ""
    if host in _WILDCARDS:
        target = addresses.parse("--server", server).target
        host = "127.0.0.1" if target.startswith("unix:") else addresses.host_and_port(target)[0]
    return f"{parts.scheme}://{addresses.of_host(host, parts.port or 80)}{_PATH}"


def _show(url: str, *, opens: bool, as_json: bool) -> None:
    if as_json:
        render.print_json({"url": url})
    else:
        click.echo(url)
    # without a desktop, Python would start a browser for terminals, which cannot run the page
    if opens and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        import webbrowser

        webbrowser.open(url)


def _run_demo(*, opens: bool, as_json: bool) -> None:
    import stepwell
    from stepwell.cli import console_demo

    server = _demo_server()
    with server, stepwell.connect(server.address) as client:
        for user in console_demo.USERS:  # before the page looks for them
            client.open_session(console_demo.MODEL, session_id=user)
        _show(f"http://{server.http_address}{_PATH}#/live", opens=opens, as_json=as_json)
        click.echo(
            f"{', '.join(console_demo.USERS)} are served at {server.address}; Ctrl-C ends it", err=as_json
        )
        with contextlib.suppress(KeyboardInterrupt):
            console_demo.live(client, threading.Event())


def _demo_server() -> LocalServer:
    from stepwell.cli import console_demo
    from stepwell.testing import LocalServer

    try:
        model = console_demo.model_file()
    except LookupError as error:
        raise Failure(f"the demo needs a server: {error}. {_install.advice(_install.SERVE)}") from None
    return LocalServer({console_demo.MODEL: model}, extra_args=["--http-listen", "127.0.0.1:0"])
