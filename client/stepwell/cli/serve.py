"""`stepwell serve`: the server, when its packages are installed."""

from __future__ import annotations

import importlib
import re
from importlib import metadata

import click

from stepwell.cli._errors import Failure

INSTALL = "pip install 'stepwell[server]'"


class PassedOn(click.Command):
    """A command that takes every argument as it is, `--help` and `--` among them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave the arguments to the function."""
        ctx.params["arguments"] = tuple(args)
        return []


@click.command(cls=PassedOn, short_help="Serve Keras models.", add_help_option=False)
def serve(arguments: tuple[str, ...]) -> None:
    """Serve Keras models; the options are the server's own."""
    missing = missing_packages()
    if missing:
        raise Failure(f"serving needs packages that are not installed ({', '.join(missing)}): {INSTALL}")
    try:
        # By name, so that the client's code nowhere imports the server's.
        server = importlib.import_module("stepwell_server.__main__")
    except ModuleNotFoundError as error:
        raise Failure(f"serving needs a package that is not installed ({error.name}): {INSTALL}") from None
    raise click.exceptions.Exit(server.main(list(arguments), prog="stepwell serve"))


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
