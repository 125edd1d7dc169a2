"""`stepwell serve`: the server, when its packages are installed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

import click

from stepwell.cli._errors import Failure
from stepwell.cli._help import Command

INSTALL = "pip install 'stepwell[server]'"


class PassedOn(Command):
    """A command that takes every argument as it is, `--help` and `--` among them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave the arguments to the function."""
        ctx.params["arguments"] = tuple(args)
        return []


@click.command(
    cls=PassedOn,
    short_help="Serve Keras models.",
    add_help_option=False,
    examples=(
        "stepwell serve forecast=model.keras",
        "stepwell serve forecast=a.keras words=b.keras --listen 127.0.0.1:50052",
        "stepwell serve forecast=model.keras --import my_layers --metrics-listen 127.0.0.1:9100",
    ),
    exit_codes=(
        ("0", "stopped by SIGTERM or Ctrl-C, after finishing what was queued"),
        ("1", "stopped before it was ready, or by a defect"),
        ("2", "it cannot start: the command line, a model, an address, or packages that are missing"),
    ),
)
@click.pass_context
def serve(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Serve Keras models; the options are the server's own."""
    pass_on(ctx, arguments, "stepwell_server.__main__", "serving")


def pass_on(ctx: click.Context, arguments: Sequence[str], module: str, doing: str) -> NoReturn:
    """Run the main function of a module of the server with a command's arguments, and exit with its code."""
    missing = missing_packages()
    if missing:
        raise Failure(f"{doing} needs packages that are not installed ({', '.join(missing)}): {INSTALL}")
    try:
        # By name, so that the client's code nowhere imports the server's.
        server = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Failure(f"{doing} needs a package that is not installed ({error.name}): {INSTALL}") from None
    try:
        code = server.main(list(arguments), prog=f"stepwell {ctx.command.name}")
    except SystemExit as exit_:  # argparse has printed the help, or what is wrong.
        code = exit_.code if isinstance(exit_.code, int) else 2
    if not {"-h", "--help"}.isdisjoint(arguments):
        show_epilog(ctx)
    ctx.exit(code)


def show_epilog(ctx: click.Context) -> None:
    """Print examples and exit codes after the server's own help."""
    formatter = ctx.make_formatter()
    ctx.command.format_epilog(ctx, formatter)
    click.echo(f"\n{formatter.getvalue()}", nl=False)


def missing_packages() -> list[str]:
    """Distributions that the `server` extra asks for and that are not installed."""
    return [name for name in server_packages() if not is_installed(name)]


def server_packages() -> list[str]:
    """Distributions that the `server` extra asks for on this platform, as the installed metadata has them."""
    try:
        requirements = metadata.requires("stepwell") or []
    except metadata.PackageNotFoundError:
        return []
    extra = [line for line in requirements if re.search(r"extra\s*==\s*['\"]server['\"]", line)]
    everywhere = [line for line in extra if "sys_platform" not in line]
    return [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in everywhere]


def is_installed(name: str) -> bool:
    """Whether a distribution is installed."""
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
